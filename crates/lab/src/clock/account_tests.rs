use machine::guest_clock::VcpuClock;
use vmtime::{Adjusted, Moment, Remainder};

use super::*;

const KHZ: u32 = 2_000_000;

/// A page at half a nanosecond a tick.
fn info(tsc: u64, ns: u64) -> TimeInfo {
    TimeInfo {
        version: 2,
        tsc_timestamp: tsc,
        system_time: ns,
        tsc_to_system_mul: 1 << 31,
        tsc_shift: 0,
        ..TimeInfo::default()
    }
}

fn stopped(tsc: u64, pages: &[(TimeInfo, Armed)]) -> StoppedClocks {
    let khz = Khz::new(u64::from(KHZ)).unwrap();
    let page = Page::from(pages[0].0).clock(0).unwrap();
    let moment = Moment {
        tsc: GuestTsc(tsc),
        vm: page.vm_time(GuestTsc(tsc)),
        khz,
        page,
        remainder: Remainder::ZERO,
        wall_ns: 0,
        tai_offset_s: None,
        wall_error_ns: None,
    };
    let vcpu =
        |(info, armed): &(TimeInfo, Armed)| VcpuClock { page: Some(*info), armed: *armed, tsc_adjust: TscAdjust::ZERO };
    StoppedClocks { moment, vcpus: pages.iter().map(vcpu).collect() }
}

fn resumed(tsc: u64, downtime_ns: u64, armed: &[Armed]) -> ResumedClocks {
    let page = Page::from(info(0, 0)).clock(0).unwrap();
    let adjusted =
        Adjusted { tsc: GuestTsc(tsc), vm: VmTime(0), page, remainder: Remainder::ZERO, downtime_ns, clamped: false };
    ResumedClocks { tsc: GuestTsc(tsc), adjusted, armed: armed.to_vec() }
}

fn context() -> Context {
    let khz = Khz::new(u64::from(KHZ)).unwrap();
    Context { number: 1, kind: Kind::Pause, khz, counts_downtime: false, kvm_pages: false }
}

const IDLE: Armed = Armed::Disarmed;
const OLD: TimeInfo = TimeInfo {
    version: 2,
    pad0: 0,
    tsc_timestamp: 0,
    system_time: 0,
    tsc_to_system_mul: 1 << 31,
    tsc_shift: 0,
    flags: 0,
    pad: [0; 2],
};

/// The account of one vCPU that stopped at TSC 1000 (500 ns) and continued at TSC 3000 with `new`.
fn one(new: TimeInfo, downtime_ns: u64) -> Stop {
    let (before, after) = (stopped(1000, &[(OLD, IDLE)]), stopped(9000, &[(new, IDLE)]));
    account(context(), &before, &resumed(3000, downtime_ns, &[IDLE]), &after).unwrap()
}

// Catches: an error with the wrong sign, or in which the downtime is left out.
#[test]
fn the_error_is_what_the_pages_say_beyond_the_downtime() {
    let found = one(info(3000, 500), 0);
    assert_eq!((found.vm_ns, found.vcpus[0].error_ns, found.vcpus[0].reading_ns), (500, 0.0, Some(0)));
    let found = one(info(3000, 507), 0);
    assert_eq!((found.vcpus[0].error_ns, found.vcpus[0].reading_ns), (7.0, Some(7)));
    // A thousand nanoseconds were to be counted, and two are missing.
    let found = one(info(3000, 1498), 1000);
    assert_eq!((found.vcpus[0].error_ns, found.vcpus[0].reading_ns), (-2.0, Some(-2)));
    // Half a nanosecond, which no reading shows.
    let found = one(info(2999, 500), 0);
    assert_eq!((found.vcpus[0].error_ns, found.vcpus[0].reading_ns), (0.5, Some(0)));
}

// Catches: a base that the guest's TSC has not reached, taken for a good page because it lies on the line.
#[test]
fn a_base_ahead_of_the_tsc_is_seen_and_not_read() {
    let ahead = info(3100, 550);
    let found = one(ahead, 0);
    assert_eq!((found.vcpus[0].error_ns, found.vcpus[0].reading_ns, found.vcpus[0].base_ahead_ticks), (0.0, None, 100));
    // KVM bases its page when a vCPU first enters, which is later.
    let (before, after) = (stopped(1000, &[(OLD, IDLE)]), stopped(9000, &[(ahead, IDLE)]));
    let kvm = Context { kvm_pages: true, ..context() };
    let found = account(kvm, &before, &resumed(3000, 0, &[IDLE]), &after).unwrap();
    assert_eq!((found.vcpus[0].error_ns, found.vcpus[0].base_ahead_ticks), (0.0, 0));
}

// Catches: a catch-up measured by the VMM's own downtime, which would agree with itself.
#[test]
fn where_downtime_counts_both_pages_are_compared_at_one_tsc() {
    let counts = Context { counts_downtime: true, ..context() };
    let stop = |new: TimeInfo, downtime| {
        let (before, after) = (stopped(1000, &[(OLD, IDLE)]), stopped(9000, &[(new, IDLE)]));
        account(counts, &before, &resumed(3000, downtime, &[IDLE]), &after).unwrap()
    };
    // The VMM says 990 ns; its page agrees, but the TSC counted 2000 ticks, which are 1000 ns.
    let found = stop(info(3000, 1490), 990);
    assert_eq!((found.same_tsc_ns, found.vcpus[0].error_ns), (Some(-10.0), 0.0));
    let other_scale = TimeInfo { tsc_shift: 1, ..info(3000, 1500) };
    assert_eq!(stop(other_scale, 1000).same_tsc_ns, None);
    assert_eq!(one(info(3000, 500), 0).same_tsc_ns, None);
}

// Catches: a vCPU whose page is off, hidden behind vCPU 0's.
#[test]
fn each_vcpu_has_its_account() {
    let before = stopped(1000, &[(OLD, IDLE), (OLD, IDLE)]);
    let after = stopped(9000, &[(info(3000, 500), IDLE), (info(3000, 530), IDLE)]);
    let found = account(context(), &before, &resumed(3000, 0, &[IDLE, IDLE]), &after).unwrap();
    let vcpus: Vec<(f64, f64)> = found.vcpus.iter().map(|vcpu| (vcpu.error_ns, vcpu.ahead_of_first_ns)).collect();
    assert_eq!(vcpus, [(0.0, 0.0), (30.0, 30.0)]);
}

// Catches: a shift in ticks of the wrong page, a deadline that was due taken for one that moved by the whole stop.
#[test]
fn a_deadline_is_compared_in_vm_time_and_in_ticks() {
    let deadline = |armed, then| {
        let before = stopped(1000, &[(OLD, armed)]);
        let after = stopped(9000, &[(info(3000, 500), IDLE)]);
        account(context(), &before, &resumed(3000, 0, &[then]), &after).unwrap().vcpus[0].deadline
    };
    let tsc = |tsc| Armed::Tsc(GuestTsc(tsc));
    // 2000 ticks are 1000 ns: on the new page that is TSC 4000.
    let found = deadline(tsc(2000), tsc(4000)).unwrap();
    assert_eq!((found.before, found.after, found.shift_ns, found.shift_ticks), (2000, 4000, 0.0, Some(0)));
    let found = deadline(tsc(2000), tsc(4003)).unwrap();
    assert_eq!((found.shift_ns, found.shift_ticks), (1.5, Some(3)));
    assert_eq!(deadline(tsc(900), tsc(3000)), None);
    assert_eq!(deadline(tsc(2000), IDLE), None);
    let found = deadline(Armed::Ns(VmTime(700)), Armed::Ns(VmTime(699))).unwrap();
    assert_eq!((found.shift_ns, found.shift_ticks), (-1.0, None));
}

#[test]
fn without_a_page_there_is_no_account() {
    let before = stopped(1000, &[(OLD, IDLE)]);
    let mut after = before.clone();
    after.vcpus[0].page = None;
    let error = account(context(), &before, &resumed(3000, 0, &[IDLE]), &after).unwrap_err();
    assert!(matches!(error, ClockError::NoPage("after a stop")), "{error}");
    after.vcpus[0].page = Some(TimeInfo { tsc_to_system_mul: 5, ..OLD });
    let error = account(context(), &before, &resumed(3000, 0, &[IDLE]), &after).unwrap_err();
    assert!(error.to_string().contains("vCPU 0"), "{error}");
}
