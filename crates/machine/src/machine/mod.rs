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

pub mod audit;
pub mod build;
pub mod checkpoint;
pub mod clock;
pub mod config;
pub mod dirty;
pub mod error;
pub mod kvm_lapic;
pub mod migrate;
pub mod paused;
pub mod policy;
pub mod record;
pub mod sched;
pub mod shared;
pub mod state;
pub mod stepper;
pub mod vcpu;
pub mod vcpus;
pub mod wake;

/// The most vCPUs a machine can have: what the guest's tick rings and 8-bit APIC IDs leave room for, and then some.
pub const MAX_CPUS: u32 = 16;
