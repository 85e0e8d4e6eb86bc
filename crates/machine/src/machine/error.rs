//! What can go wrong while a machine is made, runs, or is saved.

use vmtime::{AdjustError, Khz};

use crate::{
    blame::{Blame, Blamed},
    boot::{ImageError, sites::SiteError},
    host::kick::TimerError,
    kvm::{self, HostError},
    mem::ram::RamError,
};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// KVM or the host.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The trap sites of a saved machine.
    #[error("the saved trap sites do not fit the saved memory: {0}")]
    Sites(#[from] SiteError),
    /// The restore arithmetic.
    #[error(transparent)]
    Adjust(#[from] AdjustError),
    /// The request is impossible with this guest or its state.
    #[error("{0}")]
    Usage(String),
    /// The request needs something that this host lacks.
    #[error("{0}")]
    HostLacks(String),
    /// This host's TSC frequency is unusable.
    #[error("KVM reports a host TSC of {0} kHz, which no CPU has")]
    HostTsc(u32),
    /// The guest saw features that this host lacks.
    #[error("this host lacks CPU features that the guest saw: {}; restore on a host that has them", .0.join(", "))]
    MissingFeatures(Vec<String>),
    /// No machine can have this saved state.
    #[error("the saved state is not one a machine can have: {0}")]
    BadState(String),
    /// The trace file.
    #[error("cannot write the trace {path}: {source}")]
    Trace {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs are not possible: use 1 to {max}", max = super::limits::MAX_CPUS)]
    Cpus(u32),
    /// A vCPU's thread.
    #[error("a vCPU's thread failed: {0}")]
    Thread(String),
    /// No memory for a copy of guest RAM.
    #[error(
        "the host has no memory for a copy of the guest's {0} bytes, of which every worker of a sweep holds three; \
         use a smaller --memory or fewer --workers"
    )]
    Copy(usize),
    /// The frequency is out of the range for a migration.
    #[error("{wanted} is not within 0.1 to 10 times the guest's present {present}")]
    Ratio {
        /// The requested frequency.
        wanted: Khz,
        /// The guest's frequency.
        present: Khz,
    },
}

impl From<TimerError> for RunError {
    fn from(error: TimerError) -> Self {
        kvm::Error::from(error).into()
    }
}

impl RunError {
    /// Guest RAM cannot be accessed any more.
    #[must_use]
    pub fn is_lost_memory(&self) -> bool {
        matches!(self, Self::Kvm(kvm::Error::Memory { .. }))
    }
}

impl From<HostError> for RunError {
    fn from(error: HostError) -> Self {
        Self::Kvm(error.into())
    }
}

impl Blamed for RunError {
    fn blame(&self) -> Blame {
        match self {
            Self::Kvm(error) => error.blame(),
            Self::Image(error) => error.blame(),
            Self::Ram(error) => error.blame(),
            Self::Sites(error) => error.blame(),
            Self::Adjust(error) => error.blame(),
            Self::Usage(_) | Self::BadState(_) | Self::Trace { .. } | Self::Cpus(_) | Self::Ratio { .. } => {
                Blame::Usage
            }
            Self::HostLacks(_) | Self::HostTsc(_) | Self::MissingFeatures(_) | Self::Copy(_) => Blame::Host,
            Self::Thread(_) => Blame::Run,
        }
    }
}

/// The values that lead to these errors are from a snapshot or from --downtime-length.
impl Blamed for AdjustError {
    fn blame(&self) -> Blame {
        match self {
            Self::BeforePage { .. }
            | Self::Contradiction { .. }
            | Self::VmTimeOverflow { .. }
            | Self::TscOverflow { .. } => Blame::Usage,
        }
    }
}

#[cfg(test)]
mod tests {
    use vmtime::{GuestTsc, VmTime};

    use super::*;
    use crate::blame::tests::all_blame;

    // Catches: exit code 2 if the host lacks something, and exit code 3 if the flags are wrong.
    #[test]
    fn each_error_of_a_run_has_its_blame() {
        let khz = Khz::MIN;
        let text = || "x".to_owned();
        let usage: [RunError; 9] = [
            ImageError::CmdlineNul.into(),
            RamError::Size(1).into(),
            SiteError::Ragged(1).into(),
            AdjustError::Contradiction { vm: VmTime(1), page: VmTime(2) }.into(),
            RunError::Usage(text()),
            RunError::BadState(text()),
            RunError::Trace { path: text(), source: std::io::Error::other("x") },
            RunError::Cpus(0),
            RunError::Ratio { wanted: khz, present: khz },
        ];
        all_blame(Blame::Usage, usage);
        let host: [RunError; 7] = [
            HostError::NoKvm.into(),
            kvm::Error::MpState(9).into(),
            RamError::Mapping { bytes: 1, reason: text() }.into(),
            RunError::HostLacks(text()),
            RunError::HostTsc(0),
            RunError::MissingFeatures(vec![text()]),
            RunError::Copy(1),
        ];
        all_blame(Blame::Host, host);
        all_blame(Blame::Run, [RunError::Thread(text())]);
    }

    // Catches: a snapshot whose clock contradicts itself, reported as a guest that failed.
    #[test]
    fn a_saved_clock_is_the_users() {
        let (tsc, vm) = (GuestTsc(1), VmTime(1));
        let errors = [
            AdjustError::BeforePage { tsc, base: tsc },
            AdjustError::Contradiction { vm, page: vm },
            AdjustError::VmTimeOverflow { vm, downtime_ns: 1 },
            AdjustError::TscOverflow { tsc, downtime_ns: 1, khz: Khz::MIN },
        ];
        all_blame(Blame::Usage, errors);
    }
}
