//! Saves a machine while its session continues.
//!
//! A thread writes the snapshot and posts two requests to the machine's own thread: [`Request::MemorySaved`] when all
//! of RAM is written, so that the guest may run again, and [`Request::Saved`] when the snapshot is complete or has
//! failed. Meanwhile the machine's thread handles other requests. A requested end cancels the save, and nothing of it
//! is left.

use std::{path::Path, sync::Arc, thread::ScopedJoinHandle};

use super::{Finish, SessionError, request::Request, worker::Worker};
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

/// What to do after a save.
enum Then {
    /// Answer the client.
    Answer {
        to: Answer<Result<Reply, ApiError>>,
        /// The VM ran before.
        ran: bool,
        /// The VM stays paused.
        stay_paused: bool,
    },
    /// End the session.
    End,
}

impl Save<'_> {
    /// Whether all of RAM is written.
    pub(super) fn has_memory(&self) -> bool {
        self.has_memory
    }

    /// Whether the session ends after it.
    pub(super) fn ends_the_session(&self) -> bool {
        matches!(self.then, Then::End)
    }

    /// How much is written.
    pub(super) fn status(&self) -> Saving {
        let (done_bytes, total_bytes) = self.progress.bytes();
        Saving { done_bytes, total_bytes }
    }
}

impl<'env> Worker<'_, '_, 'env> {
    /// Starts a snapshot that a client requested.
    pub(super) fn save(
        &mut self,
        snapshot: api::Snapshot,
        to: Answer<Result<Reply, ApiError>>,
    ) -> Result<(), SessionError> {
        let api::Snapshot { dir, base, stay_paused } = snapshot;
        let ran = !self.machine()?.is_paused();
        self.pause()?;
        if let Err((error, then)) = self.begin(&dir, base.as_deref(), Then::Answer { to, ran, stay_paused })? {
            self.answer(then, Err(error.into()), false)?;
        }
        Ok(())
    }

    /// Starts the snapshot with which the session ends.
    pub(super) fn save_and_end(&mut self, dir: &Path) -> Result<(), SessionError> {
        self.pause()?;
        self.begin(dir, None, Then::End)?.map_err(|(error, _)| error.into())
    }

    /// Starts to save the paused machine. If that fails for a reason that does not end the session, returns the reason
    /// and `then`.
    fn begin(
        &mut self,
        dir: &Path,
        base: Option<&Path>,
        then: Then,
    ) -> Result<Result<(), (SnapshotError, Then)>, SessionError> {
        // A signal during the save must be handled, so the event loop is needed now.
        self.helper_threads.start()?;
        let env = self.env;
        let job = match prepare(self.machine()?, env, dir, base) {
            Ok(job) => job,
            Err(error) => return Ok(Err((error, then))),
        };
        let (verification, inbox, progress) = (self.verification, self.inbox, job.progress());
        self.machine()?.show_original_code();
        let write = move || {
            // Posting fails only if the machine's thread has ended.
            let post = |request| drop(inbox.post(request));
            // A snapshot needs all of RAM, also the blocks that the guest has not accessed yet.
            let result = verification.finish().and_then(|()| Ok(job.write(|| post(Request::MemorySaved))?));
            post(Request::Saved);
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

    /// Lets the guest run again, if it is to: all of RAM is written.
    pub(super) fn memory_saved(&mut self) -> Result<(), SessionError> {
        let Some(save) = self.save.as_mut().filter(|save| !save.has_memory) else { return Ok(()) };
        save.has_memory = true;
        let resumes = matches!(save.then, Then::Answer { ran: true, stay_paused: false, .. });
        self.machine()?.memory_is_saved();
        if resumes {
            self.resume()?;
        }
        Ok(())
    }

    /// Ends the save, which is complete or has failed: answers the client, or returns how the session ends.
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

    /// Ends the save when the session ends: cancels it if `cancel` is set, and waits for its thread.
    pub(super) fn end_save(&mut self, cancel: bool) -> Result<(), SessionError> {
        if let Some(save) = self.save.as_ref().filter(|_| cancel) {
            save.progress.cancel();
        }
        self.saved().map(drop)
    }

    /// Sends a client the result of its snapshot, and resumes a VM that ran before. A VM that was resumed when all of
    /// RAM was written is left alone: another client may have paused it since.
    fn answer(&mut self, then: Then, result: Result<(), SessionError>, had_memory: bool) -> Result<(), SessionError> {
        let Then::Answer { to, ran, stay_paused } = then else { return Ok(()) };
        if ran && if stay_paused { result.is_err() } else { !had_memory } {
            self.resume()?;
        }
        to.send(result.map(|()| Reply::Done).map_err(|error| refusal(&error)));
        Ok(())
    }

    /// Resumes the machine.
    fn resume(&mut self) -> Result<(), SessionError> {
        let policies = self.options.policies.clone();
        self.machine()?.resume(&policies)?;
        Ok(())
    }
}

/// The error that a client gets for a snapshot that failed.
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
