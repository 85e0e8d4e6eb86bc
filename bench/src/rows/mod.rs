//! The rows of the table, in its order.

mod catch_up;
mod costs;
mod lateness;
mod memory;
mod polling;
mod restore;
mod snapshot;
mod start;
mod sweep;
mod virtual_time;

pub(crate) use costs::exits_per_tick;
pub(crate) use lateness::{LAPICS, late};
pub(crate) use restore::save_in_mid_banner;
pub(crate) use snapshot::{Guest as SnapshotGuest, lacks_incremental};
pub(crate) use sweep::CMDLINE as SWEEP_CMDLINE;

use crate::row::Row;

/// Every row.
pub const ALL: [Row; 16] = [
    Row { id: "lateness", what: "lateness of a 1 ms tick, halted guest", measure: lateness::halted },
    Row { id: "busy-user", what: "the same, guest busy in user code", measure: lateness::busy_user },
    Row { id: "busy-kernel", what: "the same, guest busy in kernel code", measure: lateness::busy_kernel },
    Row { id: "polling", what: "CPU burnt by polling, 1 kHz ticks", measure: polling::measure },
    Row { id: "exits", what: "exits to user space a tick", measure: costs::exits },
    Row { id: "vcpu-ioctls", what: "vCPU ioctls a tick beyond KVM_RUN", measure: costs::ioctls },
    Row { id: "syscalls", what: "system calls a tick", measure: costs::syscalls },
    Row { id: "start", what: "process start to the guest's first byte", measure: start::measure },
    Row { id: "restore", what: "restore: process start to the guest's next byte", measure: restore::measure },
    Row { id: "snapshot", what: "full snapshot, 128 MiB, 4 MiB touched", measure: snapshot::full },
    Row { id: "incremental", what: "incremental snapshot, 64 pages dirty", measure: snapshot::incremental },
    Row {
        id: "catch-up",
        what: "step of the guest's clock over a pause of 50 ms, catch-up",
        measure: catch_up::measure,
    },
    Row { id: "memory", what: "resident memory beside the guest's", measure: memory::measure },
    Row { id: "virtual-time", what: "virtual time, 100 Hz ticks", measure: virtual_time::ticks },
    Row { id: "sleep", what: "virtual time, a sleep of 275 s", measure: virtual_time::sleep },
    Row { id: "sweep", what: "sweep of the default stretch, two workers", measure: sweep::measure },
];
