//! Charts of points: VM time or the point's number on the x axis, lateness on the y axis.

use maud::{Markup, html};
use serde::Serialize;

use super::embed;

/// A chart.
#[derive(Clone, Debug, Serialize)]
pub struct Chart {
    #[serde(skip)]
    title: String,
    x: Axis,
    series: Vec<Series>,
    marks: Vec<Mark>,
    /// Lateness above this is shaded as late.
    late_ns: Option<u64>,
}

/// What the x axis counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// Nanoseconds of VM time.
    VmTime,
    /// Numbers of points.
    Number,
}

/// Colour and shape of the points of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Look {
    /// Measured by the guest.
    Guest,
    /// Measured by the host.
    Host,
    /// Too early.
    Early,
    /// On time.
    Good,
    /// Late.
    Late,
    /// Too early, without end.
    Storm,
    /// No tick at all.
    Fatal,
    /// The clock is wrong, or GUEST_STOPPED was not set.
    Clock,
}

#[derive(Clone, Debug, Serialize)]
struct Series {
    name: String,
    look: Look,
    /// Pairs of x and y; x in order.
    points: Vec<(u64, i64)>,
}

#[derive(Clone, Debug, Serialize)]
struct Mark {
    x: u64,
    name: String,
}

impl Chart {
    /// A chart without points.
    #[must_use]
    pub fn new(title: impl Into<String>, x: Axis) -> Self {
        Self { title: title.into(), x, series: Vec::new(), marks: Vec::new(), late_ns: None }
    }

    /// Adds a series of points, each an x and a y in nanoseconds. An empty series is left out.
    #[must_use]
    pub fn series(mut self, name: impl Into<String>, look: Look, mut points: Vec<(u64, i64)>) -> Self {
        points.sort_unstable();
        if !points.is_empty() {
            self.series.push(Series { name: name.into(), look, points });
        }
        self
    }

    /// Adds a vertical line.
    #[must_use]
    pub fn mark(mut self, x: u64, name: impl Into<String>) -> Self {
        self.marks.push(Mark { x, name: name.into() });
        self
    }

    /// Shades lateness above this as late.
    #[must_use]
    pub fn late_from(mut self, ns: u64) -> Self {
        self.late_ns = Some(ns);
        self
    }

    fn points(&self) -> usize {
        self.series.iter().map(|series| series.points.len()).sum()
    }

    pub(super) fn render(&self) -> Markup {
        html! {
            figure.chart data-points=(self.points()) {
                figcaption { (self.title) }
                div.plot role="img" aria-label=(self.title) {}
                p.reading aria-hidden="true" {}
                (embed::json(self))
            }
        }
    }

    /// Names and looks of the series of all `charts`, once each.
    pub(super) fn legend(charts: &[Self]) -> Vec<(&str, &'static str)> {
        let mut legend: Vec<(&str, &'static str)> = Vec::new();
        for series in charts.iter().flat_map(|chart| &chart.series) {
            let entry = (series.name.as_str(), series.look.class());
            if !legend.contains(&entry) {
                legend.push(entry);
            }
        }
        legend
    }
}

impl Look {
    const fn class(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Host => "host",
            Self::Early => "early",
            Self::Good => "good",
            Self::Late => "late",
            Self::Storm => "storm",
            Self::Fatal => "fatal",
            Self::Clock => "clock",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_in_order_and_empty_series_are_not_there() {
        let chart = Chart::new("a < b", Axis::Number).series("late", Look::Late, vec![(5, -1), (2, 7)]).series(
            "early",
            Look::Early,
            Vec::new(),
        );
        let html = chart.render().into_string();
        assert!(html.contains(r#""points":[[2,7],[5,-1]]"#) && html.contains("data-points=\"2\""), "{html}");
        assert!(!html.contains("early") && html.contains("a &lt; b"), "{html}");
    }

    #[test]
    fn looks_are_serialized_as_their_class() {
        let all = [Look::Guest, Look::Host, Look::Early, Look::Good, Look::Late, Look::Storm, Look::Fatal, Look::Clock];
        for look in all {
            assert_eq!(serde_json::to_value(look).unwrap(), look.class());
        }
    }
}
