//! The trace: one JSON object a line for each event. Two runs are compared by their traces.
//!
//! In virtual time a line holds nothing that differs between two runs with the same inputs.

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use serde::Serialize;
use vmtime::{DeadlinePolicy, DowntimePolicy, GuestTsc, HostTsc, Khz, Now, PageClock, VmTime};

use crate::{
    machine::{cpu_index::CpuIndex, downtime::Measured, error::RunError, lock::Ranked},
    output::{FinishLimit, Outlet, Sink, WhenFull},
};

/// An event in a trace.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event<'a> {
    /// The machine starts.
    Boot {
        /// TSC source.
        source: &'a str,
        /// Guest TSC frequency.
        tsc_khz: Khz,
    },
    /// The VMClock page was written.
    Vmclock {
        /// Its disruption marker.
        marker: u64,
        /// Its generation counter.
        generation: u64,
        /// UTC of the line's TSC, in nanoseconds since 1970.
        utc_ns: u64,
    },
    /// RDTSC at a trap site.
    Rdtsc {
        /// The site.
        rip: u64,
        /// The answer.
        value: GuestTsc,
    },
    /// RDMSR.
    MsrRead {
        /// MSR.
        index: u32,
        /// The value that the guest read; none = #GP.
        value: Option<u64>,
    },
    /// WRMSR, also at a trap site.
    MsrWrite {
        /// MSR.
        index: u32,
        /// What the guest wrote.
        value: u64,
        /// It got a #GP.
        faulted: bool,
    },
    /// IN.
    PortIn {
        /// Port.
        port: u16,
        /// What the guest got.
        #[serde(with = "hex")]
        data: &'a [u8],
    },
    /// OUT.
    PortOut {
        /// Port.
        port: u16,
        /// What the guest wrote.
        #[serde(with = "hex")]
        data: &'a [u8],
    },
    /// A load outside RAM.
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// What the guest got.
        #[serde(with = "hex")]
        data: &'a [u8],
    },
    /// A store outside RAM.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// What the guest wrote.
        #[serde(with = "hex")]
        data: &'a [u8],
    },
    /// HLT.
    Halt,
    /// An interrupt enters the guest.
    Inject {
        /// Its vector.
        vector: u8,
    },
    /// The guest finished a tick.
    Tick {
        /// Its number.
        seq: u64,
        /// When it was to fire.
        expires_ns: u64,
        /// When it fired, by the guest.
        fired_ns: u64,
        /// When its interrupt was injected, by the host's reference clock.
        host_ns: Option<u64>,
        /// Interrupts that came too early.
        early_wakes: u32,
    },
    /// The host ran no vCPU for a while, although no pause was requested. That is treated as a pause, which begins
    /// here.
    HostStop {
        /// The gap's length, in nanoseconds of host time.
        gap_ns: u64,
    },
    /// A resume finds PVCLOCK_GUEST_STOPPED still set in the vCPU's kvmclock page, and it was never cleared so far.
    GuestStoppedKept {
        /// Resumes at which it was set.
        resumes: u64,
    },
    /// The clocks at a save.
    Save {
        /// Guest TSC frequency.
        tsc_khz: Khz,
        /// The page's numbers.
        page: PageClock,
        /// Version of the published page.
        page_version: u32,
        /// What the LAPIC timer waits for.
        armed: Option<vlapic::Armed>,
    },
    /// The clocks at a restore; `tsc` and `vm_ns` of the line are those the guest continues with.
    Restore {
        /// Guest TSC frequency.
        tsc_khz: Khz,
        /// The page's numbers.
        page: PageClock,
        /// Version of the published page.
        page_version: u32,
        /// What the LAPIC timer waits for, after the deadline policy was applied.
        armed: Option<vlapic::Armed>,
        /// Deadline policy.
        deadline: DeadlinePolicy,
        /// Downtime policy.
        downtime: DowntimePolicy,
        /// How far VM time advanced while saved, in nanoseconds.
        downtime_ns: u64,
        /// The wall clock had been set back, and the downtime was taken as zero.
        clamped: bool,
        /// The vCPU's steal time, if the downtime was added to it.
        #[serde(skip_serializing_if = "Option::is_none")]
        steal_ns: Option<u64>,
        /// How the downtime was measured, if it was.
        #[serde(flatten)]
        measured: Option<Measured>,
    },
    /// The page got a new base; VM time does not change.
    Renew {
        /// The page's numbers.
        page: PageClock,
    },
    /// The run ends.
    End {
        /// Why.
        reason: &'a str,
    },
}

#[derive(Serialize)]
struct Line<'a> {
    tsc: GuestTsc,
    vm_ns: VmTime,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_tsc: Option<HostTsc>,
    cpu: CpuIndex,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

/// A trace file, or nothing.
#[derive(Default)]
pub struct Trace {
    file: Option<(PathBuf, Ranked<Output, 11>)>,
}

enum Output {
    /// A file, whose writes do not block, and the first error.
    File(BufWriter<Sink>, Option<io::Error>),
    /// A pipe or a device, whose reader may be slow.
    Outlet(Outlet),
}

/// How many bytes are buffered for a slow reader. When the buffer is full the vCPUs wait, so that no event is lost.
const LIMIT: usize = 1 << 20;

impl Trace {
    /// Traces to a new file at `path`.
    ///
    /// # Errors
    /// [`RunError::Trace`] if it cannot be created.
    pub fn to_file(path: &Path) -> Result<Self, RunError> {
        let sink = Sink::create(path).map_err(|source| RunError::Trace { path: path.display().to_string(), source })?;
        Ok(Self::to_sink(sink, path.to_owned()))
    }

    fn to_sink(sink: Sink, name: PathBuf) -> Self {
        let output = if sink.can_stall() {
            Output::Outlet(Outlet::new(sink, LIMIT, WhenFull::Wait))
        } else {
            Output::File(BufWriter::new(sink), None)
        };
        Self { file: Some((name, Ranked::new(output))) }
    }

    /// Traces to standard output.
    ///
    /// # Errors
    /// [`RunError::Trace`] if there is none.
    pub fn to_stdout() -> Result<Self, RunError> {
        let sink = Sink::inherited(io::stdout());
        let sink = sink.map_err(|source| RunError::Trace { path: "-".to_owned(), source })?;
        Ok(Self::to_sink(sink, PathBuf::from("-")))
    }

    /// Writes one line.
    pub fn event(&self, cpu: CpuIndex, now: Now, host_tsc: Option<HostTsc>, event: &Event<'_>) {
        let Some((_, output)) = &self.file else { return };
        let line = Line { tsc: now.tsc, vm_ns: now.vm, host_tsc, cpu, event };
        match &mut *output.lock() {
            Output::File(_, Some(_)) => {}
            Output::File(writer, failed) => {
                let written = serde_json::to_writer(&mut *writer, &line).map_err(io::Error::from);
                // A full disk must not change what the guest sees: the run continues, and `finish` returns the error.
                *failed = written.and_then(|()| writer.write_all(b"\n")).err();
            }
            Output::Outlet(outlet) => {
                if let Ok(mut line) = serde_json::to_vec(&line) {
                    line.push(b'\n');
                    outlet.put(&line);
                }
            }
        }
    }

    /// Its buffered output, if its reader may be slow.
    pub(crate) fn outlet(&self) -> Option<Outlet> {
        let (_, output) = self.file.as_ref()?;
        match &*output.lock() {
            Output::File(..) => None,
            Output::Outlet(outlet) => Some(outlet.clone()),
        }
    }

    /// Whether events are written; if not, callers need not build them.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.file.is_some()
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    /// The first write that failed.
    pub fn finish(&self, limit: FinishLimit) -> Result<(), RunError> {
        let Some((path, output)) = &self.file else { return Ok(()) };
        let result = match &mut *output.lock() {
            Output::File(writer, failed) => failed.take().map_or_else(|| writer.flush(), Err),
            Output::Outlet(outlet) => outlet.finish(limit),
        };
        result.map_err(|source| RunError::Trace { path: path.display().to_string(), source })
    }
}
