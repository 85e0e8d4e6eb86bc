//! Lengths of time for people.

use core::{fmt, time::Duration};

/// A length of time as it is written on the command line, and as that reads it: `3s`, `1ms 522us`, `8760h`. Hours are
/// the largest unit: months and years have no one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length(pub Duration);

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = (self.0.as_secs(), self.0.subsec_nanos());
        let parts = [
            (seconds / 3600, "h"),
            (seconds / 60 % 60, "m"),
            (seconds % 60, "s"),
            (u64::from(nanos / 1_000_000), "ms"),
            (u64::from(nanos / 1000 % 1000), "us"),
            (u64::from(nanos % 1000), "ns"),
        ];
        let mut separator = "";
        for (count, unit) in parts.into_iter().filter(|(count, _)| *count != 0) {
            write!(f, "{separator}{count}{unit}")?;
            separator = " ";
        }
        if separator.is_empty() { f.write_str("0s") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_year_is_hours_and_not_months() {
        let shown = |length| Length(length).to_string();
        assert_eq!(shown(Duration::from_secs(8760 * 3600)), "8760h");
        assert_eq!(shown(Duration::from_secs(3)), "3s");
        assert_eq!(shown(Duration::from_secs(86_400 + 90 * 60)), "25h 30m");
        assert_eq!(shown(Duration::ZERO), "0s");
        assert_eq!(shown(Duration::MAX), "5124095576030431h 15s 999ms 999us 999ns");
    }

    #[test]
    fn short_ones_are_as_the_documents_show_them() {
        let shown = |nanos| Length(Duration::from_nanos(nanos)).to_string();
        assert_eq!(shown(41_000), "41us");
        assert_eq!(shown(1_522_000), "1ms 522us");
        assert_eq!(shown(4_008_550_000), "4s 8ms 550us");
        assert_eq!(shown(1), "1ns");
        assert_eq!(shown(65_000_000_001), "1m 5s 1ns");
    }

    proptest! {
        #[test]
        fn the_command_line_reads_what_is_shown(nanos: u64) {
            let length = Duration::from_nanos(nanos);
            prop_assert_eq!(humantime::parse_duration(&Length(length).to_string()), Ok(length));
        }
    }
}
