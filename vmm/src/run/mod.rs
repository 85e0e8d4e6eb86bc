//! A machine that runs: vCPUs, their LAPICs, the clock, devices, and the loop that ties them together.
//!
//! What it is: everything between "an image is loaded" and "the guest asked to end", in real and in virtual time, and
//! the state that survives a migration. [`Machine`] is the whole; [`cpu`] one vCPU; [`vcpu_loop`] the loop, with
//! [`idle`] and [`step`] as its two ways to wait for the guest.
//!
//! What it is not: it writes no file except a trace, opens no socket and parses no argument.
//!
//! Why the clock is one object: TSC, VM time, the page and the deadline in flight must change together, once, or the
//! guest sees a torn migration. [`clock::Clock`] is that object.

mod access;
pub mod clock;
pub mod cpu;
mod error;
mod idle;
pub mod judge;
mod machine;
pub mod mailbox;
mod migrate;
pub mod options;
pub mod platform;
pub mod source;
pub mod state;
mod step;
pub mod trace;
mod vcpu_loop;

pub use error::{End, Outcome, RunError};
pub use machine::{Machine, Outputs};
pub use migrate::{Migration, Policies};
pub use options::{BootOptions, EmulatedHost, HostEnvironment, TimeMode};
pub use platform::Platform;
