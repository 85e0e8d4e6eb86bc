//! Child processes with a time limit, so that none hangs a test.

use std::{
    io::{self, Read},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

/// The time limit. No child needs a tenth of it, even on a busy machine.
const HANG_GUARD: Duration = Duration::from_secs(120);

/// A process's result.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ended {
    /// The exit code.
    ///
    /// # Panics
    /// If a signal ended it.
    #[must_use]
    pub fn code(&self) -> i32 {
        let signal = self.status.signal();
        self.status.code().unwrap_or_else(|| panic!("ended by signal {signal:?}: {self:#?}"))
    }

    /// Asserts that it ended with this exit code.
    ///
    /// # Panics
    /// If it did not; with all its output.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{self:#?}");
        self
    }

    /// Asserts that it ended with `code` and one line on standard error that holds each of `parts`; it may print its
    /// TSC source before. Clap adds a usage hint of its own.
    ///
    /// # Panics If it did not; with all its output.
    #[track_caller]
    pub fn refused(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code(), code, "{self:#?}");
        let said = |line: &&str| !line.is_empty() && !line.starts_with("vmm: TSC source ");
        let lines: Vec<&str> = self.stderr.lines().filter(said).collect();
        let [line, hints @ ..] = lines.as_slice() else { panic!("nothing on standard error: {self:#?}") };
        let by_clap = line.starts_with("error: ");
        assert!(by_clap || (line.starts_with("vmm: ") && hints.is_empty()), "not one line of vmm's: {self:#?}");
        for part in parts {
            assert!(line.contains(part), "{part:?} is not in {line:?}");
        }
        assert!(!self.stderr.contains("panicked at"), "{self:#?}");
    }
}

/// A running process. Dropping this kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Receiver<io::Result<String>>,
    stderr: Receiver<io::Result<String>>,
    command: String,
}

/// Starts `command` with nothing on its standard input.
///
/// # Panics
/// If it cannot be started.
#[track_caller]
pub fn start(command: &mut Command) -> Running {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = collect(child.stdout.take().expect("piped"));
    let stderr = collect(child.stderr.take().expect("piped"));
    Running { child, stdout, stderr, command: format!("{command:?}") }
}

/// Runs `command` to its end.
///
/// # Panics
/// If it cannot be started, or does not end.
#[track_caller]
pub fn finish(command: &mut Command) -> Ended {
    start(command).finish()
}

fn collect(mut from: impl Read + Send + 'static) -> Receiver<io::Result<String>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let result = from.read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned());
        // The send fails if the test has failed meanwhile.
        let _ = sender.send(result);
    });
    receiver
}

impl Running {
    /// Its process id.
    #[must_use]
    pub fn id(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process id")
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// If its state cannot be read.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it can be waited for").is_some()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it hangs; it is killed then.
    #[track_caller]
    #[must_use]
    pub fn finish(mut self) -> Ended {
        // Both pipes close when it ends.
        let mut output = [&self.stdout, &self.stderr].map(|pipe| pipe.recv_timeout(HANG_GUARD));
        if output.iter().any(Result::is_err) {
            let _ = self.child.kill();
            output = [&self.stdout, &self.stderr].map(|pipe| pipe.recv_timeout(HANG_GUARD));
            panic!("{} did not end; its output was {output:#?}", self.command);
        }
        let status = self.child.wait().expect("it can be waited for");
        let [stdout, stderr] = output.map(|text| text.expect("checked above").expect("a pipe can be read"));
        Ended { status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
