//! Gaps: stops of the whole process that nobody requested, and that the VMM finds afterwards or not at all.

use std::time::Duration;

use machine::host::{job_control::Stood, reading::nanos};
use serde::Serialize;
use vmtime::{ExactSpan, GuestTsc, PageClock};

use super::{
    raw::RawReading,
    series::{Series, Statistics},
};

/// One gap.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Gap {
    /// From SIGSTOP until the process ran again, by CLOCK_MONOTONIC_RAW.
    pub length_ns: u64,
    /// The length that the VMM found: from where it takes the gap to begin until it noticed. None if it did not.
    pub found_ns: Option<u64>,
    /// By how much VM time after SIGSTOP the VMM takes it to begin.
    pub late_ns: Option<f64>,
    /// VM time that passed from SIGSTOP until the guest continued, by its pages.
    pub vm_ns: f64,
    /// How much more that was than passed by CLOCK_MONOTONIC_RAW.
    pub vm_minus_raw_ns: f64,
}

/// What a gap is computed from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Observed {
    pub stood: Stood,
    /// Before SIGSTOP, while VM time ran.
    pub before: RawReading,
    /// After the guest continued.
    pub after: RawReading,
    /// The length that the VMM found, and the TSC at which it stopped VM time.
    pub found: Option<(Duration, GuestTsc)>,
}

/// Some figures of a gap, in more than whole nanoseconds.
struct Spans {
    late: Option<ExactSpan>,
    vm: ExactSpan,
    vm_minus_raw: ExactSpan,
}

impl Observed {
    /// Computes them from the page that the guest had before the gap, and the one that it had after it.
    fn spans(&self, old: &PageClock, new: &PageClock) -> Spans {
        let Self { stood: Stood { from_ns, until_ns: _ }, before, after, found } = self;
        let since_sigstop = ExactSpan::of_u64_ns(after.raw_ns) - ExactSpan::of_u64_ns(*from_ns);
        let until_sigstop = ExactSpan::of_u64_ns(*from_ns) - ExactSpan::of_u64_ns(before.raw_ns);
        // Up to SIGSTOP VM time ran as CLOCK_MONOTONIC_RAW did: what they differ by is the gap's.
        let vm_minus_raw = before.until(old, after, new);
        let late = found.map(|(_, tsc)| old.line(tsc) - old.line(before.tsc) - until_sigstop);
        Spans { late, vm: vm_minus_raw + since_sigstop, vm_minus_raw }
    }
}

/// The sums of all gaps.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    asked_ns: u64,
    pub made: u64,
    pub found: u64,
    length: Series,
    found_length: Series,
    late: Series,
    vm: Series,
    vm_minus_raw: Series,
    each: Vec<Gap>,
}

/// What the gaps came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GapFindings {
    /// How long after SIGSTOP SIGCONT was to be sent.
    pub asked_ns: u64,
    /// How many there were.
    pub made: u64,
    /// How many the VMM found.
    pub found: u64,
    /// [`Gap::length_ns`].
    pub length: Option<Statistics>,
    /// [`Gap::found_ns`].
    pub found_length: Option<Statistics>,
    /// [`Gap::late_ns`].
    pub late: Option<Statistics>,
    /// [`Gap::vm_ns`].
    pub vm: Option<Statistics>,
    /// [`Gap::vm_minus_raw_ns`].
    pub vm_minus_raw: Option<Statistics>,
    /// Each that has an account.
    pub each: Vec<Gap>,
}

impl Gaps {
    pub(super) fn new(asked: Duration) -> Self {
        Self { asked_ns: nanos(asked), ..Self::default() }
    }

    /// Notes a gap of which only is known whether the VMM found it.
    pub(super) fn note(&mut self, found: bool) {
        self.made = self.made.saturating_add(1);
        self.found = self.found.saturating_add(u64::from(found));
    }

    /// Adds the account of a gap that was noted. Pages as in [`Observed::spans`].
    pub(super) fn add(&mut self, observed: &Observed, old: &PageClock, new: &PageClock) {
        let Spans { late, vm, vm_minus_raw } = observed.spans(old, new);
        let length_ns = observed.stood.until_ns.saturating_sub(observed.stood.from_ns);
        let found_ns = observed.found.map(|(length, _)| nanos(length));
        let number = u64::try_from(self.each.len()).unwrap_or(u64::MAX).saturating_add(1);
        self.length.add(ExactSpan::of_u64_ns(length_ns), number);
        if let Some(found_ns) = found_ns {
            self.found_length.add(ExactSpan::of_u64_ns(found_ns), number);
        }
        if let Some(late) = late {
            self.late.add(late, number);
        }
        self.vm.add(vm, number);
        self.vm_minus_raw.add(vm_minus_raw, number);
        let (late_ns, vm_ns) = (late.map(ExactSpan::as_ns), vm.as_ns());
        self.each.push(Gap { length_ns, found_ns, late_ns, vm_ns, vm_minus_raw_ns: vm_minus_raw.as_ns() });
    }

    pub(super) fn findings(self) -> GapFindings {
        let Self { asked_ns, made, found, length, found_length, late, vm, vm_minus_raw, each } = self;
        GapFindings {
            asked_ns,
            made,
            found,
            length: length.statistics(),
            found_length: found_length.statistics(),
            late: late.statistics(),
            vm: vm.statistics(),
            vm_minus_raw: vm_minus_raw.statistics(),
            each,
        }
    }
}

impl GapFindings {
    /// The figures that there are, with a name each.
    pub fn series(&self) -> impl Iterator<Item = (&'static str, &Statistics)> {
        [
            ("length, by MONOTONIC_RAW", &self.length),
            ("length that the VMM found", &self.found_length),
            ("SIGSTOP to start that the VMM found", &self.late),
            ("VM time, SIGSTOP to resume", &self.vm),
            ("... minus MONOTONIC_RAW", &self.vm_minus_raw),
        ]
        .into_iter()
        .filter_map(|(name, series)| Some((name, series.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use vmtime::{Scale, VmTime};

    use super::*;

    const MS: u64 = 1_000_000;

    /// Half a nanosecond a tick, and VM time 0 at `tsc_ms`, in milliseconds of that.
    fn page(tsc_ms: u64, vm_ms: u64) -> PageClock {
        let tsc_timestamp = GuestTsc(2 * MS * tsc_ms);
        PageClock { tsc_timestamp, system_time: VmTime(MS * vm_ms), scale: Scale::new(1 << 31, 0).unwrap() }
    }

    /// At a TSC that began to count with CLOCK_MONOTONIC_RAW.
    fn reading(ms: u64) -> RawReading {
        RawReading { tsc: GuestTsc(2 * MS * ms), raw_ns: MS * ms, within_ns: 0 }
    }

    /// A gap from 105 ms until 1105 ms, in a guest that continued at 1106 ms with the page `new`.
    fn account(found: Option<(Duration, GuestTsc)>, new: PageClock) -> GapFindings {
        let stood = Stood { from_ns: 105 * MS, until_ns: 1105 * MS };
        let observed = Observed { stood, before: reading(100), after: reading(1106), found };
        let mut gaps = Gaps::new(Duration::from_secs(1));
        gaps.note(found.is_some());
        gaps.add(&observed, &page(0, 0), &new);
        gaps.findings()
    }

    // Catches: the time before SIGSTOP counted as the gap's, a beginning with the wrong sign, VM time by the old page.
    #[test]
    fn vm_time_over_a_gap_is_counted_from_sigstop() {
        // Taken to begin at 112 ms, and frozen there.
        let found = Some((Duration::from_millis(993), GuestTsc(2 * MS * 112)));
        let Gap { length_ns, found_ns, late_ns, vm_ns, vm_minus_raw_ns } = account(found, page(1106, 112)).each[0];
        assert_eq!((length_ns, found_ns, late_ns), (1000 * MS, Some(993 * MS), Some(7e6)));
        assert_eq!((vm_ns, vm_minus_raw_ns), (7e6, -994e6));
        // Caught up: the page is the old one.
        let Gap { late_ns, vm_ns, vm_minus_raw_ns, .. } = account(found, page(0, 0)).each[0];
        assert_eq!((late_ns, vm_ns, vm_minus_raw_ns), (Some(7e6), 1001e6, 0.0));
    }

    // Catches: a gap that the VMM missed, counted as found or left out.
    #[test]
    fn a_gap_that_is_not_found_has_an_account() {
        let missed = account(None, page(0, 0));
        assert_eq!((missed.made, missed.found, missed.asked_ns), (1, 0, 1000 * MS));
        assert_eq!((missed.each[0].found_ns, missed.each[0].late_ns, missed.each[0].vm_ns), (None, None, 1001e6));
        assert_eq!(missed.series().count(), 3);
    }
}
