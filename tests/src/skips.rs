//! Which tests were skipped, and why, counted over one run of `cargo test`.
//!
//! Each test program of such a run is a process of its own, so a skip appends a line to a file, `TARGET/skipped/RUN`.
//! `RUN` is the `cargo` process that started the program: programs of one run share it, and two runs do not. Cargo has
//! no hook for the end of a run. It runs test programs in the order of their packages' names, so the only test program
//! of the package `zz-skip-report` comes last; it calls [`report`], which prints the counts and removes the file. A run
//! that does not get there (a test failed, or one program was asked for) leaves its file, and the next report removes
//! it.
//!
//! The test harness shows what a test prints only if it fails. So that a program run alone says that it skips, too, the
//! first skip for a reason is written past the harness.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write},
    iter,
    os::unix::process::parent_id,
    path::{Path, PathBuf},
    process,
    sync::Mutex,
};

use crate::binary;

/// Ends the test, as one that was skipped for the reason that the arguments format.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        $crate::skip_part!($($reason)*);
        return;
    }};
}

/// Says that a part of the test is skipped, for the reason that the arguments format.
#[macro_export]
macro_rules! skip_part {
    ($($reason:tt)*) => {{
        fn here() {}
        $crate::skipped(::std::any::type_name_of_val(&here), &format!($($reason)*));
    }};
}

/// The value of an `Ok`; an `Err` holds the reason for which the test is skipped.
#[macro_export]
macro_rules! require {
    ($needed:expr) => {
        match $needed {
            Ok(value) => value,
            Err(reason) => $crate::skip!("{reason}"),
        }
    };
}

/// Skips the test where there is no KVM.
#[macro_export]
macro_rules! require_kvm {
    () => {
        $crate::require!($crate::kvm())
    };
}

/// Notes a skip; `here`: the path of an item named `here` in the test. For the macros.
#[doc(hidden)]
pub fn skipped(here: &str, reason: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let test = here.strip_suffix("::here").unwrap_or(here);
    let line = format!("skipped: {test}: {reason}");
    if SAID.lock().expect("no test panics here").insert(reason.to_owned()) {
        // Unlike the macro's, this output is not captured.
        let _ = writeln!(io::stderr(), "{line}");
    } else {
        eprintln!("{line}");
    }
    if let Err(error) = Skips::of_this_run(directory()).add(test, reason) {
        eprintln!("this skip is not counted: {error}");
    }
}

/// Prints how many tests of this run were skipped, and why.
///
/// # Errors
/// If the skips cannot be read, or the output not written.
pub fn report() -> io::Result<()> {
    let report = Skips::of_this_run(directory()).take()?;
    writeln!(io::stdout(), "\n{report}")
}

fn directory() -> PathBuf {
    binary::target().join("skipped")
}

/// The skips of one run.
struct Skips {
    directory: PathBuf,
    run: Process,
}

impl Skips {
    fn of_this_run(directory: PathBuf) -> Self {
        let parents = || iter::successors(Process::read(parent_id()), |child| Process::read(child.parent));
        // Something may stand between the two: Cargo's `runner`, or a debugger.
        let cargo = parents().find(|process| process.name == "cargo");
        let run = cargo.or_else(|| parents().next()).or_else(|| Process::read(process::id()));
        Self { directory, run: run.expect("this process is in /proc") }
    }

    fn file(&self) -> PathBuf {
        self.directory.join(self.run.id())
    }

    fn add(&self, test: &str, reason: &str) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        let [test, reason] = [test, reason].map(|text| text.replace(['\t', '\n'], " "));
        // Other threads and processes append too: a line is one write.
        File::options().append(true).create(true).open(self.file())?.write_all(format!("{test}\t{reason}\n").as_bytes())
    }

    /// The report on this run, whose skips are forgotten with it, and so are those of runs that ended without a report.
    fn take(&self) -> io::Result<String> {
        let lines = match fs::read_to_string(self.file()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            lines => lines?,
        };
        let own = self.file();
        for entry in fs::read_dir(&self.directory).into_iter().flatten() {
            let path = entry?.path();
            if path == own || !of_a_living_process(&path) {
                fs::remove_file(path)?;
            }
        }
        Ok(summary(&lines))
    }
}

fn of_a_living_process(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let process = name.split_once('-').and_then(|(pid, _)| Process::read(pid.parse().ok()?));
    process.is_some_and(|process| process.id() == name)
}

fn summary(lines: &str) -> String {
    let mut reasons: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (test, reason) in lines.lines().filter_map(|line| line.split_once('\t')) {
        reasons.entry(reason).or_default().insert(test);
    }
    let tests = reasons.values().flatten().collect::<BTreeSet<_>>().len();
    if tests == 0 {
        return "no test was skipped".to_owned();
    }
    let mut reasons: Vec<_> = reasons.into_iter().map(|(reason, tests)| (tests.len(), reason)).collect();
    reasons.sort_by(|one, other| other.cmp(one));
    let reasons: Vec<_> = reasons.iter().map(|(tests, reason)| format!("{reason} ({tests})")).collect();
    format!("{tests} {} skipped, wholly or in part: {}", if tests == 1 { "test" } else { "tests" }, reasons.join("; "))
}

/// A process, by /proc/PID/stat (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    name: String,
    parent: u32,
    /// Clock ticks after boot: with the id, it names one process only.
    started: u64,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        // A name may hold blanks and parentheses.
        let (pid, rest) = stat.split_once(" (")?;
        let (name, rest) = rest.rsplit_once(") ")?;
        let mut fields = rest.split(' ').skip(1);
        let parent = fields.next()?.parse().ok()?;
        // Of all fields `ppid` is the 4th, `starttime` the 22nd.
        let started = fields.nth(22 - 5)?.parse().ok()?;
        Some(Self { pid: pid.parse().ok()?, name: name.to_owned(), parent, started })
    }

    fn id(&self) -> String {
        format!("{}-{}", self.pid, self.started)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn skips(directory: &Path) -> Skips {
        Skips::of_this_run(directory.to_owned())
    }

    #[test]
    fn the_report_counts_tests_by_reason() {
        let lines = "a\tno KVM\nb\tno KVM\nb\tno KVM\nb\tno QEMU\nc\tno strace\nd\tno KVM\n";
        let report = "4 tests skipped, wholly or in part: no KVM (3); no strace (1); no QEMU (1)";
        assert_eq!(summary(lines), report);
        assert_eq!(summary("a\tno KVM\n"), "1 test skipped, wholly or in part: no KVM (1)");
        assert_eq!(summary(""), "no test was skipped");
    }

    // Catches: skips that are lost or torn where tests run in threads.
    #[test]
    fn skips_of_many_threads_are_all_counted() {
        let directory = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for thread in 0..8 {
                let skips = skips(directory.path());
                scope.spawn(move || (0..50).for_each(|n| skips.add(&format!("{thread} {n}"), "a\nb\tc").unwrap()));
            }
        });
        let report = skips(directory.path()).take().unwrap();
        assert_eq!(report, "400 tests skipped, wholly or in part: a b c (400)");
    }

    // Catches: what an earlier run left, counted again; and what a run leaves that goes on at the same time, removed.
    #[test]
    fn each_run_counts_its_own_skips() {
        let directory = tempfile::tempdir().unwrap();
        // Some other living process, one that has ended, and one whose number is now another process's.
        let living = Process::read(process::id()).unwrap();
        let ended = Process { pid: 1 << 30, ..Process::read(process::id()).unwrap() };
        let reused = Process { started: living.started + 1, ..Process::read(process::id()).unwrap() };
        for run in [living, ended, reused] {
            Skips { directory: directory.path().to_owned(), run }.add("old", "old").unwrap();
        }
        skips(directory.path()).add("new", "new").unwrap();
        assert_eq!(skips(directory.path()).take().unwrap(), "1 test skipped, wholly or in part: new (1)");
        assert_eq!(skips(directory.path()).take().unwrap(), "no test was skipped");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert_eq!(skips(&directory.path().join("none")).take().unwrap(), "no test was skipped");
    }

    #[test]
    fn a_process_is_parsed_whatever_its_name() {
        let stat = "42 (a ) (b) S 7 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 987654 0 0 0\n";
        let process = Process { pid: 42, name: "a ) (b".to_owned(), parent: 7, started: 987_654 };
        assert_eq!(Process::parse(stat), Some(process));
        assert_eq!(Process::parse("42 (a"), None);
        assert_eq!(Process::read(process::id()).unwrap().parent, parent_id());
    }
}
