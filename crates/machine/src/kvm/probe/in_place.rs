//! A short probe on a vCPU of the guest, before the guest runs. It needs no VM of its own.

use guest_abi::{
    lapic::{self, x2apic_msr},
    msr::IA32_TSC_DEADLINE,
};
use vm_memory::{Bytes, GuestAddress};

use super::{APIC_FEATURES, Exit, HostFacts, Operation, PROBE_OFFSET, Recorder, TSC_PORT};
use crate::{
    host::tsc::read_tsc,
    kvm::{Error, Vcpu},
    mem::ram::GuestRam,
    x86::{EntryState, Leaf},
};

/// 32-bit code: RDTSC; OUT 0x80, twice; WRMSR 0x6e0 of 1; RDMSR 0x802; HLT.
const PROGRAM: [u8; 30] = [
    0x0f, 0x31, 0xe6, 0x80, 0x0f, 0x31, 0xe6, 0x80, // RDTSC; OUT 0x80
    0xb9, 0xe0, 0x06, 0x00, 0x00, 0xb8, 0x01, 0x00, 0x00, 0x00, 0x31, 0xd2, 0x0f, 0x30, // WRMSR 0x6e0
    0xb9, 0x02, 0x08, 0x00, 0x00, 0x0f, 0x32, 0xf4, // RDMSR 0x802
];

/// Whether a vCPU with these `leaves` can be probed: it must have the MSRs that the probe accesses.
#[must_use]
pub fn can_probe(leaves: &[Leaf]) -> bool {
    leaves.iter().any(|leaf| leaf.function == 1 && leaf.ecx & APIC_FEATURES == APIC_FEATURES)
}

/// Probes the host with a `vcpu` that has not run yet and for which [`can_probe`] is true. Returns the facts if they
/// are those of [`HostFacts::WITHOUT_WORKAROUNDS`], with the TSC offset as measured; otherwise none, and all probes are
/// needed.
///
/// The probe's code is in RAM at `at` while it runs; the content of that RAM is restored. The vCPU's registers are not:
/// the caller must set its state afterwards, as it would without a probe.
///
/// # Errors
/// If KVM fails in a way that says nothing about the facts, or `at` is not RAM.
pub fn probe_in_place(vcpu: &mut Vcpu, memory: &GuestRam, at: u64) -> Result<Option<HostFacts>, Error> {
    let no_memory = |_| Error::last("mmap");
    let mut saved = [0; PROGRAM.len()];
    memory.read_slice(&mut saved, GuestAddress(at)).map_err(no_memory)?;
    memory.write_slice(&PROGRAM, GuestAddress(at)).map_err(no_memory)?;
    let facts = run_program(vcpu, at);
    memory.write_slice(&saved, GuestAddress(at)).map_err(no_memory)?;
    facts
}

fn run_program(vcpu: &mut Vcpu, at: u64) -> Result<Option<HostFacts>, Error> {
    vcpu.set_flat_32bit_entry(&EntryState { rip: at, ..EntryState::default() })?;
    let mut as_assumed = follows_offset(vcpu, 0)?;
    let tsc_offset = as_assumed && follows_offset(vcpu, PROBE_OFFSET)?;
    let _ = vcpu.set_tsc_offset(0);
    let mut last = Recorder::default();
    for msr in [IA32_TSC_DEADLINE, x2apic_msr(lapic::ID)] {
        last = Recorder::default();
        as_assumed = as_assumed && vcpu.run(&mut last)? == Exit::Operation(Operation::Msr) && last.msr == Some(msr);
    }
    vcpu.drain(&mut last)?;
    Ok(as_assumed.then_some(HostFacts { tsc_offset, ..HostFacts::WITHOUT_WORKAROUNDS }))
}

/// Sets a TSC offset, and returns whether the next RDTSC then returns the host's TSC plus `offset`.
fn follows_offset(vcpu: &mut Vcpu, offset: u64) -> Result<bool, Error> {
    // An error is ignored: only the value that RDTSC returns counts.
    let _ = vcpu.set_tsc_offset(offset);
    let mut last = Recorder::default();
    let before = read_tsc();
    let exit = vcpu.run(&mut last)?;
    let after = read_tsc();
    let registers = vcpu.registers();
    let tsc = registers.rdx << 32 | registers.rax & 0xffff_ffff;
    let read = exit == Exit::Operation(Operation::Port) && last.port == Some(TSC_PORT);
    Ok(read && (before..=after).contains(&tsc.wrapping_sub(offset)))
}
