//! The APIC timer: one counter, four ways to set it.
//!
//! One-shot and periodic mode count VM time: the bus clock is 1 GHz, a cycle one nanosecond, as KVM's is. TSC-deadline
//! mode compares with the guest TSC, or with VM time when the deadline came through the nanosecond MSR. What is armed
//! is kept as an absolute instant, never as "started at": a save and restore then cannot restart a period, and a VMM
//! that restores sees exactly which instants there are to convert.
//!
//! The guest TSC wraps at 2^64, and a guest may write it to just below. A deadline before the wrap would be lost if the
//! TSC were compared with it after. So beside the deadline there is the base TSC at which it is due, which does not
//! wrap: it is made when the deadline is armed, and anew when the guest moves its TSC.
//!
//! A period is [`LEAST_PERIOD_NS`] at least. A guest could else ask for one that is shorter than its own handler, and
//! would never get past it; in virtual time, where an operation takes a microsecond, nor would anything else happen.
//!
//! An instant beyond the last one that a `u64` can hold (VM time of 584 years) never comes: such a count stops.

use vmtime::{GuestTsc, Now, VmTime};

use crate::TimerState;

/// The shortest period of periodic mode, in VM time: KVM's default (`min_timer_period_us`, Linux
/// `arch/x86/kvm/lapic.c`). A shorter one becomes as long as this, from its first expiry on. One-shot counts and
/// deadlines are as short as the guest asks for: it must do something for each of them.
pub const LEAST_PERIOD_NS: u64 = 200_000;

/// The instant at which something is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// When the base TSC ([`Now::base`]) reaches this value.
    Tsc(GuestTsc),
    /// When VM time reaches this value.
    Vm(VmTime),
}

/// What the timer waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", deny_unknown_fields))]
pub enum Armed {
    /// Nothing.
    #[default]
    Disarmed,
    /// IA32_TSC_DEADLINE: a guest TSC value. It means another instant when the TSC's frequency changes.
    Tsc(GuestTsc),
    /// The nanosecond deadline MSR: a VM time, whatever the TSC's frequency.
    Ns(VmTime),
    /// One-shot or periodic mode: the count reaches 0 at this VM time. The remaining count follows from it, and the
    /// next period from the initial count and the divide configuration.
    Count {
        /// When the current count ends.
        expires: VmTime,
    },
}

/// LVTT bits 18:17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    Deadline,
}

/// LVTT bit 18, which is reserved on a processor without deadlines.
pub(super) const LVTT_DEADLINE: u32 = 1 << 18;
/// LVTT's mode field.
pub(super) const LVTT_MODE: u32 = LVTT_DEADLINE | 1 << 17;

impl Mode {
    /// The mode in an LVTT value; none for the reserved 11b.
    pub(super) const fn of_lvtt(lvtt: u32) -> Option<Self> {
        match lvtt >> 17 & 0b11 {
            0b00 => Some(Self::OneShot),
            0b01 => Some(Self::Periodic),
            0b10 => Some(Self::Deadline),
            _ => None,
        }
    }
}

/// Nanoseconds in a tick of the count, with `divide` in TDCR (SDM vol. 3, "Divide Configuration Register": bits 3, 1, 0
/// give 2, 4, …, 128, and 1).
#[must_use]
pub const fn tick_ns(divide: u32) -> u64 {
    let code = divide >> 1 & 0b100 | divide & 0b11;
    1 << ((code + 1) & 0b111)
}

/// The timer's own registers. Its LVT entry is in the table with the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timer {
    armed: Armed,
    /// The base TSC at which [`Armed::Tsc`] is due; none for one that lies behind the base TSC's end, which never
    /// comes, and with nothing of the kind armed.
    due: Option<GuestTsc>,
    /// TMICT.
    pub(super) initial_count: u32,
    /// TDCR.
    pub(super) divide: u32,
}

impl Timer {
    /// A timer that waits for nothing.
    pub(super) const fn idle(initial_count: u32, divide: u32) -> Self {
        Self { armed: Armed::Disarmed, due: None, initial_count, divide }
    }

    /// What it waits for.
    pub(super) const fn armed(&self) -> Armed {
        self.armed
    }

    /// What is saved of it. When a deadline is due follows from the deadline and the clocks at the restore.
    pub(super) const fn state(&self) -> TimerState {
        let Self { armed, due: _, initial_count, divide } = *self;
        TimerState { armed, initial_count, divide }
    }

    /// Waits for `armed` from `now` on.
    pub(super) fn arm(&mut self, armed: Armed, now: Now) {
        self.armed = armed;
        self.due = match armed {
            Armed::Tsc(deadline) => due(deadline, now),
            Armed::Disarmed | Armed::Ns(_) | Armed::Count { .. } => None,
        };
    }

    /// The CPU's TSC was moved to what `now` says. Take the timer to the same instant before the move first.
    pub(super) fn tsc_moved(&mut self, now: Now) {
        self.arm(self.armed, now);
    }

    /// Nanoseconds in a tick.
    fn tick_ns(&self) -> u64 {
        tick_ns(self.divide)
    }

    /// Takes the timer to `now`; says whether it expired on the way.
    ///
    /// However many periods have passed, they are one expiry: the IRR could hold no more of them either.
    pub(super) fn expire(&mut self, mode: Mode, now: Now) -> bool {
        let next = match self.armed {
            Armed::Tsc(_) if self.due.is_some_and(|due| now.base >= due) => Armed::Disarmed,
            Armed::Ns(deadline) if now.vm >= deadline => Armed::Disarmed,
            Armed::Count { expires } if now.vm >= expires => match mode {
                Mode::Periodic => self.next_period(expires, now.vm),
                Mode::OneShot | Mode::Deadline => Armed::Disarmed,
            },
            Armed::Disarmed | Armed::Tsc(_) | Armed::Ns(_) | Armed::Count { .. } => return false,
        };
        self.arm(next, now);
        true
    }

    /// The first end of a period after `now`, in phase with the one at `expired`.
    fn next_period(&self, expired: VmTime, now: VmTime) -> Armed {
        let period = self.count_ns(Mode::Periodic);
        now.0
            .saturating_sub(expired.0)
            .checked_div(period)
            .and_then(|missed| missed.checked_add(1)?.checked_mul(period)?.checked_add(expired.0))
            .map_or(Armed::Disarmed, |expires| Armed::Count { expires: VmTime(expires) })
    }

    /// How long the initial count takes in `mode`; 0 if it is 0.
    fn count_ns(&self, mode: Mode) -> u64 {
        // 32 bits times at most 128: no overflow.
        match (u64::from(self.initial_count) * self.tick_ns(), mode) {
            (ns @ 1.., Mode::Periodic) => ns.max(LEAST_PERIOD_NS),
            (ns, _) => ns,
        }
    }

    /// TMCCT at `now`, to which the timer has been taken.
    ///
    /// The count drops at the end of each tick, so that a part of a tick counts as one and 0 is read at expiry, not
    /// before. Neither a clock that went backwards nor a period that was made longer makes it exceed the initial count.
    pub(super) fn current_count(&self, now: Now) -> u32 {
        match self.armed {
            Armed::Count { expires } => {
                let ticks = expires.0.saturating_sub(now.vm.0).div_ceil(self.tick_ns());
                u32::try_from(ticks).map_or(self.initial_count, |ticks| ticks.min(self.initial_count))
            }
            Armed::Disarmed | Armed::Tsc(_) | Armed::Ns(_) => 0,
        }
    }

    /// A write of TMICT: starts the count, and 0 stops it. Ignored in deadline mode. Returns what it waits for, if it
    /// was not ignored, as the writes below do.
    pub(super) fn write_initial_count(&mut self, mode: Mode, count: u32, now: Now) -> Option<Armed> {
        if mode == Mode::Deadline {
            return None;
        }
        self.initial_count = count;
        let armed = match self.count_ns(mode) {
            0 => Armed::Disarmed,
            ns => Self::count_from(now, Some(ns)),
        };
        self.arm(armed, now);
        Some(armed)
    }

    /// A write of TDCR: the ticks that are left, a part of one included, now take longer or less long. What a period
    /// was made longer by is no ticks, and stays.
    pub(super) fn write_divide(&mut self, divide: u32, now: Now) -> Option<Armed> {
        let old = self.tick_ns();
        self.divide = divide;
        let Armed::Count { expires } = self.armed else { return None };
        let left = expires.0.saturating_sub(now.vm.0);
        // At most 32 + 7 bits, and 7 more when multiplied.
        let ticks = left.min(u64::from(self.initial_count) * old);
        // Rounded up, so that the last tick is not cut short.
        let longer = (ticks * self.tick_ns()).div_ceil(old);
        self.arm(Self::count_from(now, (left - ticks).checked_add(longer)), now);
        Some(self.armed)
    }

    fn count_from(now: Now, ns: Option<u64>) -> Armed {
        ns.and_then(|ns| now.vm.0.checked_add(ns))
            .map_or(Armed::Disarmed, |expires| Armed::Count { expires: VmTime(expires) })
    }

    /// LVTT goes from one mode to another.
    ///
    /// Crossing into or out of deadline mode disarms. One-shot and periodic differ only in what happens at expiry, so
    /// that the count goes on.
    pub(super) fn change_mode(&mut self, from: Mode, to: Mode, now: Now) -> Option<Armed> {
        ((from == Mode::Deadline) != (to == Mode::Deadline)).then(|| {
            self.arm(Armed::Disarmed, now);
            Armed::Disarmed
        })
    }

    /// A write of IA32_TSC_DEADLINE.
    pub(super) fn write_tsc_deadline(&mut self, mode: Mode, value: u64, now: Now) -> Option<Armed> {
        self.write_deadline(mode, value, Armed::Tsc(GuestTsc(value)), now)
    }

    /// A write of the nanosecond deadline MSR.
    pub(super) fn write_ns_deadline(&mut self, mode: Mode, value: u64, now: Now) -> Option<Armed> {
        self.write_deadline(mode, value, Armed::Ns(VmTime(value)), now)
    }

    fn write_deadline(&mut self, mode: Mode, value: u64, armed: Armed, now: Now) -> Option<Armed> {
        (mode == Mode::Deadline).then(|| {
            let armed = if value == 0 { Armed::Disarmed } else { armed };
            self.arm(armed, now);
            armed
        })
    }

    /// IA32_TSC_DEADLINE as it reads.
    pub(super) const fn tsc_deadline(&self) -> u64 {
        match self.armed {
            Armed::Tsc(deadline) => deadline.0,
            Armed::Disarmed | Armed::Ns(_) | Armed::Count { .. } => 0,
        }
    }

    /// The nanosecond deadline MSR as it reads.
    pub(super) const fn ns_deadline(&self) -> u64 {
        match self.armed {
            Armed::Ns(deadline) => deadline.0,
            Armed::Disarmed | Armed::Tsc(_) | Armed::Count { .. } => 0,
        }
    }

    /// When the timer expires next.
    pub(super) const fn next_deadline(&self) -> Option<Deadline> {
        match self.armed {
            Armed::Disarmed => None,
            Armed::Tsc(_) => match self.due {
                Some(due) => Some(Deadline::Tsc(due)),
                None => None,
            },
            Armed::Ns(deadline) => Some(Deadline::Vm(deadline)),
            Armed::Count { expires } => Some(Deadline::Vm(expires)),
        }
    }
}

/// The base TSC at which a TSC that reads `now.tsc` at `now.base` reaches `deadline` without wrapping; 0 if that would
/// have been before the base TSC began.
fn due(deadline: GuestTsc, now: Now) -> Option<GuestTsc> {
    let passed = now.tsc.0.saturating_sub(deadline.0);
    let left = deadline.0.saturating_sub(now.tsc.0);
    now.base.0.saturating_sub(passed).checked_add(left).map(GuestTsc)
}

#[cfg(test)]
mod tests {
    use guest_abi::{
        lapic,
        msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE},
        ns_deadline,
    };

    use super::*;
    use crate::{Config, LocalApic};

    const DEADLINE_MODE: u64 = 1 << 18;

    // Catches: a write that arms, disarms or changes the timer and does not say so; one that was ignored and says so;
    // a deadline in the past, which is over when the write returns, that goes untold.
    #[test]
    fn a_write_says_what_the_timer_then_waits_for() {
        let config =
            Config { id: 0, bsp: true, x2apic: true, tsc_deadline: true, ns_deadline: true, physical_bits: 36 };
        let mut apic = LocalApic::new(config);
        let now = Now::new(GuestTsc(1000), VmTime(500));
        let base = apic.apic_base();
        let mut told = |index, value| apic.msr_write(index, value, now).unwrap().timer;
        assert_eq!(told(IA32_APIC_BASE, base | 1 << 10), None);
        let [lvtt, count, divide] = [lapic::LVTT, lapic::TMICT, lapic::TDCR].map(lapic::x2apic_msr);
        assert_eq!(told(IA32_TSC_DEADLINE, 5000), None);
        // A divide configuration of 0 is 2 ns.
        assert_eq!(told(count, 10), Some(Armed::Count { expires: VmTime(520) }));
        assert_eq!(told(divide, 0b1011), Some(Armed::Count { expires: VmTime(510) }));
        assert_eq!(told(lvtt, DEADLINE_MODE | 0x40), Some(Armed::Disarmed));
        assert_eq!(told(count, 10), None);
        assert_eq!(told(divide, 0), None);
        assert_eq!(told(IA32_TSC_DEADLINE, 5000), Some(Armed::Tsc(GuestTsc(5000))));
        assert_eq!(told(ns_deadline::MSR, 600), Some(Armed::Ns(VmTime(600))));
        assert_eq!(told(IA32_TSC_DEADLINE, 999), Some(Armed::Tsc(GuestTsc(999))));
        assert_eq!(told(IA32_TSC_DEADLINE, 0), Some(Armed::Disarmed));
        assert_eq!(told(IA32_APIC_BASE, base & !(1 << 11)), Some(Armed::Disarmed));
        assert_eq!(apic.next_deadline(), None);
    }
}
