//! Reads KTAP, version 1, by the rules of Linux `Documentation/dev-tools/ktap.rst` for a test without subtests.

/// One result line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestResult {
    /// `ok`, not `not ok`.
    pub ok: bool,
    /// The test's description.
    pub description: String,
    /// `SKIP`, `TIMEOUT` or `ERROR`, and the text after it.
    pub directive: Option<(String, String)>,
}

/// The results in `text`.
///
/// # Panics
/// If a rule is broken: a version line, then the plan, results numbered from 1 to the plan's number, no `#` in a
/// description, a directive that goes with its result, and diagnostic lines that begin with `# `.
#[must_use]
pub fn results(text: &str) -> Vec<TestResult> {
    let mut lines = text.lines().filter(|line| !line.starts_with("# "));
    assert!(text.starts_with("KTAP version 1\n"), "{text}");
    let _version = lines.next();
    let plan = lines.next().and_then(|line| line.strip_prefix("1..")).and_then(|number| number.parse::<usize>().ok());
    let mut results = Vec::new();
    for line in lines {
        let (ok, rest) = match line.strip_prefix("not ok ") {
            Some(rest) => (false, rest),
            None => (true, line.strip_prefix("ok ").unwrap_or_else(|| panic!("unknown line {line:?} in {text}"))),
        };
        let (number, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        assert_eq!(number, (results.len() + 1).to_string(), "{text}");
        let (description, data) = rest.split_once(" # ").map_or((rest, None), |(words, data)| (words, Some(data)));
        assert!(!description.is_empty() && !description.contains('#'), "{line:?}");
        let directive = data.map(|data| {
            let (word, why) = data.split_once(' ').unwrap_or((data, ""));
            // SKIP may go with either; a harness that does not know it falls back to the result.
            let goes_with = match word {
                "SKIP" => ok,
                "TIMEOUT" | "ERROR" => !ok,
                _ => false,
            };
            assert!(goes_with && !why.is_empty(), "{line:?}");
            (word.to_owned(), why.to_owned())
        });
        results.push(TestResult { ok, description: description.to_owned(), directive });
    }
    assert_eq!(Some(results.len()), plan, "{text}");
    results
}
