//! The options of a sweep.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use machine::BootOptions;
use vmtime::{DeadlinePolicy, DowntimePolicy, Khz};

use super::{SweepError, result::Shard};
use crate::recipe::{Recipe, step::Destination};

/// An end of the stretch that is swept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edge {
    /// CPU 0 enters its handler for the timer interrupt of this number, counted from 1.
    Tick(u64),
    /// A CPU is about to execute the first instruction of this function, for the first time.
    Symbol(String),
    /// A CPU is about to execute the instruction at this address, for the first time.
    Address(u64),
}

impl FromStr for Edge {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("tick:") {
            Some(number) => match number.parse() {
                Ok(number @ 1..) => Ok(Self::Tick(number)),
                _ => Err("a tick is a whole number from 1, as in tick:3".to_owned()),
            },
            None if text.starts_with("0x") => {
                let digits = text.trim_start_matches("0x");
                u64::from_str_radix(digits, 16).map(Self::Address).map_err(|_| "an address is like 0x100200".to_owned())
            }
            None if text.is_empty() => Err("name a function, or a tick as in tick:3".to_owned()),
            None => Ok(Self::Symbol(text.to_owned())),
        }
    }
}

impl fmt::Display for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tick(number) => write!(f, "tick:{number}"),
            Self::Symbol(name) => f.write_str(name),
            Self::Address(address) => write!(f, "{address:#x}"),
        }
    }
}

/// Which instruction boundaries are points.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Every {
    /// All.
    #[default]
    Instruction,
    /// Those after an exit to the VMM.
    Exit,
    /// Those after an RDTSC.
    Read,
}

impl Every {
    /// As on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Instruction => "instruction",
            Self::Exit => "exit",
            Self::Read => "read",
        }
    }
}

/// A frequency to migrate to, as a multiple of the present one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ratio {
    /// As it was written.
    pub text: String,
    /// In billionths.
    billionths: u64,
}

impl Ratio {
    /// The frequency that is this multiple of `khz`, to the nearest kHz.
    ///
    /// # Errors
    /// If no TSC has such a frequency.
    pub fn of(&self, khz: Khz) -> Result<Khz, SweepError> {
        let exact = u128::from(khz.get()) * u128::from(self.billionths);
        let nearest = u64::try_from((exact + 500_000_000) / 1_000_000_000).unwrap_or(u64::MAX);
        Khz::new(nearest).map_err(|bad| SweepError::Usage(format!("--ratio {}: {bad}", self.text)))
    }
}

impl FromStr for Ratio {
    type Err = String;

    /// A decimal number from 0.1 to 10 with at most nine digits after the point.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || "not a ratio from 0.1 to 10, with at most nine digits after the point".to_owned();
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || whole.len() > 2 || part.len() > 9 || !digits(whole) || !digits(part) {
            return Err(bad());
        }
        let billionths: u64 = format!("{whole}{part:0<9}").parse().map_err(|_| bad())?;
        if !(100_000_000..=10_000_000_000).contains(&billionths) {
            return Err(bad());
        }
        Ok(Self { text: text.to_owned(), billionths })
    }
}

/// How many migrations a point has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Depth {
    /// One migration at each point.
    #[default]
    One,
    /// Two: a second one at a later point goes back to the first frequency. The seed chooses the pairs of points.
    Two {
        /// About how many pairs; all of them if there are no more.
        samples: u64,
    },
}

/// What to sweep, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to boot; virtual time and the trapped source are implied.
    pub boot: BootOptions,
    /// The TSC frequency at boot.
    pub khz: Khz,
    /// Where the stretch begins.
    pub from: Edge,
    /// Where it ends: by default one tick after its beginning.
    pub to: Option<Edge>,
    /// Which boundaries are points.
    pub every: Every,
    /// The frequencies to migrate to.
    pub ratios: Vec<Ratio>,
    /// Deadline policy.
    pub deadline: DeadlinePolicy,
    /// Downtime policy.
    pub downtime: DowntimePolicy,
    /// How long the VM counts as saved.
    pub downtime_length: Duration,
    /// Steps of save and restore to be played in place of this VMM's own: another VMM's, or with a fault.
    pub recipe: Option<Arc<Recipe>>,
    /// The recipe is that of a fault, which is written so on the command line.
    pub inject: Option<String>,
    /// Ticks that must come after the one being handled at the point.
    pub ticks: u64,
    /// Number of migrations at a point.
    pub depth: Depth,
    /// A tick is late if its lateness exceeds the baseline's by more than this.
    pub tolerance: Duration,
    /// VM time to wait for the ticks after a migration; by default a multiple of the period.
    pub patience: Option<Duration>,
    /// Number of threads.
    pub workers: u32,
    /// Try only this part of the points.
    pub shard: Option<Shard>,
}

impl Options {
    /// Whether the recipe is one whose loss is measured in the guest's pages: KVM's kvmclock, or a VM that stays.
    #[must_use]
    pub fn measures_pages(&self) -> bool {
        self.inject.is_none() && self.recipe.as_ref().is_some_and(|recipe| recipe.destination != Destination::Vmm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_exact_decimals() {
        let of = |text: &str, khz: u64| text.parse::<Ratio>().unwrap().of(Khz::new(khz).unwrap()).unwrap().get();
        assert_eq!(of("0.5", 2_600_000), 1_300_000);
        assert_eq!(of("1.0002", 2_600_000), 2_600_520);
        assert_eq!(of("10", 2_600_000), 26_000_000);
        assert_eq!(of("0.333333333", 3_000_000), 1_000_000);
        for bad in ["", "0", "0.05", "10.1", "1e1", "-1", "+1", "1.0000000001", "100", "1.x", "."] {
            assert!(bad.parse::<Ratio>().is_err(), "{bad}");
        }
    }

    #[test]
    fn edges() {
        assert_eq!("tick:3".parse(), Ok(Edge::Tick(3)));
        assert_eq!("set_next_event".parse(), Ok(Edge::Symbol("set_next_event".to_owned())));
        assert!("tick:0".parse::<Edge>().is_err() && "tick:x".parse::<Edge>().is_err() && "".parse::<Edge>().is_err());
        assert_eq!("0x100200".parse(), Ok(Edge::Address(0x10_0200)));
        assert!("0x".parse::<Edge>().is_err() && "0xg".parse::<Edge>().is_err());
        assert_eq!(Edge::Tick(3).to_string(), "tick:3");
    }
}
