//! Probes KVM's own LAPIC: whether it is available, and whether its deadline timer fires, and not early.

use vm_memory::{Bytes, GuestAddress};

use super::{Exit, Lapics, Operation, Probe, RESULT, TSC_PORT, with_apic_features};
use crate::{
    kvm::{Error, Host},
    x86::Leaf,
};

/// 32-bit code: enable the APIC; LVTT = vector 64 in deadline mode; store TSC + 100,000 and arm it as the deadline;
/// poll IRR, at most 200,000 times, until vector 64 is requested; RDTSC to memory; OUT 0x80. Or OUT 0x81 if that never
/// happens.
const PROGRAM: [u8; 90] = [
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, // SVR = 0x1ff
    0xc7, 0x05, 0x20, 0x03, 0xe0, 0xfe, 0x40, 0x00, 0x04, 0x00, // LVTT = 0x40040
    0x0f, 0xae, 0xf0, // MFENCE
    0x0f, 0x31, 0x05, 0xa0, 0x86, 0x01, 0x00, 0x83, 0xd2, 0x00, // RDTSC; ADD; ADC
    0xa3, 0x08, 0x20, 0x00, 0x00, 0x89, 0x15, 0x0c, 0x20, 0x00, 0x00, // deadline to memory
    0xb9, 0xe0, 0x06, 0x00, 0x00, 0x0f, 0x30, // WRMSR 0x6e0
    0xbb, 0x40, 0x0d, 0x03, 0x00, 0x4b, 0x74, 0x1b, // MOV EBX, 200000; DEC; JZ
    0xa1, 0x20, 0x02, 0xe0, 0xfe, 0xa9, 0x01, 0x00, 0x00, 0x00, 0x74, 0xf1, // IRR bit 64; JZ
    0x0f, 0x31, 0xa3, 0x00, 0x20, 0x00, 0x00, 0x89, 0x15, 0x04, 0x20, 0x00, 0x00, // RDTSC to memory
    0xe6, 0x80, 0xe6, 0x81, 0xeb, 0xfc, // OUT 0x80; OUT 0x81, in a loop
];

/// The result of the probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelLapic {
    /// A VM with it could be created (KVM_CAP_SPLIT_IRQCHIP).
    pub available: bool,
    /// Its TSC deadline fired, and not before the guest's TSC had reached it.
    pub deadline_fires: bool,
}

/// Runs the probe.
///
/// # Errors
/// If KVM fails in a way that says nothing about its LAPIC.
pub fn kernel_lapic(host: &Host, supported: &[Leaf]) -> Result<KernelLapic, Error> {
    let none = KernelLapic { available: false, deadline_fires: false };
    if !host.has_kernel_lapic() {
        return Ok(none);
    }
    let in_kernel = Lapics::InKernel { tsc_moves: false };
    let Ok(mut probe) = Probe::new(host, &with_apic_features(supported), &PROGRAM, in_kernel) else { return Ok(none) };
    let exit = probe.next()?;
    let fired = exit == Exit::Operation(Operation::Port) && probe.last.port == Some(TSC_PORT);
    let [now, deadline]: [u64; 2] = probe.memory.read_obj(GuestAddress(RESULT)).map_err(|_| Error::last("mmap"))?;
    Ok(KernelLapic { available: true, deadline_fires: fired && now >= deadline })
}
