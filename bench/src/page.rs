//! Rewrites the measured part of a page, between two marks, for `--docs`.

use anyhow::{Context, Result};

use crate::{suite::Results, table};

const BEGIN: &str = "<!-- measured: written by scripts/bench --docs -->\n";
const END: &str = "<!-- end of what is measured -->\n";

/// Returns `page` with `results` between its marks.
///
/// # Errors
/// If the marks are not there.
pub fn rewrite(page: &str, results: &Results) -> Result<String> {
    let (before, rest) = page.split_once(BEGIN).with_context(|| format!("it has no line {}", BEGIN.trim_end()))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("it has no line {}", END.trim_end()))?;
    Ok(format!("{before}{BEGIN}\n{}\n{}\n{END}{after}", host(results), table::markdown(results)))
}

/// Where it was measured, in two lines.
#[must_use]
pub fn host(results: &Results) -> String {
    let machine = &results.machine;
    let [before, after] = &results.load;
    format!(
        "On {}, {} CPUs, Linux {}, {}; {} of everything{}.\nLoad averages before: {before}; after: {after}.\n",
        machine.cpu,
        machine.cpus,
        machine.kernel,
        machine.kvm_modules.join(" "),
        if results.runs == 1 { "one run".to_owned() } else { format!("{} runs", results.runs) },
        if results.quick { ", quick and not to be believed" } else { "" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostDescription;

    fn results() -> Results {
        Results {
            schema: String::new(),
            machine: HostDescription::default(),
            load: [String::new(), String::new()],
            runs: 3,
            quick: false,
            rows: Vec::new(),
        }
    }

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = format!("# Title\n{BEGIN}old\n{END}rest\n");
        let once = rewrite(&page, &results()).unwrap();
        assert!(once.starts_with("# Title\n") && once.ends_with("rest\n") && !once.contains("old"), "{once}");
        assert_eq!(rewrite(&once, &results()).unwrap(), once);
    }

    #[test]
    fn a_page_without_marks_is_an_error() {
        for page in ["", BEGIN, END] {
            assert!(rewrite(page, &results()).is_err());
        }
    }
}
