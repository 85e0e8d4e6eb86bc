//! Every notion of time, and nothing else.
//!
//! Pure: no KVM, no threads, no host clock except in `host`, which is handed the function that reads it. All
//! arithmetic between guest TSC, host TSC and VM time happens here, in 128 bits where 64 could overflow, so that there
//! is one place to prove right.

pub mod units;

pub use units::{GuestTsc, HostTsc, Khz, Now, VmTime};
