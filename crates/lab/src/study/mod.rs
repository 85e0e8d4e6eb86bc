//! The study of the thread "x86, kvm: use kvmclock to compute TSC deadline value" (2016), by experiment.
//!
//! What it is: the questions that were argued in that thread, each as a table of numbers. What do the two conversions
//! cost and how precise are they ([`arithmetic`])? Which clockevent is safe under which host policy ([`matrix`])? What
//! happens on a host whose restore has a bug ([`faults`])?
//!
//! Two more are of that thread's sequel, and need neither a guest nor a host: how precise a kvmclock page with a new
//! base can be ([`rebase`]), and how far each formula for the same clock drifts in a month ([`horizon`]).
//!
//! What it is not: an explanation. `docs/study/` has that.

pub mod arithmetic;
pub mod exact;
pub mod faults;
pub mod horizon;
pub mod matrix;
pub mod rebase;

use machine::{BootOptions, LapicKind, RunError, TimeMode, boot::Image, config::source::SourceChoice};
use serde::{Deserialize, Serialize};
use vmtime::{DeadlinePolicy, DowntimePolicy, Khz};

use crate::sweep::{Depth, Edge, Every, Options, Ratio, SweepError};

/// Version of the layout of the study's JSON.
pub const SCHEMA: &str = "vmm-study/1";

/// The results of a study; tables that were not asked for are absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// [`SCHEMA`].
    pub schema: String,
    /// See [`arithmetic`].
    pub arithmetic: Option<arithmetic::Arithmetic>,
    /// See [`matrix`].
    pub matrix: Option<Vec<matrix::Row>>,
    /// See [`faults`].
    pub faults: Option<Vec<faults::Row>>,
}

/// The clockevents that are compared, as the guest's command line selects them.
pub const CLOCKEVENTS: [&str; 9] = [
    "lapic-deadline",
    "kvm-tsc-deadline conversion=split recheck=off",
    "kvm-tsc-deadline conversion=split recheck=on",
    "kvm-tsc-deadline conversion=mult recheck=off",
    "kvm-tsc-deadline conversion=mult recheck=on",
    "kvm-tsc-deadline conversion=exact recheck=off",
    "kvm-tsc-deadline conversion=exact recheck=on",
    "kvm-ns-deadline",
    "lapic-oneshot",
];

/// The TSC frequency that guests boot with.
pub const BASE_KHZ: u32 = 2_600_000;
/// Ticks a second: a period of 100 ms, in which 200 ppm are 20 µs, well above the cost of an operation.
pub const HZ: u32 = 10;

/// The embedded guest.
///
/// # Errors
/// Never: it was built with this program.
pub fn guest() -> Result<Image, SweepError> {
    let image = Image::parse("the embedded guest".to_owned(), guest_image::GUEST_ELF.to_vec());
    Ok(image.map_err(RunError::from)?)
}

/// The options of a sweep over one tick with `clockevent`.
///
/// # Errors
/// If the base frequency or a ratio is out of range.
pub fn options(
    clockevent: &str,
    ratios: &[&str],
    deadline: DeadlinePolicy,
    workers: u32,
) -> Result<Options, SweepError> {
    let khz = Khz::new(u64::from(BASE_KHZ)).map_err(|bad| SweepError::Usage(bad.to_string()))?;
    let ratios: Result<Vec<Ratio>, String> = ratios.iter().map(|ratio| ratio.parse()).collect();
    Ok(Options {
        boot: BootOptions {
            memory: 16 << 20,
            cmdline: format!("clockevent={clockevent} hz={HZ}"),
            initrd: None,
            time: TimeMode::Virtual,
            source: SourceChoice::Auto,
            khz: Some(khz),
            cpus: 1,
            seed: 0,
            cpuid: machine::boot::cpuid_changes::CpuidChanges::default(),
            x2apic: true,
            pv_eoi: true,
            vmclock: false,
            acpi: machine::AcpiTables::Auto,
            lapic: LapicKind::User,
        },
        khz,
        from: Edge::Tick(3),
        to: None,
        every: Every::Instruction,
        ratios: ratios.map_err(SweepError::Usage)?,
        deadline,
        downtime: DowntimePolicy::Freeze,
        downtime_length: std::time::Duration::ZERO,
        recipe: None,
        inject: None,
        ticks: ticks(clockevent),
        depth: Depth::One,
        tolerance: std::time::Duration::from_micros(10),
        patience: None,
        workers,
        shard: None,
    })
}

/// Ticks to wait for. The native clockevent needs one more: its error is in the deadlines that it arms after the
/// migration.
#[must_use]
pub fn ticks(clockevent: &str) -> u64 {
    if clockevent.starts_with("lapic-deadline") { 2 } else { 1 }
}

/// The command that sweeps one row, to show to the reader.
#[must_use]
pub fn command(clockevent: &str, more: &str) -> String {
    format!("vmm sweep --cmdline \"clockevent={clockevent} hz={HZ}\" {more}")
}
