//! Which boot of which host this is.

use std::{fs, os::unix::fs::MetadataExt};

use serde::{Deserialize, Serialize};

/// One boot of one kernel with its KVM loaded once: what KVM supports does not change while this stays the same.
///
/// When a KVM module is loaded again (perhaps with other parameters), devtmpfs creates `/dev/kvm` again, and the
/// identity changes. In a container with its own `/dev/kvm` node this is not noticed. A host that is itself a virtual
/// machine keeps its identity when it is live-migrated; so does everything that its kernel detected at boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostId {
    /// The kernel's random number of this boot (`random(4)`).
    boot: String,
    /// The inode of `/dev/kvm`, and when it was last changed, in seconds and nanoseconds of Unix time.
    kvm: (u64, i64, i64),
}

impl HostId {
    /// Reads this host's identity; none if a file cannot be read.
    pub(crate) fn read() -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim_end().to_owned();
        let node = fs::metadata("/dev/kvm").ok()?;
        Some(Self { boot, kvm: (node.ino(), node.ctime(), node.ctime_nsec()) })
    }
}
