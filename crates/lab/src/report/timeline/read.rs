//! Reads a trace.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, BufRead, Read},
};

use machine::blame::{Blame, Blamed};
use serde::Deserialize;
use vlapic::Armed;
use vmtime::{DeadlinePolicy, DowntimePolicy, GuestTsc, Khz, PageClock, VmTime};

use super::{Change, EARLY_SHOWN, PageRow, Tick, Timeline};

/// Limit for the length of a line. Lines that `vmm` writes are far shorter.
const LINE_MAX: u64 = 1 << 20;
/// Injections kept of one vCPU that no tick has been matched with yet.
const UNMATCHED_MAX: usize = 4096;
/// How far an injection's VM time by the page may be from that by the reference clock: the page drifts by up to 1 ppb.
const CLOCKS_AGREE_NS: u64 = 1_000;

/// A trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot read the trace: {0}")]
    Io(#[from] io::Error),
    /// A line is not one of a trace.
    #[error("line {line} of the trace is none of ours: {source}")]
    Line {
        /// Its number, from 1.
        line: u64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A line does not end.
    #[error("line {line} of the trace is longer than {LINE_MAX} bytes")]
    LongLine {
        /// Its number, from 1.
        line: u64,
    },
}

impl Blamed for TraceError {
    fn blame(&self) -> Blame {
        match self {
            // The trace is one that a run has just written.
            Self::Io(_) | Self::Line { .. } | Self::LongLine { .. } => Blame::Run,
        }
    }
}

/// The fields of a line that are used. The trace may be of any version of `vmm`: unknown events and fields are skipped.
#[derive(Deserialize)]
struct Line {
    tsc: GuestTsc,
    vm_ns: VmTime,
    cpu: u32,
    #[serde(flatten)]
    event: Event,
}

#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event {
    Boot {
        tsc_khz: Khz,
    },
    Inject {
        vector: u8,
    },
    Tick {
        expires_ns: u64,
        fired_ns: u64,
        host_ns: Option<u64>,
        early_wakes: u32,
    },
    Save {
        tsc_khz: Khz,
        page: PageClock,
        page_version: u32,
        armed: Option<Armed>,
    },
    Restore {
        tsc_khz: Khz,
        page: PageClock,
        page_version: u32,
        armed: Option<Armed>,
        deadline: DeadlinePolicy,
        downtime: DowntimePolicy,
        downtime_ns: u64,
    },
    Renew {
        page: PageClock,
    },
    #[serde(other)]
    Other,
}

/// Injections of one vCPU that no tick has been matched with, oldest first: VM time and vector.
type Unmatched = VecDeque<(u64, u8)>;

impl Timeline {
    /// Reads a trace to its end. Several traces of one guest, one after the other, are one timeline.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn read(&mut self, trace: impl BufRead) -> Result<(), TraceError> {
        let mut trace = trace;
        let mut text = Vec::new();
        let mut unmatched = BTreeMap::new();
        for line in 1.. {
            text.clear();
            if trace.by_ref().take(LINE_MAX).read_until(b'\n', &mut text)? == 0 {
                break;
            }
            if text.last() != Some(&b'\n') && u64::try_from(text.len()).is_ok_and(|length| length == LINE_MAX) {
                return Err(TraceError::LongLine { line });
            }
            let event = serde_json::from_slice(&text).map_err(|source| TraceError::Line { line, source })?;
            self.line(event, &mut unmatched);
        }
        Ok(())
    }

    fn line(&mut self, line: Line, unmatched: &mut BTreeMap<u32, Unmatched>) {
        let Line { tsc, vm_ns: at, cpu, event } = line;
        match event {
            Event::Boot { tsc_khz } => self.khz = Some(tsc_khz),
            Event::Inject { vector } => {
                let injected = unmatched.entry(cpu).or_default();
                if injected.len() == UNMATCHED_MAX {
                    injected.pop_front();
                }
                injected.push_back((at.0, vector));
            }
            Event::Tick { expires_ns, fired_ns, host_ns, early_wakes } => {
                let early_ns = host_ns.map(|host_ns| take_matched(unmatched.entry(cpu).or_default(), host_ns));
                let mut early_ns = early_ns.unwrap_or_default();
                early_ns.retain(|at| *at < expires_ns);
                // Only the last `early_wakes` belong to this tick, by the guest's count. Others are left from a tick
                // that was not matched.
                let own = usize::try_from(early_wakes).unwrap_or(usize::MAX);
                early_ns.drain(..early_ns.len().saturating_sub(own));
                early_ns.truncate(EARLY_SHOWN);
                self.tick(Tick { expires_ns, fired_ns, host_ns, early_ns, early_wakes });
            }
            Event::Save { tsc_khz, page, page_version, armed } => {
                let (khz, version) = (Some(tsc_khz), Some(page_version));
                self.page(PageRow { change: Change::Save, at, tsc, khz, version, page, armed });
            }
            Event::Restore { tsc_khz, page, page_version, armed, deadline, downtime, downtime_ns } => {
                self.restored(at, tsc_khz);
                let change = Change::Restore { deadline, downtime, downtime_ns };
                let (khz, version) = (Some(tsc_khz), Some(page_version));
                self.page(PageRow { change, at, tsc, khz, version, page, armed });
            }
            Event::Renew { page } => {
                self.page(PageRow { change: Change::Renew, at, tsc, khz: None, version: None, page, armed: None });
            }
            Event::Other => {}
        }
    }
}

/// Removes the injections up to `host_ns`, when the host injected the tick's last interrupt. Returns the times of the
/// earlier ones with the same vector. If the tick's own injection is not in the list, nothing is removed.
fn take_matched(injected: &mut Unmatched, host_ns: u64) -> Vec<u64> {
    let last = injected.iter().rposition(|(at, _)| at.abs_diff(host_ns) <= CLOCKS_AGREE_NS);
    let Some(last) = last else { return Vec::new() };
    let mut taken: Vec<(u64, u8)> = injected.drain(..=last).collect();
    let Some((_, vector)) = taken.pop() else { return Vec::new() };
    taken.into_iter().filter(|(_, of)| *of == vector).map(|(at, _)| at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a trace of our own that cannot be read, reported as a wrong command line.
    #[test]
    fn a_trace_is_the_runs() {
        let source = serde_json::from_str::<u8>("x").unwrap_err();
        let errors =
            [io::Error::other("x").into(), TraceError::Line { line: 1, source }, TraceError::LongLine { line: 1 }];
        assert!(errors.iter().all(|error| error.blame() == Blame::Run));
    }

    fn timeline(lines: &[String]) -> Result<Timeline, TraceError> {
        let mut timeline = Timeline::default();
        timeline.read(lines.concat().as_bytes())?;
        Ok(timeline)
    }

    fn inject(vm_ns: u64, vector: u8) -> String {
        format!("{{\"tsc\":1,\"vm_ns\":{vm_ns},\"cpu\":0,\"event\":\"inject\",\"vector\":{vector}}}\n")
    }

    fn tick(expires_ns: u64, fired_ns: u64, host_ns: u64, early_wakes: u32) -> String {
        format!(
            "{{\"tsc\":1,\"vm_ns\":{fired_ns},\"cpu\":0,\"event\":\"tick\",\"seq\":0,\"expires_ns\":{expires_ns},\
             \"fired_ns\":{fired_ns},\"host_ns\":{host_ns},\"early_wakes\":{early_wakes}}}\n"
        )
    }

    fn restore(vm_ns: u64) -> String {
        format!(
            "{{\"tsc\":9,\"vm_ns\":{vm_ns},\"cpu\":0,\"event\":\"restore\",\"tsc_khz\":1300000,\"page\":{{\"tsc_timestamp\":9,\
             \"system_time\":{vm_ns},\"scale\":{{\"mul\":3303820996,\"shift\":0}}}},\"page_version\":4,\"armed\":{{\"tsc\":5}},\
             \"deadline\":\"rescale\",\"downtime\":\"freeze\",\"downtime_ns\":0,\"clamped\":false}}\n"
        )
    }

    #[test]
    fn early_wakes_are_the_injections_of_the_ticks_own_vector_before_it() {
        let halt = "{\"tsc\":1,\"vm_ns\":1,\"cpu\":0,\"event\":\"halt\"}\n".to_owned();
        let lines = [
            inject(4_000_000, 64),
            inject(5_000_000, 64),
            inject(6_000_000, 99),
            inject(7_500_000, 64),
            halt,
            inject(10_000_300, 64),
            tick(10_000_000, 10_002_000, 10_000_000, 2),
            tick(20_000_000, 20_002_000, 20_000_000, 0),
        ];
        let timeline = timeline(&lines).unwrap();
        let ticks: Vec<&Tick> = timeline.overview.ticks().collect();
        assert_eq!(ticks[0].early_ns, [5_000_000, 7_500_000]);
        assert!(ticks[1].early_ns.is_empty());
        assert_eq!((timeline.ticks, timeline.early_wakes), (2, 2));
    }

    #[test]
    fn ticks_around_a_migration_are_kept_and_no_more() {
        let ticks =
            |range: std::ops::Range<u64>| range.map(|n| tick(n * 1_000_000, n * 1_000_000 + 5, n * 1_000_000, 0));
        let mut lines: Vec<String> = ticks(1..100).collect();
        for round in 0..30 {
            lines.push(restore(100_000_000 + round));
            lines.extend(ticks(100..200));
        }
        let timeline = timeline(&lines).unwrap();
        assert_eq!(timeline.migrations.len(), crate::report::timeline::MIGRATIONS_SHOWN);
        assert_eq!(timeline.more_migrations, 18);
        let first = &timeline.migrations[0];
        assert_eq!(
            (first.before.len(), first.after.len()),
            (crate::report::timeline::BEFORE, crate::report::timeline::AFTER)
        );
        assert_eq!((first.before[15].expires_ns, first.after[0].expires_ns), (99_000_000, 100_000_000));
        assert_eq!(timeline.pages.len(), 30);
    }

    #[test]
    fn what_is_no_trace_is_refused_by_its_line() {
        let torn = [inject(1, 64), "{\"tsc\":1".to_owned()];
        assert!(matches!(timeline(&torn), Err(TraceError::Line { line: 2, .. })));
        let endless = "x".repeat(2 << 20);
        assert!(matches!(timeline(&[endless]), Err(TraceError::LongLine { line: 1 })));
        let shift = restore(1).replace("\"shift\":0", "\"shift\":99");
        assert!(matches!(timeline(&[shift]), Err(TraceError::Line { line: 1, .. })));
    }
}
