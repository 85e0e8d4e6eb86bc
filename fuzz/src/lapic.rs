//! Two local APICs, and operations on them decoded from the fuzzer's bytes.

use guest_abi::{
    msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE, X2APIC},
    ns_deadline,
};
use vlapic::{
    Config, Deadline, Delivery, DeliveryMode, Effects, LocalApic, LocalSource, Mode, Route, State, lowest_priority,
};
use vmtime::{GuestTsc, Now, VmTime};

use crate::bytes::Bytes;

/// MSRs that lie apart from the x2APIC's.
const APART: [u32; 3] = [IA32_APIC_BASE, IA32_TSC_DEADLINE, ns_deadline::MSR];

/// Runs the operations that `data` spells. Panics, which is what a fuzzer looks for, when the APIC does or when
/// something that always holds does not. The answer is the number of operations, for which the bytes sufficed.
pub fn lapic_doors(data: &[u8]) -> u32 {
    let mut count = 0;
    // Out of bytes: done.
    let _ = run(Bytes(data), &mut count);
    count
}

fn run(mut bytes: Bytes<'_>, count: &mut u32) -> Option<()> {
    let flags = bytes.u8()?;
    let config = |id| Config {
        id,
        bsp: id == 0,
        x2apic: flags & 1 == 0,
        tsc_deadline: flags & 2 == 0,
        ns_deadline: flags & 4 == 0,
        physical_bits: if flags & 8 == 0 { 52 } else { 40 },
    };
    let other = if flags & 16 == 0 { 1 } else { 0x1_0023 };
    let mut apics = [config(0), config(other)].map(|config| LocalApic::new(config));
    let mut now = Now::default();
    loop {
        let code = bytes.u8()?;
        now = time(&mut bytes, code >> 6, now)?;
        let cpu = usize::from(code >> 5 & 1);
        operation(&mut bytes, code & 0x1f, &mut apics, cpu, now)?;
        for apic in &mut apics {
            check(apic, now);
        }
        *count += 1;
    }
}

/// The same instant, a little later, or anywhere: clocks that go backwards must not hurt either.
fn time(bytes: &mut Bytes<'_>, how: u8, now: Now) -> Option<Now> {
    Some(match how {
        0 => now,
        1 | 2 => Now::new(
            GuestTsc(now.tsc.0.saturating_add(u64::from(bytes.u16()?))),
            VmTime(now.vm.0.saturating_add(u64::from(bytes.u16()?))),
        ),
        _ => Now::new(GuestTsc(bytes.u64()?), VmTime(bytes.u64()?)),
    })
}

fn operation(bytes: &mut Bytes<'_>, code: u8, apics: &mut [LocalApic; 2], cpu: usize, now: Now) -> Option<()> {
    let apic = apics.get_mut(cpu)?;
    match code {
        0..=6 => {
            let (number, value) = (bytes.u8()?, bytes.u32()?);
            let effects = write_page(apic, u64::from(number & 0x3f) * 16, &value.to_le_bytes(), now);
            route(apics, cpu, effects);
        }
        7..=13 => {
            let (number, value) = (bytes.u8()?, bytes.u64()?);
            // Few values have no reserved bit: half of them shall.
            let value = if number & 0x80 == 0 { value } else { value & 0xffff_ffff_0001_07ff };
            let effects = write_msr(apic, X2APIC.first() + u32::from(number & 0x3f), value, now);
            route(apics, cpu, effects);
        }
        14 => {
            let (which, value) = (bytes.u8()?, bytes.u64()?);
            let effects = write_msr(apic, *APART.get(usize::from(which % 3))?, value, now);
            route(apics, cpu, effects);
        }
        15 => {
            // The modes, without having to find their bits.
            let base = [0xfee0_0000, 0xfee0_0800, 0xfee0_0c00, 0x400].get(usize::from(bytes.u8()? & 3)).copied()?;
            let effects = write_msr(apic, IA32_APIC_BASE, base, now);
            route(apics, cpu, effects);
        }
        16 => {
            let (offset, len) = (bytes.u64()?, bytes.u8()? & 15);
            let effects = write_page(apic, offset, &vec![0x5a; usize::from(len)], now);
            route(apics, cpu, effects);
        }
        17 => {
            let (index, value) = (bytes.u32()?, bytes.u64()?);
            let effects = write_msr(apic, index, value, now);
            route(apics, cpu, effects);
        }
        18 => apic.mmio_read(u64::from(bytes.u16()?), &mut vec![0xa5; usize::from(bytes.u8()? & 15)], now),
        19 => {
            let index = bytes.u32()?;
            let value = apic.msr_read(index, now);
            assert!(LocalApic::owns_msr(index) || value.is_err());
        }
        20 => apic.set_cr8(bytes.u8()?),
        21..=23 => {
            if let Some(vector) = apic.pending() {
                apic.acknowledge(vector);
                assert!(apic.pending().is_none_or(|next| next >> 4 > vector >> 4), "nesting");
            }
        }
        24 => apic.acknowledge(bytes.u8()?),
        25 | 26 => {
            let sources = [
                LocalSource::Lint0,
                LocalSource::Lint1,
                LocalSource::Thermal,
                LocalSource::Performance,
                LocalSource::Error,
            ];
            let _ = apic.local(*sources.get(usize::from(bytes.u8()?) % sources.len())?, bytes.bool()?);
        }
        27 => apic.init(),
        28 => apic.reset(),
        29 => restore_garbage(bytes, apic)?,
        _ => {
            apic.advance(now);
        }
    }
    Some(())
}

fn write_page(apic: &mut LocalApic, offset: u64, data: &[u8], now: Now) -> Option<Effects> {
    let effects = apic.mmio_write(offset, data, now);
    assert!(!effects.base_changed, "only an MSR moves the page");
    Some(effects)
}

fn write_msr(apic: &mut LocalApic, index: u32, value: u64, now: Now) -> Option<Effects> {
    let mut evaluated = apic.clone();
    evaluated.advance(now);
    let before = apic.mmio_base();
    match apic.msr_write(index, value, now) {
        Ok(effects) => {
            assert!(effects.base_changed || before == apic.mmio_base());
            Some(effects)
        }
        Err(_) => {
            assert_eq!(*apic, evaluated, "a fault changes no register");
            None
        }
    }
}

/// The bus between the two, as a run loop has it.
fn route(apics: &mut [LocalApic; 2], sender: usize, effects: Option<Effects>) {
    let Some(ipi) = effects.and_then(|effects| effects.ipi) else { return };
    let mut targets: Vec<(usize, Route)> = apics.iter().map(LocalApic::route).enumerate().collect();
    targets.retain(|(cpu, route)| route.addressed_by(ipi.destination, *cpu == sender));
    if ipi.mode == DeliveryMode::LowestPriority {
        let chosen = lowest_priority(targets.iter().copied());
        assert!(chosen.is_some() || targets.iter().all(|(_, route)| !route.enabled));
        targets.retain(|(cpu, _)| Some(*cpu) == chosen);
    }
    for (cpu, _) in targets {
        let Some(apic) = apics.get_mut(cpu) else { continue };
        if apic.deliver(&ipi) == Delivery::Init {
            apic.init();
        }
    }
}

/// A saved state with the fuzzer's numbers in it is refused, or is what the APIC then saves.
fn restore_garbage(bytes: &mut Bytes<'_>, apic: &mut LocalApic) -> Option<()> {
    let mut state = apic.state(Now::default());
    match bytes.u8()? % 10 {
        0 => state.base = bytes.u64()?,
        1 => state.svr = bytes.u32()?,
        2 => state.lvt.timer = bytes.u32()?,
        3 => state.lvt.lint0 = bytes.u32()?,
        4 => state.icr = bytes.u64()?,
        5 => state.irr[0] = bytes.u32()?,
        6 => state.esr = bytes.u32()?,
        7 => state.timer.initial_count = bytes.u32()?,
        8 => state.xapic_id = Some(bytes.u8()?),
        _ => state.timer.divide = bytes.u32()?,
    }
    if let Ok(restored) = LocalApic::from_state(&state, *apic.config(), Now::default()) {
        assert_eq!(restored.state(Now::default()), state);
    }
    Some(())
}

/// What holds after every operation.
fn check(apic: &mut LocalApic, now: Now) {
    let state = apic.state(now);
    let restored = LocalApic::from_state(&state, *apic.config(), now);
    assert_eq!(restored.as_ref(), Ok(&*apic), "saved and restored");
    let State { isr, tmr, irr, .. } = state;
    assert!([isr, tmr, irr].iter().all(|set| set[0] & 0xffff == 0), "vectors below 16");
    assert!(apic.next_wake().is_none() || apic.next_wake() == apic.next_deadline());
    apic.advance(now);
    match apic.next_deadline() {
        None => {}
        Some(Deadline::Tsc(deadline)) => assert!(deadline > now.tsc, "overdue"),
        Some(Deadline::Vm(deadline)) => assert!(deadline > now.vm, "overdue"),
    }
    if let Some(vector) = apic.pending() {
        assert!(vector >= 16 && vector >> 4 > apic.cr8());
        assert!(!apic.blocked_by_priority());
    }
    let mode = apic.route().mode;
    assert_eq!(apic.mmio_base().is_some(), mode == Mode::XApic);
    assert!(apic.mmio_base().is_none_or(|base| base % 0x1000 == 0 && base >> apic.config().physical_bits == 0));
    assert!(mode != Mode::Disabled || (apic.pending().is_none() && apic.next_deadline().is_none()));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random bytes, no fuzzer: the target itself is sound, and reaches the end of its input.
    #[test]
    fn random_bytes() {
        let mut state = 1u64;
        let mut count = 0;
        for _ in 0..50_000 {
            let data: Vec<u8> = (0..400)
                .map(|_| {
                    // Xorshift.
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state.to_le_bytes()[3]
                })
                .collect();
            count += lapic_doors(&data);
        }
        assert!(count > 1_000_000, "{count} operations");
    }
}
