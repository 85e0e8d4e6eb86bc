//! Moves a machine to another VMM while its session continues.
//!
//! A thread sends the machine ([`crate::live`]). What it needs of the machine it asks of the machine's own thread, by
//! requests, between two runs of the guest. Until the destination has been told to run the guest, every failure ends
//! with the guest going on here.

use std::{
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, Sender, channel},
    },
    thread::ScopedJoinHandle,
    time::Duration,
};

use super::{
    Finish, SessionError,
    request::{MoveRequest, Request},
    worker::Worker,
};
use crate::{
    control::{
        Answer, ApiError, Reply,
        api::{self, MAX_DOWNTIME_MS, Moving},
    },
    live::{self, Address, LastOfIt, LiveError, Outcome, Settings, SourcePorts, send::Progress},
    machine::{Machine, config::HostEnvironment, error::RunError, sched::mailbox::Mailbox},
    mem::pages::PageSet,
    say,
    snapshot::{SnapshotError, machine::encode_without_memory},
};

type Answered<T> = Sender<Result<T, LiveError>>;

/// A move that is under way.
pub(super) struct Move<'scope> {
    thread: ScopedJoinHandle<'scope, Result<Outcome, SessionError>>,
    progress: Arc<Progress>,
    /// The guest is stopped for it.
    stopped: bool,
    to: Answer<Result<Reply, ApiError>>,
    address: Address,
}

impl Move<'_> {
    /// How far it is.
    pub(super) fn status(&self) -> Moving {
        let Progress { rounds, sent_bytes, left_bytes, .. } = &*self.progress;
        let [rounds, sent_bytes, left_bytes] = [rounds, sent_bytes, left_bytes].map(|n| n.load(Ordering::Relaxed));
        Moving { rounds, sent_bytes, left_bytes }
    }
}

/// The requests as the sending thread has them.
struct Ports<'env> {
    inbox: &'env Mailbox<Request>,
}

impl Ports<'_> {
    fn ask<T>(&self, request: impl FnOnce(Answered<T>) -> MoveRequest) -> Result<T, LiveError> {
        let (answer, answered): (_, Receiver<Result<T, LiveError>>) = channel();
        // If the machine has ended, the request is dropped, and the answer with it.
        let _ = self.inbox.post(Request::Move(request(answer)));
        answered.recv().unwrap_or(Err(LiveError::Ended))
    }
}

impl SourcePorts for Ports<'_> {
    fn changed(&self) -> Result<PageSet, LiveError> {
        self.ask(MoveRequest::Changed)
    }

    fn stop(&self) -> Result<LastOfIt, LiveError> {
        self.ask(MoveRequest::Stop)
    }
}

impl Worker<'_, '_, '_> {
    /// Begins to move the VM, as a client requested.
    pub(super) fn begin_move(
        &mut self,
        migrate: api::Migrate,
        to: Answer<Result<Reply, ApiError>>,
    ) -> Result<(), SessionError> {
        let Some(address) = migrate.to.clone() else { return Ok(()) };
        if let Err(error) = self.check_move(&migrate, &address) {
            to.send(Err(error));
            return Ok(());
        }
        let max_downtime = Duration::from_millis(migrate.max_downtime_ms.unwrap_or(MAX_DOWNTIME_MS));
        let settings = Settings { to: address.clone(), max_downtime };
        // A signal during the move must be handled, so the event loop is needed now.
        self.helper_threads.start()?;
        let (verification, inbox, clock) = (self.verification, self.inbox, self.env.clock);
        let progress: Arc<Progress> = Arc::default();
        let machine = self.machine()?;
        if let Err(error) = machine.begin_copy() {
            to.send(Err(refusal(&LiveError::Snapshot(error.into()))));
            return Ok(());
        }
        let memory = machine.memory();
        let seen = Arc::clone(&progress);
        let work = move || {
            // All of RAM is sent, also the blocks that the guest has not accessed yet.
            let outcome =
                verification.finish().map(|()| live::send(&settings, &memory, clock, &Ports { inbox }, &seen));
            // Posting fails only if the machine's thread has ended.
            drop(inbox.post(Request::Move(MoveRequest::Over)));
            outcome
        };
        match self.helper_threads.spawn("move", work) {
            Ok(thread) => self.moving = Some(Move { thread, progress, stopped: false, to, address }),
            Err(error) => {
                self.machine()?.end_copy()?;
                to.send(Err(ApiError::Internal(format!("cannot start a thread to move the VM: {error}"))));
            }
        }
        Ok(())
    }

    fn check_move(&mut self, migrate: &api::Migrate, address: &Address) -> Result<(), ApiError> {
        if migrate.tsc_khz.is_some() || migrate.deadline.is_some() || migrate.downtime.is_some() {
            let why =
                "the destination says with which frequency and policies the VM goes on: give these to vmm receive";
            return Err(ApiError::BadRequest(why.to_owned()));
        }
        if matches!(address, Address::Tcp(_)) && !migrate.insecure {
            return Err(ApiError::BadRequest(LiveError::Insecure(address.clone()).to_string()));
        }
        if self.options.migrate.is_some() || self.options.save.is_some() {
            let why = "the VM cannot be moved: it was started with --migrate-every or --save-at";
            return Err(ApiError::WrongState(why.to_owned()));
        }
        match self.machine() {
            Ok(machine) if machine.is_paused() => {
                Err(ApiError::WrongState("the VM is paused: resume it, or save it with a snapshot".to_owned()))
            }
            Ok(_) => Ok(()),
            Err(error) => Err(ApiError::Internal(error.to_string())),
        }
    }

    /// Does what the sending thread asks.
    pub(super) fn move_request(&mut self, request: MoveRequest) -> Result<Option<Finish>, SessionError> {
        match request {
            MoveRequest::Changed(answer) => {
                let changed = self.machine()?.take_copy_changes();
                // Sending fails only if the thread has ended.
                drop(answer.send(changed.map_err(|error| LiveError::Snapshot(error.into()))));
                Ok(None)
            }
            MoveRequest::Stop(answer) => {
                let env = self.env;
                self.pause()?;
                if let Some(moving) = &mut self.moving {
                    moving.stopped = true;
                }
                let last = last_of_it(self.machine()?, env);
                drop(answer.send(last.map_err(LiveError::Snapshot)));
                Ok(None)
            }
            MoveRequest::Over => self.end_move(),
        }
    }

    /// Ends the move: answers the client, and lets the guest go on if it stays.
    fn end_move(&mut self) -> Result<Option<Finish>, SessionError> {
        let Some(Move { thread, progress: _, stopped, to, address }) = self.moving.take() else { return Ok(None) };
        let outcome = thread.join().map_err(|_| SessionError::Lost)??;
        match outcome {
            Outcome::Moved(figures) => {
                to.send(Ok(Reply::Moved(figures)));
                Ok(Some(Finish::Moved { to: address, figures }))
            }
            Outcome::Stays(error) => {
                self.stay(stopped)?;
                to.send(Err(refusal(&error)));
                Ok(None)
            }
            Outcome::Unknown(error) => {
                self.stay(false)?;
                say!("vmm: {error}");
                to.send(Err(ApiError::Internal(error.to_string())));
                Ok(None)
            }
        }
    }

    /// The machine stays here; if `goes_on`, the guest runs again.
    fn stay(&mut self, goes_on: bool) -> Result<(), SessionError> {
        let policies = self.options.policies.clone();
        let machine = self.machine()?;
        machine.show_patched_code();
        machine.end_copy()?;
        if goes_on {
            machine.resume(&policies)?;
        }
        Ok(())
    }

    /// The session ends during a move: the destination is not told to run the guest, unless it was already. Returns how
    /// the session ends then.
    pub(super) fn finish_move(&mut self, finish: Result<Finish, SessionError>) -> Result<Finish, SessionError> {
        let Some(Move { thread, progress, to, address, .. }) = self.moving.take() else { return finish };
        progress.cancelled.store(true, Ordering::SeqCst);
        // What the thread still asks gets no answer.
        self.inbox.close();
        match thread.join().map_err(|_| SessionError::Lost)? {
            Ok(Outcome::Moved(figures)) => {
                to.send(Ok(Reply::Moved(figures)));
                finish.map(|_| Finish::Moved { to: address, figures })
            }
            Ok(Outcome::Unknown(error)) => {
                say!("vmm: {error}");
                finish
            }
            Ok(Outcome::Stays(_)) | Err(_) => finish,
        }
    }
}

fn last_of_it(machine: &mut Machine, env: &HostEnvironment) -> Result<LastOfIt, SnapshotError> {
    let state = machine.state(env)?;
    let host = env.fingerprint().map_err(RunError::from)?;
    // The destination may not patch anything. And the pages last: reading the state makes KVM complete a pending
    // access, which can still write to RAM.
    machine.show_original_code();
    let changed = machine.take_copy_changes()?;
    Ok(LastOfIt { state: encode_without_memory(&state, host.as_ref())?, changed })
}

fn refusal(error: &LiveError) -> ApiError {
    match error {
        LiveError::Insecure(_) => ApiError::BadRequest(error.to_string()),
        _ => ApiError::Internal(format!("the VM goes on here: {error}")),
    }
}
