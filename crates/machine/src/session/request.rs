//! What other threads ask of the machine's own.

use std::{
    sync::{Arc, mpsc::Sender},
    time::Duration,
};

use crate::{
    control::{Answer, ApiError, Command, Reply},
    live::{LastOfIt, LiveError},
    machine::sched::mailbox::Mailbox,
    mem::pages::PageSet,
};

/// A request from another thread.
pub enum Request {
    /// A command from the control socket; the answer goes to the sender.
    Command(Command, Answer<Result<Reply, ApiError>>),
    /// Bytes typed at the console; the number of those that the UART took goes to the sender.
    Type(Vec<u8>, Answer<usize>),
    /// A signal, or the event loop's failure, ends the session.
    Stop,
    /// This much wall time has passed ([`Options::timeout`](super::Options::timeout)).
    TimedOut(Duration),
    /// This much wall time has passed ([`Options::heartbeat`](super::Options::heartbeat)).
    Heartbeat(Duration),
    /// The restored memory is not what was saved.
    Damaged,
    /// The snapshot that is being made has all of RAM.
    MemorySaved,
    /// The snapshot is complete, or has failed.
    Saved,
    /// What the thread asks that moves the VM.
    Move(MoveRequest),
}

/// What the thread that moves the VM asks.
pub enum MoveRequest {
    /// The pages that have changed.
    Changed(Sender<Result<PageSet, LiveError>>),
    /// Stop, and the last of the machine.
    Stop(Sender<Result<LastOfIt, LiveError>>),
    /// It is over.
    Over,
}

pub(super) type Inbox = Arc<Mailbox<Request>>;
