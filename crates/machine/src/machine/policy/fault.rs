//! Faults that are injected into restores and stops: bugs that real VMMs had.
//!
//! A fault changes one step of [`crate::machine::Machine::resume`] and nothing else. So a change in the guest's
//! behaviour is caused by it. To add one: a variant, its line in [`InjectedFault::ALL`], its name and story, and the
//! step that it changes.

use std::{fmt, time::Duration};

use vlapic::Armed;
use vmtime::{GuestTsc, Khz, Now, PageClock, VmTime};

/// A step of the restore that is left out, done too early or done with wrong values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InjectedFault {
    /// IA32_TSC_DEADLINE is written before LVTT selects deadline mode.
    DeadlineBeforeLapic,
    /// IA32_TSC_DEADLINE is written while the TSC of the fresh vCPU still counts from 0.
    DeadlineBeforeTsc,
    /// The kvmclock page stays as it was saved.
    PageNotRepublished,
    /// PVCLOCK_GUEST_STOPPED is not set.
    NoGuestStopped,
    /// A deadline of 0, which means disarmed, is restored as "now".
    ZeroToNow,
    /// The TSC continues one second ahead of its value.
    TscJump,
    /// The page's base is a TSC that is read one millisecond after the one the guest continues with.
    PageBaseAhead,
    /// Not a restore: the host stops the VMM for this long, and the guest's clocks count on meanwhile.
    HostStop(Duration),
}

/// How far [`InjectedFault::TscJump`] jumps.
const JUMP_NS: u64 = 1_000_000_000;
/// How far the base of [`InjectedFault::PageBaseAhead`] is ahead.
const AHEAD_NS: u64 = 1_000_000;

impl InjectedFault {
    /// All that have no parameter, which is all but [`InjectedFault::HostStop`].
    pub const ALL: [Self; 7] = [
        Self::DeadlineBeforeLapic,
        Self::DeadlineBeforeTsc,
        Self::PageNotRepublished,
        Self::NoGuestStopped,
        Self::ZeroToNow,
        Self::TscJump,
        Self::PageBaseAhead,
    ];

    /// The name of [`InjectedFault::HostStop`] on the command line, without its length.
    pub const HOST_STOP: &'static str = "host-stop";

    /// The name on the command line and in results, without the length of a [`InjectedFault::HostStop`].
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DeadlineBeforeLapic => "deadline-before-lapic",
            Self::DeadlineBeforeTsc => "deadline-before-tsc",
            Self::PageNotRepublished => "page-not-republished",
            Self::NoGuestStopped => "no-guest-stopped",
            Self::ZeroToNow => "zero-to-now",
            Self::TscJump => "tsc-jump",
            Self::PageBaseAhead => "page-base-ahead",
            Self::HostStop(_) => Self::HOST_STOP,
        }
    }

    /// A description of the fault, and of the real bug that it reproduces.
    #[must_use]
    pub const fn story(self) -> &'static str {
        match self {
            Self::DeadlineBeforeLapic => {
                "the deadline MSR is written before LVTT selects deadline mode, and so ignored: the timer is lost \
                 (Firecracker issues 4099 and 4618, Cloud Hypervisor issue 7930)"
            }
            Self::DeadlineBeforeTsc => {
                "the deadline MSR is written while the fresh vCPU's TSC still counts from 0: the timer is set for the \
                 guest's whole uptime (Firecracker's DEFERRED_MSRS keep the order)"
            }
            Self::PageNotRepublished => {
                "the kvmclock page keeps the numbers of the old TSC frequency: the guest's clock runs at the wrong rate"
            }
            Self::NoGuestStopped => {
                "PVCLOCK_GUEST_STOPPED is not set at resume: the guest is not told of the gap, and its watchdogs take \
                 it for a hang (Firecracker issue 5494)"
            }
            Self::ZeroToNow => {
                "a deadline of 0 (disarmed) is restored as \"now\", as Firecracker does to survive lost interrupts: an \
                 interrupt that nobody asked for"
            }
            Self::TscJump => "the TSC goes on one second ahead of the saved value, and the page does not know",
            Self::PageBaseAhead => {
                "page and TSC are taken at different instants: the page's base is a TSC that the guest reaches only 1 \
                 ms later, and until then the unsigned difference wraps"
            }
            Self::HostStop(_) => {
                "the VMM's process is stopped (SIGSTOP, a frozen cgroup, a host that sleeps) and nobody notices: the \
                 guest's clocks go on, its timers are late, and it is not told; no migration, so --ratio is 1"
            }
        }
    }

    /// The fault of this name; a [`InjectedFault::HostStop`] has its length after `=`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let host_stop = || {
            let (name, length) = name.split_once('=')?;
            let length = humantime::parse_duration(length).ok()?;
            // At most an hour: the sweep waits for the ticks after it.
            (name == Self::HOST_STOP && (1..=3_600_000_000_000).contains(&length.as_nanos())).then_some(length)
        };
        Self::ALL.into_iter().find(|fault| fault.as_str() == name).or_else(|| host_stop().map(Self::HostStop))
    }

    /// How long the guest's clocks count on while it does not run.
    pub(crate) fn host_stop(self) -> Option<Duration> {
        match self {
            Self::HostStop(length) => Some(length),
            _ => None,
        }
    }

    /// What the timer waits for with this fault, instead of `armed`; `now` is the vCPU's, after the restore.
    pub(crate) fn armed(self, armed: Armed, deadline_mode: bool, now: Now) -> Armed {
        match (self, armed) {
            (Self::DeadlineBeforeLapic, Armed::Tsc(_)) => Armed::Disarmed,
            // The faulty host computes the time left as the distance from 0 to the deadline.
            (Self::DeadlineBeforeTsc, Armed::Tsc(at)) => Armed::Tsc(GuestTsc(now.tsc.0.saturating_add(at.0))),
            (Self::ZeroToNow, Armed::Disarmed) if deadline_mode => Armed::Tsc(GuestTsc(now.tsc.0.max(1))),
            _ => armed,
        }
    }

    /// The page that is published with this fault, instead of `page`; none = the old one stays.
    pub(crate) fn page(self, page: PageClock, khz: Khz) -> Option<PageClock> {
        match self {
            Self::PageNotRepublished | Self::HostStop(_) => None,
            Self::PageBaseAhead => Some(PageClock {
                tsc_timestamp: GuestTsc(page.tsc_timestamp.0.saturating_add(ticks(AHEAD_NS, khz))),
                system_time: VmTime(page.system_time.0.saturating_add(AHEAD_NS)),
                ..page
            }),
            _ => Some(page),
        }
    }

    /// Whether PVCLOCK_GUEST_STOPPED is set.
    pub(crate) fn sets_guest_stopped(self) -> bool {
        !matches!(self, Self::NoGuestStopped | Self::HostStop(_))
    }

    /// How far the TSC jumps, in ticks.
    pub(crate) fn tsc_jump(self, khz: Khz) -> u64 {
        if self == Self::TscJump { ticks(JUMP_NS, khz) } else { 0 }
    }
}

impl fmt::Display for InjectedFault {
    /// As [`InjectedFault::from_name`] takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HostStop(length) => write!(f, "{}={}", self.as_str(), humantime::format_duration(*length)),
            _ => f.write_str(self.as_str()),
        }
    }
}

/// Ticks in `ns` nanoseconds at `khz`.
const fn ticks(ns: u64, khz: Khz) -> u64 {
    // At most a second and 100 GHz: far from overflow.
    ns / 1000 * khz.get() as u64 / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_lead_back() {
        for fault in InjectedFault::ALL {
            assert_eq!(InjectedFault::from_name(fault.as_str()), Some(fault));
            assert!(!fault.story().is_empty());
        }
        let stop = InjectedFault::HostStop(Duration::from_millis(1500));
        assert_eq!(InjectedFault::from_name("host-stop=1500ms"), Some(stop));
        assert_eq!(InjectedFault::from_name(&stop.to_string().replace(' ', "")), Some(stop));
        for bad in ["none", "host-stop", "host-stop=", "host-stop=0s", "host-stop=2h", "tsc-jump=1s"] {
            assert_eq!(InjectedFault::from_name(bad), None, "{bad}");
        }
    }

    #[test]
    fn each_fault_changes_one_step() {
        let khz = Khz::new(2_000_000).unwrap();
        let now = Now::new(GuestTsc(500), VmTime(250));
        let page =
            PageClock { tsc_timestamp: GuestTsc(500), system_time: VmTime(250), scale: vmtime::Scale::from_khz(khz) };
        for fault in InjectedFault::ALL {
            let changes = [
                fault.armed(Armed::Tsc(GuestTsc(700)), true, now) != Armed::Tsc(GuestTsc(700)),
                fault.armed(Armed::Disarmed, true, now) != Armed::Disarmed,
                fault.page(page, khz) != Some(page),
                !fault.sets_guest_stopped(),
                fault.tsc_jump(khz) != 0,
            ];
            assert_eq!(changes.iter().filter(|changed| **changed).count(), 1, "{fault:?}");
            // Counts and nanosecond deadlines are no TSC values.
            assert_eq!(fault.armed(Armed::Ns(VmTime(9)), true, now), Armed::Ns(VmTime(9)));
            assert_eq!(fault.armed(Armed::Disarmed, false, now), Armed::Disarmed);
        }
        assert_eq!(ticks(JUMP_NS, khz), 2_000_000_000);
    }
}
