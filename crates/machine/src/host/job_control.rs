//! A process that stops itself with SIGSTOP, and its parent, which lets it continue.
//!
//! What it is for: a measurement of what such a stop does to a guest. All threads of the process stop wherever they
//! are, and those of the machine are not told.
//!
//! Why the parent: a stopped process cannot continue itself. And an interactive shell takes a job that stops for one
//! that its user suspended, and reads the next command. So the shell's job is the parent, which does not stop.

use std::{
    fs, io,
    os::fd::AsFd,
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill, raise},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork, getpid, getppid},
};

use super::{exit::exit_at_once, os_clocks::OsClocks, reading::nanos};

/// The exit code of a process that a signal ended, as shells have it: this plus the signal's number.
const BY_SIGNAL: i32 = 128;

/// Forks. In the child it returns `None`. The parent waits for the child, sends it SIGCONT `length` after each SIGSTOP,
/// and passes SIGINT and SIGTERM on; when the child has ended, it returns the child's exit code, or 128 and the number
/// of the signal that ended it. If the parent is killed, so is the child.
///
/// Call it before any thread is started: the child has only the thread that calls it.
///
/// # Errors
/// If there are other threads, or a system call fails.
pub fn fork_and_continue(length: Duration) -> io::Result<Option<u8>> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("the process has more than one thread"));
    }
    let signals: SigSet = [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    let mask = SigSet::thread_get_mask()?;
    // Before the fork, so that the parent misses none.
    signals.thread_block()?;
    let parent = getpid();
    // SAFETY: there is no other thread, as was checked above, so that none can hold a lock, which nobody would release
    // in the child.
    match unsafe { fork() }? {
        ForkResult::Child => {
            mask.thread_set_mask()?;
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            if getppid() != parent {
                // The parent was killed before the call above.
                exit_at_once(1);
            }
            Ok(None)
        }
        ForkResult::Parent { child } => watch(child, &signals, length).map(Some),
    }
}

/// What the parent does until `child` has ended.
fn watch(child: Pid, signals: &SigSet, length: Duration) -> io::Result<u8> {
    let received = SignalFd::with_flags(signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let now = OsClocks::LINUX.monotonic_ns;
    // When to send SIGCONT, if the child is stopped. Sending fails only if the child has ended, which waitpid tells.
    let mut continue_at: Option<u64> = None;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(exit_code(code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(exit_code(BY_SIGNAL + signal as i32)),
            Ok(WaitStatus::Stopped(_, Signal::SIGSTOP)) => continue_at = Some(now().saturating_add(nanos(length))),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if continue_at.is_some_and(|at| at <= now()) {
            let _ = kill(child, Signal::SIGCONT);
            continue_at = None;
        }
        let limit = continue_at.map_or(PollTimeout::NONE, |at| {
            // poll counts whole milliseconds: the last of them begins before `at`.
            let rest = Duration::from_nanos(at.saturating_sub(now())).saturating_add(Duration::from_millis(1));
            PollTimeout::try_from(rest).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut [PollFd::new(received.as_fd(), PollFlags::POLLIN)], limit) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        while let Some(info) = received.read_signal()? {
            let signal = i32::try_from(info.ssi_signo).ok().and_then(|signal| Signal::try_from(signal).ok());
            if let Some(end @ (Signal::SIGINT | Signal::SIGTERM)) = signal {
                let _ = kill(child, end);
                // A stopped process does not act on it.
                let _ = kill(child, Signal::SIGCONT);
                continue_at = None;
            }
        }
    }
}

fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(1)
}

/// When the process stopped and when it ran again, by CLOCK_MONOTONIC_RAW in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stood {
    /// Just before SIGSTOP.
    pub from_ns: u64,
    /// When the thread that sent it ran again.
    pub until_ns: u64,
}

/// A stop of this process by SIGSTOP, from a thread of its own, whatever the process does meanwhile.
#[derive(Debug)]
pub struct SelfStop {
    thread: JoinHandle<Stood>,
    begun: Arc<AtomicBool>,
}

impl SelfStop {
    /// Sends SIGSTOP after `delay`. Somebody else must send SIGCONT: see [`fork_and_continue`].
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn after(delay: Duration) -> io::Result<Self> {
        let begun = Arc::new(AtomicBool::new(false));
        let begins = Arc::clone(&begun);
        let stop = move || {
            thread::sleep(delay);
            begins.store(true, Ordering::SeqCst);
            let raw_ns = OsClocks::LINUX.raw_ns;
            let from_ns = raw_ns();
            // A signal to the calling thread is acted on before the call returns, so it returns after SIGCONT. It
            // cannot fail for this signal.
            let _ = raise(Signal::SIGSTOP);
            Stood { from_ns, until_ns: raw_ns() }
        };
        let thread = thread::Builder::new().name("stop".to_owned()).spawn(stop)?;
        Ok(Self { thread, begun })
    }

    /// Whether SIGSTOP was sent.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::SeqCst)
    }

    /// Whether the process has continued.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until the process has continued.
    #[must_use]
    pub fn wait(self) -> Stood {
        self.thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}
