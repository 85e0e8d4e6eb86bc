//! Runs a machine with its console, its control socket and signal handling.
//!
//! The calling thread owns the machine and runs it (`worker`). Another (`helper_threads`) waits for events and posts
//! requests into the machine's mailbox. The event loop never blocks on a request: answers come back to it as events.
//! Commands are carried out in order, one at a time. The machine stays on the thread that made it, because a thread of
//! its own would have to start before the guest does.

mod console;
mod ending;
mod error;
mod heartbeat;
mod helper_threads;
mod host_stops;
mod memory_verification;
mod moving;
mod request;
mod save;
mod signals;
mod timeout;
mod worker;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, thread, time::Duration};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmtime::{Khz, VmTime};

use self::{
    error::events,
    helper_threads::{Duties, HelperThreads},
    memory_verification::MemoryVerification,
    request::Inbox,
};
use crate::{
    control::{Answer, ApiError, Command, ControlServer, Handler, Reply},
    live::{Address, Figures},
    machine::{
        Machine,
        audit::{GuestStopped, Summary, TimerSummary},
        config::HostEnvironment,
        downtime::Downtimes,
        error::RunError,
        policy::Policies,
        record::counters::Costs,
        sched::mailbox::Mailbox,
        stop::End,
    },
    output::{AT_END, AT_REQUESTED_END, FinishLimit},
    snapshot::Pager,
};
pub use error::SessionError;
pub use request::{MoveRequest, Request};
pub use signals::block as block_signals;

/// How a session is to run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The control socket.
    pub api_sock: Option<PathBuf>,
    /// Start paused, until a `resume` comes.
    pub paused: bool,
    /// How a pause, a resume or a migration treats deadlines and downtime.
    pub policies: Policies,
    /// Save at this VM time into this directory, and end.
    pub save: Option<(VmTime, PathBuf)>,
    /// Migrate in process, at a fixed interval of VM time.
    pub migrate: Option<Cycle>,
    /// Read standard input as the console's.
    pub console: bool,
    /// The wall time after which the session ends, even if the guest has not ended.
    pub timeout: Option<Duration>,
    /// Say on standard error at this interval of wall time that the session goes on, and how far it is.
    pub heartbeat: Option<Duration>,
}

/// Repeated migration in process.
#[derive(Clone, Debug)]
pub struct Cycle {
    /// VM time between two migrations.
    pub every: Duration,
    /// The frequencies, in turn; none = the present one again.
    pub khz: Vec<Khz>,
}

/// How a session ended: with its machine, or for a reason of the session's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The guest ended.
    Ended(End),
    /// A signal or `quit` stopped it.
    Stopped,
    /// It was saved, as [`Options::save`] says.
    Saved,
    /// It runs in another VMM.
    Moved {
        /// Where.
        to: Address,
        /// What the move came to.
        figures: Figures,
    },
    /// It had not ended after [`Options::timeout`].
    TimedOut {
        /// That time.
        after: Duration,
        /// Where each vCPU was, as text.
        cpus: Vec<String>,
    },
}

impl Finish {
    /// How long the process waits for slow readers of its outputs.
    #[must_use]
    pub fn finish_limit(&self) -> FinishLimit {
        match self {
            Self::Ended(_) | Self::Saved | Self::Moved { .. } => AT_END,
            Self::Stopped | Self::TimedOut { .. } => AT_REQUESTED_END,
        }
    }
}

/// The results of a session.
#[derive(Debug)]
pub struct Report {
    /// How it ended.
    pub finish: Finish,
    /// The tick audit's counts; none if there is no tick ring that can be read.
    pub summary: Option<Summary>,
    /// Why there is none, as text.
    pub no_ring: String,
    /// Counts of the LAPICs' timer interrupts; none if KVM emulates the LAPICs.
    pub timer: Option<TimerSummary>,
    /// Counters of what the run cost.
    pub costs: Costs,
    /// Instructions that were performed because this host's KVM cannot emulate them, by kind.
    pub assists: BTreeMap<&'static str, u64>,
    /// VM time at the end.
    pub vm_ns: VmTime,
    /// Migrations since the guest booted, in all processes.
    pub migrations: u64,
    /// Migrations within this process.
    pub migrations_here: u64,
    /// How often the host ran no vCPU for a while, without a pause having been requested.
    pub host_stops: u64,
    /// The downtimes that were measured.
    pub downtimes: Downtimes,
    /// How often PVCLOCK_GUEST_STOPPED was set, and found cleared, in this process.
    pub guest_stopped: GuestStopped,
    /// How far the guest's time of day was ahead of the host's at the end, if that is known.
    pub wall_error_ns: Option<i64>,
    /// How far real time by VMClock was ahead of the host's at the end, if that is known.
    pub vmclock_error_ns: Option<i64>,
    /// Whether the trace is complete.
    pub trace: Result<(), RunError>,
}

/// Posts commands from the control socket.
struct CommandSender(Inbox);

impl Handler for CommandSender {
    fn handle(&mut self, command: Command, answer: Answer<Result<Reply, ApiError>>) {
        if command == Command::Quit {
            ending::soon();
        }
        // Posting fails if the machine has ended. The request is then dropped, and with it the answer, which reports
        // that.
        let _ = self.0.post(Request::Command(command, answer));
    }
}

/// Ends the event loop when the machine is done.
struct Done(EventFd);

impl MutEventSubscriber for Done {
    fn process(&mut self, _: Events, _: &mut EventOps) {}

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0, EventSet::IN)) {
            log::error!("cannot wait for the machine: {error}");
        }
    }
}

/// Ends the event loop when dropped. This must happen even if the machine's thread panics: the thread scope then waits
/// for the event loop's thread.
struct Finished<'a> {
    inbox: &'a Mailbox<Request>,
    done: &'a EventFd,
}

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        self.inbox.close();
        // It cannot fail: the counter is far from its limit.
        let _ = self.done.write(1);
    }
}

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Runs `machine` to its end. `pager` maps its RAM, if not all of it is present yet. Call [`block_signals`] before any
/// thread is started.
///
/// # Errors
/// [`SessionError`]. If restored memory was damaged, [`SessionError::Damaged`] in place of any other error.
pub fn run(
    env: &HostEnvironment,
    machine: Machine,
    pager: Option<&Pager>,
    options: &Options,
) -> Result<Report, SessionError> {
    run_after(env, machine, pager, options, || Ok(()))
}

/// As [`run`], but calls `before` when all is ready (the control socket, for example), and before the guest runs.
///
/// # Errors
/// As [`run`], or that of `before`; the guest has not run then.
pub fn run_after(
    env: &HostEnvironment,
    machine: Machine,
    pager: Option<&Pager>,
    options: &Options,
    before: impl FnOnce() -> Result<(), SessionError>,
) -> Result<Report, SessionError> {
    let inbox: Inbox = Arc::new(Mailbox::new(options.api_sock.is_some()));
    let done = EventFd::new(EFD_NONBLOCK).map_err(events)?;
    let mut subscribers: Vec<Subscriber> = Vec::new();
    if let Some(path) = &options.api_sock {
        subscribers.push(Box::new(ControlServer::bind(path, CommandSender(Arc::clone(&inbox)))?));
    }
    subscribers.push(Box::new(signals::Stop::new(Arc::clone(&inbox)).map_err(events)?));
    if options.console
        && let Some(console) = console::Input::new(Arc::clone(&inbox))
    {
        subscribers.push(Box::new(console));
    }
    if let Some(after) = options.timeout {
        subscribers.push(Box::new(timeout::Timeout::new(after, Arc::clone(&inbox)).map_err(events)?));
    }
    if let Some(every) = options.heartbeat {
        subscribers.push(Box::new(heartbeat::Heartbeat::new(every, Arc::clone(&inbox)).map_err(events)?));
    }
    subscribers.push(Box::new(Done(done.try_clone().map_err(events)?)));

    let verification = MemoryVerification::new(pager, &inbox);
    if let Some(cycle) = &options.migrate {
        worker::check(env, &machine, cycle)?;
    }
    before()?;
    let report = thread::scope(|scope| {
        let (inbox, done) = (&*inbox, &done);
        let mut helper_threads = HelperThreads::new(scope, Duties { subscribers, done, inbox });
        let finished = Finished { inbox, done };
        let report = worker::work(env, machine, verification, &mut helper_threads, options, inbox);
        drop(finished);
        let joined = helper_threads.join();
        match (report, joined) {
            // The other thread's own error says more.
            (Err(SessionError::Lost), Err(reason)) => Err(reason),
            (report, joined) => report.and_then(|report| joined.map(|()| report)),
        }
    });
    // Now also the threads that save or move have ended.
    ending::over();
    report
}
