//! Saving and restoring.

use vlapic::{Armed, State, StateError};

use super::*;

#[test]
fn a_fresh_apic_is_made_from_the_reset_state() {
    for bits in 0..16u32 {
        let [bsp, x2apic, tsc_deadline, ns_deadline] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
        let config = Config { id: bits, bsp, x2apic, tsc_deadline, ns_deadline, physical_bits: 46 };
        let fresh = LocalApic::new(config);
        assert_eq!(fresh.state(at(0)), State::reset(&config));
        assert_eq!(LocalApic::from_state(&State::reset(&config), config, at(0)), Ok(fresh));
        let text = serde_json::to_string(&config.state()).unwrap();
        assert_eq!(Config::from_state(serde_json::from_str(&text).unwrap(), 46), config);
    }
    assert_eq!(State::reset(&Config { bsp: false, ..ALL }), State::default());
}

/// A restore does not start the period again: the count goes on from where it was.
#[test]
fn a_count_survives_to_the_nanosecond() {
    for mut bench in Bench::timers(PERIODIC) {
        bench.write(TDCR, BY_8, at(0));
        bench.write(TMICT, 100_000, at(3));
        bench.apic.advance(at(900_005));
        let state = bench.apic.state(at(900_005));
        assert_eq!(state.timer.armed, Armed::Count { expires: VmTime(1_600_003) });
        let text = serde_json::to_string(&state).unwrap();
        let mut restored = bench.clone();
        restored.apic = LocalApic::from_state(&serde_json::from_str(&text).unwrap(), ALL, at(900_005)).unwrap();
        assert_eq!(restored.apic, bench.apic);
        assert_eq!(restored.read(TMCCT, at(900_005)), 87_500);
    }
}

/// Saving looks at nothing: what is due fires after the restore, not twice and not never.
#[test]
fn a_deadline_that_is_due_at_save_fires_after_the_restore() {
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        let mut state = bench.apic.state(at(2000));
        assert_eq!(state.timer.armed, Armed::Tsc(GuestTsc(3000)));
        bench.apic = LocalApic::from_state(&state, ALL, at(2000)).unwrap();
        assert_eq!((bench.interrupts(at(2000)), bench.interrupts(at(2001))), (1, 0));
        state.timer.armed = Armed::Tsc(GuestTsc(0));
        bench.apic = LocalApic::from_state(&state, ALL, at(2000)).unwrap();
        assert_eq!(bench.interrupts(at(0)), 1, "a policy that fires at once can say so");
    }
}

#[test]
fn an_unknown_field_is_refused() {
    let mut json = serde_json::to_value(State::default()).unwrap();
    assert!(serde_json::from_value::<State>(json.clone()).is_ok());
    json["timer"]["extra"] = 1.into();
    assert!(serde_json::from_value::<State>(json.clone()).is_err());
    json["timer"].as_object_mut().unwrap().remove("extra");
    json["timer"]["armed"] = serde_json::json!({"count": {"expires": 1, "extra": 1}});
    assert!(serde_json::from_value::<State>(json).is_err());
}

/// What a state may hold, and a check that is too strict would refuse.
#[test]
fn unusual_states_are_restored() {
    let mut cluster = Bench::xapic();
    cluster.write(DFR, 0x0fff_ffff, at(0));
    let mut disabled = Bench::xapic();
    disabled.wrmsr(APIC_BASE, 0, at(0));
    for bench in [cluster, disabled] {
        let state = bench.apic.state(at(900));
        assert_eq!(LocalApic::from_state(&state, ALL, at(900)), Ok(bench.apic));
    }
    // Each error that an APIC can log: two of vectors, one of registers.
    let state = State { esr: 0xe0, errors: 0xe0, ..State::default() };
    assert!(LocalApic::from_state(&state, ALL, at(0)).is_ok());
}

#[test]
fn an_error_names_the_value_that_cannot_be() {
    let state = State { svr: 0x1ff, icr: 5 << 32 | 1 << 12, ..State::default() };
    let refused = |state: &State| LocalApic::from_state(state, ALL, at(0)).unwrap_err();
    assert_eq!(refused(&state), StateError::Reserved { register: "ICR", value: 5 << 32 | 1 << 12 });
    let state = State { ldr: 7, icr: 5 << 32, ..state };
    assert_eq!(refused(&state), StateError::Reserved { register: "LDR", value: 7 });
}

/// One error for each way in which a state can be impossible.
#[test]
fn impossible_states_are_refused() {
    let enabled = || State { svr: 0x1ff, ..State::default() };
    let refused = |config: Config, change: &dyn Fn(&mut State)| {
        let mut state = enabled();
        change(&mut state);
        LocalApic::from_state(&state, config, at(0)).unwrap_err()
    };
    let none = Config { x2apic: false, tsc_deadline: false, ns_deadline: false, ..ALL };

    assert_eq!(refused(ALL, &|s| s.base = 0x400), StateError::Base(0x400));
    assert_eq!(refused(none, &|s| s.base = 0xfee0_0c00), StateError::Base(0xfee0_0c00));
    let narrow = Config { physical_bits: 36, ..ALL };
    assert_eq!(refused(narrow, &|s| s.base = 0x10_fee0_0800), StateError::Base(0x10_fee0_0800));
    type Change<'a> = (&'a str, &'a dyn Fn(&mut State));
    assert_eq!(
        refused(ALL, &|s| s.base = 0),
        StateError::Disabled(0),
        "software enabled is not how disabling leaves it"
    );
    let disabled = State { base: 0xfee0_0000, tpr: 0x20, ..State::default() };
    assert!(LocalApic::from_state(&disabled, ALL, at(0)).is_ok());
    let changes: [Change<'_>; 8] = [
        ("LDR", &|s| s.ldr = 1),
        ("DFR", &|s| s.dfr = 0),
        ("SVR", &|s| s.svr = 1 << 12),
        ("ESR", &|s| s.esr = 1),
        ("the error accumulator", &|s| s.errors = 1 << 8),
        ("ICR", &|s| s.icr = 1 << 12),
        ("TDCR", &|s| s.timer.divide = 4),
        ("an LVT entry", &|s| s.lvt.lint1 = 1 << 14),
    ];
    for (name, change) in changes {
        assert!(matches!(refused(ALL, change), StateError::Reserved { register, .. } if register == name), "{name}");
    }
    assert_eq!(refused(ALL, &|s| s.isr[0] = 1), StateError::IllegalVector("ISR"));
    assert_eq!(refused(ALL, &|s| s.irr[0] = 1 << 15), StateError::IllegalVector("IRR"));
    let unmasked = State { lvt: vlapic::LvtState { error: 0xfe, ..Default::default() }, ..State::default() };
    assert_eq!(LocalApic::from_state(&unmasked, ALL, at(0)), Err(StateError::Unmasked(0xff)));
    assert_eq!(refused(ALL, &|s| s.lvt.timer = 3 << 17), StateError::TimerMode(3 << 17));
    assert_eq!(refused(none, &|s| s.lvt.timer = DEADLINE), StateError::TimerMode(DEADLINE));

    let tsc = Armed::Tsc(GuestTsc(5));
    let ns = Armed::Ns(VmTime(5));
    let count = Armed::Count { expires: VmTime(5) };
    assert_eq!(refused(ALL, &|s| s.timer.armed = count), StateError::NoInitialCount);
    for (config, lvtt, armed) in [
        (ALL, ONE_SHOT, tsc),
        (ALL, PERIODIC, ns),
        (ALL, DEADLINE, count),
        (Config { tsc_deadline: false, ..ALL }, DEADLINE, tsc),
        (Config { ns_deadline: false, ..ALL }, DEADLINE, ns),
    ] {
        let change = |s: &mut State| {
            s.lvt.timer = lvtt;
            s.timer.initial_count = 1;
            s.timer.armed = armed;
        };
        assert_eq!(refused(config, &change), StateError::Armed { armed, lvtt });
    }
}

/// Remote IRR is there only where a level-triggered interrupt can have set it; an xAPIC ID only where it is used.
#[test]
fn remote_irr_and_the_written_id_are_checked() {
    let restore = |change: &dyn Fn(&mut State)| {
        let mut state = State { svr: 0x1ff, ..State::default() };
        change(&mut state);
        LocalApic::from_state(&state, ALL, at(0)).map(|apic| assert_eq!(apic.state(at(0)), state))
    };
    assert_eq!(restore(&|s| s.lvt.lint0 = 0xc051), Ok(()));
    for lint0 in [0x4051, 0xc451, 0xd051] {
        let error = StateError::Reserved { register: "an LVT entry", value: u64::from(lint0) };
        assert_eq!(restore(&|s| s.lvt.lint0 = lint0), Err(error), "edge, NMI, delivery status");
    }
    assert!(restore(&|s| s.lvt.lint1 = 0xc051).is_err());
    assert_eq!(restore(&|s| (s.xapic_id, s.lint_high) = (Some(9), [true, false])), Ok(()));
    let x2apic = |s: &mut State| (s.base, s.xapic_id) = (0xfee0_0c00, Some(9));
    assert_eq!(restore(&x2apic), Err(StateError::XApicId(9)));
    let disabled = |s: &mut State| *s = State { base: 0xfee0_0000, lint_high: [true, true], ..State::default() };
    assert_eq!(restore(&disabled), Ok(()), "pins are outside");
    assert!(restore(&|s| *s = State { base: 0xfee0_0000, xapic_id: Some(9), ..State::default() }).is_err());
}

/// States were saved before the xAPIC ID could be written and the pins existed.
#[test]
fn an_older_state_is_read() {
    let mut json = serde_json::to_value(State::default()).unwrap();
    for field in ["xapic_id", "lint_high"] {
        assert!(json.as_object_mut().unwrap().remove(field).is_some());
    }
    assert_eq!(serde_json::from_value::<State>(json).unwrap(), State::default());
}

/// What a resume does in place is what a save, a change of the file and a restore would do.
#[test]
fn rearming_is_a_restore_of_another_armed_timer() {
    let armed = [
        Armed::Disarmed,
        Armed::Tsc(GuestTsc(5)),
        Armed::Tsc(GuestTsc(5000)),
        Armed::Ns(VmTime(5000)),
        Armed::Count { expires: VmTime(5000) },
    ];
    for mode in [ONE_SHOT, PERIODIC, DEADLINE] {
        for mut bench in Bench::timers(mode) {
            bench.write(TMICT, 9, at(0));
            bench.wrmsr(TSC_DEADLINE, 3000, at(0));
            // The CPU's TSC and the base need not be equal.
            let now = Now { base: GuestTsc(70), ..at(100) };
            for armed in armed {
                let mut state = bench.apic.state(now);
                state.timer.armed = armed;
                let mut apic = bench.apic.clone();
                let rearmed = apic.rearm(armed, now);
                let restored = LocalApic::from_state(&state, ALL, now);
                assert_eq!(rearmed.map(|()| apic.clone()), restored, "{armed:?}");
                assert!(restored.is_ok() || apic == bench.apic, "a refused timer stays as it was");
            }
        }
    }
}
