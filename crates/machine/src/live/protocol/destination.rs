//! The end that the guest goes to.

/// The destination's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Destination {
    /// Memory and state arrive.
    Receiving,
    /// All has arrived, and the machine is built. It does not run.
    Prepared,
    /// It runs.
    Running,
    /// It does not run, and never will.
    Refused,
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DestinationEvent {
    /// The machine is built.
    Built,
    /// `commit` has come.
    Commit,
    /// The machine cannot be built, the connection is lost, the source is silent or talks nonsense, or this end gives
    /// up.
    Broken,
}

/// What the destination is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DestinationAction {
    /// Send `prepared`.
    SendPrepared,
    /// Send `started`, and run.
    Run,
    /// Close the connection, and answer from now on that it does not run.
    Refuse,
    /// Nothing.
    Nothing,
}

impl Destination {
    /// The next state, and what to do.
    #[must_use]
    pub(crate) fn on(self, event: DestinationEvent) -> (Self, DestinationAction) {
        use DestinationEvent::{Built, Commit};
        match (self, event) {
            (Self::Receiving, Built) => (Self::Prepared, DestinationAction::SendPrepared),
            (Self::Prepared, Commit) => (Self::Running, DestinationAction::Run),
            (Self::Receiving | Self::Prepared, _) => (Self::Refused, DestinationAction::Refuse),
            (Self::Running | Self::Refused, _) => (self, DestinationAction::Nothing),
        }
    }

    /// The answer to a source that asks whether it runs; none while that is open.
    #[must_use]
    pub(crate) fn answer(self) -> Option<bool> {
        match self {
            Self::Receiving | Self::Prepared => None,
            Self::Running => Some(true),
            Self::Refused => Some(false),
        }
    }
}
