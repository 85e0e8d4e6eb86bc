//! The end that the guest comes from.

/// The source's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// The guest runs, and its memory is copied.
    Copying,
    /// The guest is stopped, and the last of it has been sent.
    Stopped,
    /// `commit` has been sent: the destination may run the guest.
    Committed,
    /// It is over.
    Over(Ending),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ending {
    /// The guest goes on here.
    Stays,
    /// The destination runs the guest.
    Moved,
    /// Nobody here knows whether the destination runs the guest.
    Unknown,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SourceEvent {
    /// The rounds are over, and the guest is stopped.
    Stop,
    /// The destination has all of it, and can run it.
    Prepared,
    /// The destination runs it.
    Started,
    /// The destination refuses, the connection is lost, the destination is silent or talks nonsense, or this end gives
    /// up.
    Broken,
    /// Asked anew, the destination says whether it runs the guest; if not, it never will.
    Answer {
        /// Whether it does.
        runs: bool,
    },
    /// Asked anew, it does not answer.
    NoAnswer,
}

/// What the source is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SourceAction {
    /// Send the last pages and the state.
    SendState,
    /// Send `commit`.
    SendCommit,
    /// Connect anew and ask whether the destination runs the guest.
    Ask,
    /// Send `done`, and end: the guest is elsewhere.
    End,
    /// Close the connection and let the guest go on.
    GoOn,
    /// Keep the guest stopped, and say that nobody knows.
    Wait,
}

impl Source {
    /// The next state, and what to do.
    #[must_use]
    pub(crate) fn on(self, event: SourceEvent) -> (Self, SourceAction) {
        use SourceEvent::{Answer, NoAnswer, Prepared, Started, Stop};
        let over = |ending, action| (Self::Over(ending), action);
        match (self, event) {
            (Self::Copying, Stop) => (Self::Stopped, SourceAction::SendState),
            (Self::Stopped, Prepared) => (Self::Committed, SourceAction::SendCommit),
            // Nothing that comes before `commit` was sent can mean that the guest runs elsewhere.
            (Self::Copying | Self::Stopped, _) => over(Ending::Stays, SourceAction::GoOn),
            (Self::Committed, Started | Answer { runs: true }) => over(Ending::Moved, SourceAction::End),
            (Self::Committed, Answer { runs: false }) => over(Ending::Stays, SourceAction::GoOn),
            (Self::Committed, NoAnswer) => over(Ending::Unknown, SourceAction::Wait),
            (Self::Committed, _) => (self, SourceAction::Ask),
            (Self::Over(Ending::Stays), _) => (self, SourceAction::GoOn),
            (Self::Over(Ending::Moved), _) => (self, SourceAction::End),
            (Self::Over(Ending::Unknown), _) => (self, SourceAction::Wait),
        }
    }

    /// Whether the guest may run here.
    #[cfg(test)]
    pub(crate) fn runs(self) -> bool {
        matches!(self, Self::Copying | Self::Over(Ending::Stays))
    }
}
