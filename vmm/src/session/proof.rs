//! The proof that a restored guest runs on the memory that was saved.
//!
//! Reading all of it takes long, a guest needs little of it, and damage is rare: so the guest starts first, and a thread
//! reads behind its back, only when the CPU has nothing else to do. What the machine comes to counts only once the proof is
//! there: whoever ends the session or writes a snapshot waits for it, so that damage is neither passed over nor saved again
//! with a checksum of its own.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use super::{Request, SessionError};
use crate::{
    run::{mailbox::Mailbox, set_idle_priority},
    snapshot::{SnapshotError, machine::Unverified},
};

/// How long this thread waits before it reads the guest's memory, unless somebody waits for that.
const GRACE_MS: u32 = 20;

/// What the machine's thread has of it.
pub(super) struct Proof {
    verdict: Option<Receiver<Result<(), SnapshotError>>>,
    /// Somebody waits.
    urgent: Arc<AtomicBool>,
}

/// What the other thread has of it.
pub(super) struct Prover {
    verdict: Sender<Result<(), SnapshotError>>,
    urgent: Arc<AtomicBool>,
}

impl Proof {
    /// There is nothing to prove.
    pub(super) fn needless() -> Self {
        Self { verdict: None, urgent: Arc::default() }
    }

    /// Both ends of one that is to be found.
    pub(super) fn wanted() -> (Self, Prover) {
        let (sender, receiver) = channel();
        let urgent = Arc::new(AtomicBool::new(false));
        (Self { verdict: Some(receiver), urgent: Arc::clone(&urgent) }, Prover { verdict: sender, urgent })
    }

    /// Whether the verdict is still to come.
    pub(super) fn is_open(&self) -> bool {
        self.verdict.is_some()
    }

    /// Waits for the verdict. Good news stays good: asking again costs nothing.
    ///
    /// # Errors
    /// [`SessionError::Damaged`], once; the session must end with it.
    pub(super) fn settle(&mut self) -> Result<(), SessionError> {
        let Some(verdict) = self.verdict.take() else { return Ok(()) };
        self.urgent.store(true, Ordering::Relaxed);
        // The other end is dropped without a verdict only if its thread panicked.
        verdict.recv().map_err(|_| SessionError::Lost)?.map_err(SessionError::Damaged)
    }
}

impl Prover {
    /// Looks for the proof; bad news interrupts the guest.
    pub(super) fn prove(self, unverified: &Unverified, inbox: &Mailbox<Request>) {
        let idle = set_idle_priority(true);
        if let Err(error) = &idle {
            log::debug!("memory is verified at ordinary priority: {error}");
        }
        let mut idle = idle.is_ok();
        // The first exits of a restored guest are what people wait for; this touches the same page tables.
        for _ in 0..GRACE_MS {
            if self.urgent.load(Ordering::Relaxed) {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let verdict = unverified.verify(|| {
            if idle && self.urgent.load(Ordering::Relaxed) {
                idle = set_idle_priority(false).is_err();
            }
        });
        let damaged = verdict.is_err();
        // Nobody waits any more if the machine's thread is gone: it has settled this, or panicked.
        let _ = self.verdict.send(verdict);
        if damaged {
            let _ = inbox.post(Request::Damaged);
        }
    }
}
