//! Stops the process while the machine runs, without a request to pause.

use std::time::Duration;

use machine::{
    Machine, StopReason, TimeMode,
    host::{job_control::SelfStop, reading::nanos},
    sched::mailbox::NoRequests,
};
use vmtime::VmTime;

use super::{
    super::{
        ClockError, Options, Stops,
        account::Kind,
        gaps::{Gaps, Observed},
        raw::RawReading,
    },
    Run, ticks,
};

/// Where the gaps are summed up; none if the stops are others.
pub(super) fn sums(options: &Options) -> Result<Option<Gaps>, ClockError> {
    match options.stops {
        Stops::Gaps(_) if options.boot.time == TimeMode::Virtual => Err(ClockError::Usage(
            "--gaps needs --time real: virtual time does not follow the host's clocks, so a process that is stopped makes \
             no gap in it; use --pauses"
                .to_owned(),
        )),
        Stops::Gaps(length) => Ok(Some(Gaps::new(length))),
        Stops::Migrations | Stops::InPlace | Stops::Pauses(_) => Ok(None),
    }
}

/// How long the first run is beyond the delay until SIGSTOP, in VM time.
const BEYOND: Duration = Duration::from_millis(100);

/// How long the machine runs before SIGSTOP, if there were `made` gaps before: from 1 to 100 ms, and each of these once
/// in a hundred. A vCPU that runs is interrupted every 100 ms, and a default guest's tick comes every 10 ms: SIGSTOP
/// falls anywhere in both.
fn delay(made: u64) -> Duration {
    Duration::from_millis((made % 100) * 37 % 100 + 1)
}

impl Run<'_> {
    /// Runs the machine while the process is stopped and continues.
    pub(super) fn gap(&mut self, machine: &mut Machine) -> Result<(), ClockError> {
        let every = nanos(self.options.every);
        let delay = delay(self.made());
        let last = RawReading::take(machine);
        let stop = SelfStop::after(delay).map_err(ClockError::NoStop)?;
        let mut before = Vec::new();
        // Long enough for SIGSTOP to come within the first run. The VMM notes the time at each beginning of a run, so
        // that a gap soon after one is taken to begin with the greatest delay.
        let mut run_for = nanos(delay.saturating_add(BEYOND));
        let found = loop {
            // A process that has continued before this run finds the gap in it, or not at all.
            let over = stop.is_over();
            let until = VmTime(machine.vm_time().0.saturating_add(run_for));
            run_for = every;
            match machine.run(&NoRequests, Some(until))? {
                StopReason::Reached | StopReason::Requested if over => break None,
                StopReason::Reached | StopReason::Requested => {}
                StopReason::HostStopped { length } if stop.has_begun() => break Some(length),
                StopReason::HostStopped { .. } => {
                    self.found(machine, &before, (Kind::HostStop, None, None))?;
                    before = ticks(machine);
                }
                StopReason::Ended(end) => return Err(self.ended(end)),
            }
        };
        let stood = stop.wait();
        if let Some(gaps) = &mut self.sums.gaps {
            gaps.note(found.is_some());
        }
        match (found, last, RawReading::take(machine)) {
            (Some(length), ..) => self.found(machine, &before, (Kind::Gap, last, Some((stood, length))))?,
            (None, Some(before), Some(after)) => self.missed.push(Observed { stood, before, after, found: None }),
            // The clocks could not be read together.
            (None, ..) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: delays that are all at one place between two ticks, or between two interruptions of a vCPU.
    #[test]
    fn delays_are_everywhere_in_a_tenth_of_a_second() {
        let mut delays: Vec<u128> = (500..600).map(|made| delay(made).as_millis()).collect();
        assert!(delays.windows(2).all(|two| two[0].abs_diff(two[1]) > 30), "{delays:?}");
        delays.sort_unstable();
        assert!(delays.into_iter().eq(1..=100));
    }
}
