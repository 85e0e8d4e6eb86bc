//! Formats numbers for people.

/// A duration with the unit that fits its size, with one decimal.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "three digits for people")]
pub fn time(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => format!("{:.1}µs", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}ms", ns as f64 / 1e6),
        _ => format!("{:.1}s", ns as f64 / 1e9),
    }
}

/// VM time to the nanosecond: milliseconds with six decimals, in groups of three.
#[must_use]
pub fn exact_ms(ns: u64) -> String {
    let (ms, rest) = (ns / 1_000_000, ns % 1_000_000);
    format!("{}.{:03}\u{202f}{:03}", grouped(ms), rest / 1_000, rest % 1_000)
}

/// A number with a thin space between groups of three digits.
#[must_use]
pub fn grouped(number: u64) -> String {
    grouped_by(number, '\u{202f}')
}

/// A number with `separator` between groups of three digits.
#[must_use]
pub fn grouped_by(number: u64, separator: char) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 2);
    for (index, digit) in digits.chars().enumerate() {
        if index != 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(separator);
        }
        text.push(digit);
    }
    text
}

/// `count` of something: `1 point`, `2 points`.
#[must_use]
pub fn count(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{} {what}s", grouped(count)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_three() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_000), "1\u{202f}000");
        assert_eq!(grouped(12_345_678), "12\u{202f}345\u{202f}678");
        assert_eq!(exact_ms(1_234_005_006), "1\u{202f}234.005\u{202f}006");
    }

    #[test]
    fn one_is_singular() {
        assert_eq!((count(1, "point"), count(0, "point")), ("1 point".to_owned(), "0 points".to_owned()));
    }
}
