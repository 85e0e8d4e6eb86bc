//! The APIC timer: one counter, four ways to set it.
//!
//! One-shot and periodic mode count VM time: the bus clock is 1 GHz, a cycle one nanosecond, as KVM's is. TSC-deadline
//! mode compares with the guest TSC, or with VM time when the deadline came through the nanosecond MSR. What is armed
//! is kept as an absolute instant, never as "started at": a save and restore then cannot restart a period, and whoever
//! restores sees exactly which instants there are to convert.
//!
//! An instant beyond the last one that a `u64` can hold (VM time of 584 years) never comes: such a count stops.

use serde::{Deserialize, Serialize};

use crate::time::{GuestTsc, Now, VmTime};

/// The instant at which something is due, on the clock that it is defined on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// When the guest TSC reaches this value.
    Tsc(GuestTsc),
    /// When VM time reaches this value.
    Vm(VmTime),
}

/// What the timer waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
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
    pub(super) armed: Armed,
    /// TMICT.
    pub(super) initial_count: u32,
    /// TDCR.
    pub(super) divide: u32,
}

impl Timer {
    /// Nanoseconds in a tick.
    fn tick_ns(&self) -> u64 {
        tick_ns(self.divide)
    }

    /// Takes the timer to `now`; says whether it expired on the way.
    ///
    /// However many periods have passed, they are one expiry: the IRR could hold no more of them either.
    pub(super) fn expire(&mut self, mode: Mode, now: Now) -> bool {
        let next = match self.armed {
            Armed::Tsc(deadline) if now.tsc >= deadline => Armed::Disarmed,
            Armed::Ns(deadline) if now.vm >= deadline => Armed::Disarmed,
            Armed::Count { expires } if now.vm >= expires => match mode {
                Mode::Periodic => self.next_period(expires, now.vm),
                Mode::OneShot | Mode::Deadline => Armed::Disarmed,
            },
            Armed::Disarmed | Armed::Tsc(_) | Armed::Ns(_) | Armed::Count { .. } => return false,
        };
        self.armed = next;
        true
    }

    /// The first end of a period after `now`, in phase with the one at `expired`.
    fn next_period(&self, expired: VmTime, now: VmTime) -> Armed {
        // 32 bits times at most 128: no overflow.
        let period = u64::from(self.initial_count) * self.tick_ns();
        now.0
            .saturating_sub(expired.0)
            .checked_div(period)
            .and_then(|missed| missed.checked_add(1)?.checked_mul(period)?.checked_add(expired.0))
            .map_or(Armed::Disarmed, |expires| Armed::Count { expires: VmTime(expires) })
    }

    /// TMCCT at `now`, to which the timer has been taken.
    ///
    /// The count drops at the end of each tick, so that a part of a tick counts as one and 0 is read at expiry, not
    /// before. A clock that went backwards cannot make it exceed the initial count.
    pub(super) fn current_count(&self, now: Now) -> u32 {
        match self.armed {
            Armed::Count { expires } => {
                let ticks = expires.0.saturating_sub(now.vm.0).div_ceil(self.tick_ns());
                u32::try_from(ticks).map_or(self.initial_count, |ticks| ticks.min(self.initial_count))
            }
            Armed::Disarmed | Armed::Tsc(_) | Armed::Ns(_) => 0,
        }
    }

    /// A write of TMICT: starts the count, and 0 stops it. Ignored in deadline mode.
    pub(super) fn write_initial_count(&mut self, mode: Mode, count: u32, now: Now) {
        if mode == Mode::Deadline {
            return;
        }
        self.initial_count = count;
        self.armed = match u64::from(count) * self.tick_ns() {
            0 => Armed::Disarmed,
            ns => Self::count_from(now, Some(ns)),
        };
    }

    /// A write of TDCR: the ticks that are left, a part of one included, now take longer or less long.
    pub(super) fn write_divide(&mut self, divide: u32, now: Now) {
        let old = u128::from(self.tick_ns());
        self.divide = divide;
        if let Armed::Count { expires } = self.armed {
            let left = u128::from(expires.0.saturating_sub(now.vm.0));
            // At most 64 + 7 bits. Rounded up, so that the last tick is not cut short.
            let left = (left * u128::from(self.tick_ns())).div_ceil(old);
            self.armed = Self::count_from(now, u64::try_from(left).ok());
        }
    }

    fn count_from(now: Now, ns: Option<u64>) -> Armed {
        ns.and_then(|ns| now.vm.0.checked_add(ns))
            .map_or(Armed::Disarmed, |expires| Armed::Count { expires: VmTime(expires) })
    }

    /// LVTT goes from one mode to another.
    ///
    /// Crossing into or out of deadline mode disarms. One-shot and periodic differ only in what happens at expiry, so
    /// that the count goes on.
    pub(super) fn change_mode(&mut self, from: Mode, to: Mode) {
        if (from == Mode::Deadline) != (to == Mode::Deadline) {
            self.armed = Armed::Disarmed;
        }
    }

    /// A write of IA32_TSC_DEADLINE.
    pub(super) fn write_tsc_deadline(&mut self, mode: Mode, value: u64) {
        self.write_deadline(mode, value, Armed::Tsc(GuestTsc(value)));
    }

    /// A write of the nanosecond deadline MSR.
    pub(super) fn write_ns_deadline(&mut self, mode: Mode, value: u64) {
        self.write_deadline(mode, value, Armed::Ns(VmTime(value)));
    }

    fn write_deadline(&mut self, mode: Mode, value: u64, armed: Armed) {
        if mode == Mode::Deadline {
            self.armed = if value == 0 { Armed::Disarmed } else { armed };
        }
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
            Armed::Tsc(deadline) => Some(Deadline::Tsc(deadline)),
            Armed::Ns(deadline) => Some(Deadline::Vm(deadline)),
            Armed::Count { expires } => Some(Deadline::Vm(expires)),
        }
    }
}
