//! The command line: `key=value` words. An unknown key or value is an error, so that a test that misspells a key does
//! not quietly test the default.

use core::fmt;

use crate::pvclock::Conversion;
use crate::scenarios::{DEFAULT_MAX_DELTA_MS, Deltas, HZ_MAX, HZ_MIN, Scenario};
use crate::watchdog::{self, Clocksource};

/// Longest command line, in bytes without its NUL.
pub const MAX_BYTES: usize = 2047;
/// Most ticks that `count=` may ask for: at the highest rate, more than a day.
pub const COUNT_MAX: u64 = 1_000_000_000;
/// Longest `max_ms=`: an hour.
pub const MAX_MS_MAX: u64 = 3_600_000;

/// Most pages that `touch=` may ask for.
pub const TOUCH_MAX: u64 = 4096;

/// Keys that hypervisors append on their own: QEMU and Firecracker announce virtio devices, Firecracker says `pci=off`.
const IGNORED: [&str; 2] = ["virtio_mmio.device", "pci"];

/// A scenario's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScenarioName {
    /// `hz` ticks a second, `count` of them.
    Ticks,
    /// `count` random waits.
    Deltas,
    /// `hz` ticks a second without end.
    Idle,
    /// `hz` ticks a second, `count` of them on every CPU, each with an interrupt to the next CPU.
    Smp,
    /// A tick every half second, `count` of them, at each of which clocks are compared.
    Watchdog,
}

impl ScenarioName {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ticks => "ticks",
            Self::Deltas => "deltas",
            Self::Idle => "idle",
            Self::Smp => "smp",
            Self::Watchdog => "watchdog",
        }
    }
}

/// What the CPU does between ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Halts.
    None,
    /// Spins in the kernel.
    Kernel,
    /// Spins in user mode.
    User,
}

/// The options that the command line sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options<'a> {
    /// `clockevent=`; `None` = the usable one with the highest rating.
    pub clockevent: Option<&'a str>,
    /// `conversion=split|mult|exact`.
    pub conversion: Conversion,
    /// `recheck=off|on`.
    pub recheck: bool,
    /// `plant=none|early-check`: plants a bug in CPU 0's clock, for tools that must find it.
    pub plant_early_check: bool,
    /// `scenario=ticks|deltas|idle|smp|watchdog`.
    pub scenario: ScenarioName,
    /// `watchdog=kvmclock|acpi_pm`: the clock that `scenario=watchdog` compares others with.
    pub watchdog: Clocksource,
    /// `hz=`.
    pub hz: u32,
    /// `count=`.
    pub count: u64,
    /// `seed=`.
    pub seed: u64,
    /// `max_ms=`: the longest wait of `deltas`.
    pub max_ms: u64,
    /// `load=none|kernel|user`.
    pub load: Load,
    /// `eoi=auto|apic`: whether to use paravirtual EOI, which ends an interrupt without a write to the APIC.
    pub pv_eoi: bool,
    /// `steal=off|on`: whether to register a steal-time area, and to read it after every tick.
    pub steal: bool,
    /// `vmclock=off|on`: whether to compare VMClock with kvmclock after every tick.
    pub vmclock: bool,
    /// `touch=`: pages that are written to after every tick.
    pub touch: u64,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            clockevent: None,
            conversion: Conversion::Exact,
            recheck: true,
            plant_early_check: false,
            scenario: ScenarioName::Ticks,
            watchdog: Clocksource::Kvmclock,
            hz: 100,
            count: 100,
            seed: 0,
            max_ms: DEFAULT_MAX_DELTA_MS,
            load: Load::None,
            pv_eoi: true,
            steal: false,
            vmclock: false,
            touch: 0,
        }
    }
}

/// What is wrong with a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CmdlineError<'a> {
    /// More than [`MAX_BYTES`].
    TooLong,
    /// A byte outside ASCII.
    NotAscii,
    /// A word without `=`, or a key that does not exist.
    UnknownKey(&'a str),
    /// A value that the key does not take.
    BadValue {
        /// The key.
        key: &'static str,
        /// Its value.
        value: &'a str,
        /// What it takes.
        want: &'static str,
    },
    /// `load=` or `touch=` with `scenario=smp`.
    LoadOfSeveral,
    /// `load=`, `touch=` or `hz=` with `scenario=watchdog`.
    NotForWatchdog,
    /// `steal=on` or `vmclock=on` where the main loop does something else.
    Alone(&'static str),
}

impl fmt::Display for CmdlineError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "command line is longer than {MAX_BYTES} bytes"),
            Self::NotAscii => f.write_str("command line is not ASCII"),
            Self::UnknownKey(word) => write!(
                f,
                "command line: {} is unknown; keys are clockevent conversion recheck plant scenario watchdog hz count seed max_ms load touch \
                 eoi steal vmclock",
                word.escape_default()
            ),
            Self::BadValue { key, value, want } => {
                write!(f, "command line: {key}={} is not {want}", value.escape_default())
            }
            Self::LoadOfSeveral => f.write_str("command line: load= and touch= are for one CPU, not for scenario=smp"),
            Self::Alone(key) => write!(
                f,
                "command line: {key}=on is for scenario=ticks, deltas or idle, without load= and touch=; steal=on and vmclock=on exclude each other"
            ),
            Self::NotForWatchdog => f.write_str(
                "command line: hz=, load= and touch= are not for scenario=watchdog, which ticks every half second",
            ),
        }
    }
}

impl core::error::Error for CmdlineError<'_> {}

impl<'a> Options<'a> {
    /// Parses the bytes before the NUL. A key given twice has its last value, as Linux does it.
    ///
    /// # Errors
    /// [`CmdlineError`], for the first word that is wrong.
    pub fn parse(line: &'a [u8]) -> Result<Self, CmdlineError<'a>> {
        if line.len() > MAX_BYTES {
            return Err(CmdlineError::TooLong);
        }
        let line = ascii(line).ok_or(CmdlineError::NotAscii)?;
        let mut options = Self { hz: 0, ..Self::default() };
        for word in line.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').ok_or(CmdlineError::UnknownKey(word))?;
            options.set(key, value)?;
        }
        let loaded = options.load != Load::None || options.touch != 0;
        if loaded && options.scenario == ScenarioName::Smp {
            return Err(CmdlineError::LoadOfSeveral);
        }
        let watchdog = options.scenario == ScenarioName::Watchdog;
        if watchdog && (loaded || options.hz != 0) {
            return Err(CmdlineError::NotForWatchdog);
        }
        let busy = loaded || watchdog || options.scenario == ScenarioName::Smp;
        if options.steal && (busy || options.vmclock) {
            return Err(CmdlineError::Alone("steal"));
        }
        if options.vmclock && busy {
            return Err(CmdlineError::Alone("vmclock"));
        }
        if options.hz == 0 {
            options.hz = if watchdog { watchdog::HZ } else { Self::default().hz };
        }
        Ok(options)
    }

    fn set(&mut self, key: &'a str, value: &'a str) -> Result<(), CmdlineError<'a>> {
        let bad = |key, want| CmdlineError::BadValue { key, value, want };
        match key {
            "clockevent" => self.clockevent = Some(value),
            "conversion" => {
                self.conversion = match value {
                    "split" => Conversion::Split,
                    "mult" => Conversion::Mult,
                    "exact" => Conversion::Exact,
                    _ => return Err(bad("conversion", "split, mult or exact")),
                }
            }
            "recheck" => {
                self.recheck = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad("recheck", "on or off")),
                }
            }
            "plant" => {
                self.plant_early_check = match value {
                    "none" => false,
                    "early-check" => true,
                    _ => return Err(bad("plant", "none or early-check")),
                }
            }
            "scenario" => {
                self.scenario = match value {
                    "ticks" => ScenarioName::Ticks,
                    "deltas" => ScenarioName::Deltas,
                    "idle" => ScenarioName::Idle,
                    "smp" => ScenarioName::Smp,
                    "watchdog" => ScenarioName::Watchdog,
                    _ => return Err(bad("scenario", "ticks, deltas, idle, smp or watchdog")),
                }
            }
            "watchdog" => {
                self.watchdog = match value {
                    "kvmclock" => Clocksource::Kvmclock,
                    "acpi_pm" => Clocksource::AcpiPm,
                    _ => return Err(bad("watchdog", "kvmclock or acpi_pm")),
                }
            }
            "hz" => {
                let hz = value.parse().ok().filter(|hz| (HZ_MIN..=HZ_MAX).contains(hz));
                self.hz = hz.ok_or(bad("hz", "a number from 1 to 10000"))?;
            }
            "count" => {
                let count = value.parse().ok().filter(|n| (1..=COUNT_MAX).contains(n));
                self.count = count.ok_or(bad("count", "a number from 1 to 1000000000"))?;
            }
            "seed" => self.seed = value.parse().map_err(|_| bad("seed", "a number below 2^64"))?,
            "max_ms" => {
                let max = value.parse().ok().filter(|ms| *ms <= MAX_MS_MAX);
                self.max_ms = max.ok_or(bad("max_ms", "a number up to 3600000"))?;
            }
            "load" => {
                self.load = match value {
                    "none" => Load::None,
                    "kernel" => Load::Kernel,
                    "user" => Load::User,
                    _ => return Err(bad("load", "none, kernel or user")),
                }
            }
            "eoi" => {
                self.pv_eoi = match value {
                    "auto" => true,
                    "apic" => false,
                    _ => return Err(bad("eoi", "auto or apic")),
                }
            }
            "steal" => {
                self.steal = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad("steal", "on or off")),
                }
            }
            "vmclock" => {
                self.vmclock = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad("vmclock", "on or off")),
                }
            }
            "touch" => {
                let pages = value.parse().ok().filter(|pages| *pages <= TOUCH_MAX);
                self.touch = pages.ok_or(bad("touch", "a number up to 4096"))?;
            }
            key if IGNORED.contains(&key) => {}
            key => return Err(CmdlineError::UnknownKey(key)),
        }
        Ok(())
    }

    /// The scenario at its start; for `smp`, one CPU's part of it.
    #[must_use]
    pub fn scenario(&self) -> Scenario {
        match self.scenario {
            ScenarioName::Ticks | ScenarioName::Smp | ScenarioName::Watchdog => {
                Scenario::periodic(self.hz, Some(self.count))
            }
            ScenarioName::Idle => Scenario::periodic(self.hz, None),
            ScenarioName::Deltas => Scenario::Deltas { deltas: Deltas::new(self.seed, self.max_ms), left: self.count },
        }
    }
}

/// Bytes as text, if they are ASCII. Byte by byte, because `core`'s `is_ascii` uses SSE2 intrinsics whatever the target
/// features are, and the kernel runs with SSE off.
fn ascii(line: &[u8]) -> Option<&str> {
    if line.iter().all(u8::is_ascii) { str::from_utf8(line).ok() } else { None }
}

#[cfg(test)]
mod tests;
