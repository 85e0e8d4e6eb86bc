//! What a measurement found.

use machine::{audit::Summary, guest_clock::ClockIoctls};
use serde::Serialize;
use vmtime::{ExactSpan, Khz, VmTime};

use super::{
    account::{Deadline, Kind, Stop},
    gaps::{GapFindings, Gaps},
    series::{Series, Statistics},
};

/// Version of the layout of the JSON.
pub const SCHEMA: &str = "vmm-clock/1";

/// The most stops that are listed one by one. Of more, every n-th is.
const LISTED: u64 = 10_000;

/// What was asked for, and by whom it was done.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Setup {
    /// The guest's image.
    pub guest: String,
    /// Its command line.
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// `user` or `kvm`.
    pub lapic: &'static str,
    /// `real` or `virtual`.
    pub time: &'static str,
    /// The TSC source at the end.
    pub source: &'static str,
    /// TSC frequency at boot.
    pub tsc_khz: Khz,
    /// The frequencies of the stops, in turn; empty: it does not change.
    pub khz_cycle: Vec<Khz>,
    /// `migrations`, `migrations in place`, `pauses` or `gaps`.
    pub stops: &'static str,
    /// How many were asked for.
    pub wanted: u64,
    /// VM time between two, in nanoseconds.
    pub every_ns: u64,
    /// Deadline policy.
    pub deadline: &'static str,
    /// Downtime policy.
    pub downtime: &'static str,
    /// The fault that was injected.
    pub fault: Option<String>,
    /// Which of the ioctls that are proposed for an exact move of its kvmclock KVM has; none if the VMM publishes the
    /// pages.
    pub kvm_ioctls: Option<ClockIoctls>,
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Findings {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// What was asked for.
    pub setup: Setup,
    /// All stops were made.
    pub complete: bool,
    /// How many were.
    pub count: u64,
    /// Those among them that nobody asked for: the host ran no vCPU for a while.
    pub host_stops: u64,
    /// Stops without an account: the host stopped the process before KVM had published a page after the stop before.
    pub unaccounted: u64,
    /// The gaps, if that is what was asked for. One that the VMM did not find is no stop.
    pub gaps: Option<GapFindings>,
    /// VM time at the end, in nanoseconds.
    pub vm_ns: u64,
    /// VM time error of each stop, of vCPU 0.
    pub error: Option<Statistics>,
    /// Error of what the guest reads, in whole nanoseconds.
    pub reading: Option<Statistics>,
    /// Where the TSC counts on and downtime is counted: new page minus old page at the same TSC.
    pub same_tsc: Option<Statistics>,
    /// VM time minus CLOCK_MONOTONIC_RAW, while VM time was to run. Real time only.
    pub raw: Option<Statistics>,
    /// How far a CLOCK_MONOTONIC_RAW reading may be from the TSC reading beside it, at worst.
    pub raw_within_ns: u64,
    /// How far the pages of other vCPUs were ahead of vCPU 0's: the farthest of each stop.
    pub between_vcpus: Option<Statistics>,
    /// Deadlines in flight: by how much they were shifted.
    pub deadlines: Option<Statistics>,
    /// TSC deadlines among them that were not at the least TSC of their VM time: the farthest, in ticks.
    pub deadline_ticks: Option<i64>,
    /// The deadline that was in flight at most stops.
    pub longest: Option<Longest>,
    /// Between stops: VM time by the pages minus ticks over the frequency, in all.
    pub rate_ns: f64,
    /// The remainder that the VMM carries after the last stop.
    pub remainder_ns: f64,
    /// Stops after which the guest read less than before.
    pub went_back: u64,
    /// Stops after which a page's base was ahead of the TSC.
    pub bases_ahead: u64,
    /// What the guest's ticks came to, if it has a tick ring.
    pub ticks: Option<Summary>,
    /// Each n-th stop is listed.
    pub every_nth: u64,
    /// The stops.
    pub stops: Vec<Stop>,
    /// The stop with the largest error.
    pub worst: Option<Stop>,
}

impl Findings {
    /// How many of the stops that were asked for were made.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.gaps.as_ref().map_or(self.count, |gaps| gaps.made)
    }

    /// The figures that there are, with a name each.
    pub fn series(&self) -> impl Iterator<Item = (&'static str, &Statistics)> {
        [
            ("VM time", &self.error),
            ("guest's reading", &self.reading),
            ("new - old page at one TSC", &self.same_tsc),
            ("VM time - MONOTONIC_RAW", &self.raw),
            ("pages ahead of vCPU 0's", &self.between_vcpus),
            ("deadlines in flight, shift", &self.deadlines),
        ]
        .into_iter()
        .filter_map(|(name, series)| Some((name, series.as_ref()?)))
    }
}

/// A deadline that was in flight at several stops in a row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Longest {
    /// How many.
    pub stops: u64,
    /// When it was armed first: a TSC value or a VM time.
    pub first: u64,
    /// After the last of the stops.
    pub last: u64,
    /// By how much it was shifted in all.
    pub shift_ns: f64,
}

/// The sums while the measurement goes on.
#[derive(Debug, Default)]
pub(super) struct Sums {
    pub count: u64,
    host_stops: u64,
    pub unaccounted: u64,
    pub gaps: Option<Gaps>,
    error: Series,
    reading: Series,
    same_tsc: Series,
    pub raw: Series,
    pub raw_within_ns: u64,
    between_vcpus: Series,
    deadlines: Series,
    deadline_ticks: Option<i64>,
    /// Of vCPU 0: the deadline in flight since, the stops that it survived, and its shift.
    flight: Option<(Deadline, u64, ExactSpan)>,
    longest: Option<Longest>,
    pub rate: ExactSpan,
    remainder_ns: f64,
    went_back: u64,
    bases_ahead: u64,
    every_nth: u64,
    stops: Vec<Stop>,
    worst: Option<Stop>,
}

impl Sums {
    pub(super) fn new(wanted: u64, gaps: Option<Gaps>) -> Self {
        Self { gaps, every_nth: wanted.div_ceil(LISTED).max(1), ..Self::default() }
    }

    /// Adds a stop.
    pub(super) fn add(&mut self, stop: Stop) {
        let number = stop.number;
        self.count = self.count.saturating_add(1);
        self.host_stops = self.host_stops.saturating_add(u64::from(stop.kind == Kind::HostStop));
        self.remainder_ns = stop.remainder_ns;
        if let Some(same_tsc) = stop.same_tsc {
            self.same_tsc.add(same_tsc, number);
        }
        let (mut back, mut ahead) = (false, false);
        for vcpu in &stop.vcpus {
            if let Some(deadline) = vcpu.deadline {
                self.deadlines.add(deadline.shift, number);
                if let Some(ticks) = deadline.shift_ticks
                    && self.deadline_ticks.is_none_or(|farthest| ticks.unsigned_abs() > farthest.unsigned_abs())
                {
                    self.deadline_ticks = Some(ticks);
                }
            }
            ahead |= vcpu.base_ahead_ticks > 0;
            let advance = vcpu.reading_ns.map(|ns| i128::from(ns) + i128::from(stop.downtime_ns));
            back |= advance.is_some_and(|advance| advance < 0);
        }
        self.went_back = self.went_back.saturating_add(u64::from(back));
        self.bases_ahead = self.bases_ahead.saturating_add(u64::from(ahead));
        if let Some(first) = stop.vcpus.first() {
            self.error.add(first.error, number);
            if let Some(reading) = first.reading_ns {
                self.reading.add(ExactSpan::of_ns(reading), number);
            }
            self.follow(first.deadline);
        }
        if stop.vcpus.len() > 1 {
            let farthest = stop.vcpus.iter().map(|vcpu| vcpu.ahead).max_by_key(|ahead| ahead.abs());
            self.between_vcpus.add(farthest.unwrap_or_default(), number);
        }
        let size = |stop: &Stop| stop.vcpus.first().map_or(ExactSpan::ZERO, |vcpu| vcpu.error.abs());
        if self.worst.as_ref().is_none_or(|worst| size(&stop) > size(worst)) {
            self.worst = Some(stop.clone());
        }
        if number.saturating_sub(1).is_multiple_of(self.every_nth) {
            self.stops.push(stop);
        }
    }

    /// Follows vCPU 0's deadline from stop to stop.
    fn follow(&mut self, deadline: Option<Deadline>) {
        self.flight = deadline.map(|now| match self.flight {
            Some((first, stops, shift)) if first.after == now.before => {
                (Deadline { before: first.before, ..now }, stops.saturating_add(1), shift + now.shift)
            }
            _ => (now, 1, now.shift),
        });
        if let Some((deadline, stops, shift)) = self.flight
            && self.longest.is_none_or(|longest| stops > longest.stops)
        {
            let Deadline { before: first, after: last, .. } = deadline;
            self.longest = Some(Longest { stops, first, last, shift_ns: shift.as_ns() });
        }
    }

    /// What they come to.
    pub(super) fn findings(self, setup: Setup, vm: VmTime, ticks: Option<Summary>) -> Findings {
        let gaps = self.gaps.map(Gaps::findings);
        let complete = gaps.as_ref().map_or(self.count, |gaps| gaps.made) >= setup.wanted;
        Findings {
            schema: SCHEMA,
            setup,
            complete,
            count: self.count,
            host_stops: self.host_stops,
            unaccounted: self.unaccounted,
            gaps,
            vm_ns: vm.0,
            error: self.error.statistics(),
            reading: self.reading.statistics(),
            same_tsc: self.same_tsc.statistics(),
            raw: self.raw.statistics(),
            raw_within_ns: self.raw_within_ns,
            between_vcpus: self.between_vcpus.statistics(),
            deadlines: self.deadlines.statistics(),
            deadline_ticks: self.deadline_ticks,
            longest: self.longest,
            rate_ns: self.rate.as_ns(),
            remainder_ns: self.remainder_ns,
            went_back: self.went_back,
            bases_ahead: self.bases_ahead,
            ticks,
            every_nth: self.every_nth,
            stops: self.stops,
            worst: self.worst,
        }
    }
}
