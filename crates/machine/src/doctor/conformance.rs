//! `vmm doctor --conformance`: what this host's KVM does with each call that keeping time needs, beside what KVM's
//! documentation says. The layout of the JSON is in `docs/conformance.md`.

use std::fmt::{self, Write};

use serde::Serialize;

pub use crate::kvm::conformance::{Answer, Verdict};

use super::{kvm_modules, read_line};
use crate::{
    kvm::conformance,
    machine::{config::HostEnvironment, error::RunError},
};

/// Version of the report's layout.
pub const SCHEMA: &str = "vmm-conformance/1";

/// The results.
#[derive(Clone, Debug, Serialize)]
pub struct Conformance {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// The kernel's release.
    pub kernel: String,
    /// The KVM modules that are loaded; empty if KVM is built in.
    pub kvm_modules: Vec<String>,
    /// The CPU's name.
    pub cpu: String,
    /// The kernel's clock source, on which KVM's kvmclock depends.
    pub clocksource: String,
    /// The host's TSC frequency in kHz, as KVM reports it.
    pub host_tsc_khz: u32,
    /// One for each check, in a fixed order.
    pub answers: Vec<Answer>,
}

/// Runs all checks, which takes about a second.
///
/// # Errors
/// [`RunError`] if KVM cannot be used at all.
pub fn examine() -> Result<Conformance, RunError> {
    let env = HostEnvironment::open(None)?;
    let khz = env.clock.as_it_is().khz().get();
    Ok(Conformance {
        schema: SCHEMA,
        kernel: read_line("/proc/sys/kernel/osrelease"),
        kvm_modules: kvm_modules(),
        cpu: cpu(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        clocksource: read_line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        host_tsc_khz: khz,
        answers: conformance::examine(&env.host, env.supported()?, khz),
    })
}

/// The first CPU's name in what `/proc/cpuinfo` shows; empty if it has none.
fn cpu(cpuinfo: &str) -> String {
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map(|(_, name)| name.trim().to_owned()).unwrap_or_default()
}

impl Conformance {
    /// The report as text for people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_text(&mut out);
        out
    }

    /// The report as KTAP, version 1 (Linux `Documentation/dev-tools/ktap.rst`). A check that differs or failed is "not
    /// ok", one that the backend does not offer is skipped.
    #[must_use]
    pub fn ktap(&self) -> String {
        let mut out = String::new();
        let _ = self.write_ktap(&mut out);
        out
    }

    fn host(&self) -> String {
        let modules = if self.kvm_modules.is_empty() { "built in".to_owned() } else { self.kvm_modules.join(", ") };
        format!(
            "kernel {}, KVM modules: {modules}; {}, TSC {} kHz, clocksource {}",
            self.kernel, self.cpu, self.host_tsc_khz, self.clocksource
        )
    }

    fn write_text(&self, out: &mut String) -> fmt::Result {
        writeln!(out, "{}\n", self.host())?;
        for Answer { id, asked, said, measured, verdict, .. } in &self.answers {
            writeln!(out, "{:<11} {id:<21} {asked}", verdict.name())?;
            writeln!(out, "{:34}KVM said: {said}; measured: {measured}", "")?;
        }
        let differing: Vec<_> = self.answers.iter().filter(|answer| answer.verdict == Verdict::Differs).collect();
        if !differing.is_empty() {
            writeln!(out, "\nNot as documented")?;
        }
        for Answer { id, rule, kernel, .. } in differing {
            writeln!(out, "  {id}\n    documented: {rule}\n    kernel: {kernel}")?;
        }
        let count = |verdict| self.answers.iter().filter(|answer| answer.verdict == verdict).count();
        writeln!(
            out,
            "\n{} checks: {} conform, {} differ, {} not offered, {} noted, {} failed",
            self.answers.len(),
            count(Verdict::Conforms),
            count(Verdict::Differs),
            count(Verdict::NotOffered),
            count(Verdict::Noted),
            count(Verdict::Failed),
        )
    }

    fn write_ktap(&self, out: &mut String) -> fmt::Result {
        writeln!(out, "KTAP version 1\n# {}\n1..{}", self.host(), self.answers.len())?;
        for (number, answer) in (1..).zip(&self.answers) {
            let Answer { id, asked, said, measured, verdict, rule, kernel } = answer;
            writeln!(out, "# asked: {asked}\n# KVM said: {said}\n# measured: {measured}")?;
            match verdict {
                Verdict::Conforms => writeln!(out, "ok {number} {id}")?,
                Verdict::Noted => writeln!(out, "# noted: the documentation leaves it open\nok {number} {id}")?,
                Verdict::NotOffered => writeln!(out, "ok {number} {id} # SKIP not offered")?,
                Verdict::Differs | Verdict::Failed => {
                    writeln!(out, "# documented: {rule}\n# kernel: {kernel}\nnot ok {number} {id}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Conformance {
        let answer = |id, verdict| Answer {
            id,
            asked: "an offset".to_owned(),
            said: "ok".to_owned(),
            measured: "no effect".to_owned(),
            verdict,
            rule: "the offset",
            kernel: "a function (x86.c)",
        };
        Conformance {
            schema: SCHEMA,
            kernel: "6.12.1".to_owned(),
            kvm_modules: vec!["kvm".to_owned()],
            cpu: "A CPU".to_owned(),
            clocksource: "tsc".to_owned(),
            host_tsc_khz: 1_000_000,
            answers: vec![
                answer("a", Verdict::Conforms),
                answer("b", Verdict::Differs),
                answer("c", Verdict::NotOffered),
                answer("d", Verdict::Noted),
                answer("e", Verdict::Failed),
            ],
        }
    }

    // Catches: a check that differs or could not be made, counted as passed; one that is not offered, counted as
    // failed.
    #[test]
    fn ktap_fails_what_differs_and_skips_what_is_not_offered() {
        let ktap = report().ktap();
        let results: Vec<&str> = ktap.lines().filter(|line| !line.starts_with('#')).collect();
        let expected =
            ["KTAP version 1", "1..5", "ok 1 a", "not ok 2 b", "ok 3 c # SKIP not offered", "ok 4 d", "not ok 5 e"];
        assert_eq!(results, expected);
        assert!(ktap.contains("# documented: the offset\n# kernel: a function (x86.c)\nnot ok 2 b"), "{ktap}");
    }

    #[test]
    fn the_text_names_the_kernels_function_of_what_differs_only() {
        let text = report().text();
        assert_eq!(text.matches("a function").count(), 1, "{text}");
        assert!(text.contains("5 checks: 1 conform, 1 differ, 1 not offered, 1 noted, 1 failed"), "{text}");
    }

    #[test]
    fn the_cpu_is_the_first_ones_name() {
        assert_eq!(cpu("processor\t: 0\nmodel name\t: A: B\nmodel name\t: C\n"), "A: B");
        assert_eq!(cpu("no names"), "");
    }
}
