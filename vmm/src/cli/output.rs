//! Result files. They are opened before the work, so that a bad path is reported before it. They are written at its
//! end, under another name first, so that a reader never finds half a file.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use clap::Args;
use lab::report::{Page, cases::Suite};
use machine::blame::Blame;
use serde::Serialize;
use tempfile::NamedTempFile;

use super::exit::{Codes, Error, Result};

/// Flag for results for people.
#[derive(Debug, Args)]
pub struct ReportFile {
    /// Write a report to this file: one HTML page with charts and tables, which needs no network; - is standard output.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// Flags for results for CI.
#[derive(Debug, Args)]
pub struct CaseFiles {
    /// Write test results to this file as JUnit XML; - is standard output.
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Write test results to this file as TAP; - is standard output.
    #[arg(long, value_name = "FILE")]
    pub tap: Option<PathBuf>,
    /// Write test results to this file as KTAP, the kernel's test format; - is standard output.
    #[arg(long, value_name = "FILE")]
    pub ktap: Option<PathBuf>,
    /// Whose exit codes to end with.
    #[arg(long, value_enum, value_name = "WHOSE", default_value = "vmm")]
    pub exit_codes: Codes,
}

impl CaseFiles {
    /// The flags that name a file, and their values.
    pub fn named(&self) -> [(&'static str, Option<&Path>); 3] {
        let Self { junit, tap, ktap, exit_codes: _ } = self;
        [("junit", junit.as_deref()), ("tap", tap.as_deref()), ("ktap", ktap.as_deref())]
    }
}

/// An open result file.
pub struct OutFile {
    flag: &'static str,
    path: PathBuf,
    to: To,
}

enum To {
    Stdout,
    /// A pipe or a device, which is written directly.
    There(File),
    /// A file with a temporary name in the same directory, and its final name.
    Replacing(NamedTempFile, PathBuf),
}

impl OutFile {
    /// Opens the file at `path`, the value of `--flag`, if there is one; `-` is standard output.
    pub fn open(flag: &'static str, path: Option<&Path>) -> Result<Option<Self>> {
        let Some(path) = path else { return Ok(None) };
        let to = if is_stdout(path) {
            To::Stdout
        } else {
            To::open(path).map_err(|error| Error::usage(format!("--{flag} {}: {error}", path.display())))?
        };
        Ok(Some(Self { flag, path: path.to_owned(), to }))
    }

    /// Whether it is standard output. Nothing else may be printed there then.
    pub fn is_stdout(&self) -> bool {
        matches!(self.to, To::Stdout)
    }

    /// Writes `content`. A failure is a usage error: the flag named a file that cannot be written.
    pub fn write(self, content: &[u8]) -> Result<()> {
        let Self { flag, path, to } = self;
        let written = match to {
            To::Stdout => io::stdout().write_all(content),
            To::There(mut file) => file.write_all(content),
            To::Replacing(mut file, path) => {
                file.write_all(content).and_then(|()| file.persist(path).map(drop).map_err(|error| error.error))
            }
        };
        written.map_err(|error| Error::usage(format!("cannot write --{flag} {}: {error}", path.display())))
    }
}

impl To {
    fn open(path: &Path) -> io::Result<Self> {
        // A symbolic link is followed: the file behind it is replaced, not the link.
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        match fs::metadata(&real) {
            Ok(meta) if !meta.is_file() => return File::options().write(true).open(&real).map(Self::There),
            Ok(_) => drop(File::options().write(true).open(&real)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let dir = real.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // If the directory is missing, this error is clearer than that of the temporary file.
        fs::metadata(dir)?;
        // The mode of any new file: the umask applies.
        let file = tempfile::Builder::new().prefix(".vmm-").permissions(Permissions::from_mode(0o666)).tempfile_in(dir);
        Ok(Self::Replacing(file.map_err(|error| io::Error::from(error.kind()))?, real))
    }
}

/// Whether `path` is standard output: `-`, or one of its names.
pub fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].into_iter().any(|name| path == Path::new(name))
}

/// The canonical path of a file, for comparison.
fn target(path: &Path) -> PathBuf {
    if is_stdout(path) {
        return PathBuf::from("/dev/stdout");
    }
    let in_its_directory = || {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(fs::canonicalize(directory).ok()?.join(path.file_name()?))
    };
    fs::canonicalize(path).ok().or_else(in_its_directory).unwrap_or_else(|| path.to_owned())
}

/// Serializes `result` as a line of JSON.
pub fn json(result: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec(result).map_err(Error::failed)?;
    text.push(b'\n');
    Ok(text)
}

/// Checks that no two results go to the same file, or to standard output.
pub fn distinct(files: &[(&str, Option<&Path>)]) -> Result<()> {
    let named = || files.iter().filter_map(|(flag, path)| path.map(|path| (*flag, path)));
    for (index, (flag, path)) in named().enumerate() {
        let same = |other: &Path| target(other) == target(path);
        if let Some((other, _)) = named().skip(index.saturating_add(1)).find(|(_, other)| same(other)) {
            return Err(Error::usage(format!("--{flag} and --{other} both name {}", path.display())));
        }
    }
    Ok(())
}

/// Report, JUnit, TAP and KTAP, opened.
pub struct Results {
    report: Option<OutFile>,
    cases: Vec<(OutFile, Format)>,
}

/// Makes the content of a file from a suite.
type Format = fn(&Suite) -> Result<String>;

impl Results {
    /// Opens the files that the flags name.
    pub fn open(report: &ReportFile, cases: &CaseFiles) -> Result<Self> {
        let formats: [Format; 3] = [|suite| Ok(suite.junit()?), |suite| Ok(suite.tap()), |suite| Ok(suite.ktap())];
        let report = OutFile::open("report", report.report.as_deref())?;
        let mut opened = Vec::new();
        for ((flag, path), format) in cases.named().into_iter().zip(formats) {
            opened.extend(OutFile::open(flag, path)?.map(|file| (file, format)));
        }
        Ok(Self { report, cases: opened })
    }

    /// Whether one of them is standard output.
    pub fn use_stdout(&self) -> bool {
        self.report.iter().chain(self.cases.iter().map(|(file, _)| file)).any(OutFile::is_stdout)
    }

    /// Whether a report is to be written.
    pub fn has_report(&self) -> bool {
        self.report.is_some()
    }

    /// Makes and writes the results that the flags ask for.
    pub fn write(&mut self, page: impl FnOnce() -> Page, suite: impl FnOnce() -> Suite) -> Result<()> {
        if let Some(file) = self.report.take() {
            file.write(page().render().as_bytes())?;
        }
        self.write_cases(suite)
    }

    /// Makes and writes the test results that the flags ask for.
    pub fn write_cases(&mut self, suite: impl FnOnce() -> Suite) -> Result<()> {
        let files = std::mem::take(&mut self.cases);
        if files.is_empty() {
            return Ok(());
        }
        let suite = suite();
        for (file, format) in files {
            file.write(format(&suite)?.as_bytes())?;
        }
        Ok(())
    }

    /// Passes `ended` on. If it is an error and no test results have been written, writes what it means for a test:
    /// what this host cannot do is skipped, another error is one. A wrong command line is not a result. `name` is the
    /// command.
    pub fn with_error<T>(&mut self, name: &str, ended: Result<T>) -> Result<T> {
        let error = match ended {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let why = error.one_line();
        let written = match error.blame() {
            Blame::Usage => Ok(()),
            Blame::Host => self.write_cases(|| Suite::cannot(name, &why)),
            Blame::Run => self.write_cases(|| Suite::error(name, &why)),
        };
        if let Err(unwritten) = written {
            machine::say!("vmm: {}", unwritten.one_line());
        }
        Err(error)
    }
}

/// The command line that this program was started with, quoted for a shell.
pub fn command_line() -> String {
    let arguments: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let words = ["vmm"].into_iter().chain(arguments.iter().map(String::as_str));
    // Quoting fails only for a NUL, which no argument holds.
    shlex::try_join(words).unwrap_or_else(|_| "vmm".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> Result<OutFile> {
        OutFile::open("report", Some(path)).map(|file| file.unwrap())
    }

    #[test]
    fn a_file_is_there_when_it_is_whole_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        fs::write(&path, "old").unwrap();
        let file = open(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        file.write(b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        drop(open(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "something was left");
    }

    #[test]
    fn a_link_is_written_through_and_a_device_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link, null) = (dir.path().join("file"), dir.path().join("link"), dir.path().join("null"));
        fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        std::os::unix::fs::symlink("/dev/null", &null).unwrap();
        open(&link).unwrap().write(b"new").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        open(&null).unwrap().write(b"x").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn two_results_in_one_file_are_refused() {
        let [a, b] = ["a", "b"].map(Path::new);
        distinct(&[("json", Some(a)), ("report", None), ("tap", Some(b))]).unwrap();
        let error = distinct(&[("json", Some(a)), ("report", Some(b)), ("tap", Some(a))]).unwrap_err();
        assert_eq!(error.one_line(), "--json and --tap both name a");
    }

    #[test]
    fn standard_output_takes_one_result_by_whatever_name() {
        let [dash, device, file] = ["-", "/dev/stdout", "./-"].map(Path::new);
        distinct(&[("json", Some(dash)), ("report", Some(file))]).unwrap();
        distinct(&[("json", Some(dash)), ("report", Some(device))]).unwrap_err();
        for path in [dash, device] {
            assert!(open(path).unwrap().is_stdout(), "{}", path.display());
        }
    }

    #[test]
    fn a_bad_path_is_a_usage_error() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("none/out"), dir.path().to_owned()] {
            let error = open(&path).map(drop).unwrap_err();
            assert!(error.blame() == Blame::Usage && error.one_line().starts_with("--report "), "{error:?}");
        }
    }
}
