//! Test results for CI: a suite of cases, written as JUnit XML, TAP or KTAP.

mod junit;
mod ktap;
mod sweep;
mod tap;

pub use junit::JunitError;

/// A suite of test cases.
#[derive(Clone, Debug)]
pub struct Suite {
    /// What was tested.
    pub name: String,
    /// In order.
    pub cases: Vec<Case>,
}

/// One case; without a failure it passed.
#[derive(Clone, Debug)]
pub struct Case {
    /// The group it belongs to: a ratio, a clockevent.
    pub class: String,
    /// Its name within the group.
    pub name: String,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// A remark about a case that passed.
    pub remark: Option<String>,
    /// Why it neither passed nor failed.
    pub skipped: Option<String>,
}

/// Why a case failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// In a line.
    pub message: String,
    /// In full.
    pub detail: String,
    /// What kind of failure.
    pub kind: FailureKind,
}

/// Whether a test said no, or did not come to say anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// What was checked is not as it must be.
    Check,
    /// The time limit was reached.
    TimedOut,
    /// The test could not be carried out.
    Error,
}

impl Suite {
    /// The results of a test that this host cannot run, for `reason`: one case, which is skipped.
    #[must_use]
    pub fn cannot(name: &str, reason: &str) -> Self {
        Self::of_one(name, None, Some(reason.to_owned()))
    }

    /// The results of a test that ended with an error before it had any: one case, which failed.
    #[must_use]
    pub fn error(name: &str, error: &str) -> Self {
        let failure = Failure { message: error.to_owned(), detail: error.to_owned(), kind: FailureKind::Error };
        Self::of_one(name, Some(failure), None)
    }

    fn of_one(name: &str, failure: Option<Failure>, skipped: Option<String>) -> Self {
        let case = Case { class: String::new(), name: name.to_owned(), failure, remark: None, skipped };
        Self { name: name.to_owned(), cases: vec![case] }
    }

    /// How many failed.
    #[must_use]
    pub fn failures(&self) -> usize {
        self.cases.iter().filter(|case| case.failure.is_some()).count()
    }
}

#[cfg(test)]
mod samples {
    use super::*;

    /// Four cases, of which the second failed and the last was skipped, with names that are markup and directives.
    pub(super) fn suite() -> Suite {
        let case = |name: &str, failure, skipped| Case {
            class: "×0.5".to_owned(),
            name: name.to_owned(),
            failure,
            remark: None,
            skipped,
        };
        let failure = Failure {
            message: "2 \"late\" <b>".to_owned(),
            detail: "first\n...\n]]>\u{1b}".to_owned(),
            kind: FailureKind::Check,
        };
        let cases = vec![
            case("a # SKIP </script>", None, None),
            case("b \\ & c\nd", Some(failure), None),
            case("e", None, None),
            case("f", None, Some("not # tried".to_owned())),
        ];
        Suite { name: "vmm <sweep>".to_owned(), cases }
    }
}
