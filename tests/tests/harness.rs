//! Test harnesses get what they read: KTAP, and exit codes as kselftest and Automake have them.

use std::fs;

use vm_tests::{
    Ended, Lab, finish, guest,
    ktap::{TestResult, results},
    kvm, no_tsc_scaling, require, require_kvm,
};

/// The schemes, and their codes for: passed, failed, usage, this host cannot.
const SCHEMES: [(&str, [i32; 4]); 3] =
    [("vmm", [0, 1, 2, 3]), ("kselftest", [0, 1, 1, 4]), ("automake", [0, 1, 99, 77])];
/// Passes.
const GOOD: &str = "--time virtual --tsc-khz 2600000 --cmdline count=5";
/// Fails: each of its ticks is late.
const LATE: &str = "--time virtual --tsc-khz 2600000 --cmdline count=5 --fail-on late=1ns";
/// What no host can that is so emulated.
const CANNOT: &str = "sweep --emulate-host coarse-step";

fn run(lab: &Lab, flags: &str) -> Ended {
    lab.run(&format!("--guest {} {flags}", guest().display()))
}

/// The one result that a test has which could not be run.
fn the_only(text: &str) -> TestResult {
    let all = results(text);
    assert_eq!(all.len(), 1, "{text}");
    all[0].clone()
}

// Catches: a code that a harness takes for something else, such as 3 for an unexpected pass.
#[test]
fn each_harness_gets_its_exit_codes() {
    require_kvm!();
    let lab = Lab::new();
    for (scheme, [pass, fail, usage, host]) in SCHEMES {
        let flag = format!("--exit-codes {scheme}");
        let _ = run(&lab, &format!("{GOOD} {flag}")).expect(pass);
        let _ = run(&lab, &format!("{LATE} {flag}")).expect(fail);
        let _ = run(&lab, &format!("--no-such-flag {flag}")).expect(usage);
        let _ = run(&lab, &format!("--no-such-flag --exit-codes={scheme}")).expect(usage);
        let _ = lab.run(&format!("--guest none {flag}")).expect(usage);
        let _ = lab.run(&format!("sweep merge none {flag}")).expect(usage);
        let _ = lab.run(&format!("restore none {flag}")).expect(usage);
        let _ = lab.run(&format!("{CANNOT} {flag}")).expect(host);
        let _ = lab.run(&format!("--help {flag}")).expect(0);
    }
    // A wrong command line is not a result.
    let _ = lab.run("--guest none --ktap k --junit j").expect(2);
    assert!(!lab.path("k").exists() && !lab.path("j").exists());
    lab.run("--exit-codes kunit").refused(2, &["kunit", "--exit-codes"]);
    run(&lab, &format!("{GOOD} --exit-codes kselftest --debug-exit-status raw"))
        .refused(1, &["--exit-codes", "--debug-exit-status raw"]);
}

// Catches: a host that cannot run a test and leaves no result, or a failed one.
#[test]
fn what_a_host_cannot_do_is_skipped_with_the_reason() {
    let lab = Lab::new();
    let files = "--ktap k --tap t --junit j";
    // A host without KVM cannot do anything, and says that first.
    let reason = match kvm() {
        Ok(()) => "single steps are not exact",
        Err(_) => "/dev/kvm",
    };
    let _ = lab.run(&format!("{CANNOT} {files} --exit-codes kselftest")).expect(4);
    let [ktap, tap, junit] = ["k", "t", "j"].map(|name| fs::read_to_string(lab.path(name)).unwrap());
    let result = the_only(&ktap);
    let (directive, why) = result.directive.unwrap();
    assert!(result.ok && directive == "SKIP" && why.contains(reason), "{ktap}");
    assert!(tap.contains("\nok 1 - vmm sweep # SKIP ") && tap.contains(reason), "{tap}");
    assert!(junit.contains("skipped=\"1\"") && junit.contains(reason), "{junit}");
}

// Catches: `--tsc scaled` where KVM cannot, which was exit code 3 and no result.
#[test]
fn a_host_that_does_not_scale_skips_what_needs_it() {
    require_kvm!();
    require!(no_tsc_scaling());
    let lab = Lab::new();
    let ended = run(&lab, "--tsc scaled --tsc-khz 1234567 --exit-codes automake --ktap -").expect(77);
    let result = the_only(&ended.stdout);
    assert_eq!(result.directive.map(|(word, _)| word).as_deref(), Some("SKIP"), "{}", ended.stdout);
}

// Catches: a verdict that KTAP turns round, a check that is left out, a wrong plan.
#[test]
fn a_run_has_a_result_for_each_check() {
    require_kvm!();
    let lab = Lab::new();
    let of = |ended: Ended| -> Vec<(String, bool)> {
        let words = |result: TestResult| result.description.rsplit(' ').next().unwrap().to_owned();
        results(&ended.stdout).into_iter().map(|result| (words(result.clone()), result.ok)).collect()
    };
    let named = |all: &[(&str, bool)]| all.iter().map(|(name, ok)| ((*name).to_owned(), *ok)).collect::<Vec<_>>();
    let good = of(run(&lab, &format!("{GOOD} --ktap -")).expect(0));
    assert_eq!(good, named(&[("run", true), ("lost", true), ("clock", true), ("accounts", true)]));
    let late = of(run(&lab, &format!("{LATE} --ktap -")).expect(1));
    assert_eq!(late, named(&[("run", true), ("late=1ns", false)]));
}

// Catches: a time limit that reads as an ordinary failure, or as a pass.
#[test]
fn a_time_limit_is_a_timeout() {
    require_kvm!();
    let lab = Lab::new();
    let ended = finish(&mut lab.guest("scenario=idle", "--timeout 200ms --ktap - --exit-codes kselftest")).expect(1);
    let all = results(&ended.stdout);
    let first = all.first().unwrap();
    assert_eq!(first.directive.as_ref().map(|(word, _)| word.as_str()), Some("TIMEOUT"), "{}", ended.stdout);
    assert!(all.iter().skip(1).all(|result| result.directive.as_ref().is_none_or(|(word, _)| word != "TIMEOUT")));
}

// Catches: an error of the run itself that leaves CI without a result.
#[test]
fn an_error_before_the_first_result_is_an_error() {
    require_kvm!();
    let lab = Lab::new();
    // A sweep whose stretch the guest never reaches.
    let ended = lab.run("sweep --from tick:3 --cmdline count=1 --ktap -").expect(1);
    let result = the_only(&ended.stdout);
    assert_eq!(result.directive.map(|(word, _)| word).as_deref(), Some("ERROR"), "{ended:#?}");
}

// Catches: windows that are told as failed instructions, or harmless ones as failures.
#[test]
fn a_sweep_has_a_result_for_each_function() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--cmdline \"clockevent=kvm-tsc-deadline conversion=split recheck=off\" --ratio 0.5,2";
    let ended = finish(&mut sh(&lab, &format!("sweep {flags} --ktap -"))).expect(1);
    let failed: Vec<String> =
        results(&ended.stdout).into_iter().filter(|result| !result.ok).map(|result| result.description).collect();
    assert_eq!(failed, ["×0.5 timer_entry"], "{}", ended.stdout);
    assert!(ended.stdout.contains("# 12 of "), "{}", ended.stdout);
}

/// `vmm` with flags that a shell splits.
fn sh(lab: &Lab, flags: &str) -> std::process::Command {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &format!("exec {} {flags}", vm_tests::vmm().display())]).current_dir(lab.path("."));
    command
}

// Catches: a long run that is silent; a heartbeat that moves virtual time, or changes which of several vCPUs runs next.
#[test]
fn a_long_run_has_a_heartbeat() {
    require_kvm!();
    let lab = Lab::new();
    let run = |heartbeat: &str, trace: &str| {
        let flags = format!("--time virtual --cpus 3 --tsc-khz 2600000 --heartbeat {heartbeat} --trace {trace}");
        finish(&mut lab.guest("scenario=smp hz=1000 count=200", &flags)).expect(0)
    };
    let lines = |ended: &Ended| ended.stderr.lines().filter(|line| line.contains("running after ")).count();
    let (beating, silent) = (run("1ms", "a"), run("off", "b"));
    assert!(lines(&beating) > 0 && lines(&silent) == 0, "{beating:#?}");
    assert!(beating.stderr.contains(": VM time ") && beating.stderr.contains(" ticks, migrations 0\n"), "{beating:#?}");
    assert!(fs::read(lab.path("a")).unwrap() == fs::read(lab.path("b")).unwrap());
    // A sweep and the demonstration say so between two steps, a sweep from any of its threads.
    let sweep = lab.run("sweep --ratio 0.5 --heartbeat 1ns --cmdline clockevent=kvm-tsc-deadline").expect(0);
    assert!(sweep.stderr.lines().any(|line| line.contains(" points after ")), "{sweep:#?}");
    assert!(!sweep.stdout.contains(" points after "), "{sweep:#?}");
    lab.run("--heartbeat 0s").refused(2, &["--heartbeat"]);
}

// Catches: a summary that scrolls away.
#[test]
fn a_summary_is_one_screen() {
    require_kvm!();
    let lab = Lab::new();
    // Two windows at each frequency: the race, and where a deadline is in flight.
    let many = "sweep --ratio 0.1,0.3,0.5,0.7,0.9,1.1,2,10 --deadline fire --json all \
                --cmdline \"clockevent=kvm-tsc-deadline recheck=off\"";
    let ended = finish(&mut sh(&lab, many)).expect(1);
    let all: serde_json::Value = serde_json::from_slice(&fs::read(lab.path("all")).unwrap()).unwrap();
    assert!(all["windows"].as_array().is_some_and(|windows| windows.len() > 8), "{}", all["windows"]);
    assert!(ended.stdout.lines().count() <= 40, "{}", ended.stdout);
    assert!(ended.stdout.contains(" more windows (--json and --report have all)\n"), "{}", ended.stdout);
}
