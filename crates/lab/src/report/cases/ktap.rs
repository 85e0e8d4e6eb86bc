//! KTAP, version 1 (Linux `Documentation/dev-tools/ktap.rst`), as the kernel's own tests print it.

use super::{Case, FailureKind, Suite};

impl Suite {
    /// As KTAP. What is known about a case stands in diagnostic lines before its result.
    #[must_use]
    pub fn ktap(&self) -> String {
        let mut text = format!("KTAP version 1\n1..{}\n", self.cases.len());
        diagnostics(&mut text, &self.name);
        for (index, case) in self.cases.iter().enumerate() {
            result(&mut text, index.saturating_add(1), case);
        }
        // As `ksft_print_cnts` prints them. Nothing here is expected to fail.
        let count = |which: fn(&Case) -> bool| self.cases.iter().filter(|case| which(case)).count();
        text.push_str(&format!(
            "# Totals: pass:{} fail:{} xfail:0 xpass:0 skip:{} error:{}\n",
            count(|case| case.failure.is_none() && case.skipped.is_none()),
            count(|case| case.failure.as_ref().is_some_and(|failure| failure.kind != FailureKind::Error)),
            count(|case| case.failure.is_none() && case.skipped.is_some()),
            count(|case| case.failure.as_ref().is_some_and(|failure| failure.kind == FailureKind::Error)),
        ));
        text
    }
}

/// `<result> <number> [<description>][ # [<directive>] [<diagnostic data>]]`
fn result(text: &mut String, number: usize, case: &Case) {
    if let Some(failure) = &case.failure {
        diagnostics(text, &failure.message);
        if failure.detail != failure.message {
            diagnostics(text, &failure.detail);
        }
    } else if let Some(remark) = &case.remark {
        diagnostics(text, remark);
    }
    let verdict = if case.failure.is_some() { "not ok" } else { "ok" };
    text.push_str(&format!("{verdict} {number} {}", description(&format!("{} {}", case.class, case.name))));
    let directive = match (&case.failure, &case.skipped) {
        (Some(failure), _) => match failure.kind {
            FailureKind::Check => None,
            FailureKind::TimedOut => Some(("TIMEOUT", &failure.message)),
            FailureKind::Error => Some(("ERROR", &failure.message)),
        },
        (None, Some(reason)) => Some(("SKIP", reason)),
        (None, None) => None,
    };
    if let Some((directive, why)) = directive {
        text.push_str(&format!(" # {directive} {}", line(why)));
    }
    text.push('\n');
}

fn diagnostics(text: &mut String, words: &str) {
    for words in words.lines() {
        text.push_str(&format!("# {}\n", line(words)));
    }
}

/// "The description ... can be any string of words (can't include #)."
fn description(words: &str) -> String {
    line(&words.replace('#', " ")).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn line(words: &str) -> String {
    words.replace(char::is_control, " ").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::cases::{Failure, samples::suite};

    /// The rules of ktap.rst for a test without subtests: one version line, then the plan, result lines numbered from
    /// 1, no `#` in a description, known directives, and all other lines diagnostic.
    fn obeys_the_rules(ktap: &str) -> Vec<(bool, &str, Option<&str>)> {
        let mut lines = ktap.lines();
        assert_eq!(lines.next(), Some("KTAP version 1"));
        let planned: usize = lines.next().and_then(|line| line.strip_prefix("1..")).unwrap().parse().unwrap();
        let mut results = Vec::new();
        for line in lines.filter(|line| !line.starts_with("# ")) {
            let (ok, rest) = match line.strip_prefix("not ok ") {
                Some(rest) => (false, rest),
                None => (true, line.strip_prefix("ok ").unwrap_or_else(|| panic!("unknown line {line:?}"))),
            };
            let (number, rest) = rest.split_once(' ').unwrap();
            assert_eq!(number, (results.len() + 1).to_string(), "{line}");
            let (description, data) = rest.split_once(" # ").map_or((rest, None), |(text, data)| (text, Some(data)));
            assert!(!description.contains('#') && !description.is_empty(), "{line}");
            let directive = data.and_then(|data| data.split(' ').next());
            match directive {
                Some("SKIP") => assert!(ok, "{line}"),
                Some("TIMEOUT" | "ERROR") => assert!(!ok, "{line}"),
                None => {}
                Some(other) => panic!("{other} in {line}"),
            }
            results.push((ok, description, directive));
        }
        assert_eq!(results.len(), planned);
        results
    }

    // Catches: a plan that does not match, a name that becomes a directive, a detail that becomes a result line.
    #[test]
    fn results_obey_the_rules() {
        let mut suite = suite();
        let failure = |kind| Some(Failure { message: "why\nok 9 not".to_owned(), detail: "more".to_owned(), kind });
        for kind in [FailureKind::TimedOut, FailureKind::Error] {
            suite.cases.push(Case { failure: failure(kind), ..suite.cases[0].clone() });
        }
        let ktap = suite.ktap();
        let expected = [
            (true, "×0.5 a SKIP </script>", None),
            (false, "×0.5 b \\ & c d", None),
            (true, "×0.5 e", None),
            (true, "×0.5 f", Some("SKIP")),
            (false, "×0.5 a SKIP </script>", Some("TIMEOUT")),
            (false, "×0.5 a SKIP </script>", Some("ERROR")),
        ];
        assert_eq!(obeys_the_rules(&ktap), expected);
        assert!(ktap.contains("# 2 \"late\" <b>\n# first\n# ...\n# ]]>\nnot ok 2"), "{ktap}");
        assert!(ktap.contains("# SKIP not # tried\n") && ktap.contains(" # ERROR why ok 9 not\n"), "{ktap}");
        assert!(ktap.ends_with("# Totals: pass:2 fail:2 xfail:0 xpass:0 skip:1 error:1\n"), "{ktap}");
    }

    // Catches: a host that cannot run the test and counts as passed or failed.
    #[test]
    fn what_a_host_cannot_do_is_skipped_and_an_error_is_no_pass() {
        let skipped = Suite::cannot("vmm sweep", "no /dev/kvm");
        assert_eq!(obeys_the_rules(&skipped.ktap()), [(true, "vmm sweep", Some("SKIP"))]);
        assert!(skipped.ktap().contains("ok 1 vmm sweep # SKIP no /dev/kvm\n"));
        assert!(skipped.tap().contains("\nok 1 - vmm sweep # SKIP no /dev/kvm\n"), "{}", skipped.tap());
        assert!(skipped.junit().unwrap().contains("<skipped message=\"no /dev/kvm\""));
        let broken = Suite::error("vmm sweep", "a thread ended");
        assert_eq!(obeys_the_rules(&broken.ktap()), [(false, "vmm sweep", Some("ERROR"))]);
        assert!(broken.tap().contains("\nnot ok 1 - vmm sweep\n"), "{}", broken.tap());
        assert!(broken.junit().unwrap().contains("<error message=\"a thread ended\""), "{}", broken.junit().unwrap());
    }
}
