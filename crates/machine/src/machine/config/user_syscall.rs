//! What this host's KVM does with SYSCALL in user mode.

use std::sync::{Arc, OnceLock};

use crate::kvm::{
    Error, Host,
    probe::{self, UserSyscall},
};

/// A probe that runs when the first guest enables SYSCALL: it needs a VM of its own, and few guests have user code.
pub struct UserSyscallProbe {
    host: Arc<Host>,
    found: OnceLock<UserSyscall>,
}

impl UserSyscallProbe {
    pub(crate) fn new(host: Arc<Host>) -> Self {
        Self { host, found: OnceLock::new() }
    }

    /// What it found, which runs it at the first call.
    ///
    /// # Errors
    /// If KVM fails in a way that says nothing about SYSCALL.
    pub fn found(&self) -> Result<UserSyscall, Error> {
        if let Some(found) = self.found.get() {
            return Ok(*found);
        }
        let found = probe::user_syscall(&self.host, &self.host.supported_cpuid()?)?;
        Ok(*self.found.get_or_init(|| found))
    }

    /// Whether the VMM has to perform it. If the probe fails, it has not, and a warning is logged.
    pub(crate) fn faults(&self) -> bool {
        let found = self.found().unwrap_or_else(|error| {
            log::warn!("cannot find out what KVM does with SYSCALL in user mode, and leaves it to KVM: {error}");
            *self.found.get_or_init(|| UserSyscall::Other)
        });
        found == UserSyscall::Faults
    }
}
