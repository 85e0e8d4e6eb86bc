//! Random operations of a guest, in any order, at any time.

use proptest::prelude::*;

use vlapic::{Deadline, Mode, MsrFault, State};

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8> },
    Rdmsr(u32),
    Wrmsr(u32, u64),
    SetCr8(u8),
    Accept(u8, bool),
    Acknowledge(u8),
    AcknowledgePending,
    Advance,
    SaveAndRestore,
}

/// Values that lie at an edge more often than chance would have it.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        any::<u32>().prop_map(u64::from),
        (0..64u32, 0..3u64).prop_map(|(bit, less)| (1u64 << bit).wrapping_sub(less)),
        // LVT entries, timer modes included.
        (0..8u32, any::<u8>()).prop_map(|(mode, vector)| u64::from(mode << 16 | u32::from(vector))),
        Just(0x1ff),
        Just(0xfee0_0800),
        Just(0xfee0_0c00),
        Just(0),
    ]
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![10 => (0..0x41u64).prop_map(|n| n * 16), 1 => any::<u64>(), 1 => 0..0x1000u64]
}

fn index() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => (0..0x40u32).prop_map(|n| 0x800 + n),
        3 => Just(TSC_DEADLINE),
        3 => Just(NS_DEADLINE),
        3 => Just(APIC_BASE),
        2 => prop_oneof![Just(msr(LVTT)), Just(msr(TMICT)), Just(msr(TDCR)), Just(msr(SVR))],
        1 => any::<u32>(),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let word = value().prop_map(|value| value.to_le_bytes()[..4].to_vec());
    let data = prop_oneof![9 => word, 1 => proptest::collection::vec(any::<u8>(), 0..17)];
    prop_oneof![
        2 => (offset(), prop_oneof![9 => Just(4usize), 1 => 0..17usize]).prop_map(|(offset, len)| Op::Read { offset, len }),
        6 => (offset(), data).prop_map(|(offset, data)| Op::Write { offset, data }),
        2 => index().prop_map(Op::Rdmsr),
        6 => (index(), value()).prop_map(|(index, value)| Op::Wrmsr(index, value)),
        1 => any::<u8>().prop_map(Op::SetCr8),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(vector, level)| Op::Accept(vector, level)),
        1 => any::<u8>().prop_map(Op::Acknowledge),
        2 => Just(Op::AcknowledgePending),
        3 => Just(Op::Advance),
        1 => Just(Op::SaveAndRestore),
    ]
}

/// Steps of both clocks: mostly small and forward, sometimes to anywhere.
fn step() -> impl Strategy<Value = (u64, u64, bool)> {
    prop_oneof![
        6 => (0..5000u64, 0..5000u64).prop_map(|(tsc, vm)| (tsc, vm, false)),
        1 => (value(), value()).prop_map(|(tsc, vm)| (tsc, vm, true)),
    ]
}

fn config() -> impl Strategy<Value = Config> {
    let id = prop_oneof![0..4u32, any::<u32>()];
    (id, any::<[bool; 4]>()).prop_map(|(id, [bsp, x2apic, tsc_deadline, ns_deadline])| Config {
        id,
        bsp,
        x2apic,
        tsc_deadline,
        ns_deadline,
        physical_bits: 52,
    })
}

fn apply(apic: &mut LocalApic, op: &Op, now: Now) -> Result<(), TestCaseError> {
    match op {
        Op::Read { offset, len } => apic.mmio_read(*offset, &mut vec![0xa5; *len], now),
        Op::Write { offset, data } => {
            apic.mmio_write(*offset, data, now);
        }
        Op::Rdmsr(index) => {
            let result = apic.msr_read(*index, now);
            prop_assert!(LocalApic::owns_msr(*index) || result == Err(MsrFault));
        }
        Op::Wrmsr(index, value) => {
            let mut evaluated = apic.clone();
            evaluated.advance(now);
            if apic.msr_write(*index, *value, now).is_err() {
                prop_assert_eq!(&*apic, &evaluated, "a fault changes no register");
            }
        }
        Op::SetCr8(cr8) => apic.set_cr8(*cr8),
        Op::Accept(vector, level) => apic.accept(Interrupt { vector: *vector, level: *level }),
        Op::Acknowledge(vector) => apic.acknowledge(*vector),
        Op::AcknowledgePending => {
            if let Some(vector) = apic.pending() {
                apic.acknowledge(vector);
                prop_assert!(apic.pending().is_none_or(|next| next >> 4 > vector >> 4));
            }
        }
        Op::Advance => {}
        Op::SaveAndRestore => *apic = round_trip(apic, now)?,
    }
    Ok(())
}

/// Through JSON, as a snapshot does; equal to what it was.
fn round_trip(apic: &LocalApic, now: Now) -> Result<LocalApic, TestCaseError> {
    let state = apic.state(now);
    let read: State = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
    prop_assert_eq!(&read, &state);
    let restored = LocalApic::from_state(&read, *apic.config(), now);
    prop_assert_eq!(restored.as_ref(), Ok(apic));
    Ok(restored.unwrap())
}

/// PPR, as the guest can read it.
fn ppr(apic: &mut LocalApic, now: Now) -> Option<u8> {
    let mut bytes = [0; 4];
    match apic.route().mode {
        Mode::Disabled => return None,
        Mode::XApic => apic.mmio_read(PPR, &mut bytes, now),
        Mode::X2Apic => bytes.copy_from_slice(&apic.msr_read(msr(PPR), now).unwrap().to_le_bytes()[..4]),
    }
    Some(bytes[0])
}

fn check(apic: &mut LocalApic, now: Now) -> Result<(), TestCaseError> {
    prop_assert!(apic.next_wake().is_none() || apic.next_wake() == apic.next_deadline());
    apic.advance(now);
    match apic.next_deadline() {
        None => {}
        Some(Deadline::Tsc(deadline)) => prop_assert!(deadline > now.base),
        Some(Deadline::Vm(deadline)) => prop_assert!(deadline > now.vm),
    }
    let (ppr, pending) = (ppr(apic, now), apic.pending());
    prop_assert!(ppr.is_none_or(|ppr| ppr >> 4 >= apic.cr8()));
    prop_assert!(pending.is_none() || ppr.is_some());
    if let (Some(vector), Some(ppr)) = (pending, ppr) {
        prop_assert!(vector >= 16 && vector >> 4 > ppr >> 4);
        prop_assert!(!apic.blocked_by_priority());
    }
    let State { irr, isr, tmr, .. } = apic.state(now);
    // SDM vol. 3, "Valid Interrupt Vectors": none below 16.
    prop_assert!([irr, isr, tmr].iter().all(|words| words[0] & 0xffff == 0));
    prop_assert!(apic.mmio_base().is_none_or(|base| base % 4096 == 0));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    /// Nothing panics, and what always holds does.
    #[test]
    fn no_guest_breaks_it(
        config in config(),
        enable in any::<bool>(),
        ops in proptest::collection::vec((step(), op()), 1..80),
    ) {
        let mut apic = LocalApic::new(config);
        let mut now = Now::default();
        if enable {
            apic.mmio_write(SVR, &0x1ffu32.to_le_bytes(), now);
        }
        for ((tsc, vm, jump), op) in &ops {
            now = if *jump {
                // Also backwards.
                Now::new(GuestTsc(*tsc), VmTime(*vm))
            } else {
                Now::new(GuestTsc(now.tsc.0.saturating_add(*tsc)), VmTime(now.vm.0.saturating_add(*vm)))
            };
            apply(&mut apic, op, now)?;
            check(&mut apic, now)?;
            prop_assert_eq!(&round_trip(&apic, now)?, &apic);
        }
    }

    /// A saved state with any numbers in it is refused, or makes an APIC that saves the same and works.
    #[test]
    fn no_file_breaks_it(
        config in config(),
        base in value(),
        lvtt in value(),
        numbers in any::<[u32; 6]>(),
        armed in prop_oneof![
            Just(vlapic::Armed::Disarmed),
            value().prop_map(|v| vlapic::Armed::Tsc(GuestTsc(v))),
            value().prop_map(|v| vlapic::Armed::Ns(VmTime(v))),
            value().prop_map(|v| vlapic::Armed::Count { expires: VmTime(v) }),
        ],
        tidy in any::<bool>(),
        now in (value(), value()),
    ) {
        let [svr, esr, icr, divide, initial_count, irr] = numbers;
        let mask = |value: u32, defined: u32| if tidy { value & defined } else { value };
        let mut state = State { base: if tidy { 0xfee0_0800 } else { base }, ..State::default() };
        state.svr = mask(svr, 0x3ff) | 0x100;
        state.esr = mask(esr, 0xe0);
        state.icr = u64::from(mask(icr, 0x000c_cfff));
        state.irr[0] = mask(irr, 0xffff_0000);
        state.lvt.timer = u32::try_from(lvtt & 0xffff_ffff).unwrap();
        state.timer = vlapic::TimerState { armed, initial_count, divide: mask(divide, 0xb) };
        let now = Now::new(GuestTsc(now.0), VmTime(now.1));
        if let Ok(mut apic) = LocalApic::from_state(&state, config, now) {
            prop_assert_eq!(apic.state(state.saved_at.now(TscAdjust::ZERO)), state);
            check(&mut apic, now)?;
            round_trip(&apic, now)?;
        }
    }
}
