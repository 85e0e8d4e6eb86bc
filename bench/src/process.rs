//! Programs under measurement.

use std::{
    fs,
    io::Read,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// Nothing here takes longer on a machine on which a measurement would mean something.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a program left, and what it took.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// From before it was started to after its end.
    pub wall: Duration,
    /// User and system time of it and of what it waited for.
    pub cpu: Duration,
}

/// A program that runs; dropped, it is killed.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Starts it, with nothing to read and nobody to hear it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("{command:?}"))?))
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the guest prints first.
pub const BANNER: &str = "guest: ";

/// From before `command` is started to its first byte on standard output, which must begin with `text`. Then it is killed.
///
/// # Errors
/// If it ends without a byte, or says something else.
pub fn first_byte(command: &mut Command, text: &str) -> Result<Duration> {
    first_byte_of(command.stdout(Stdio::piped()).stderr(Stdio::null()), |child| child.stdout.take(), text)
}

/// As [`first_byte`], on standard error: where vmm says what TSC source a machine got, once it is whole.
///
/// # Errors
/// If it ends without a byte, or says something else.
pub fn first_remark(command: &mut Command) -> Result<Duration> {
    first_byte_of(command.stdout(Stdio::null()).stderr(Stdio::piped()), |child| child.stderr.take(), "vmm: TSC source")
}

fn first_byte_of<R: Read>(command: &mut Command, stream: fn(&mut Child) -> Option<R>, text: &str) -> Result<Duration> {
    let begin = Instant::now();
    let mut child = command.stdin(Stdio::null()).spawn().with_context(|| format!("{command:?}"))?;
    let mut stream = stream(&mut child).context("no pipe")?;
    let mut byte = [0];
    let read = stream.read_exact(&mut byte);
    let took = begin.elapsed();
    // Whatever else it is that speaks first would make the time meaningless.
    let mut said = byte.to_vec();
    let rest = u64::try_from(text.len().saturating_sub(1))?;
    let more = stream.take(rest).read_to_end(&mut said);
    let _ = child.kill();
    let status = child.wait()?;
    read.and(more).with_context(|| format!("{command:?} ended without a byte of output: {status}"))?;
    if !said.starts_with(text.as_bytes()) {
        bail!("{command:?} said {:?} first, and not {text:?}", String::from_utf8_lossy(&said));
    }
    Ok(took)
}

/// Runs `command` to its end, whatever that is.
///
/// # Errors
/// If it cannot be started, or does not end.
pub fn finish(command: &mut Command) -> Result<Ended> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (begin, before) = (Instant::now(), children_cpu()?);
    let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
    let out = collect(child.stdout.take().context("no pipe")?);
    let err = collect(child.stderr.take().context("no pipe")?);
    // Both pipes close at its end.
    let told = [out, err].map(|pipe| pipe.recv_timeout(PATIENCE));
    let [Ok(stdout), Ok(stderr)] = told else {
        let _ = child.kill();
        let _ = child.wait();
        bail!("{command:?} did not end within {} s", PATIENCE.as_secs());
    };
    let status = child.wait()?;
    Ok(Ended { status, stdout, stderr, wall: begin.elapsed(), cpu: children_cpu()?.saturating_sub(before) })
}

fn collect(mut from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is what there is.
        let _ = from.read_to_end(&mut bytes);
        // Nobody listens when the patience is over.
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// As [`finish`], for a program that must end well.
///
/// # Errors
/// Also if its exit code is another than 0, with what it said.
pub fn succeed(command: &mut Command) -> Result<Ended> {
    let ended = finish(command)?;
    if !ended.status.success() {
        bail!("{command:?}: {}: {}{}", ended.status, ended.stdout.trim_end(), ended.stderr.trim_end());
    }
    Ok(ended)
}

/// What all children have taken so far that were waited for.
fn children_cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds().saturating_add(usage.system_time().num_microseconds());
    Ok(Duration::from_micros(u64::try_from(micros)?))
}

/// A mapping of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its size, in bytes.
    pub size: u64,
    /// What of it is in memory, in bytes.
    pub resident: u64,
}

/// The mappings of process `pid` (proc(5), "/proc/pid/smaps").
///
/// # Errors
/// If they cannot be read.
pub fn mappings(pid: u32) -> Result<Vec<Mapping>> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("smaps")?;
    Ok(parse_smaps(&text))
}

fn parse_smaps(text: &str) -> Vec<Mapping> {
    let kib = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let sizes = text.lines().filter_map(|line| kib(line, "Size:"));
    let resident = text.lines().filter_map(|line| kib(line, "Rss:"));
    sizes.zip(resident).map(|(size, resident)| Mapping { size, resident }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_have_size_and_resident_part() {
        let text = "7f00-7f01 rw-p 0 00:00 0 \nSize:   131072 kB\nKernelPageSize: 4 kB\nRss:   212 kB\nPss: 1 kB\n\
                    7fff-8000 r-xp 0 00:00 0 [vdso]\nSize:   8 kB\nRss:   4 kB\n";
        let want = [(128 << 20, 212 << 10), (8192, 4096)].map(|(size, resident)| Mapping { size, resident });
        assert_eq!(parse_smaps(text), want);
    }

    #[test]
    fn a_program_that_fails_is_told_with_its_words() {
        let error = succeed(Command::new("sh").args(["-c", "echo no >&2; exit 3"])).unwrap_err();
        assert!(format!("{error:#}").contains("exit status: 3: no"), "{error:#}");
        assert!(first_byte(&mut Command::new("true"), "").is_err());
    }

    // Catches: the time to an error message taken for that to the guest's first byte.
    #[test]
    fn only_the_guest_is_waited_for() {
        let says = |what: &str| first_byte(Command::new("echo").arg(what), BANNER);
        assert!(says("guest: x2apic").is_ok());
        let error = says("gone: no such file").unwrap_err().to_string();
        assert!(error.contains(r#"said "gone: n" first"#), "{error}");
    }
}
