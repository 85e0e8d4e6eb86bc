//! How the program ends: an error of a command as one line for the user, and the exit code.
//!
//! 0 is all good; [`Blame`] has the others, and [`Codes`] those of test harnesses.

use std::{
    error,
    ffi::OsString,
    fmt::Display,
    iter,
    process::ExitCode,
    sync::atomic::{AtomicU8, Ordering},
};

use clap::{ArgMatches, ValueEnum};
use machine::{
    End,
    blame::{Blame, Blamed},
    devices::GuestExit,
};

use super::text::{LINE_CHARS, printable};

/// What a command comes to.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a command failed. `?` makes it from any error type of the libraries that implements [`Blamed`], and does not
/// compile for another.
#[derive(Debug)]
pub struct Error {
    blame: Blame,
    /// What it is about, the error, its cause, and so on; the outermost first.
    words: Vec<String>,
}

impl<E: error::Error + Blamed> From<E> for Error {
    fn from(error: E) -> Self {
        Self { blame: error.blame(), words: chain(&error) }
    }
}

/// An error and its causes.
fn chain(error: &dyn error::Error) -> Vec<String> {
    iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect()
}

impl Error {
    /// What is wrong is what the user gave.
    pub fn usage(what: impl Display) -> Self {
        Self::new(Blame::Usage, what)
    }

    /// The guest failed, a check failed, or the command could not go on.
    pub fn failed(what: impl Display) -> Self {
        Self::new(Blame::Run, what)
    }

    /// An error in words.
    pub fn new(blame: Blame, what: impl Display) -> Self {
        Self { blame, words: vec![what.to_string()] }
    }

    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        self.blame
    }

    /// Puts what it is about in front.
    pub fn about(mut self, what: impl Display) -> Self {
        self.words.insert(0, what.to_string());
        self
    }

    /// The error and its causes in one bounded line. Most errors name their cause themselves: it is not repeated.
    pub fn one_line(&self) -> String {
        let mut line = String::new();
        for words in &self.words {
            if line.is_empty() {
                line.clone_from(words);
            } else if !line.contains(words) {
                line = format!("{line}: {words}");
            }
        }
        printable(&line, LINE_CHARS)
    }
}

/// For an error that says whose fault it is.
pub trait About<T> {
    /// Puts what it is about in front of it.
    fn about<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<Error>> About<T> for Result<T, E> {
    fn about<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| error.into().about(what()))
    }
}

/// For an error of the standard library or the operating system.
pub trait OrFailed<T> {
    /// The command fails with [`Blame::Run`]; `what` says what could not be done.
    fn or_failed<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: error::Error> OrFailed<T> for Result<T, E> {
    fn or_failed<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| Error { blame: Blame::Run, words: chain(&error) }.about(what()))
    }
}

/// Whose exit codes the program ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[repr(u8)]
pub enum Codes {
    /// vmm's own: 1 failed, 2 usage, 3 this host cannot.
    Vmm,
    /// kselftest's: 1 failed or usage, 4 skipped because this host cannot. Never 2 (XFAIL) or 3 (XPASS).
    Kselftest,
    /// Automake's: 1 failed, 77 skipped because this host cannot, 99 usage.
    Automake,
}

/// The codes that were asked for.
static CODES: AtomicU8 = AtomicU8::new(Codes::Vmm as u8);

impl Codes {
    const FLAG: &str = "--exit-codes";

    /// Sets the codes for [`code`]. If the command line cannot be parsed, so that there is no `matches`, its words
    /// tell: else a harness would take a usage error for an expected failure.
    pub fn choose(matches: Option<&ArgMatches>, words: impl Iterator<Item = OsString>) {
        let chosen = matches.map_or_else(|| Self::among(words), Self::parsed).unwrap_or(Self::Vmm);
        CODES.store(chosen as u8, Ordering::Relaxed);
    }

    /// The value of the flag, of the innermost command that has it.
    fn parsed(matches: &ArgMatches) -> Option<Self> {
        let own = matches.try_get_one::<Self>("exit_codes").ok().flatten().copied();
        matches.subcommand().and_then(|(_, matches)| Self::parsed(matches)).or(own)
    }

    fn among(words: impl Iterator<Item = OsString>) -> Option<Self> {
        let words: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
        words.iter().enumerate().rev().find_map(|(index, word)| {
            let value = match word.strip_prefix(Self::FLAG)? {
                "" => words.get(index.saturating_add(1))?,
                value => value.strip_prefix('=')?,
            };
            <Self as ValueEnum>::from_str(value, false).ok()
        })
    }

    /// The code for an error.
    const fn of(self, blame: Blame) -> u8 {
        match (self, blame) {
            (Self::Vmm, _) => blame.exit_code(),
            (Self::Kselftest, Blame::Run | Blame::Usage) | (Self::Automake, Blame::Run) => 1,
            (Self::Kselftest, Blame::Host) => 4,
            (Self::Automake, Blame::Usage) => 99,
            (Self::Automake, Blame::Host) => 77,
        }
    }
}

/// The exit code for an error, as [`Codes::choose`] has it.
pub fn code(blame: Blame) -> u8 {
    let chosen = CODES.load(Ordering::Relaxed);
    Codes::value_variants().iter().find(|codes| **codes as u8 == chosen).unwrap_or(&Codes::Vmm).of(blame)
}

/// Says what is wrong with the command line, or the help that was asked for. Where words are very long, their middle is
/// left out.
pub fn refuse(error: &clap::Error) -> ExitCode {
    let said = error.render().to_string();
    if said.lines().any(|line| line.chars().count() > LINE_CHARS) && error.use_stderr() {
        for line in said.lines() {
            machine::say!("{}", printable(line, LINE_CHARS));
        }
    } else {
        // There is no other output to report a failed write to.
        let _ = error.print();
    }
    if error.use_stderr() { code(Blame::Usage).into() } else { ExitCode::SUCCESS }
}

/// The exit code for a guest's end. `raw` passes the debug-exit status through as QEMU does: `(code << 1) | 1`.
pub fn code_of_end(end: &End, raw: bool) -> ExitCode {
    let failed = code(Blame::Run);
    match end {
        End::Guest(GuestExit::Debug(code)) if raw => {
            // A process's status has eight bits.
            ExitCode::from(u8::try_from((code << 1 | 1) & 0xff).unwrap_or(failed))
        }
        End::Guest(GuestExit::Debug(0) | GuestExit::Reset | GuestExit::PowerOff) => ExitCode::SUCCESS,
        _ => failed.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use machine::{
        RunError,
        session::SessionError,
        snapshot::{ContainerError, SnapshotError},
    };

    use super::*;

    // Catches: a conversion, or words put in front, that change the blame.
    #[test]
    fn an_error_keeps_its_blame() {
        let lacking = || RunError::HostLacks("no scaling".to_owned());
        let errors: [Error; 3] =
            [lacking().into(), SnapshotError::Run(lacking()).into(), SessionError::Run(lacking()).into()];
        for error in errors {
            let error = Err::<(), _>(error).about(|| "snapshot x").unwrap_err();
            assert_eq!((error.blame(), error.one_line().as_str()), (Blame::Host, "snapshot x: no scaling"));
        }
        let missing = io::Error::other("missing");
        let error = Err::<(), _>(missing).or_failed(|| "cannot find it").unwrap_err();
        assert_eq!((error.blame(), error.one_line().as_str()), (Blame::Run, "cannot find it: missing"));
    }

    // Catches: a cause that is repeated, or missing.
    #[test]
    fn a_cause_is_said_once() {
        let cause = || serde_json::from_str::<u8>("x").unwrap_err();
        let state = ContainerError::Decode { name: "cpus".to_owned(), source: cause() };
        let line = Error::from(SnapshotError::from(state)).one_line();
        assert_eq!(line, format!("section `cpus` cannot be read: {}", cause()));
        #[derive(Debug, thiserror::Error)]
        #[error("it failed")]
        struct Silent(#[source] io::Error);
        impl Blamed for Silent {
            fn blame(&self) -> Blame {
                Blame::Run
            }
        }
        assert_eq!(Error::from(Silent(io::Error::other("why"))).one_line(), "it failed: why");
    }

    // Catches: a code that a harness reads as something else. kselftest.h: 0 pass, 1 fail, 2 xfail, 3 xpass, 4 skip;
    // Automake's manual, "Scripts-based Testsuites": 77 skip, 99 hard error.
    #[test]
    fn harnesses_get_their_codes() {
        let of = |codes: Codes| [Blame::Run, Blame::Usage, Blame::Host].map(|blame| codes.of(blame));
        assert_eq!([Codes::Vmm, Codes::Kselftest, Codes::Automake].map(of), [[1, 2, 3], [1, 1, 4], [1, 99, 77]]);
    }

    // Catches: a usage error that ends with vmm's own code, because the flag stands in a line that cannot be parsed.
    #[test]
    fn the_flag_is_found_in_a_wrong_line() {
        let among = |line: &str| Codes::among(line.split(' ').map(OsString::from));
        assert_eq!(among("vmm sweep --bad --exit-codes kselftest"), Some(Codes::Kselftest));
        assert_eq!(among("vmm --exit-codes=automake --bad"), Some(Codes::Automake));
        for line in ["vmm --bad", "vmm --exit-codes", "vmm --exit-codes none", "vmm --exit-codesx=kselftest"] {
            assert_eq!(among(line), None, "{line}");
        }
    }

    // Catches: a guest's status that is passed on as another one.
    #[test]
    fn a_guests_end_has_its_code() {
        let code = |end: End, raw| format!("{:?}", code_of_end(&end, raw));
        let debug = |code| End::Guest(GuestExit::Debug(code));
        let is = |code: u8| format!("{:?}", ExitCode::from(code));
        assert_eq!([code(debug(0), false), code(debug(0), true)], [is(0), is(1)]);
        assert_eq!([code(debug(2), false), code(debug(2), true)], [is(1), is(5)]);
        assert_eq!(code(End::Guest(GuestExit::PowerOff), true), is(0));
        assert_eq!([code(End::Guest(GuestExit::Reset), true), code(End::AllParked, true)], [is(0), is(1)]);
    }
}
