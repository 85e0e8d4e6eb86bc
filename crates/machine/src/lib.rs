//! A KVM virtual machine whose local APIC, timer and kvmclock page are in user space: it boots, runs, saves, and goes
//! on with another TSC frequency.
//!
//! # Example
//!
//! A guest in virtual time, which goes on with a TSC of half the frequency after 505 ms:
//!
//! ```no_run
//! use machine::{AcpiTables, BootOptions, HostEnvironment, LapicKind, Machine, Outputs, Policies, TimeMode};
//! use machine::{boot::{Image, cpuid_changes::CpuidChanges}, config::source::SourceChoice, sched::mailbox::NoRequests};
//! use vmtime::{DeadlinePolicy, Khz, VmTime};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let env = HostEnvironment::open(None)?;
//! let image = Image::open("target/guest.bin".as_ref())?;
//! let (lapic, time, source) = (LapicKind::User, TimeMode::Virtual, SourceChoice::Auto);
//! let (cmdline, khz) = ("count=100".to_owned(), Some(Khz::new(2_600_000)?));
//! let (memory, initrd, cpus, seed) = (128 << 20, None, 1, 0);
//! let (x2apic, pv_eoi, vmclock, acpi) = (true, true, false, AcpiTables::Auto);
//! let cpuid = CpuidChanges::default();
//! let options = BootOptions {
//!     memory, cmdline, initrd, lapic, time, source, khz, cpus, seed, cpuid, x2apic, pv_eoi, vmclock, acpi,
//! };
//! let outputs = Outputs::new(Box::new(std::io::stdout()), None);
//! let mut machine = Machine::boot(&env, &image, &options, outputs)?;
//! machine.run(&NoRequests, Some(VmTime(505_000_000)))?;
//! machine.pause()?;
//! let policies = Policies { deadline: DeadlinePolicy::Rescale, ..Policies::default() };
//! machine.resume_at(Khz::new(1_300_000)?, &policies)?;
//! println!("{:?}: {:?}", machine.run(&NoRequests, None)?, machine.tick_summary());
//! # Ok(())
//! # }
//! ```
//!
//! # Which door
//!
//! | to | use |
//! |---|---|
//! | boot, run, pause, resume and migrate from one thread | [`Machine`] |
//! | do the same while a socket, signals and the console are served | [`session::run`] |
//! | look at every instruction of a stretch, go back, migrate there | [`Stepper`] |
//! | stop a machine that another thread runs | [`sched::mailbox::Mailbox`] |
//! | save a machine to a directory, restore it, merge snapshots | [`snapshot`] |
//! | command a machine in another process | [`control`] |
//! | know what this host can do | [`HostEnvironment::facts`], for people [`doctor`] |
//! | know how late ticks were, and whether two accounts agree | [`Machine::tick_summary`], [`audit`] |
//! | know what any guest armed its timers for | [`Machine::audit_timers`], [`Machine::timer_accounts`] |
//! | let a copy run on where a machine migrates, and compare | [`Machine::twin`] |
//! | give the exit code of an error | [`blame::Blamed`] |
//!
//! # The floors
//!
//! From the bottom; each needs only those above it in this list. A test in `tests/layers` checks that.
//!
//! - [`blame`]: whose fault an error is.
//! - [`x86`], [`mem`]: plain data of the CPU; guest RAM.
//! - [`host`]: the operating system. Unsafe code is here and in [`kvm`] only.
//! - [`kvm`]: `/dev/kvm`, probes of what it really does, a vCPU's state.
//! - [`output`]: the console and the trace, buffered, so that a slow reader does not hold a vCPU.
//! - [`boot`]: images, their load and entry, CPUID, trap sites. [`devices`]: serial port, 8259, I/O APIC,
//!   8254.
//! - [`machine`]: vCPUs, their LAPICs and the clock; scheduling, tick audit, trace, migration.
//! - [`snapshot`]: a machine on disk. [`live`]: a machine on its way to another process while it runs.
//!   [`doctor`]: what this host does. [`control`]: HTTP over a Unix socket.
//! - [`session`]: a machine with console, control socket and signals.

pub mod blame;
pub mod boot;
pub mod control;
pub mod devices;
pub mod doctor;
pub mod host;
pub mod kvm;
pub mod live;
pub mod machine;
pub mod mem;
pub mod output;
pub mod session;
pub mod snapshot;
pub mod x86;

pub use machine::{
    Machine, audit, clock, config,
    config::{
        AcpiTables, BootOptions, EmulatedHost, HostEnvironment, LapicKind, TimeMode, host_fingerprint::HostFingerprint,
    },
    cpu_index::CpuIndex,
    dirty::SnapshotId,
    error::RunError,
    guest_clock,
    limits::MAX_CPUS,
    outputs::{Outputs, TraceTo},
    policy::{self, Policies, check_ratio},
    record,
    record::counters::Costs,
    resume::Migration,
    sched, state,
    stepper::{Place, Stepper},
    stop::{At, End, StopReason},
    vcpu,
    vcpu::{
        disassembly::{INSTRUCTION_MAX, disassemble},
        step::Pace,
    },
};
