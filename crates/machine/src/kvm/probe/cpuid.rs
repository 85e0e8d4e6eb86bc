//! What a guest's CPUID instruction returns.

use super::{Error, Exit, Host, Operation, Probe, TSC_PORT, USER_SPACE};
use crate::x86::Leaf;

/// The leaves, by function and index, that a guest's kernel sees on a vCPU with the CPUID `leaves`. Some hosts add
/// features of their own.
///
/// # Errors
/// If KVM fails.
pub fn cpuid(host: &Host, leaves: &[Leaf], wanted: impl IntoIterator<Item = (u32, u32)>) -> Result<Vec<Leaf>, Error> {
    let mut seen = Vec::new();
    for (function, index) in wanted {
        // MOV EAX, function; MOV ECX, index; CPUID; OUT 0x80.
        let [f, i] = [function, index].map(u32::to_le_bytes);
        let program = [&[0xb8][..], &f, &[0xb9], &i, &[0x0f, 0xa2, 0xe6, 0x80]].concat();
        let mut probe = Probe::new(host, leaves, &program, USER_SPACE)?;
        if probe.next()? != Exit::Operation(Operation::Port) || probe.last.port != Some(TSC_PORT) {
            continue;
        }
        let registers = probe.vcpu.general_registers();
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        seen.push(Leaf {
            function,
            index,
            indexed: true,
            eax: low(registers.rax),
            ebx: low(registers.rbx),
            ecx: low(registers.rcx),
            edx: low(registers.rdx),
        });
    }
    Ok(seen)
}
