//! Why the vCPUs stopped.
//!
//! Three enums are involved, from the inside out. [`kvm::Exit`](crate::kvm::Exit) is why KVM_RUN returned;
//! the step acts on it. `Stepped` is the result of the step; the loop around the steps acts on it. [`StopReason`] is
//! why that loop ended; the session or the sweep acts on it.

use std::time::Duration;

use vmtime::Length;

use super::cpu_index::CpuIndex;
use crate::devices::GuestExit;

/// Why the vCPUs stopped.
///
/// A vCPU's step returns it in `Stepped::Stop`, and with it the vCPU's loop ends. Where several vCPUs have stopped, the
/// strongest of their reasons is the machine's. [`Machine::run`](super::Machine::run) returns it to the session,
/// [`Stepper::run`](super::stepper::Stepper::run) to the sweep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest has ended.
    Ended(End),
    /// VM time reached the instant that the caller named.
    Reached,
    /// A request waits in the mailbox; or, for the stepper, its caller's condition holds. A vCPU's loop also ends with
    /// this when another vCPU has stopped, or when a gap as in [`Self::HostStopped`] was found.
    Requested,
    /// No vCPU ran for a while, although no pause was requested. The machine is paused, as of the beginning of that
    /// gap. Only [`Machine::run`](super::Machine::run) returns this, and only in real time.
    HostStopped {
        /// The gap's length.
        length: Duration,
    },
}

impl StopReason {
    /// The machine's reason, where one vCPU stopped for `self` and another one for `other`: the guest's end before all,
    /// the VM time reached before a request. Of two ends, that in `self`.
    #[must_use]
    pub(crate) fn or(self, other: Self) -> Self {
        match (self, other) {
            (ended @ Self::Ended(_), _) | (_, ended @ Self::Ended(_)) => ended,
            (stopped @ Self::HostStopped { .. }, _) | (_, stopped @ Self::HostStopped { .. }) => stopped,
            (Self::Reached, _) | (_, Self::Reached) => Self::Reached,
            (Self::Requested, Self::Requested) => Self::Requested,
        }
    }
}

/// Where a vCPU was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// Its number.
    pub cpu: CpuIndex,
    /// The linear address of its next instruction.
    pub address: u64,
}

/// Why the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest ended itself through a device.
    Guest(GuestExit),
    /// Triple fault of this vCPU.
    TripleFault {
        /// Its number.
        cpu: CpuIndex,
    },
    /// HLT with interrupts off: nothing can wake it. The address is that after the HLT.
    HaltedForever(At),
    /// Every CPU waits for a start-up message, so none can send it.
    AllParked,
    /// HLT in virtual time with no timer armed: nothing will wake it. The address is that after the HLT.
    NothingWillWake(At),
    /// Virtual time: the guest ran for this long without an operation, so that VM time did not advance.
    Spins {
        /// Where it was.
        at: At,
        /// The limit, in host time.
        limit: Duration,
    },
    /// The guest executes at an address without RAM.
    NoMemory(At),
    /// KVM cannot execute the guest's next instruction.
    CannotExecute {
        /// Where.
        at: At,
        /// The instruction: its bytes and its text.
        instruction: String,
        /// KVM's reason.
        reason: String,
    },
}

impl End {
    /// One line of text; `None` for an orderly end.
    #[must_use]
    pub fn message(&self) -> Option<String> {
        match self {
            Self::Guest(GuestExit::Debug(0) | GuestExit::Reset | GuestExit::PowerOff) => None,
            Self::Guest(GuestExit::Debug(code)) => Some(format!("the guest failed with code {code}")),
            Self::TripleFault { cpu } => Some(format!("cpu {cpu}: the guest's CPU shut down (triple fault)")),
            Self::HaltedForever(At { cpu, address }) => {
                Some(format!("cpu {cpu}: the guest halted at {address:#x} with interrupts off: nothing can wake it"))
            }
            Self::AllParked => Some("every CPU waits for a start-up message: none is left to send it".to_owned()),
            Self::NothingWillWake(At { cpu, address }) => Some(format!(
                "cpu {cpu}: the guest halted at {address:#x} with no timer armed: nothing will wake it in virtual time"
            )),
            Self::Spins { at: At { cpu, address }, limit } => Some(format!(
                "cpu {cpu}: the guest ran {} near {address:#x} without any operation that moves virtual time; use \
                 --time real for guests that spin, or a longer --spin-limit for one that is only slow on this host",
                Length(*limit)
            )),
            Self::NoMemory(At { cpu, address }) => {
                Some(format!("cpu {cpu}: the guest went on at {address:#x}, where there is no memory"))
            }
            Self::CannotExecute { at: At { cpu, address }, instruction, reason } => Some(format!(
                "cpu {cpu}: this host cannot execute the guest's code at {address:#x} ({instruction}): {reason}"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: the end of the guest on one vCPU, or the VM time reached, lost because another vCPU stopped for a weaker
    // reason.
    #[test]
    fn the_strongest_reason_of_two_vcpus_is_the_machines() {
        let ended = |cpu| StopReason::Ended(End::TripleFault { cpu: CpuIndex::new(cpu) });
        for other in [StopReason::Reached, StopReason::Requested] {
            assert_eq!(ended(0).or(other.clone()), ended(0));
            assert_eq!(other.or(ended(0)), ended(0));
        }
        assert_eq!(ended(0).or(ended(1)), ended(0));
        assert_eq!(StopReason::Requested.or(StopReason::Reached), StopReason::Reached);
        assert_eq!(StopReason::Reached.or(StopReason::Requested), StopReason::Reached);
        assert_eq!(StopReason::Requested.or(StopReason::Requested), StopReason::Requested);
    }
}
