//! One stop: what it did to the guest's clocks and timers, from the pages before and after it.

use guest_abi::pvclock::TimeInfo;
use machine::guest_clock::{ResumedClocks, StoppedClocks, VcpuClock};
use serde::Serialize;
use vlapic::Armed;
use vmtime::{ExactSpan, GuestTsc, Khz, PageClock, Scale, TscAdjust, VmTime};

use super::ClockError;

/// What kind of stop it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The virtual machine was built anew.
    Migration,
    /// It stood still, and continued.
    Pause,
    /// The process was stopped to be measured, without a request: the VMM found it, and made it a pause.
    Gap,
    /// The host ran no vCPU for a while, which nobody asked for: the VMM made it a pause.
    HostStop,
}

/// A kvmclock page as the guest has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Page {
    /// Even; another one after each publication.
    pub version: u32,
    /// The TSC of the base.
    pub tsc_timestamp: u64,
    /// VM time at the base, in nanoseconds.
    pub system_time: u64,
    /// Nanoseconds per shifted tick, as a 32-bit fraction.
    pub tsc_to_system_mul: u32,
    /// The shift.
    pub tsc_shift: i8,
    /// Flags.
    pub flags: u8,
}

impl From<TimeInfo> for Page {
    fn from(info: TimeInfo) -> Self {
        let TimeInfo { version, pad0: _, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags, pad: _ } =
            info;
        Self { version, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags }
    }
}

impl Page {
    /// The page as a clock.
    pub(super) fn clock(self, cpu: usize) -> Result<PageClock, ClockError> {
        let scale = Scale::new(self.tsc_to_system_mul, self.tsc_shift)
            .map_err(|bad| ClockError::BadPage { cpu, reason: bad.to_string() })?;
        Ok(PageClock { tsc_timestamp: GuestTsc(self.tsc_timestamp), system_time: VmTime(self.system_time), scale })
    }
}

/// A timer that was armed at the stop and after it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Deadline {
    /// What it waited for: a TSC value, or a VM time in nanoseconds.
    pub before: u64,
    /// The same after the resume.
    pub after: u64,
    /// By how much later it falls due now, in VM time by the two pages' lines. A deadline that was due at the resume is
    /// not listed.
    pub shift_ns: f64,
    /// A TSC deadline: how far it is from the least TSC at which the new page's line shows the old VM time.
    pub shift_ticks: Option<i64>,
    #[serde(skip)]
    pub(super) shift: ExactSpan,
}

/// One vCPU over a stop.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VcpuStop {
    /// Its page before the stop.
    pub old: Page,
    /// Its page after it.
    pub new: Page,
    /// The new page's line at the TSC of the resume, minus the old page's at the TSC of the stop, minus the downtime.
    pub error_ns: f64,
    /// The same for what the guest reads, in whole nanoseconds. None if KVM based the page after the resume.
    pub reading_ns: Option<i64>,
    /// How far its new page is ahead of vCPU 0's, at the resume.
    pub ahead_of_first_ns: f64,
    /// The page's base is this far ahead of the TSC with which the guest continues: until the guest's TSC has reached
    /// it, the guest reads a time centuries away.
    pub base_ahead_ticks: u64,
    /// Its timer.
    pub deadline: Option<Deadline>,
    #[serde(skip)]
    pub(super) error: ExactSpan,
    #[serde(skip)]
    pub(super) ahead: ExactSpan,
}

/// One stop.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stop {
    /// Its number, from 1.
    pub number: u64,
    /// What kind.
    pub kind: Kind,
    /// VM time at the stop, by the old page of vCPU 0.
    pub vm_ns: u64,
    /// TSC frequency before.
    pub from_khz: Khz,
    /// TSC frequency after.
    pub to_khz: Khz,
    /// The TSC at the stop.
    pub stop_tsc: GuestTsc,
    /// The TSC with which the guest continued.
    pub resume_tsc: GuestTsc,
    /// How much downtime was to be counted, in nanoseconds.
    pub downtime_ns: u64,
    /// VM time that the VMM carries beyond its page: what the page's numbers cannot express.
    pub remainder_ns: f64,
    /// The same frequency, and downtime is counted: the new page minus the old one at the TSC of the resume.
    pub same_tsc_ns: Option<f64>,
    /// By number of vCPU; only those that had a page at the stop and after it.
    pub vcpus: Vec<VcpuStop>,
    #[serde(skip)]
    pub(super) same_tsc: Option<ExactSpan>,
}

/// What surrounds the pages.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// The stop's number.
    pub number: u64,
    /// What kind.
    pub kind: Kind,
    /// TSC frequency after the resume.
    pub khz: Khz,
    /// Whether downtime is counted.
    pub counts_downtime: bool,
    /// Whether KVM publishes the pages, which it does when a vCPU first enters after the resume.
    pub kvm_pages: bool,
}

/// Accounts for one stop: the clocks at it, where the guest continued, and the clocks at the next stop, which have the
/// new pages.
///
/// # Errors
/// If vCPU 0 has no page, or a page's numbers are none that a host publishes.
pub fn account(
    context: Context,
    before: &StoppedClocks,
    resumed: &ResumedClocks,
    after: &StoppedClocks,
) -> Result<Stop, ClockError> {
    let Context { number, kind, khz, counts_downtime, kvm_pages } = context;
    let (stop_tsc, resume_tsc) = (before.moment.tsc, resumed.tsc);
    let downtime = ExactSpan::of_u64_ns(resumed.adjusted.downtime_ns);
    let mut vcpus: Vec<VcpuStop> = Vec::new();
    let (mut first_line, mut vm_ns, mut same_tsc) = (None, 0, None);
    for (cpu, ((was, is), armed)) in before.vcpus.iter().zip(&after.vcpus).zip(&resumed.armed).enumerate() {
        let (Some(old), Some(new)) = (was.page.map(Page::from), is.page.map(Page::from)) else {
            if cpu == 0 {
                return Err(ClockError::NoPage(if was.page.is_none() { "at a stop" } else { "after a stop" }));
            }
            continue;
        };
        let (old_clock, new_clock) = (old.clock(cpu)?, new.clock(cpu)?);
        let own = |tsc: GuestTsc, adjust: TscAdjust| adjust.from_base(tsc);
        let (stop, resume) = (own(stop_tsc, was.tsc_adjust), own(resume_tsc, was.tsc_adjust));
        let line = new_clock.line(resume);
        let error = line - old_clock.line(stop) - downtime;
        let base_ahead_ticks = if kvm_pages { 0 } else { new_clock.tsc_timestamp.0.saturating_sub(resume.0) };
        let readable = resume >= new_clock.tsc_timestamp;
        let reading = readable.then(|| {
            let advance = i128::from(new_clock.vm_time(resume).0) - i128::from(old_clock.vm_time(stop).0);
            i64::try_from(advance - i128::from(resumed.adjusted.downtime_ns)).unwrap_or(i64::MAX)
        });
        let first = *first_line.get_or_insert(line);
        if cpu == 0 {
            vm_ns = old_clock.vm_time(stop).0;
            let comparable = counts_downtime && old_clock.scale == new_clock.scale;
            same_tsc = comparable.then(|| line - old_clock.line(resume));
        }
        vcpus.push(VcpuStop {
            old,
            new,
            error_ns: error.as_ns(),
            reading_ns: reading,
            ahead_of_first_ns: (line - first).as_ns(),
            base_ahead_ticks,
            deadline: deadline((&old_clock, was), (&new_clock, *armed), resume, line),
            error,
            ahead: line - first,
        });
    }
    Ok(Stop {
        number,
        kind,
        vm_ns,
        from_khz: before.moment.khz,
        to_khz: khz,
        stop_tsc,
        resume_tsc,
        downtime_ns: resumed.adjusted.downtime_ns,
        remainder_ns: resumed.adjusted.remainder.as_ns(),
        same_tsc_ns: same_tsc.map(ExactSpan::as_ns),
        vcpus,
        same_tsc,
    })
}

/// Compares a timer before and after. None if it was not armed, was due at the resume, or changed its mode.
fn deadline(
    (old, was): (&PageClock, &VcpuClock),
    (new, armed): (&PageClock, Armed),
    resume: GuestTsc,
    now: ExactSpan,
) -> Option<Deadline> {
    let (before, after, shift, shift_ticks) = match (was.armed, armed) {
        (Armed::Tsc(before), Armed::Tsc(after)) => {
            let due = old.line(before);
            if due <= now || after <= resume {
                return None;
            }
            (before.0, after.0, new.line(after) - due, Some(ticks_past(new, after, due)))
        }
        (Armed::Ns(before), Armed::Ns(after)) | (Armed::Count { expires: before }, Armed::Count { expires: after }) => {
            let due = ExactSpan::of_u64_ns(before.0);
            if due <= now {
                return None;
            }
            (before.0, after.0, ExactSpan::of_u64_ns(after.0) - due, None)
        }
        _ => return None,
    };
    Some(Deadline { before, after, shift_ns: shift.as_ns(), shift_ticks, shift })
}

/// How far `tsc` is past the least TSC at which the page's line shows `due` or later.
fn ticks_past(page: &PageClock, tsc: GuestTsc, due: ExactSpan) -> i64 {
    // The line never falls, so the least TSC is found by halving.
    let (mut low, mut high) = (0, u64::MAX);
    while low < high {
        let middle = low + (high - low) / 2;
        if page.line(GuestTsc(middle)) >= due { high = middle } else { low = middle.saturating_add(1) }
    }
    i64::try_from(i128::from(tsc.0) - i128::from(low)).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "account_tests.rs"]
mod tests;
