//! The instants at which a recipe's steps take effect.

use super::step::{Group, Op};

/// A step at its instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event<'a> {
    /// Nanoseconds since the vCPUs stopped, on a clock that both hosts share.
    pub at_ns: u64,
    /// The vCPU; 0 for a step of the whole VM.
    pub cpu: usize,
    /// What happens.
    pub op: &'a Op,
}

/// The steps of `groups` for `cpus` vCPUs, from the instant `start_ns`, and the instant at which the last one is over.
pub(super) fn schedule(groups: &[Group], cpus: usize, start_ns: u64) -> (Vec<Event<'_>>, u64) {
    let mut events = Vec::new();
    let mut now = start_ns;
    for group in groups {
        match group {
            Group::Vm(steps) => {
                for step in steps {
                    now = now.saturating_add(step.after_ns);
                    events.push(Event { at_ns: now, cpu: 0, op: &step.op });
                }
            }
            Group::EachCpu(steps) => {
                for cpu in 0..cpus {
                    for step in steps {
                        now = now.saturating_add(step.after_ns);
                        events.push(Event { at_ns: now, cpu, op: &step.op });
                    }
                }
            }
            Group::AllCpus(steps) => {
                for step in steps {
                    now = now.saturating_add(step.after_ns);
                    events.extend((0..cpus).map(|cpu| Event { at_ns: now, cpu, op: &step.op }));
                }
            }
        }
    }
    (events, now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::step::Step;

    // Catches: delays of a loop over vCPUs that count once, or of parallel threads that add up.
    #[test]
    fn loops_take_longer_with_more_vcpus_and_threads_do_not() {
        let step = |after_ns, op| Step { after_ns, op };
        let groups = [
            Group::EachCpu(vec![step(5, Op::GetLapic), step(2, Op::GetTscKhz)]),
            Group::Vm(vec![step(100, Op::GetClock)]),
            Group::AllCpus(vec![step(10, Op::SetLapic)]),
        ];
        let (events, end) = schedule(&groups, 2, 1000);
        let brief: Vec<_> = events.iter().map(|event| (event.at_ns, event.cpu)).collect();
        assert_eq!(brief, [(1005, 0), (1007, 0), (1012, 1), (1014, 1), (1114, 0), (1124, 0), (1124, 1)]);
        assert_eq!(end, 1124);
    }
}
