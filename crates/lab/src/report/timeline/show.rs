//! A timeline as charts and tables.

use vlapic::Armed;

use super::{Change, PageRow, Tick, Timeline};
use crate::report::{
    Cell, Chart, Section, Table,
    chart::{Axis, Look},
    units,
};

/// Lateness from which the chart is shaded as late: a tick's handler takes some operations of a microsecond each.
const LATE_NS: u64 = 20_000;

impl Timeline {
    /// Charts and tables of one guest's ticks, migrations and pages.
    #[must_use]
    pub fn section(&self, title: &str) -> Section {
        let mut section = Section::new(title);
        if self.ticks == 0 {
            section = section.text("The trace has no ticks: the guest has no tick ring, or handled none.");
        } else {
            section = section.text(HOW_TO_READ).charts(vec![self.overview_chart("All ticks")]);
            let stride = self.overview.stride();
            if stride > 1 {
                section = section.note(format!(
                    "Each point is the worst of {stride} ticks: there were {}.",
                    units::grouped(self.ticks)
                ));
            }
            let around = self.around();
            if !around.is_empty() {
                section = section.charts(around);
            }
            if self.more_migrations != 0 {
                section = section.note(format!("{} came later.", units::count(self.more_migrations, "more migration")));
            }
        }
        if !self.pages.is_empty() {
            section = section.table(self.page_table());
            if self.more_pages != 0 {
                section = section.note(format!("{} came later.", units::count(self.more_pages, "more change")));
            }
        }
        section
    }

    /// All ticks in one chart.
    #[must_use]
    pub fn overview_chart(&self, title: &str) -> Chart {
        let ticks: Vec<&Tick> = self.overview.ticks().collect();
        let chart = points(Chart::new(title, Axis::VmTime), &ticks);
        self.migrations.iter().fold(chart, |chart, migration| chart.mark(migration.at.0, migration.khz.to_string()))
    }

    /// A chart for each migration that has ticks around it.
    fn around(&self) -> Vec<Chart> {
        let shown = self.migrations.iter().filter(|migration| !migration.after.is_empty());
        let chart = |migration: &super::Migration| {
            let ticks: Vec<&Tick> = migration.before.iter().chain(&migration.after).collect();
            let title = format!("Migration at {} ms, to {}", units::exact_ms(migration.at.0), migration.khz);
            points(Chart::new(title, Axis::VmTime), &ticks).mark(migration.at.0, migration.khz.to_string())
        };
        shown.map(chart).collect()
    }

    /// The page at each save, restore and renewal.
    #[must_use]
    pub fn page_table(&self) -> Table {
        let header =
            ["", "VM time, ms", "guest TSC", "TSC, kHz", "version", "tsc_timestamp", "system_time, ns", "mul", "shift"];
        let mut table = Table::new(header.into_iter().chain(["deadline in flight", "policies"]))
            .caption("The kvmclock page at each save, restore and renewal")
            .numeric([1, 2, 3, 4, 5, 6, 7, 8]);
        for row in &self.pages {
            table.row(cells(row));
        }
        table
    }
}

/// How to read the charts of a timeline.
pub const HOW_TO_READ: &str = "A point is a tick: when it was to fire on the x axis, in VM time, and how much later it did on the y \
     axis, which is logarithmic beyond 1 µs either way. The guest's account is when its handler read the clock, the host's \
     when the interrupt was injected. Vertical lines are migrations. Drag to zoom, double-click to go back.";

fn points(chart: Chart, ticks: &[&Tick]) -> Chart {
    let late = |tick: &Tick, at: u64| (tick.expires_ns, difference(at, tick.expires_ns));
    let guest = ticks.iter().map(|tick| late(tick, tick.fired_ns)).collect();
    let host = ticks.iter().filter_map(|tick| tick.host_ns.map(|at| late(tick, at))).collect();
    // Early wakes are drawn at the time they came: a tick may have several.
    let early = |tick: &&Tick| {
        let expires_ns = tick.expires_ns;
        tick.early_ns.iter().map(move |at| (*at, difference(*at, expires_ns))).collect::<Vec<_>>()
    };
    chart
        .series("fired, by the guest", Look::Guest, guest)
        .series("injected, by the host", Look::Host, host)
        .series("woken too early", Look::Early, ticks.iter().flat_map(early).collect())
        .late_from(LATE_NS)
}

/// `a - b`, saturating.
fn difference(a: u64, b: u64) -> i64 {
    let distance = i64::try_from(a.abs_diff(b)).unwrap_or(i64::MAX);
    if a >= b { distance } else { distance.saturating_neg() }
}

fn cells(row: &PageRow) -> Vec<Cell> {
    let PageRow { change, at, tsc, khz, version, page, armed } = row;
    let (name, policies) = match change {
        Change::Save => ("save", String::new()),
        Change::Renew => ("renewal", String::new()),
        Change::Restore { deadline, downtime, downtime_ns } => {
            ("restore", format!("{}; {} {}", deadline.as_str(), downtime.as_str(), units::time(*downtime_ns)))
        }
    };
    vec![
        name.into(),
        units::exact_ms(at.0).into(),
        units::grouped(tsc.0).into(),
        khz.map(|khz| units::grouped(u32::from(khz).into())).unwrap_or_default().into(),
        version.map(|version| version.to_string()).unwrap_or_default().into(),
        units::grouped(page.tsc_timestamp.0).into(),
        units::grouped(page.system_time.0).into(),
        page.scale.mul().to_string().into(),
        page.scale.shift().to_string().into(),
        armed.map(deadline).unwrap_or_default().into(),
        policies.into(),
    ]
}

fn deadline(armed: Armed) -> String {
    match armed {
        Armed::Disarmed => "none".to_owned(),
        Armed::Tsc(tsc) => format!("TSC {}", units::grouped(tsc.0)),
        Armed::Ns(at) | Armed::Count { expires: at } => format!("{} ms", units::exact_ms(at.0)),
    }
}
