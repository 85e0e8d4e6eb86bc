//! Reads ticks, migrations and the kvmclock page from a trace, in bounded memory.
//!
//! A trace may be larger than memory. So three things are kept: each tick around the first migrations; of all ticks,
//! the worst of each group of neighbours; and the first changes of the page.

mod read;
mod show;
mod thin;

use std::collections::VecDeque;

pub use read::TraceError;
pub use show::HOW_TO_READ;

use vlapic::Armed;
use vmtime::{DeadlinePolicy, DowntimePolicy, GuestTsc, Khz, PageClock, VmTime};

use self::thin::Thinned;

/// Ticks kept before and after a migration.
const BEFORE: usize = 16;
const AFTER: usize = 32;
/// Migrations that get a chart each.
const MIGRATIONS_SHOWN: usize = 12;
/// Changes of the page that are kept.
const PAGES_SHOWN: usize = 200;
/// Early wakes of one tick that are kept: the first of them, which are the earliest.
const EARLY_SHOWN: usize = 12;

/// A tick.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tick {
    /// When it was to fire.
    pub expires_ns: u64,
    /// When it fired, by the guest's clock.
    pub fired_ns: u64,
    /// When its interrupt was injected, by the reference clock.
    pub host_ns: Option<u64>,
    /// When interrupts came too early for it.
    pub early_ns: Vec<u64>,
    /// How many interrupts came too early.
    pub early_wakes: u32,
}

/// A restore, and the ticks around it.
#[derive(Clone, Debug)]
struct Migration {
    at: VmTime,
    khz: Khz,
    before: Vec<Tick>,
    after: Vec<Tick>,
}

/// The event that changed the page, or that the page is shown for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Save,
    Renew,
    Restore { deadline: DeadlinePolicy, downtime: DowntimePolicy, downtime_ns: u64 },
}

/// The page at a save, after a restore or a renewal.
#[derive(Clone, Debug)]
struct PageRow {
    change: Change,
    at: VmTime,
    tsc: GuestTsc,
    /// None for a renewal, which changes neither.
    khz: Option<Khz>,
    version: Option<u32>,
    page: PageClock,
    armed: Option<Armed>,
}

/// The ticks, migrations and page changes of one or several traces.
#[derive(Debug, Default)]
pub struct Timeline {
    ticks: u64,
    early_wakes: u64,
    overview: Thinned,
    recent: VecDeque<Tick>,
    migrations: Vec<Migration>,
    /// Migrations after the first [`MIGRATIONS_SHOWN`]: only counted.
    more_migrations: u64,
    pages: Vec<PageRow>,
    more_pages: u64,
    /// The frequency after the last restore or boot.
    khz: Option<Khz>,
}

impl Tick {
    /// Its greatest distance from its expiry, early or late, by the guest or the host.
    fn worst_ns(&self) -> u64 {
        let instants = [self.fired_ns].into_iter().chain(self.host_ns).chain(self.early_ns.iter().copied());
        instants.map(|at| at.abs_diff(self.expires_ns)).max().unwrap_or(0)
    }
}

impl Timeline {
    /// Ticks read so far.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        self.ticks
    }

    fn tick(&mut self, tick: Tick) {
        self.ticks = self.ticks.saturating_add(1);
        self.early_wakes = self.early_wakes.saturating_add(u64::from(tick.early_wakes));
        for migration in &mut self.migrations {
            if migration.after.len() < AFTER {
                migration.after.push(tick.clone());
            }
        }
        if self.recent.len() == BEFORE {
            self.recent.pop_front();
        }
        self.recent.push_back(tick.clone());
        self.overview.push(tick);
    }

    fn restored(&mut self, at: VmTime, khz: Khz) {
        self.khz = Some(khz);
        if self.migrations.len() < MIGRATIONS_SHOWN {
            let before = self.recent.iter().cloned().collect();
            self.migrations.push(Migration { at, khz, before, after: Vec::new() });
        } else {
            self.more_migrations = self.more_migrations.saturating_add(1);
        }
    }

    fn page(&mut self, row: PageRow) {
        if self.pages.len() < PAGES_SHOWN {
            self.pages.push(row);
        } else {
            self.more_pages = self.more_pages.saturating_add(1);
        }
    }
}
