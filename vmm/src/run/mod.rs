//! A machine that runs: vCPUs, their LAPICs, the clock, devices, and the loop that ties them together.
//!
//! What it is: everything between "an image is loaded" and "the guest asked to end", in real and in virtual time, and
//! the state that survives a migration. [`Machine`] is the whole; [`cpu`] one vCPU; `turn` what one vCPU does
//! between two looks at the world, and `schedule` whose turn it is.
//!
//! What it is not: it writes no file except a trace, opens no socket and parses no argument.
//!
//! Why the clock is one object: TSC, VM time, the page and the deadline in flight must change together, once, or the
//! guest sees a torn migration. [`clock::Clock`] is that object.

mod access;
mod alarm;
pub mod bell;
mod changes;
mod checkpoint;
pub mod checks;
pub mod clock;
mod costs;
pub mod cpu;
mod cpus;
mod disassembly;
mod early;
mod error;
pub mod fault;
mod host_note;
mod host_stop;
mod idle;
mod in_kernel;
mod ipi;
pub mod judge;
mod machine;
pub mod mailbox;
mod migrate;
pub mod options;
mod pages;
mod paused;
pub mod platform;
pub mod pv_eoi;
mod ram_copies;
mod schedule;
pub mod source;
pub mod state;
mod step;
mod stepper;
pub mod trace;
mod trial;
mod turn;
mod turns;
mod vcpu_tsc;
mod wire;

/// The most vCPUs a machine can have: what the guest's tick rings and 8-bit APIC IDs leave room for, and then some.
pub const MAX_CPUS: u32 = 16;

pub use crate::kvm::{Piece, Withheld, begin_writeback, exit_at_once, guard_mapped_file, write_back};
pub use crate::output::AT_END;
pub use changes::SnapshotId;
pub use costs::Costs;
pub use disassembly::{INSTRUCTION_MAX, disassemble};
pub use error::{At, End, Outcome, RunError};
pub use host_note::HostNote;
pub use machine::{Machine, Outputs, TraceTo};
pub use migrate::{Migration, Policies, check_ratio};
pub use options::{BootOptions, EmulatedHost, HostEnvironment, LapicKind, TimeMode};
pub use pages::PageSet;
pub use platform::Platform;
pub use stepper::{Came, Place, Stepper};
pub use turn::Pace;
