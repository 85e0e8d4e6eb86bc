//! Drives a machine from stop to stop.

mod gap;

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use machine::{
    End, HostEnvironment, LapicKind, Machine, Outputs, Policies, RunError, StopReason, TimeMode,
    boot::Image,
    check_ratio,
    guest_clock::{ResumedClocks, StoppedClocks},
    host::{job_control::Stood, reading::nanos},
    sched::mailbox::NoRequests,
};
use vmtime::{ExactSpan, Khz, VmTime};

use super::{
    ClockError, Options, Stops,
    account::{Context, Kind, Page, account},
    gaps::Observed,
    raw::RawReading,
    result::{Findings, Setup, Sums},
};

/// VM time by which the guest must have a clock and have made a tick.
const BEGINS_WITHIN_NS: u64 = 60_000_000_000;

/// KVM publishes its page when it enters a vCPU, which it does not while that is idle. So the time between two stops is
/// extended until each vCPU has made a tick, at most so often.
const LONGER: u32 = 100;

/// Measures what the stops of `options` do to the guest's clocks and timers. `progress` is called after each stop, with
/// the number of stops so far and in all. When `cancel` is set, the findings so far are returned.
///
/// # Errors
/// [`ClockError`].
pub fn measure(
    env: &HostEnvironment,
    image: &Image,
    options: &Options,
    cancel: &AtomicBool,
    progress: &dyn Fn(u64, u64),
) -> Result<Findings, ClockError> {
    let gaps = gap::sums(options)?;
    let mut machine = Machine::boot(env, image, &options.boot, Outputs::new(Box::new(io::sink()), None))?;
    machine.check_downtime(options.policies.downtime)?;
    check_cycle(env, &machine, &options.khz_cycle)?;
    let boot_khz = machine.tsc_khz();
    let mut run = Run { env, options, sums: Sums::new(options.count, gaps), open: None, missed: Vec::new() };
    run.approach(&mut machine)?;
    while run.made() < options.count && !cancel.load(Ordering::SeqCst) {
        machine = run.stop(machine)?;
        run.leg(&mut machine)?;
        progress(run.made(), options.count);
    }
    let last = RawReading::take(&machine);
    machine.pause()?;
    run.stopped(&machine, last)?;
    let setup = setup(image, options, &machine, boot_khz);
    Ok(run.sums.findings(setup, machine.vm_time(), machine.tick_summary()))
}

fn setup(image: &Image, options: &Options, machine: &Machine, tsc_khz: Khz) -> Setup {
    let Options { boot, stops, count, every, khz_cycle, policies, inject } = options;
    Setup {
        guest: image.name().to_owned(),
        cmdline: boot.cmdline.clone(),
        cpus: boot.cpus,
        lapic: match boot.lapic {
            LapicKind::User => "user",
            LapicKind::Kvm => "kvm",
        },
        time: boot.time.as_str(),
        source: machine.tsc_source().as_str(),
        tsc_khz,
        khz_cycle: khz_cycle.clone(),
        stops: match stops {
            Stops::Migrations => "migrations",
            Stops::InPlace => "migrations in place",
            Stops::Pauses(_) => "pauses",
            Stops::Gaps(_) => "gaps",
        },
        wanted: *count,
        every_ns: nanos(*every),
        deadline: policies.deadline.as_str(),
        downtime: policies.downtime.as_str(),
        fault: inject.clone(),
        kvm_ioctls: machine.kvm_clock_ioctls(),
    }
}

/// Checks all frequencies, so that an impossible one is reported before the guest runs.
fn check_cycle(env: &HostEnvironment, machine: &Machine, cycle: &[Khz]) -> Result<(), ClockError> {
    let mut present = machine.tsc_khz();
    // The first frequency follows the last one again.
    for khz in cycle.iter().chain(cycle.first()) {
        check_ratio(present, *khz)?;
        machine.check_source(env, *khz)?;
        present = *khz;
    }
    Ok(())
}

/// Ticks handled so far, by number of vCPU; none where there is no tick ring.
fn ticks(machine: &Machine) -> Vec<Option<u64>> {
    (0..machine.cpu_count()).map(|cpu| machine.ticks_handled(cpu)).collect()
}

/// A stop whose new pages are not known yet: they are read at the next stop.
struct Open {
    kind: Kind,
    khz: Khz,
    before: StoppedClocks,
    resumed: ResumedClocks,
    /// Before the stop and after it.
    raw: (Option<RawReading>, Option<RawReading>),
    /// If it is a gap: what the process saw of it, and the length that the VMM found.
    gap: Option<(Stood, Duration)>,
}

struct Run<'a> {
    env: &'a HostEnvironment,
    options: &'a Options,
    sums: Sums,
    open: Option<Open>,
    /// Gaps that the VMM did not find, and whose page is not read yet.
    missed: Vec<Observed>,
}

impl Run<'_> {
    /// Stops so far, the last of which may be open; or gaps, if that is what was asked for.
    fn made(&self) -> u64 {
        let stops = || self.sums.count.saturating_add(u64::from(self.open.is_some()));
        self.sums.gaps.as_ref().map_or_else(stops, |gaps| gaps.made)
    }

    /// Runs until the guest has a clock and, if it has a tick ring, has made a tick.
    fn approach(&mut self, machine: &mut Machine) -> Result<(), ClockError> {
        machine.resume(&Policies::default())?;
        loop {
            self.leg(machine)?;
            let ready = !machine.announces_ring() || machine.ticks_handled(0).is_some_and(|ticks| ticks > 0);
            if ready || machine.vm_time().0 > BEGINS_WITHIN_NS {
                return Ok(());
            }
        }
    }

    /// Runs for the time between two stops.
    fn leg(&mut self, machine: &mut Machine) -> Result<(), ClockError> {
        let every = nanos(self.options.every);
        let mut until = VmTime(machine.vm_time().0.saturating_add(every));
        let mut before = ticks(machine);
        let mut longer = 0;
        loop {
            match machine.run(&NoRequests, Some(until))? {
                StopReason::Reached | StopReason::Requested => {
                    if self.published(&before, machine) || longer == LONGER {
                        return Ok(());
                    }
                    longer += 1;
                    until = VmTime(machine.vm_time().0.saturating_add(every));
                }
                StopReason::HostStopped { .. } => {
                    self.found(machine, &before, (Kind::HostStop, None, None))?;
                    before = ticks(machine);
                }
                StopReason::Ended(end) => return Err(self.ended(end)),
            }
        }
    }

    fn ended(&self, end: End) -> ClockError {
        ClockError::GuestEnded { stops: self.made(), wanted: self.options.count, end }
    }

    /// Resumes after a gap that the VMM found: the machine is paused as of its beginning. `before`: as for
    /// [`Self::published`]. Then what is known of the gap: its kind, a reading from before it, what the process saw.
    fn found(
        &mut self,
        machine: &mut Machine,
        before: &[Option<u64>],
        (kind, last, gap): (Kind, Option<RawReading>, Option<(Stood, Duration)>),
    ) -> Result<(), ClockError> {
        // The gap's length was measured. One that is given for the other stops does not apply.
        let policies = Policies { downtime_length: None, ..self.options.policies.clone() };
        if self.published(before, machine) {
            let clocks = self.stopped(machine, last)?;
            machine.resume(&policies)?;
            self.opened(kind, clocks, machine, last);
            if let Some(open) = &mut self.open {
                open.gap = gap;
            }
        } else {
            // There is no page between the last stop and this one.
            let last = u64::from(self.open.take().is_some());
            self.sums.unaccounted = self.sums.unaccounted.saturating_add(last + 1);
            machine.resume(&policies)?;
        }
        Ok(())
    }

    /// Whether each vCPU's page in memory is that of the last resume, if each had made the ticks `before` then.
    fn published(&self, before: &[Option<u64>], machine: &Machine) -> bool {
        let ticked = || before.iter().zip(ticks(machine)).all(|(before, now)| before.is_none() || *before < now);
        self.options.boot.lapic == LapicKind::User || ticked()
    }

    /// Stops the machine, and lets it continue.
    fn stop(&mut self, mut machine: Machine) -> Result<Machine, ClockError> {
        let env = self.env;
        match self.options.stops {
            Stops::Migrations => self.requested(machine, Kind::Migration, |machine, khz, policies| {
                machine.migrate(env, khz, policies).map(|(machine, _)| machine)
            }),
            Stops::InPlace => self.requested(machine, Kind::Migration, |mut machine, khz, policies| {
                machine.resume_at(khz, policies)?;
                Ok(machine)
            }),
            Stops::Pauses(length) => self.requested(machine, Kind::Pause, |mut machine, khz, policies| {
                let mut policies = policies.clone();
                match machine.time_mode() {
                    TimeMode::Real => thread::sleep(length),
                    TimeMode::Virtual => policies.downtime_length = policies.downtime_length.or(Some(length)),
                }
                machine.resume_at(khz, &policies)?;
                Ok(machine)
            }),
            Stops::Gaps(_) => {
                self.gap(&mut machine)?;
                Ok(machine)
            }
        }
    }

    /// Pauses the machine, and lets `resume` continue it with a TSC frequency.
    fn requested(
        &mut self,
        mut machine: Machine,
        kind: Kind,
        resume: impl FnOnce(Machine, Khz, &Policies) -> Result<Machine, RunError>,
    ) -> Result<Machine, ClockError> {
        let cycle = &self.options.khz_cycle;
        let turn = self.made() % u64::try_from(cycle.len().max(1)).unwrap_or(1);
        let next = usize::try_from(turn).ok().and_then(|turn| cycle.get(turn)).copied();
        let khz = next.unwrap_or_else(|| machine.tsc_khz());
        let last = RawReading::take(&machine);
        machine.pause()?;
        let before = self.stopped(&machine, last)?;
        let machine = resume(machine, khz, &self.options.policies)?;
        self.opened(kind, before, &machine, last);
        Ok(machine)
    }

    /// The clocks of the machine, which is paused. They have the new pages of the stop before, whose account is closed.
    fn stopped(&mut self, machine: &Machine, last: Option<RawReading>) -> Result<StoppedClocks, ClockError> {
        let clocks = machine.stopped_clocks()?.ok_or(ClockError::NoPage("because the machine runs"))?;
        if let (Some(gaps), Some(page)) = (&mut self.sums.gaps, clocks.vcpus.first().and_then(|vcpu| vcpu.page)) {
            for missed in self.missed.drain(..) {
                let page = Page::from(page).clock(0)?;
                gaps.add(&missed, &page, &page);
            }
        }
        let Some(Open { kind, khz, before, resumed, raw: (raw_before, raw_after), gap }) = self.open.take() else {
            return Ok(clocks);
        };
        let counts_downtime = self.options.policies.downtime.advances();
        let kvm_pages = self.options.boot.lapic == LapicKind::Kvm;
        let number = self.sums.count.saturating_add(1);
        let stop = account(Context { number, kind, khz, counts_downtime, kvm_pages }, &before, &resumed, &clocks)?;
        if let Some(first) = stop.vcpus.first() {
            let (old, new) = (first.old.clock(0)?, first.new.clock(0)?);
            let ticks = clocks.moment.tsc.0.saturating_sub(resumed.tsc.0);
            let shown = new.line(clocks.moment.tsc) - new.line(resumed.tsc);
            self.sums.rate = self.sums.rate + shown - ExactSpan::of_ticks(ticks, khz);
            if let (Some(gaps), Some((stood, length)), Some(from), Some(after)) =
                (&mut self.sums.gaps, gap, raw_before, raw_after)
            {
                let found = Some((length, before.moment.tsc));
                gaps.add(&Observed { stood, before: from, after, found }, &old, &new);
            }
            if let (Some(begin), Some(end)) = (raw_after, last) {
                let leg = begin.until(&new, &end, &new);
                let stood = raw_before.filter(|_| counts_downtime).map(|stop| stop.until(&old, &begin, &new));
                self.sums.raw.add(leg + stood.unwrap_or_default(), number);
                self.sums.raw_within_ns = self.sums.raw_within_ns.max(begin.within_ns.max(end.within_ns));
            }
        }
        self.sums.add(stop);
        Ok(clocks)
    }

    /// Notes a stop after which the machine continues.
    fn opened(&mut self, kind: Kind, before: StoppedClocks, machine: &Machine, last: Option<RawReading>) {
        let raw = (last, RawReading::take(machine));
        let khz = machine.tsc_khz();
        self.open =
            machine.resumed_clocks().cloned().map(|resumed| Open { kind, khz, before, resumed, raw, gap: None });
    }
}
