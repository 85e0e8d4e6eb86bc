//! Saving a machine while its session goes on.
//!
//! A thread writes; the machine's own thread is told twice: when all of RAM is written, so that the guest may run on, and when
//! the snapshot is whole or cannot be. Meanwhile it answers, and an end that is asked for comes at once: then the save is
//! given up, and nothing of it is left.

use std::{path::Path, sync::Arc, thread::ScopedJoinHandle};

use super::{Finish, Request, SessionError, worker::Worker};
use crate::{
    control::{
        Answer, ApiError, Reply,
        api::{self, Saving},
    },
    machine::dirty::SnapshotId,
    snapshot::{
        DirectoryError, SnapshotError,
        saving::{Progress, prepare},
    },
};

/// A save that is under way.
pub(super) struct Save<'scope> {
    thread: ScopedJoinHandle<'scope, Result<Option<SnapshotId>, SessionError>>,
    progress: Arc<Progress>,
    /// All of RAM is written.
    has_memory: bool,
    then: Then,
}

/// What comes after a save.
enum Then {
    /// A client gets its answer.
    Answer {
        to: Answer<Result<Reply, ApiError>>,
        /// The VM ran before.
        ran: bool,
        /// The VM stays paused.
        stay_paused: bool,
    },
    /// The session ends.
    End,
}

impl Save<'_> {
    /// Whether all of RAM is written.
    pub(super) fn has_memory(&self) -> bool {
        self.has_memory
    }

    /// Whether the session ends with it.
    pub(super) fn ends_the_session(&self) -> bool {
        matches!(self.then, Then::End)
    }

    /// How far it is.
    pub(super) fn status(&self) -> Saving {
        let (done_bytes, total_bytes) = self.progress.bytes();
        Saving { done_bytes, total_bytes }
    }
}

impl<'env> Worker<'_, '_, 'env> {
    /// A client wants a snapshot.
    pub(super) fn save(
        &mut self,
        snapshot: api::Snapshot,
        to: Answer<Result<Reply, ApiError>>,
    ) -> Result<(), SessionError> {
        let api::Snapshot { dir, base, stay_paused } = snapshot;
        let ran = !self.machine()?.is_paused();
        self.machine()?.pause()?;
        if let Err((error, then)) = self.begin(&dir, base.as_deref(), Then::Answer { to, ran, stay_paused })? {
            self.answer(then, Err(error.into()), false)?;
        }
        Ok(())
    }

    /// The session is to end with a snapshot.
    pub(super) fn save_and_end(&mut self, dir: &Path) -> Result<(), SessionError> {
        self.machine()?.pause()?;
        self.begin(dir, None, Then::End)?.map_err(|(error, _)| error.into())
    }

    /// Begins to save the paused machine; or why not, and what was to come after it.
    fn begin(
        &mut self,
        dir: &Path,
        base: Option<&Path>,
        then: Then,
    ) -> Result<Result<(), (SnapshotError, Then)>, SessionError> {
        // A session that saves has others who may want it to end.
        self.helper_threads.start()?;
        let env = self.env;
        let job = match prepare(self.machine()?, env, dir, base) {
            Ok(job) => job,
            Err(error) => return Ok(Err((error, then))),
        };
        let (verification, inbox, progress) = (self.verification, self.inbox, job.progress());
        self.machine()?.show_original_code();
        let write = move || {
            // Refused only when the machine's thread is gone.
            let tell = |request| drop(inbox.post(request));
            // A snapshot has all of RAM, also what the guest has not asked for yet.
            let result = verification.settle().and_then(|()| Ok(job.write(|| tell(Request::MemorySaved))?));
            tell(Request::Saved);
            result
        };
        match self.helper_threads.spawn("save", write) {
            Ok(thread) => self.save = Some(Save { thread, progress, has_memory: false, then }),
            Err(source) => {
                self.machine()?.memory_is_saved();
                self.machine()?.saved_as(None);
                let error = DirectoryError::Io { action: "start a thread to write", path: dir.to_owned(), source };
                return Ok(Err((error.into(), then)));
            }
        }
        Ok(Ok(()))
    }

    /// All of RAM is written.
    pub(super) fn memory_saved(&mut self) -> Result<(), SessionError> {
        let Some(save) = self.save.as_mut().filter(|save| !save.has_memory) else { return Ok(()) };
        save.has_memory = true;
        let runs_on = matches!(save.then, Then::Answer { ran: true, stay_paused: false, .. });
        self.machine()?.memory_is_saved();
        if runs_on {
            self.go_on()?;
        }
        Ok(())
    }

    /// The snapshot is whole, or cannot be.
    pub(super) fn saved(&mut self) -> Result<Option<Finish>, SessionError> {
        let Some(save) = self.save.take() else { return Ok(None) };
        let Save { thread, progress: _, has_memory, then } = save;
        let result = thread.join().map_err(|_| SessionError::Lost)?;
        if !has_memory {
            self.machine()?.memory_is_saved();
        }
        self.machine()?.saved_as(result.as_ref().ok().copied().flatten());
        match (then, result) {
            (_, Err(error @ SessionError::Damaged(_))) => Err(error),
            (Then::End, result) => result.map(|_| Some(Finish::Saved)),
            (then @ Then::Answer { .. }, result) => self.answer(then, result.map(drop), has_memory).map(|()| None),
        }
    }

    /// The session ends: waits for the save, if there is one, or gives it up.
    pub(super) fn end_save(&mut self, give_up: bool) -> Result<(), SessionError> {
        if let Some(save) = self.save.as_ref().filter(|_| give_up) {
            save.progress.cancel();
        }
        self.saved().map(drop)
    }

    /// Tells a client what came of its snapshot, and lets a VM run that ran before, unless it was let before: when it had all
    /// of RAM. Then somebody else may have paused it.
    fn answer(&mut self, then: Then, result: Result<(), SessionError>, had_memory: bool) -> Result<(), SessionError> {
        let Then::Answer { to, ran, stay_paused } = then else { return Ok(()) };
        if ran && if stay_paused { result.is_err() } else { !had_memory } {
            self.go_on()?;
        }
        to.give(result.map(|()| Reply::Done).map_err(|error| refusal(&error)));
        Ok(())
    }

    /// Lets a paused machine run.
    fn go_on(&mut self) -> Result<(), SessionError> {
        let policies = self.resume_policies();
        self.machine()?.resume(&policies)?;
        Ok(())
    }
}

/// Why there is no snapshot, to a client.
fn refusal(error: &SessionError) -> ApiError {
    let message = error.to_string();
    match error {
        SessionError::Snapshot(SnapshotError::Directory(
            DirectoryError::NoName { .. } | DirectoryError::NotEmpty { .. } | DirectoryError::NotADirectory { .. },
        )) => ApiError::BadRequest(message),
        SessionError::Snapshot(SnapshotError::Chain(reason)) if reason.refuses_save() => ApiError::BadRequest(message),
        _ => ApiError::Internal(message),
    }
}
