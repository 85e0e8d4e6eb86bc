//! Which boot of which host this is.

use std::{fs, os::unix::fs::MetadataExt};

use serde::{Deserialize, Serialize};

/// One boot of one kernel with its KVM loaded once: what KVM supports does not change while this stays the same.
///
/// A KVM module that is loaded again (perhaps with other parameters) makes `/dev/kvm` anew in devtmpfs, and so another
/// identity. Where `/dev/kvm` is a node of a container's own, that is not seen. A host that is itself a virtual machine, and
/// is moved while it runs, stays the same, as does all that its kernel found out at boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostId {
    /// The kernel's random number of this boot (`random(4)`).
    boot: String,
    /// The inode of `/dev/kvm`, and when it was last changed, in seconds and nanoseconds of Unix time.
    kvm: (u64, i64, i64),
}

impl HostId {
    /// Of this host; none if it does not tell.
    pub(crate) fn read() -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim_end().to_owned();
        let node = fs::metadata("/dev/kvm").ok()?;
        Some(Self { boot, kvm: (node.ino(), node.ctime(), node.ctime_nsec()) })
    }
}
