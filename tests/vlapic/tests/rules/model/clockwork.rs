//! The naive timer: what is left, counted from an anchor, in integers that cannot overflow.

use vlapic::Deadline;
use vmtime::{GuestTsc, Now, VmTime};

#[derive(Clone, Debug, Default)]
pub(super) struct Clockwork {
    pub(super) initial: u32,
    pub(super) divide: u32,
    /// When the count was last looked at, and the nanoseconds that were left then.
    count: Option<(i128, i128)>,
    /// The TSC deadline as written, and as for the count: the base TSC when it was looked at, and what was left then.
    tsc: Option<(u64, i128, i128)>,
    ns: Option<i128>,
}

/// The last instant that there is: what is due later never comes.
const LAST: i128 = u64::MAX as i128;

impl Clockwork {
    fn tick(&self) -> i128 {
        match self.divide {
            0 => 2,
            1 => 4,
            2 => 8,
            3 => 16,
            8 => 32,
            9 => 64,
            10 => 128,
            11 => 1,
            other => panic!("TDCR {other:#x}"),
        }
    }

    /// Nanoseconds in a whole count; periods are 200 microseconds long, or longer.
    fn length(&self, lvtt: u32) -> i128 {
        let count = i128::from(self.initial) * self.tick();
        if lvtt >> 17 & 3 == 1 && count < 200_000 { 200_000 } else { count }
    }

    fn start(&mut self, now: Now, left: i128) {
        let at = i128::from(now.vm.0);
        self.count = (at + left <= LAST).then_some((at, left));
    }

    /// Whether it expired by now.
    pub(super) fn expire(&mut self, lvtt: u32, now: Now) -> bool {
        let (base, vm) = (i128::from(now.base.0), i128::from(now.vm.0));
        if let Some((anchor, left)) = self.count
            && vm - anchor >= left
        {
            let late = vm - anchor - left;
            self.count = None;
            if lvtt >> 17 & 3 == 1 {
                let period = self.length(lvtt);
                self.start(now, period - late % period);
            }
            return true;
        }
        let due = self.tsc.is_some_and(|(_, anchor, left)| base - anchor >= left) || self.ns.is_some_and(|at| at <= vm);
        if due {
            (self.tsc, self.ns) = (None, None);
        }
        due
    }

    pub(super) fn current(&self, now: Now) -> u32 {
        let Some((anchor, left)) = self.count else { return 0 };
        let left = (left - (i128::from(now.vm.0) - anchor)).max(0);
        let ticks = left / self.tick() + i128::from(left % self.tick() != 0);
        u32::try_from(ticks.min(i128::from(self.initial))).unwrap()
    }

    pub(super) fn write_initial(&mut self, lvtt: u32, initial: u32, now: Now) {
        if lvtt >> 18 & 1 == 1 {
            return;
        }
        self.initial = initial;
        self.count = None;
        if initial > 0 {
            self.start(now, self.length(lvtt));
        }
    }

    pub(super) fn write_divide(&mut self, divide: u32, now: Now) {
        let old = self.tick();
        self.divide = divide;
        if let Some((anchor, left)) = self.count {
            // Whole old ticks become whole new ones, and of a part of a tick the same part is left.
            // Nor is what comes before the initial count begins to drop made of ticks.
            let left = (anchor + left - i128::from(now.vm.0)).max(0);
            let before = (left - i128::from(self.initial) * old).max(0);
            let (whole, part) = ((left - before) / old, (left - before) % old);
            self.start(now, before + whole * self.tick() + (part * self.tick() + old - 1) / old);
        }
    }

    pub(super) fn write_lvtt(&mut self, from: u32, to: u32) {
        if (from ^ to) >> 18 & 1 == 1 {
            (self.count, self.tsc, self.ns) = (None, None, None);
        }
    }

    /// A write of the TSC deadline MSR, or of the nanosecond one.
    pub(super) fn write_deadline(&mut self, lvtt: u32, tsc: bool, value: u64, now: Now) {
        if lvtt >> 18 & 1 == 1 {
            (self.tsc, self.ns) = (None, None);
            match (value, tsc) {
                (0, _) => {}
                (_, true) => self.tsc = Some((value, 0, 0)),
                (_, false) => self.ns = Some(i128::from(value)),
            }
            self.tsc_moved(now);
        }
    }

    /// The TSC is what `now` says, whatever it was.
    pub(super) fn tsc_moved(&mut self, now: Now) {
        if let Some((value, anchor, left)) = &mut self.tsc {
            (*anchor, *left) = (i128::from(now.base.0), i128::from(*value) - i128::from(now.tsc.0));
        }
    }

    pub(super) fn read_deadline(&self, tsc: bool) -> u64 {
        if tsc { self.tsc.map_or(0, |(value, ..)| value) } else { u64::try_from(self.ns.unwrap_or(0)).unwrap() }
    }

    pub(super) fn next(&self) -> Option<Deadline> {
        let at = |at: i128| u64::try_from(at).unwrap();
        let count = self.count.map(|(anchor, left)| Deadline::Vm(VmTime(at(anchor + left))));
        let due = self.tsc.map(|(_, anchor, left)| (anchor + left).max(0)).filter(|due| *due <= LAST);
        let tsc = due.map(|due| Deadline::Tsc(GuestTsc(at(due))));
        let ns = self.ns.map(|due| Deadline::Vm(VmTime(at(due))));
        count.or(tsc).or(ns)
    }
}
