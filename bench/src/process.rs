//! Runs programs under measurement.

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

/// Limit for the time of one program. Where one takes longer, a measurement would mean nothing.
const PATIENCE: Duration = Duration::from_secs(120);

/// A program's result, and the time it took.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Wall time from before its start to after its end.
    pub wall: Duration,
    /// User and system time of it and of the children that it waited for.
    pub cpu: Duration,
}

/// A running program. Dropping this kills it.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Starts it, with its input and outputs at /dev/null.
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

/// The first text that the guest prints.
pub const BANNER: &str = "guest: ";

/// Measures the time from before `command` is started to its first byte on standard output, which must begin with
/// `text`. Then the program is killed.
///
/// # Errors
/// If it ends without a byte, or says something else.
pub fn first_byte(command: &mut Command, text: &str) -> Result<Duration> {
    first_byte_of(command.stdout(Stdio::piped()).stderr(Stdio::null()), |child| child.stdout.take(), text)
}

/// As [`first_byte`], on standard error: vmm prints the TSC source there, once the machine is complete.
///
/// # Errors
/// If it ends without a byte, or prints another text.
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
    // If the first output is another text, such as an error message, the time means nothing.
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

/// Runs `command` to its end, with any exit status.
///
/// # Errors
/// If it cannot be started, or does not end.
pub fn finish(command: &mut Command) -> Result<Ended> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (begin, before) = (Instant::now(), children_cpu()?);
    let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
    let out = collect(child.stdout.take().context("no pipe")?);
    let err = collect(child.stderr.take().context("no pipe")?);
    // Both pipes close when it ends.
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
        // After a read error, the output so far is returned.
        let _ = from.read_to_end(&mut bytes);
        // The send fails if the receiver has timed out.
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// As [`finish`], for a program that must succeed.
///
/// # Errors
/// Also if its exit code is not 0; with its output.
pub fn succeed(command: &mut Command) -> Result<Ended> {
    let ended = finish(command)?;
    if !ended.status.success() {
        bail!("{command:?}: {}: {}{}", ended.status, ended.stdout.trim_end(), ended.stderr.trim_end());
    }
    Ok(ended)
}

/// CPU time so far of all children that were waited for.
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
    /// Its resident part, in bytes.
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
    fn the_error_of_a_failed_program_holds_its_output() {
        let error = succeed(Command::new("sh").args(["-c", "echo no >&2; exit 3"])).unwrap_err();
        assert!(format!("{error:#}").contains("exit status: 3: no"), "{error:#}");
        assert!(first_byte(&mut Command::new("true"), "").is_err());
    }

    // Catches: the time to an error message reported as that to the guest's first byte.
    #[test]
    fn only_the_guest_is_waited_for() {
        let says = |what: &str| first_byte(Command::new("echo").arg(what), BANNER);
        assert!(says("guest: x2apic").is_ok());
        let error = says("gone: no such file").unwrap_err().to_string();
        assert!(error.contains(r#"said "gone: n" first"#), "{error}");
    }
}
