//! A KVM virtual machine whose local APIC, timer and kvmclock page are in user space: it boots, runs, saves, and goes on
//! with another TSC frequency.

pub mod blame;
pub mod boot;
pub mod control;
pub mod devices;
pub mod doctor;
pub mod host;
pub mod kvm;
pub mod machine;
pub mod mem;
pub mod output;
pub mod session;
pub mod snapshot;
pub mod x86;

pub use machine::{
    Machine, audit, clock, config,
    config::{BootOptions, EmulatedHost, HostEnvironment, LapicKind, TimeMode, host_fingerprint::HostFingerprint},
    dirty::SnapshotId,
    error::RunError,
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
