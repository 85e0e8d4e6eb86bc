//! TAP, version 14 (<https://testanything.org/tap-version-14-specification.html>).

use super::{Case, Suite};

impl Suite {
    /// As TAP.
    #[must_use]
    pub fn tap(&self) -> String {
        let mut text = format!("TAP version 14\n1..{}\n", self.cases.len());
        for (index, case) in self.cases.iter().enumerate() {
            point(&mut text, index.saturating_add(1), case);
        }
        text
    }
}

fn point(text: &mut String, number: usize, case: &Case) {
    let verdict = if case.failure.is_some() { "not ok" } else { "ok" };
    let name = format!("{} {}", case.class, case.name);
    text.push_str(&format!("{verdict} {number} - {}", description(name.trim_start())));
    if let (None, Some(reason)) = (&case.failure, &case.skipped) {
        text.push_str(&format!(" # SKIP {}", description(reason)));
    }
    text.push('\n');
    let diagnostics = match (&case.failure, &case.remark) {
        (Some(failure), _) => vec![("message", &failure.message), ("detail", &failure.detail)],
        (None, Some(remark)) => vec![("message", remark)],
        (None, None) => return,
    };
    text.push_str("  ---\n");
    for (key, value) in diagnostics {
        text.push_str(&format!("  {key}: {}\n", scalar(value)));
    }
    text.push_str("  ...\n");
}

/// "The characters # and \ ... must be escaped" in descriptions; a line is one test point.
fn description(text: &str) -> String {
    text.replace('\\', "\\\\").replace('#', "\\#").replace(char::is_control, " ")
}

/// Encodes `text` as a JSON string, which is also a YAML scalar, in one line.
fn scalar(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use crate::report::cases::samples::suite;

    #[test]
    fn the_plan_is_the_number_of_points_and_no_name_is_a_directive() {
        let suite = suite();
        let tap = suite.tap();
        let mut lines = tap.lines();
        assert_eq!(lines.next(), Some("TAP version 14"));
        assert_eq!(lines.next(), Some("1..4"));
        let points: Vec<&str> = lines.filter(|line| !line.starts_with(' ')).collect();
        assert_eq!(
            points,
            [
                "ok 1 - ×0.5 a \\# SKIP </script>",
                "not ok 2 - ×0.5 b \\\\ & c d",
                "ok 3 - ×0.5 e",
                "ok 4 - ×0.5 f # SKIP not \\# tried"
            ]
        );
        assert!(tap.contains(r#"  detail: "first\n...\n]]>\u001b""#), "{tap}");
    }
}
