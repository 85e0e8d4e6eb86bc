//! The model and the formula, compared; each step's effect; what is refused.

use machine::policy::restorer::{Restored, RestoredCpu, Saved, SavedCpu};
use proptest::prelude::*;
use vlapic::Armed;
use vmtime::{Adjusted, GuestTsc, Khz, Moment, PageClock, Remainder, Scale, TscAdjust, VmTime};

use super::{
    HOST_STOP, Recipe, RecipeError, fault_names, kvm, own, parse::parse, play::error_ns, predict, shipped,
    step::Destination,
};

fn khz(khz: u64) -> Khz {
    Khz::new(khz).unwrap()
}

/// A guest that was stopped after 5 s, with a deadline in 1 ms.
fn saved(cpus: usize, from: Khz, to: Khz) -> Saved {
    let tsc = GuestTsc(u64::from(from.get()) * 5_000);
    let page = PageClock { tsc_timestamp: tsc, system_time: VmTime(5_000_000_000), scale: Scale::from_khz(from) };
    let moment = Moment::new(page, tsc, from, 0);
    let own = Adjusted { tsc, vm: moment.vm, page, remainder: Remainder::ZERO, downtime_ns: 0, clamped: false };
    let armed = Armed::Tsc(GuestTsc(tsc.0 + u64::from(from.get())));
    let cpu = SavedCpu { tsc_adjust: TscAdjust::ZERO, armed, own_armed: armed, own_due: None, in_deadline_mode: true };
    Saved { moment, khz: to, own, cpus: vec![cpu; cpus] }
}

/// Plays `recipe`; returns how the guest continues, and the error of each page.
fn play(recipe: &Recipe, cpus: usize, from: Khz, host: Khz) -> (Restored, Vec<i64>) {
    let saved = saved(cpus, from, recipe.khz_there(from, host));
    let restored = match recipe.destination {
        Destination::Kvm => kvm::play(recipe, host, &saved),
        Destination::Vmm | Destination::Same => own::play(recipe, &saved),
    };
    let page = |cpu: &RestoredCpu| {
        // Without a new page the old one stays.
        let page = cpu.page.unwrap_or(saved.moment.page);
        let adjust = if recipe.destination == Destination::Same { cpu.tsc_adjust } else { TscAdjust::ZERO };
        error_ns(&saved, &restored, recipe.destination, adjust, (page.tsc_timestamp.0, page.system_time.0))
    };
    let errors = restored.cpus.iter().map(page).collect();
    (restored, errors)
}

fn recipe(text: &str) -> Recipe {
    parse("test.toml", "test", text).unwrap()
}

/// A recipe in which every delay is one of `delays`.
fn with_delays(name: &str, delays: &[u64]) -> Recipe {
    let mut recipe = Recipe::named_or_file(name).unwrap();
    let mut next = delays.iter().cycle();
    for group in recipe.save.iter_mut().chain(&mut recipe.restore) {
        group.steps_mut().iter_mut().for_each(|step| step.after_ns = *next.next().unwrap());
    }
    recipe
}

// Catches: a recipe that does not parse, or has no source; a formula that has no answer for one.
#[test]
fn every_shipped_recipe_has_a_source_and_a_prediction() {
    for recipe in shipped().unwrap() {
        assert!(!recipe.about.is_empty() && !recipe.sources.is_empty(), "{}", recipe.name);
        let ghz = khz(2_600_000);
        let predicted = (recipe.destination != Destination::Vmm).then_some(3);
        assert_eq!(predict(&recipe, 3, ghz, ghz).map(|errors| errors.len()), predicted, "{}", recipe.name);
    }
}

// Catches: a model that loses a delay, or a formula that counts one twice. At 2.6 GHz 5 ns are 13 ticks.
#[test]
fn what_the_model_loses_is_what_the_formula_says_to_the_nanosecond() {
    let ghz = khz(2_600_000);
    for recipe in shipped().unwrap().into_iter().filter(|recipe| recipe.destination != Destination::Vmm) {
        for cpus in [1, 2, 4, 64] {
            let (_, errors) = play(&recipe, cpus, ghz, ghz);
            assert_eq!(Some(errors), predict(&recipe, cpus, ghz, ghz), "{} {cpus}", recipe.name);
        }
    }
}

// Catches: a formula for QEMU other than the one on the list, worked out by hand for 4 vCPUs:
// P2 - P1 = 3 * 2 + 1 + 100 us; P4 - P3 = 5 + 3 * (1 + 30 + 5) + 10 us.
#[test]
fn the_loss_of_qemu_grows_with_the_vcpus() {
    let qemu = Recipe::named_or_file("qemu").unwrap();
    let ghz = khz(2_600_000);
    let of = |cpus| predict(&qemu, cpus, ghz, ghz).unwrap()[0];
    assert_eq!(of(4), (6_000 + 1_000 + 100_000) - (5_000 + 3 * 36_000 + 10_000));
    assert_eq!(of(5) - of(4), 2_000 - 36_000);
}

// Catches: a fault that changes nothing, or more than one thing, or that cannot be found by its name.
#[test]
fn each_fault_changes_one_step_of_this_vmms_restore() {
    let ghz = khz(2_000_000);
    let right = |cpu: &SavedCpu, saved: &Saved| RestoredCpu {
        tsc_adjust: cpu.tsc_adjust,
        armed: cpu.own_armed,
        due: cpu.own_due,
        page: Some(saved.own.page),
        guest_stopped: true,
    };
    for name in fault_names() {
        let fault = Recipe::fault(name).unwrap();
        let mut changes = 0;
        for armed in [saved(1, ghz, ghz).cpus[0].armed, Armed::Disarmed] {
            let mut saved = saved(1, ghz, ghz);
            (saved.cpus[0].armed, saved.cpus[0].own_armed) = (armed, armed);
            let restored = own::play(&fault, &saved);
            let (is, right) = (restored.cpus[0], right(&saved.cpus[0], &saved));
            changes += u32::from(is.armed != right.armed)
                + u32::from(is.page != right.page && armed == Armed::Disarmed)
                + u32::from(is.guest_stopped != right.guest_stopped && is.page.is_some() && armed == Armed::Disarmed)
                + u32::from(restored.tsc != saved.own.tsc && armed == Armed::Disarmed)
                + u32::from(!restored.vmclock && armed == Armed::Disarmed);
        }
        assert_eq!(changes, 1, "{name}");
        // Counts and nanosecond deadlines are no TSC values.
        for armed in [Armed::Ns(VmTime(9)), Armed::Count { expires: VmTime(9) }] {
            let mut saved = saved(1, ghz, ghz);
            (saved.cpus[0].armed, saved.cpus[0].own_armed) = (armed, armed);
            assert_eq!(own::play(&fault, &saved).cpus[0].armed, armed, "{name}");
        }
    }
    let stop = Recipe::fault(HOST_STOP).unwrap();
    let (restored, _) = play(&stop, 2, ghz, ghz);
    assert!(restored.cpus.iter().all(|cpu| cpu.page.is_none() && !cpu.guest_stopped), "{restored:?}");
    assert!(Recipe::fault("qemu").is_none());
}

// Catches: an update that steps once more for each vCPU, or TSCs that are not moved.
#[test]
fn a_vm_that_stays_where_it_is_is_changed_as_the_formula_says() {
    let ghz = khz(2_600_000);
    let of = |name: &str, cpus| {
        let recipe = Recipe::named_or_file(name).unwrap();
        let (_, errors) = play(&recipe, cpus, ghz, ghz);
        assert_eq!(Some(&errors), predict(&recipe, cpus, ghz, ghz).as_ref(), "{name}");
        errors
    };
    // 30 days, at a nanosecond a second.
    assert_eq!(of("masterclock-update", 1), [2_592_000]);
    assert_eq!(of("masterclock-update", 4), [2_592_000; 4]);
    assert_eq!(of("tsc-offsets", 4), [0, 500, 1_000, 1_500]);
}

// Catches: a host formula that is the page's, or errs the other way.
#[test]
fn a_deadline_by_khz_is_early_by_what_the_page_has_lost() {
    let ghz = khz(2_600_000);
    let recipe = Recipe::named_or_file("deadline-by-khz").unwrap();
    let mut saved = saved(1, ghz, ghz);
    saved.cpus[0].own_armed = Armed::Ns(VmTime(5_010_000_000));
    let Armed::Ns(at) = own::play(&recipe, &saved).cpus[0].armed else { panic!("a nanosecond deadline") };
    // 1,005.8 ns in each of 720 hours.
    assert!((720 * 1_005..720 * 1_007).contains(&(5_010_000_000 - at.0)), "{at:?}");
}

// Catches: an order in which the timer fires too soon or never.
#[test]
fn a_deadline_keeps_its_value_in_kvms_order() {
    let ghz = khz(2_600_000);
    for name in ["qemu", "kvm-doc"] {
        let (restored, _) = play(&Recipe::named_or_file(name).unwrap(), 2, ghz, ghz);
        let armed = saved(1, ghz, ghz).cpus[0].armed;
        assert!(restored.cpus.iter().all(|cpu| cpu.armed == armed && cpu.guest_stopped), "{name}: {restored:?}");
        assert!(restored.stable, "{name}");
    }
}

const READ_ALL: &str = r#"
    about = "test"
    [[save]]
    each-cpu = [{ do = "get-msrs", msrs = ["tsc", "kvmclock", "deadline"] }, { do = "get-lapic" }, { do = "get-tsc-khz" }]
    [[save]]
    vm = [{ do = "get-clock" }]
"#;

fn restores(steps: &str) -> Recipe {
    recipe(&format!("{READ_ALL}\n{steps}"))
}

// Catches: steps whose order does not matter in the model, although it does in KVM.
#[test]
fn the_order_of_lapic_tsc_and_deadline_matters() {
    let ghz = khz(2_000_000);
    let at = |steps: &str| {
        let (restored, _) = {
            let recipe = restores(steps);
            let saved = saved(1, ghz, ghz);
            (kvm::play(&recipe, ghz, &saved), saved)
        };
        (restored.cpus[0].armed, restored.tsc.0)
    };
    let deadline = 10_002_000_000;
    let right =
        at("[[restore]]\neach-cpu = [{ do = \"set-lapic\" }, { do = \"set-msrs\", msrs = [\"tsc\", \"deadline\"] }]");
    assert_eq!(right, (Armed::Tsc(GuestTsc(deadline)), 10_000_000_000));
    // Dropped: LVTT is not in deadline mode yet.
    let first =
        at("[[restore]]\neach-cpu = [{ do = \"set-msrs\", msrs = [\"tsc\", \"deadline\"] }, { do = \"set-lapic\" }]");
    assert_eq!(first.0, Armed::Disarmed);
    // Set while the TSC counts from 0: the whole uptime later.
    let before_tsc =
        at("[[restore]]\neach-cpu = [{ do = \"set-lapic\" }, { do = \"set-msrs\", msrs = [\"deadline\", \"tsc\"] }]");
    assert_eq!(before_tsc.0, Armed::Tsc(GuestTsc(10_000_000_000 + deadline)));
}

// Catches: a model without KVM's window of a second, in which TSC writes count as one.
#[test]
fn tscs_that_are_written_more_than_a_second_apart_differ_and_the_page_is_not_stable() {
    let ghz = khz(2_000_000);
    let written = |after_ns: u64| {
        let step = format!("{{ do = \"set-msrs\", msrs = [\"tsc\", \"kvmclock\"], after-ns = {after_ns} }}");
        let recipe = restores(&format!(
            "[[restore]]\nvm = [{{ do = \"set-clock\", by = \"value\" }}]\n[[restore]]\neach-cpu = [{step}]"
        ));
        let (restored, errors) = play(&recipe, 3, ghz, ghz);
        assert_eq!(Some(&errors), predict(&recipe, 3, ghz, ghz).as_ref());
        (restored.stable, errors)
    };
    assert_eq!(written(999_999_999), (true, vec![999_999_999; 3]));
    assert_eq!(written(1_000_000_000), (false, vec![1_000_000_000, 2_000_000_000, 3_000_000_000]));
}

// Catches: a TSC that does not jump when its frequency is set last, or jumps the wrong way.
#[test]
fn setting_the_frequency_after_the_tsc_moves_it_by_the_hosts_uptime() {
    let steps = |order: [&str; 2]| {
        let [a, b] = order;
        let recipe = restores(&format!(
            "[[restore]]\neach-cpu = [{a}, {b}]\n[[restore]]\nvm = [{{ do = \"set-clock\", by = \"value\" }}]\n\
             [hosts]\ntsc-scaling = true\nuptime-ns = 2_000_000_000"
        ));
        let (from, host) = (khz(2_000_000), khz(3_000_000));
        let (_, errors) = play(&recipe, 1, from, host);
        assert_eq!(Some(&errors), predict(&recipe, 1, from, host).as_ref());
        errors[0]
    };
    let msrs = "{ do = \"set-msrs\", msrs = [\"tsc\", \"kvmclock\"] }";
    let frequency = "{ do = \"set-tsc-khz\" }";
    assert_eq!(steps([frequency, msrs]), 0);
    // 2 s at 3 GHz become 2 s at 2 GHz: the TSC is 2 G ticks behind, which are a second.
    assert_eq!(steps([msrs, frequency]), 1_000_000_000);
}

// Catches: an error without the line, or several lines of it; a mistake that is taken.
#[test]
fn mistakes_are_named_with_their_line() {
    let long = "[[restore]]\nvm = [{ do = \"wait\" }]\n".repeat(65);
    for (text, line, why) in [
        ("about = 1\nrestore = []", 1, "invalid type"),
        ("about = \"\"\n\nx = 1\nrestore = []", 3, "unknown field `x`"),
        ("about = \"\"\n[[restore]]\nvm = [\n{ do = \"sett\" }]", 4, "unknown variant `sett`"),
        ("about = \"\"\n[[restore]]\nvm = [\n{ do = \"set-clock\", by = \"value\" }]", 4, "the save needs get-clock"),
        ("about = \"\"\n[[restore]]\nvm = [\n\n{ do = \"set-lapic\" }]", 5, "put it into an each-cpu"),
        ("about = \"\"\n[[restore]]\nvm = []", 2, "1 to 32 steps"),
        ("about = \"\"\n[[restore]]\n", 2, "one of vm, each-cpu and all-cpus"),
        ("about = \"\"\n[[restore]]\nvm = [{ do = \"wait\", after-ns = 3600000000001 }]", 3, "at most 3600000000000"),
        ("about = \"\"\n[[restore]]\nvm = [{ do = \"wait\", after-ns = -1 }]", 3, "invalid value"),
        ("about = \"\"\n[[restore]]\nvm = [{ do = \"wait\", by = \"value\" }]", 3, "wait takes no by"),
        ("about = \"\"\nrestore = []\n[hosts]\nuptime-ns = 400000000000000000", 3, "uptime-ns"),
        (&format!("about = \"\"\n{long}"), 1, "65 groups"),
        ("about = \"\"\nrestore = []\n[[save]]\nvm = [{ do = \"set-clock\", by = \"value\" }]", 4, "a save only reads"),
        ("about = \"\"\nrestore = [", 2, ""),
    ] {
        let error = parse("bad.toml", "bad", text).unwrap_err();
        let RecipeError::Line { line: found, why: said, .. } = &error else { panic!("{error:?}") };
        assert!(*found == line && said.contains(why) && !said.contains('\n'), "{text}: {error}");
        assert!(error.to_string().starts_with(&format!("bad.toml:{line}: ")), "{error}");
    }
}

proptest! {
    // Catches: a model that rounds more than the hardware: one tick when a TSC is read and one when it is written.
    #[test]
    fn with_any_delays_model_and_formula_differ_by_less_than_two_ticks(
        delays in prop::collection::vec(0_u64..50_000_000, 5), which in 0..2_usize, cpus in 1..5_usize,
        khz_of in 1_000_000_u64..5_000_000, other in 1_000_000_u64..5_000_000, downtime_ns in 0_u64..1_000_000_000,
    ) {
        let mut recipe = with_delays(["qemu", "kvm-doc"][which], &delays);
        recipe.hosts.downtime_ns = downtime_ns;
        let (_, errors) = play(&recipe, cpus, khz(khz_of), khz(other));
        let predicted = predict(&recipe, cpus, khz(khz_of), khz(other)).unwrap();
        for (error, predicted) in errors.iter().zip(predicted) {
            prop_assert!(error.abs_diff(predicted) <= 3, "{error} {predicted}");
        }
    }

    // Catches: a panic or an overflow on a file that asks for the most of everything.
    #[test]
    fn no_text_makes_the_parser_panic(text in "[a-z0-9=\\[\\]{}\", \n-]{0,200}") {
        let _ = parse("x", "x", &text);
    }
}
