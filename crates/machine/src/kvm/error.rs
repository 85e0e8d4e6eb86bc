//! Errors of KVM.

use std::io;

use crate::{
    blame::{Blame, Blamed},
    host::kick::TimerError,
};

/// The host cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// `/dev/kvm` does not exist.
    #[error(
        "/dev/kvm does not exist: this host offers no KVM; load kvm_intel or kvm_amd, or enable virtualization in the \
         firmware or in the hypervisor around this machine"
    )]
    NoKvm,
    /// `/dev/kvm` exists but may not be opened.
    #[error("/dev/kvm may not be opened by this user ({0}); join the group that owns it (often `kvm`) or run as root")]
    Forbidden(io::Error),
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("/dev/kvm cannot be opened: {0}")]
    Open(io::Error),
    /// The API's version is not 12, which has been the only one since KVM's API became stable.
    #[error("/dev/kvm speaks KVM API version {0}; only version 12 is known")]
    ApiVersion(i32),
    /// A required capability is missing.
    #[error("this host's KVM lacks {name}, needed {why}")]
    MissingCapability {
        /// KVM's name of it.
        name: &'static str,
        /// Its purpose.
        why: &'static str,
    },
}

/// A KVM call failed, or the host cannot run the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See [`HostError`].
    #[error(transparent)]
    Host(#[from] HostError),
    /// An ioctl that must not fail did.
    #[error("KVM call {call} failed: {source}")]
    Call {
        /// The ioctl's name.
        call: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// Guest RAM that the kernel cannot read or write: its file became shorter, or the medium under it fails.
    #[error("guest memory cannot be accessed{}: {source}", at.map(|at| format!(" at {at:#x}")).unwrap_or_default())]
    Memory {
        /// The guest physical address, if KVM reports it.
        at: Option<u64>,
        /// The kernel's error.
        source: io::Error,
    },
    /// An MP state that no x86 vCPU has in the versions of KVM known here.
    #[error("KVM reports MP state {0}, which no vCPU here can have")]
    MpState(u32),
    /// KVM refuses an MSR's value of a saved vCPU.
    #[error("this host does not take the value {value:#x} for the guest's MSR {index:#x}")]
    Msr {
        /// MSR number.
        index: u32,
        /// The refused value.
        value: u64,
    },
}

impl From<TimerError> for Error {
    fn from(TimerError(source): TimerError) -> Self {
        Self::Call { call: "timer_create", source }
    }
}

impl Error {
    /// Makes the error of a kvm-ioctls call, for `map_err`.
    pub(super) fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Call { call, source: io::Error::from_raw_os_error(error.errno()) }
    }

    /// Makes the error from errno, for ioctls that kvm-ioctls does not wrap.
    pub(super) fn last(call: &'static str) -> Self {
        Self::Call { call, source: io::Error::last_os_error() }
    }
}

impl Blamed for HostError {
    fn blame(&self) -> Blame {
        match self {
            Self::NoKvm | Self::Forbidden(_) | Self::Open(_) | Self::ApiVersion(_) | Self::MissingCapability { .. } => {
                Blame::Host
            }
        }
    }
}

impl Blamed for Error {
    fn blame(&self) -> Blame {
        match self {
            Self::Host(error) => error.blame(),
            Self::Call { .. } | Self::Memory { .. } | Self::MpState(_) | Self::Msr { .. } => Blame::Host,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blame::tests::all_blame;

    fn io() -> io::Error {
        io::Error::other("x")
    }

    fn host_errors() -> [HostError; 5] {
        [
            HostError::NoKvm,
            HostError::Forbidden(io()),
            HostError::Open(io()),
            HostError::ApiVersion(13),
            HostError::MissingCapability { name: "x", why: "y" },
        ]
    }

    // Catches: a host without KVM, or whose KVM fails, reported as a wrong command line.
    #[test]
    fn kvm_is_the_hosts() {
        all_blame(Blame::Host, host_errors());
        all_blame(Blame::Host, host_errors().map(Error::from));
        all_blame(
            Blame::Host,
            [
                Error::Call { call: "KVM_RUN", source: io() },
                Error::Memory { at: None, source: io() },
                Error::MpState(9),
                Error::Msr { index: 1, value: 2 },
            ],
        );
    }
}
