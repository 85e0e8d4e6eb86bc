//! Shared code of the tests that boot virtual machines: runs the program, and reads its output and files.
//!
//! The tests use `vmm` as users do, through its command line, and check its exit code, its messages, its trace and its
//! summary. Arithmetic on these is written here a second time, on purpose: none of `vmm`'s own code is called.

mod binary;
mod browser;
pub mod document;
mod host;
pub mod kernel;
pub mod ktap;
mod lab;
pub mod long_mode;
mod page;
pub mod performed;
mod process;
pub mod raw;
mod skips;
pub mod state_file;
mod trace;
pub mod two_cpus;

pub use binary::{example, guest, guest_without, vmm};
pub use browser::{Browser, Loaded, number};
pub use host::{deadline_write, doctor, kvm, no_tsc_scaling, qemu, strace, true_tsc_frequency};
pub use lab::{Lab, Run, Summary};
pub use page::Page;
pub use process::{Ended, Running, finish, start};
pub use skips::report as report_skips;
#[doc(hidden)]
pub use skips::skipped;
pub use trace::{Line, Trace};

/// Every clockevent of the guest, as its command line selects it.
pub const CLOCKEVENTS: [&str; 9] = [
    "clockevent=lapic-deadline",
    "clockevent=kvm-tsc-deadline conversion=split recheck=off",
    "clockevent=kvm-tsc-deadline conversion=split recheck=on",
    "clockevent=kvm-tsc-deadline conversion=mult recheck=off",
    "clockevent=kvm-tsc-deadline conversion=mult recheck=on",
    "clockevent=kvm-tsc-deadline conversion=exact recheck=off",
    "clockevent=kvm-tsc-deadline conversion=exact recheck=on",
    "clockevent=kvm-ns-deadline",
    "clockevent=lapic-oneshot",
];

/// Both ways to access the LAPIC, as flags of `vmm`.
pub const DOORS: [&str; 2] = ["--x2apic on", "--x2apic off"];
