//! JUnit XML, as CI servers read it. Without times: the same results give the same bytes.

use machine::blame::{Blame, Blamed};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use super::{Case, FailureKind, Suite};

/// XML could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot write JUnit XML: {0}")]
pub struct JunitError(String);

impl Blamed for JunitError {
    fn blame(&self) -> Blame {
        Blame::Run
    }
}

impl Suite {
    /// As JUnit XML.
    ///
    /// # Errors
    /// If the XML writer fails.
    pub fn junit(&self) -> Result<String, JunitError> {
        let mut suite = TestSuite::new(self.name.as_str());
        suite.add_test_cases(self.cases.iter().map(test_case));
        let mut report = Report::new(self.name.as_str());
        report.add_test_suite(suite);
        report.to_string().map_err(|error| JunitError(error.to_string()))
    }
}

fn test_case(case: &Case) -> TestCase {
    let status = match (&case.failure, &case.skipped) {
        (None, None) => TestCaseStatus::success(),
        (None, Some(reason)) => {
            let mut status = TestCaseStatus::skipped();
            status.set_message(reason.as_str());
            status
        }
        (Some(failure), _) => {
            let kind = match failure.kind {
                FailureKind::Error => NonSuccessKind::Error,
                FailureKind::Check | FailureKind::TimedOut => NonSuccessKind::Failure,
            };
            let mut status = TestCaseStatus::non_success(kind);
            status.set_message(failure.message.as_str()).set_type("verdict").set_description(failure.detail.as_str());
            status
        }
    };
    let mut test = TestCase::new(case.name.as_str(), status);
    if !case.class.is_empty() {
        test.set_classname(case.class.as_str());
    }
    if let Some(remark) = &case.remark {
        test.set_system_out(remark.as_str());
    }
    test
}

#[cfg(test)]
mod tests {
    use crate::report::cases::samples::suite;

    #[test]
    fn counts_are_right_and_text_does_not_become_markup() {
        let xml = suite().junit().unwrap();
        // The reader of the same crate rejects XML that is not well-formed.
        let report = quick_junit::Report::deserialize_from_str(&xml).unwrap();
        assert_eq!((report.tests, report.failures, report.errors), (4, 1, 0));
        assert!(xml.contains("skipped=\"1\"") && xml.contains("<skipped message=\"not # tried\""), "{xml}");
        let cases = &report.test_suites[0].test_cases;
        assert_eq!(
            cases.iter().filter(|case| !matches!(case.status, quick_junit::TestCaseStatus::Success { .. })).count(),
            2
        );
        assert_eq!(cases[0].name.as_str(), "a # SKIP </script>");
        assert!(!xml.contains("<b>") && !xml.contains('\u{1b}') && !xml.contains("timestamp"), "{xml}");
    }
}
