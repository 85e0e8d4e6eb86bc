//! Whether a guest clears PVCLOCK_GUEST_STOPPED, as the VMM sees it in the guest's memory.

use vm_tests::{Lab, Trace, raw, require_kvm};

/// kvmclock's page, and where its flags are.
const PAGE: u32 = 0x10_1000;
const FLAGS: u32 = PAGE + 29;
/// The page's version after boot, and how much each resume adds.
const FIRST_VERSION: u8 = 2;
const PUBLICATION: u8 = 2;
/// Resumes that the guests wait for.
const RESUMES: u8 = 4;

/// A guest that looks at its page until so many resumes were made, and ends; it clears the flag, or does not.
fn guest(clears: bool) -> Vec<u8> {
    let word = |value: u32| value.to_le_bytes();
    // MOV ECX, MSR_KVM_SYSTEM_TIME_NEW; MOV EAX; XOR EDX; WRMSR
    let enable = [&[0xb9][..], &word(0x4b56_4d01), &[0xb8], &word(PAGE | 1), &[0x31, 0xd2, 0x0f, 0x30]].concat();
    // AND byte [FLAGS], 0xfd
    let clear = [&[0x80, 0x25][..], &word(FLAGS), &[0xfd]].concat();
    let last = FIRST_VERSION + PUBLICATION * RESUMES;
    // CMP dword [PAGE], last; JB back
    let wait = [&[0x83, 0x3d][..], &word(PAGE), &[last]].concat();
    let wait = if clears { [clear, wait, vec![0x72, 0xf0]].concat() } else { [wait, vec![0x72, 0xf7]].concat() };
    raw::multiboot(&[&raw::INTERRUPTIBLE[..], &enable, &wait, &raw::SUCCESS].concat())
}

#[track_caller]
fn run(lab: &Lab, clears: bool, flags: &str, code: i32) -> (serde_json::Value, String, Trace) {
    std::fs::write(lab.path("guest"), guest(clears)).expect("a file");
    let flags = format!("--guest guest --migrate-every 50ms --summary summary --trace trace {flags}");
    let ended = lab.run(&flags).expect(code);
    let summary = std::fs::read(lab.path("summary")).expect("a summary");
    (serde_json::from_slice(&summary).expect("JSON"), ended.stderr, Trace::read(&lab.path("trace")))
}

// Catches: a VMM that sets the flag and does not notice that nobody reads it; a count that needs the guest's own
// account.
#[test]
fn a_guest_that_never_clears_it_is_told_of() {
    require_kvm!();
    for lapic in ["user", "kvm"] {
        let lab = Lab::new();
        let (summary, said, trace) = run(&lab, false, &format!("--lapic {lapic}"), 0);
        let found = &summary["guest_stopped"];
        let resumes = summary["migrations"].as_u64().expect("a count");
        // KVM publishes the page oftener than at resumes, so that its guest ends sooner.
        assert!(resumes >= if lapic == "user" { u64::from(RESUMES) } else { 1 }, "{summary}");
        let want = serde_json::json!({"set": resumes, "cleared": 0, "never_cleared": 1, "in_resumes": resumes});
        assert_eq!(*found, want, "{lapic}: {said}");
        assert!(said.contains(&format!("; GUEST_STOPPED never cleared in {resumes} resumes; ")), "{said}");
        let kept: Vec<u64> = trace.all("guest-stopped-kept").map(|line| line.field("resumes")).collect();
        assert_eq!(kept, (1..resumes).collect::<Vec<_>>(), "{lapic}");
    }
    let lab = Lab::new();
    let (summary, said, _) = run(&lab, false, "--fail-on stopped", 1);
    assert_eq!(summary["verdict"]["checks"]["stopped"], "fail");
    assert!(said.contains("PVCLOCK_GUEST_STOPPED was never cleared: vCPUs 1, resumes "), "{said}");
}

// Catches: a guest that clears it and is said not to, because the last resume set it again.
#[test]
fn a_guest_that_clears_it_is_not() {
    require_kvm!();
    let lab = Lab::new();
    let (summary, said, trace) = run(&lab, true, "--fail-on stopped", 0);
    let found = &summary["guest_stopped"];
    assert_eq!(found["never_cleared"], 0, "{summary}");
    assert!(found["cleared"].as_u64().expect("a count") >= 1, "{summary}");
    assert!(!said.contains("GUEST_STOPPED"), "{said}");
    assert_eq!(trace.all("guest-stopped-kept").count(), 0);
    // The embedded guest does, in virtual time: every one of them.
    let run = lab.boot("count=100", "--time virtual --migrate-every 100ms --fail-on stopped,lost");
    let found = run.summary.value("guest_stopped");
    assert_eq!(found["set"], found["cleared"], "{found}");
    assert_eq!(found["set"], run.summary.count("migrations"));
}
