//! The same questions, put to a vCPU that is to run a guest.

use vm_memory::{Bytes, GuestAddress};

use super::{APIC_FEATURES, Exit, HostFacts, Last, Operation, PROBE_OFFSET, TSC_PORT};
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

/// Whether a vCPU that sees these `leaves` can tell all: it must have the MSRs that are asked about.
#[must_use]
pub fn can_tell(leaves: &[Leaf]) -> bool {
    leaves.iter().any(|leaf| leaf.function == 1 && leaf.ecx & APIC_FEATURES == APIC_FEATURES)
}

/// What this host does, if it is what [`HOPED`](HostFacts::HOPED) says but for the TSC offset, as seen by a `vcpu` that has
/// not run yet and [`can_tell`].
///
/// The code is lent the RAM at `at`, which then holds what it held. The vCPU's registers are left as the code left them:
/// its true state is to be set afterwards, as it would have been without.
///
/// # Errors
/// If KVM fails in a way that is no answer, or `at` is not RAM.
pub fn if_as_hoped(vcpu: &mut Vcpu, memory: &GuestRam, at: u64) -> Result<Option<HostFacts>, Error> {
    let no_memory = |_| Error::last("mmap");
    let mut lent = [0; PROGRAM.len()];
    memory.read_slice(&mut lent, GuestAddress(at)).map_err(no_memory)?;
    memory.write_slice(&PROGRAM, GuestAddress(at)).map_err(no_memory)?;
    let answer = ask(vcpu, at);
    memory.write_slice(&lent, GuestAddress(at)).map_err(no_memory)?;
    answer
}

fn ask(vcpu: &mut Vcpu, at: u64) -> Result<Option<HostFacts>, Error> {
    vcpu.set_flat_32bit_entry(&EntryState { rip: at, ..EntryState::default() })?;
    let mut hoped = follows_offset(vcpu, 0)?;
    let tsc_offset = hoped && follows_offset(vcpu, PROBE_OFFSET)?;
    let _ = vcpu.set_tsc_offset(0);
    let mut last = Last::default();
    for msr in [0x6e0, 0x802] {
        last = Last::default();
        hoped = hoped && vcpu.run(&mut last)? == Exit::Operation(Operation::Msr) && last.msr == Some(msr);
    }
    vcpu.drain(&mut last)?;
    Ok(hoped.then_some(HostFacts { tsc_offset, ..HostFacts::HOPED }))
}

/// Whether the next RDTSC gives the host's TSC plus `offset`, when KVM is asked for that.
fn follows_offset(vcpu: &mut Vcpu, offset: u64) -> Result<bool, Error> {
    // The answer is in what RDTSC gives.
    let _ = vcpu.set_tsc_offset(offset);
    let mut last = Last::default();
    let before = read_tsc();
    let exit = vcpu.run(&mut last)?;
    let after = read_tsc();
    let registers = vcpu.registers();
    let tsc = registers.rdx << 32 | registers.rax & 0xffff_ffff;
    let read = exit == Exit::Operation(Operation::Port) && last.port == Some(TSC_PORT);
    Ok(read && (before..=after).contains(&tsc.wrapping_sub(offset)))
}
