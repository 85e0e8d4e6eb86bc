//! Applies the deadline policy to an armed timer.

use vlapic::Armed;
use vmtime::{Adjusted, DeadlinePolicy, Due, GuestTsc, Moment, TscAdjust, adjust};

/// What the LAPIC timer waits for after a resume, and with a rescaled TSC deadline what the next resume needs; `due` is
/// that of an earlier one.
///
/// A count (one-shot, periodic) is an absolute VM time and keeps its meaning. So does a nanosecond deadline, unless it
/// is to fire at once. A TSC deadline is in units that just changed, and the policy says what happens to it. Under each
/// policy a deadline that the base TSC has reached meanwhile is due. That holds even if the vCPU's own TSC wrapped
/// meanwhile and now reads less than the deadline.
pub(crate) fn rearm(
    armed: Armed,
    due: Option<Due>,
    tsc_adjust: TscAdjust,
    policy: DeadlinePolicy,
    moment: &Moment,
    adjusted: &Adjusted,
) -> (Armed, Option<Due>) {
    match armed {
        Armed::Disarmed | Armed::Count { .. } => (armed, None),
        Armed::Ns(at) => (Armed::Ns(adjust::ns_deadline(policy, at, adjusted.vm)), None),
        Armed::Tsc(deadline) => {
            let here = tsc_adjust.from_base(moment.tsc);
            let there = tsc_adjust.from_base(adjusted.tsc);
            let base = GuestTsc(moment.tsc.0.saturating_add(deadline.0.saturating_sub(here.0)));
            // The deadline and both vCPU TSCs may have wrapped. So they are compared as distances from the base TSC,
            // which does not wrap. The result is never 0, which would disarm the timer.
            let (tsc, due) = match policy {
                DeadlinePolicy::Keep if base <= adjusted.tsc => (deadline.0.min(there.0), None),
                DeadlinePolicy::Keep => (deadline.0, None),
                DeadlinePolicy::Rescale | DeadlinePolicy::Fire => {
                    let (moved, due) = adjust::deadline(policy, base, due, moment, adjusted);
                    (there.0.saturating_add(moved.0.saturating_sub(adjusted.tsc.0)), due)
                }
            };
            (Armed::Tsc(GuestTsc(tsc.max(1))), due)
        }
    }
}
