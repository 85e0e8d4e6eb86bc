//! `vmm sweep --recipe`: what other VMMs' steps lose is what a formula says, and what a file says is checked.

use std::fs;

use serde_json::Value;
use vm_tests::{Lab, require_kvm};

/// What is known of a shipped recipe, at 2.6 GHz and with the delays in its file.
struct Golden {
    name: &'static str,
    /// How far the page is ahead of the TSC, with 1 and with 4 vCPUs.
    page_error_ns: [i64; 2],
    /// The verdicts of a tick's exits, from harmless to fatal.
    verdicts: &'static [&'static str],
}

/// One row for each recipe. Where the TSC has counted the downtime, the ticks of it are late; where kvmclock alone has,
/// it is ahead by the downtime. `dragonball` loses the deadline once it is armed.
const GOLDEN: &[Golden] = &[
    Golden { name: "kvm-doc", page_error_ns: [0, 0], verdicts: &["late"] },
    Golden { name: "qemu", page_error_ns: [86_000, -16_000], verdicts: &["clock-stepped"] },
    Golden { name: "qemu-account-downtime", page_error_ns: [0, 0], verdicts: &["late"] },
    Golden { name: "firecracker", page_error_ns: [6_000, -96_000], verdicts: &["clock-stepped"] },
    Golden { name: "cloud-hypervisor", page_error_ns: [100_034_000, 100_103_000], verdicts: &["clock-stepped"] },
    Golden { name: "dragonball", page_error_ns: [10_040_000, 10_040_000], verdicts: &["clock-stepped", "lost"] },
    Golden { name: "stratovirt", page_error_ns: [140_000, 206_000], verdicts: &["clock-stepped"] },
    Golden { name: "masterclock-update", page_error_ns: [2_592_000, 2_592_000], verdicts: &["clock-stepped"] },
    // Of the vCPU that the guest uses; the others' TSCs are below.
    Golden { name: "tsc-offsets", page_error_ns: [0, 0], verdicts: &["on-time"] },
];

/// Sweeps the exits of a tick with this recipe; `code` is the exit code.
#[track_caller]
fn sweep(lab: &Lab, recipe: &str, flags: &str, code: i32) -> Value {
    let mut command = lab.vmm("sweep --every exit --json found.json");
    command.args(["--recipe", recipe]).args(flags.split_whitespace());
    vm_tests::finish(&mut command).expect(code);
    serde_json::from_slice(&fs::read(lab.path("found.json")).expect("the result")).expect("JSON")
}

// Catches: a change of a recipe, of the model of KVM or of how the guest's pages are published that nobody meant.
#[test]
fn every_recipe_loses_what_its_delays_say() {
    require_kvm!();
    let lab = Lab::new();
    let listed = lab.run("sweep --recipe list").expect(0).stdout;
    let names: Vec<&str> = listed.lines().skip(2).filter_map(|line| line.split_whitespace().next()).collect();
    for name in names {
        // `deadline-by-khz` has no error of the page: see below.
        let has = name == "deadline-by-khz" || GOLDEN.iter().any(|golden| golden.name == name);
        assert!(has, "{name} has no golden result");
    }
    for Golden { name, page_error_ns, verdicts } in GOLDEN {
        for (cpus, error) in [1, 4].into_iter().zip(page_error_ns) {
            let code = i32::from(*verdicts != ["on-time"]);
            let found = sweep(&lab, name, &format!("--cpus {cpus} --cmdline clockevent=kvm-tsc-deadline"), code);
            let totals = &found["totals"][0];
            let predicted = found["inputs"]["recipe"]["predicted_ns"][0].as_array().expect("a prediction");
            assert_eq!(predicted.len(), cpus, "{name}");
            assert_eq!(predicted[0], *error, "{name} {cpus}: predicted {predicted:?}");
            // Measured in guest RAM, and the same at every point.
            let bounds = vec![*error; 2];
            assert_eq!(totals["page_errors_ns"][0], serde_json::json!(bounds), "{name} {cpus}");
            let seen: Vec<&str> =
                totals["verdicts"].as_array().expect("verdicts").iter().filter_map(|pair| pair[0].as_str()).collect();
            assert_eq!(seen, *verdicts, "{name} {cpus}");
        }
    }
}

// Catches: an error that the pages have and the guest does not see: its own readings are of the TSC and the page.
#[test]
fn the_guests_own_readings_show_the_error() {
    require_kvm!();
    let lab = Lab::new();
    let found = sweep(&lab, "qemu", "--cpus 4 --cmdline scenario=smp", 1);
    for point in found["points"].as_array().expect("points") {
        let outcome = &point["outcomes"][0];
        assert_eq!(outcome["page_errors_ns"], serde_json::json!(vec![-16_000; 4]), "{point}");
        // Each reading rounds down by up to 2 ns, and the reference clock is computed from whole ticks.
        let by_guest = outcome["clock_error_ns"].as_i64().expect("a clock error");
        assert!((-16_004..=-15_998).contains(&by_guest), "{point}");
    }
}

// Catches: TSCs of several vCPUs that differ while the pages say that they are one clock, unseen by guest and host.
#[test]
fn a_guest_sees_that_its_vcpus_tscs_differ() {
    require_kvm!();
    let lab = Lab::new();
    let found = sweep(&lab, "tsc-offsets", "--cpus 3 --cmdline scenario=smp", 1);
    let bounds: Vec<[u32; 2]> = vec![[0, 0], [500, 500], [1_000, 1_000]];
    assert_eq!(found["totals"][0]["page_errors_ns"], serde_json::json!(bounds));
    for point in found["points"].as_array().expect("points") {
        let by_guest = point["outcomes"][0]["clock_error_ns"].as_i64().expect("a clock error");
        assert!((996..=1_002).contains(&by_guest), "{point}");
    }
}

// Catches: deadlines by another formula than the page's that nobody notices.
#[test]
fn a_deadline_by_khz_wakes_the_guest_early() {
    require_kvm!();
    let lab = Lab::new();
    let found = sweep(&lab, "deadline-by-khz", "--ratio 1 --cmdline clockevent=kvm-ns-deadline", 0);
    let totals = &found["totals"][0];
    assert!(
        totals["verdicts"].as_array().is_some_and(|pairs| pairs.iter().any(|pair| pair[0] == "rearmed")),
        "{totals}"
    );
    assert_eq!(totals["most_early_wakes"], 1);
}

// Catches: a fault that is another thing as a recipe than injected.
#[test]
fn a_fault_is_a_recipe_too() {
    require_kvm!();
    let lab = Lab::new();
    let as_recipe = sweep(&lab, "tsc-jump", "--ratio 0.5", 1);
    let mut command = lab.vmm("sweep --every exit --json found.json --inject tsc-jump --ratio 0.5");
    vm_tests::finish(&mut command).expect(1);
    let injected: Value = serde_json::from_slice(&fs::read(lab.path("found.json")).expect("the result")).expect("JSON");
    assert_eq!(injected["inputs"]["inject"], "tsc-jump");
    assert_eq!(as_recipe["inputs"]["recipe"]["predicted_ns"], serde_json::json!([null]));
    assert_eq!(as_recipe["points"], injected["points"]);
}

// Catches: a recipe of one's own that is not played as written; delays that do not count.
#[test]
fn a_recipe_in_a_file_is_played() {
    require_kvm!();
    let lab = Lab::new();
    let steps = |clock_ns: u64| {
        format!(
            r#"
about = "clock last"
[[save]]
each-cpu = [{{ do = "get-lapic" }}, {{ do = "get-msrs", msrs = ["tsc", "kvmclock", "deadline"], after-ns = 500 }}]
[[save]]
vm = [{{ do = "get-clock", after-ns = {clock_ns} }}]
[[restore]]
each-cpu = [{{ do = "set-lapic" }}, {{ do = "set-msrs", msrs = ["tsc", "kvmclock", "deadline"] }}, {{ do = "kvmclock-ctrl" }}]
[[restore]]
vm = [{{ do = "set-clock", by = "value", after-ns = 40 }}]
"#
        )
    };
    fs::write(lab.path("own.toml"), steps(40)).expect("written");
    let found = sweep(&lab, "own.toml", "", 0);
    assert_eq!(found["inputs"]["recipe"]["name"], "own");
    assert_eq!(found["totals"][0]["page_errors_ns"], serde_json::json!([[0, 0]]));
    fs::write(lab.path("own.toml"), steps(1_000_040)).expect("written");
    let found = sweep(&lab, "own.toml", "", 1);
    assert_eq!(found["totals"][0]["page_errors_ns"], serde_json::json!([[1_000_000, 1_000_000]]));
}

// Catches: a bad file that is not named with its line, or one that is read without end.
#[test]
fn a_bad_recipe_is_one_error_with_file_and_line() {
    let lab = Lab::new();
    let bad = "about = \"x\"\n\n[[restore]]\nvm = [{ do = \"set-clok\" }]\n";
    fs::write(lab.path("bad.toml"), bad).expect("written");
    lab.run("sweep --recipe bad.toml").refused(2, &["bad.toml:4: ", "set-clok", "set-clock"]);
    fs::write(lab.path("large.toml"), vec![b'#'; 65_537]).expect("written");
    lab.run("sweep --recipe large.toml").refused(2, &["large.toml", "65537 bytes"]);
    lab.run("sweep --recipe /dev/zero").refused(2, &["/dev/zero", "not a regular file"]);
    lab.run("sweep --recipe qemus").refused(2, &["--recipe qemus", "qemu", "kvm-doc", "--recipe list"]);
    lab.run("sweep --recipe qemu --depth 2").refused(2, &["--recipe", "--depth 1"]);
    fs::write(lab.path("binary.toml"), [0xff, 0xfe]).expect("written");
    lab.run("sweep --recipe binary.toml").refused(2, &["binary.toml"]);
    for flags in ["--inject tsc-jump", "--deadline keep", "--downtime freeze"] {
        let ended = lab.run(&format!("sweep --recipe qemu {flags}"));
        assert_eq!(ended.code(), 2, "{flags}: {ended:#?}");
    }
}
