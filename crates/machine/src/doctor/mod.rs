//! `vmm doctor`: what this host can do, and which features of `vmm` work on it.
//!
//! Everything is measured: the report has the return codes of the TSC ioctls beside what the guest's TSC did, because
//! on some hosts they differ. The report is data ([`Report`]); [`text`] is its form for people. The JSON's layout is in
//! `docs/doctor.md`.

pub mod conformance;
pub mod text;

use std::{fs, time::Duration};

use serde::Serialize;

use crate::{
    host::kick::{self, KickTimer},
    kvm::{
        Host,
        probe::{self, DeadlineWrite, UserSyscall},
    },
    machine::{
        config::{EmulatedHost, HostEnvironment},
        error::RunError,
    },
};

/// Version of the report's layout.
pub const SCHEMA: &str = "vmm-doctor/1";

/// The results.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// The kernel's release.
    pub kernel: String,
    /// The KVM modules that are loaded; empty if KVM is built in.
    pub kvm_modules: Vec<String>,
    /// The capabilities of KVM that `vmm` uses, with their purpose.
    pub capabilities: Vec<Capability>,
    /// The host's TSC frequency in kHz, as KVM reports it.
    pub host_tsc_khz: u32,
    /// With a TSC offset of 0, a guest's RDTSC returns the host's TSC.
    pub tsc_equals_host: bool,
    /// TSC frequencies that KVM was asked for, and those that guests had.
    pub tsc_scaling: Vec<Scaling>,
    /// Whether a TSC offset can be set.
    pub tsc_offset: Claim,
    /// What a guest's write of IA32_TSC_DEADLINE does: "exits", "exits-with-mwait" or "swallowed".
    pub deadline_wrmsr: &'static str,
    /// x2APIC MSRs exit.
    pub x2apic_exits: bool,
    /// What SYSCALL in user mode does: "works", "faults" or "other".
    pub user_syscall: &'static str,
    /// KVM's own LAPIC is available (`--lapic kvm`).
    pub kernel_lapic: bool,
    /// KVM's own LAPIC fired a TSC deadline, and not early.
    pub kernel_lapic_deadline: bool,
    /// Cost of one instruction of supervisor code, in nanoseconds.
    pub supervisor_instruction_ns: f64,
    /// Supervisor code is emulated rather than run by the CPU.
    pub supervisor_emulated: bool,
    /// Single steps stop after exactly one instruction.
    pub single_step_exact: bool,
    /// Cost of a single step, in nanoseconds.
    pub single_step_ns: u64,
    /// Cost of an exit to user space and back, in nanoseconds.
    pub exit_ns: u64,
    /// How late a sleeping thread wakes, in nanoseconds: the median.
    pub wake_p50_ns: u64,
    /// The same, 90th percentile.
    pub wake_p90_ns: u64,
    /// Which features of `vmm` work.
    pub verdicts: Vec<Verdict>,
}

/// A capability of KVM.
#[derive(Clone, Debug, Serialize)]
pub struct Capability {
    /// KVM's name.
    pub name: &'static str,
    /// Whether the host has it.
    pub present: bool,
    /// Its purpose in `vmm`.
    pub purpose: &'static str,
}

/// A TSC frequency that KVM was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct Scaling {
    /// The frequency, in kHz.
    pub asked_khz: u32,
    /// Whether KVM_SET_TSC_KHZ succeeded.
    pub accepted: bool,
    /// The frequency of the guest's TSC, in kHz.
    pub measured_khz: u64,
    /// Whether KVM scales the TSC: the guest's frequency is the requested one, to 1 %, on a host with
    /// KVM_CAP_TSC_CONTROL.
    pub works: bool,
    /// Whether KVM does not scale the TSC, and instead sets it forward at each entry.
    pub catches_up: bool,
}

/// Whether an ioctl succeeded, and whether it had an effect.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Claim {
    /// The ioctl succeeded.
    pub accepted: bool,
    /// The guest saw the effect.
    pub works: bool,
}

/// Whether one feature of `vmm` works on this host.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The feature.
    pub feature: &'static str,
    /// Whether it works here.
    pub works: bool,
    /// How it works; or why it does not, and what to use instead.
    pub detail: String,
}

/// Examines this host, which takes some 100 ms.
///
/// # Errors
/// [`RunError`] if KVM cannot be used at all.
pub fn examine(emulated: Option<EmulatedHost>) -> Result<Report, RunError> {
    let env = HostEnvironment::open(emulated)?;
    let (host, supported, facts) = (&env.host, env.supported()?, env.facts()?);
    let khz = env.clock.as_it_is().khz().get();
    let mut tsc_scaling = Vec::new();
    for asked_khz in [khz.saturating_mul(2), khz / 2] {
        let rate = probe::tsc_rate(host, supported, khz, asked_khz)?;
        let verdict = rate.verdict(asked_khz);
        tsc_scaling.push(Scaling {
            asked_khz,
            accepted: rate.accepted,
            measured_khz: rate.measured_khz,
            works: verdict == probe::Verdict::Scales,
            catches_up: verdict == probe::Verdict::CatchesUp,
        });
    }
    let offset = probe::tsc_offset(host, supported, 1 << 44)?;
    let step = env.step()?;
    let supervisor_instruction_ns = probe::instruction_ns(host, supported, khz)?;
    let wakes = wake_lateness(&env)?;
    let kernel_lapic = probe::kernel_lapic(host, supported)?;
    let mut report = Report {
        schema: SCHEMA,
        kernel: read_line("/proc/sys/kernel/osrelease"),
        kvm_modules: kvm_modules(),
        capabilities: capabilities(host),
        host_tsc_khz: khz,
        tsc_equals_host: facts.tsc_equals_host,
        tsc_scaling,
        tsc_offset: Claim { accepted: offset.accepted, works: offset.took_effect },
        deadline_wrmsr: match facts.deadline_write {
            DeadlineWrite::Exits => "exits",
            DeadlineWrite::ExitsWithMwait => "exits-with-mwait",
            DeadlineWrite::Swallowed => "swallowed",
        },
        x2apic_exits: facts.x2apic_exits,
        user_syscall: match env.user_syscall.found()? {
            UserSyscall::Works => "works",
            UserSyscall::Faults => "faults",
            UserSyscall::Other => "other",
        },
        kernel_lapic: kernel_lapic.available,
        kernel_lapic_deadline: kernel_lapic.deadline_fires,
        supervisor_instruction_ns,
        supervisor_emulated: supervisor_instruction_ns > EMULATED_NS,
        single_step_exact: step.exact,
        single_step_ns: step.ns,
        exit_ns: probe::exit_ns(host, supported, khz)?,
        wake_p50_ns: quantile(&wakes, 50),
        wake_p90_ns: quantile(&wakes, 90),
        verdicts: Vec::new(),
    };
    report.verdicts = verdicts(&report);
    Ok(report)
}

/// From this time for an instruction on, code is taken to be emulated: every CPU runs a DEC or a jump faster, and every
/// instruction emulator is slower.
const EMULATED_NS: f64 = 30.0;

fn capabilities(host: &Host) -> Vec<Capability> {
    host.capabilities().into_iter().map(|(name, present, purpose)| Capability { name, present, purpose }).collect()
}

fn read_line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn kvm_modules() -> Vec<String> {
    let entries = fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut modules: Vec<String> = names.filter(|name| name == "kvm" || name.starts_with("kvm_")).collect();
    modules.sort();
    modules
}

/// Measures how late the wake timer wakes a thread: 40 waits of 1 ms. Returns the lateness of each in nanoseconds,
/// sorted.
fn wake_lateness(env: &HostEnvironment) -> Result<Vec<u64>, RunError> {
    let timer = KickTimer::new()?;
    let mut late = Vec::new();
    for _ in 0..40 {
        kick::clear();
        let start = env.clock.tsc();
        timer.arm(SLEEP);
        while !kick::pending() {
            kick::wait();
        }
        let slept = env.clock.duration(start, env.clock.tsc());
        let over = u64::try_from(slept.saturating_sub(SLEEP).as_nanos()).unwrap_or(u64::MAX);
        late.push(over);
    }
    late.sort_unstable();
    Ok(late)
}

const SLEEP: Duration = Duration::from_millis(1);

fn quantile(sorted: &[u64], percent: usize) -> u64 {
    sorted.get(sorted.len() * percent / 100).copied().unwrap_or(0)
}

fn verdicts(report: &Report) -> Vec<Verdict> {
    let scales = report.tsc_scaling.iter().all(|scaling| scaling.works);
    let catches_up = report.tsc_scaling.iter().any(|scaling| scaling.catches_up);
    let ignores = report.tsc_scaling.iter().any(|s| s.accepted && !s.works);
    let verdict = |feature, works, detail: &str| Verdict { feature, works, detail: detail.to_owned() };
    vec![
        match report.tsc_equals_host {
            true => verdict("--tsc host", true, "a guest's RDTSC gives the host's TSC"),
            false => {
                verdict("--tsc host", false, "a guest's TSC is not the host's even with offset 0; use --tsc trapped")
            }
        },
        match (scales, ignores) {
            (true, _) => verdict("--tsc scaled", true, "KVM gives a guest's TSC another frequency, up and down"),
            (false, _) if catches_up => verdict(
                "--tsc scaled",
                false,
                "no TSC scaling: KVM sets a guest's TSC forward at entries instead; use --tsc trapped with a guest that has \
                 trap sites",
            ),
            (false, true) => verdict(
                "--tsc scaled",
                false,
                "KVM accepts a TSC frequency and ignores it; use --tsc trapped with a guest that has trap sites",
            ),
            (false, false) => {
                verdict("--tsc scaled", false, "no TSC scaling; use --tsc trapped with a guest that has trap sites")
            }
        },
        verdict(
            "--tsc trapped",
            true,
            "RDTSC at trap sites exits: any frequency, for guests with sites (--sites auto finds them)",
        ),
        verdict(
            "--time virtual",
            report.single_step_exact,
            if report.single_step_exact {
                "single steps are exact, so that an interrupt enters at the first instruction that lets it"
            } else {
                "single steps are not exact here: interrupts may enter an instruction late, and vmm sweep is refused"
            },
        ),
        match report.deadline_wrmsr {
            "exits" => verdict("TSC-deadline", true, "the write of IA32_TSC_DEADLINE exits"),
            "exits-with-mwait" => verdict(
                "TSC-deadline",
                true,
                "the write of IA32_TSC_DEADLINE exits once MWAIT exits are off, which vmm does",
            ),
            _ => verdict(
                "TSC-deadline",
                false,
                "KVM swallows the write of IA32_TSC_DEADLINE: vmm patches the guest's deadline sites, or hides TSC-deadline \
                 from a guest that has none; --lapic kvm has it",
            ),
        },
        match report.x2apic_exits {
            true => verdict("x2APIC", true, "its MSRs exit; --x2apic off offers xAPIC only"),
            false => verdict("x2APIC", false, "its MSRs do not exit: guests get xAPIC"),
        },
        match report.user_syscall {
            "works" => verdict("SYSCALL", true, "user code enters the guest's kernel by it"),
            "faults" => verdict(
                "SYSCALL",
                true,
                "KVM stays in user mode at IA32_LSTAR, where the guest gets a page fault: vmm makes a system call of that",
            ),
            _ => verdict("SYSCALL", false, "a probe guest's user code did not get to IA32_LSTAR: use no user code"),
        },
        match (report.kernel_lapic, report.kernel_lapic_deadline) {
            (true, true) => {
                verdict("--lapic kvm", true, "KVM's LAPIC can be had, and its TSC deadline fires, not early")
            }
            (true, false) => {
                verdict("--lapic kvm", false, "KVM's LAPIC can be had, but its TSC deadline failed a probe")
            }
            (false, _) => {
                verdict("--lapic kvm", false, "KVM's LAPIC cannot be had without its other chips; use --lapic user")
            }
        },
        verdict(
            "guest code",
            true,
            if report.supervisor_emulated {
                "supervisor code is emulated: an instruction costs hundreds of ns, and vmm performs some that KVM cannot"
            } else {
                "supervisor code runs natively"
            },
        ),
    ]
}
