//! Every interleaving of messages, losses and crashes, tried.
//!
//! The network: a connection has a queue in each direction. At any instant it can break; of each queue any number of
//! the first messages still arrive, then the end of the connection is seen. Either end can crash at any instant. The
//! source asks at most [`QUESTIONS`] times, each time over a connection of its own that can break, too.

use std::collections::{HashSet, VecDeque};

use super::{Destination, DestinationAction as Do, DestinationEvent, Ending, Source, SourceAction as Act, SourceEvent};

/// How often the source asks.
const QUESTIONS: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ToDestination {
    State,
    Commit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ToSource {
    Prepared,
    Started,
}

/// What the source waits for besides messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Question {
    None,
    Asked,
    Answered(bool),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Source,
    destination: Destination,
    source_crashed: bool,
    destination_crashed: bool,
    /// The source's end of the connection is closed, or has seen the end.
    source_closed: bool,
    destination_closed: bool,
    /// The connection is broken: what is in the queues still arrives, then its end.
    broken: bool,
    to_destination: VecDeque<ToDestination>,
    to_source: VecDeque<ToSource>,
    question: Question,
    questions_left: u8,
    /// The destination has run the guest: from then on the source must not.
    has_moved: bool,
    /// Whether anything went wrong besides the connection.
    crash: bool,
    /// Questions that were lost.
    unanswered: bool,
}

impl World {
    fn new() -> Self {
        Self {
            source: Source::Copying,
            destination: Destination::Receiving,
            source_crashed: false,
            destination_crashed: false,
            source_closed: false,
            destination_closed: false,
            broken: false,
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            question: Question::None,
            questions_left: QUESTIONS,
            has_moved: false,
            crash: false,
            unanswered: false,
        }
    }

    fn source_on(&self, event: SourceEvent) -> Self {
        let mut next = self.clone();
        let (state, action) = next.source.on(event);
        next.source = state;
        match action {
            Act::SendState => next.send_to_destination(ToDestination::State),
            Act::SendCommit => next.send_to_destination(ToDestination::Commit),
            Act::Ask => {
                next.source_closed = true;
                if next.questions_left == 0 {
                    return next.source_on(SourceEvent::NoAnswer);
                }
                next.questions_left -= 1;
                next.question = Question::Asked;
            }
            Act::End | Act::GoOn | Act::Wait => {
                next.source_closed = true;
                next.question = Question::None;
            }
        }
        next
    }

    fn destination_on(&self, event: DestinationEvent) -> Self {
        let mut next = self.clone();
        let (state, action) = next.destination.on(event);
        next.destination = state;
        match action {
            Do::SendPrepared => next.send_to_source(ToSource::Prepared),
            Do::Run => {
                next.has_moved = true;
                next.send_to_source(ToSource::Started);
            }
            Do::Refuse => next.destination_closed = true,
            Do::Nothing => {}
        }
        next
    }

    fn send_to_destination(&mut self, message: ToDestination) {
        if !self.broken {
            self.to_destination.push_back(message);
        }
    }

    fn send_to_source(&mut self, message: ToSource) {
        if !self.broken {
            self.to_source.push_back(message);
        }
    }

    /// All that can happen next.
    fn next(&self) -> Vec<Self> {
        let mut all = Vec::new();
        let with = |change: &dyn Fn(&mut Self)| {
            let mut next = self.clone();
            change(&mut next);
            next
        };
        if !self.source_crashed {
            if self.source == Source::Copying {
                all.push(self.source_on(SourceEvent::Stop));
            }
            if !self.source_closed {
                // It may lose its patience at any instant, or read the next message, or the end.
                all.push(self.source_on(SourceEvent::Broken));
                if let Some(message) = self.to_source.front() {
                    let event = match message {
                        ToSource::Prepared => SourceEvent::Prepared,
                        ToSource::Started => SourceEvent::Started,
                    };
                    let read = with(&|next| next.to_source = next.to_source.iter().skip(1).copied().collect());
                    all.push(read.source_on(event));
                } else if self.broken || self.destination_closed || self.destination_crashed {
                    all.push(self.source_on(SourceEvent::Broken));
                }
            }
            match self.question {
                Question::None => {}
                Question::Asked => {
                    // The question or its answer is lost, or nobody listens.
                    let lost = with(&|next| next.unanswered = true);
                    all.push(lost.source_on(SourceEvent::Broken));
                    if let (false, Some(runs)) = (self.destination_crashed, self.destination.answer()) {
                        all.push(with(&|next| next.question = Question::Answered(runs)));
                    }
                }
                Question::Answered(runs) => {
                    all.push(self.source_on(SourceEvent::Answer { runs }));
                    let lost = with(&|next| next.unanswered = true);
                    all.push(lost.source_on(SourceEvent::Broken));
                }
            }
            all.push(with(&|next| (next.source_crashed, next.crash) = (true, true)));
        }
        if !self.destination_crashed {
            if !self.destination_closed {
                if let Some(message) = self.to_destination.front() {
                    let read =
                        with(&|next| next.to_destination = next.to_destination.iter().skip(1).copied().collect());
                    match message {
                        ToDestination::State => {
                            all.push(read.destination_on(DestinationEvent::Built));
                            // Its host cannot run such a machine.
                            all.push(read.destination_on(DestinationEvent::Broken));
                        }
                        ToDestination::Commit => all.push(read.destination_on(DestinationEvent::Commit)),
                    }
                } else if self.broken || self.source_closed || self.source_crashed {
                    all.push(self.destination_on(DestinationEvent::Broken));
                }
                // It loses its patience.
                all.push(self.destination_on(DestinationEvent::Broken));
            }
            all.push(with(&|next| (next.destination_crashed, next.crash) = (true, true)));
        }
        if !self.broken {
            for kept_to_destination in 0..=self.to_destination.len() {
                for kept_to_source in 0..=self.to_source.len() {
                    all.push(with(&|next| {
                        next.broken = true;
                        next.to_destination.truncate(kept_to_destination);
                        next.to_source.truncate(kept_to_source);
                    }));
                }
            }
        }
        all.retain(|next| next != self);
        all
    }

    fn source_runs(&self) -> bool {
        !self.source_crashed && self.source.runs()
    }

    fn destination_runs(&self) -> bool {
        !self.destination_crashed && self.destination == Destination::Running
    }

    fn check(&self, ends: bool) {
        assert!(!(self.source_runs() && self.destination_runs()), "both run: {self:#?}");
        assert!(!(self.source.runs() && self.has_moved), "the source runs again after the guest has moved: {self:#?}");
        if !ends {
            return;
        }
        // Nothing can happen any more but what changes nothing.
        if !self.source_crashed {
            assert!(matches!(self.source, Source::Over(_)), "the source waits for ever: {self:#?}");
            let knows = self.source != Source::Over(Ending::Unknown);
            assert!(knows || self.destination_crashed || self.unanswered, "nothing was lost but the answer: {self:#?}");
        }
        if !self.destination_crashed {
            assert!(self.destination.answer().is_some(), "the destination waits for ever: {self:#?}");
        }
        if !self.crash && !self.unanswered {
            assert!(self.source_runs() != self.destination_runs(), "not exactly one runs: {self:#?}");
        }
    }
}

// Catches: a protocol in which, after some message, loss or crash at the wrong instant, two copies of a guest run, or
// none although both ends live and can talk.
#[test]
fn exactly_one_runs_whatever_is_lost() {
    let mut seen = HashSet::from([World::new()]);
    let mut open = vec![World::new()];
    let (mut ends, mut moved, mut stayed, mut unknown) = (0, 0, 0, 0);
    while let Some(world) = open.pop() {
        let next = world.next();
        // A crash is always possible, so that an end is a state in which only crashes and breaks are left.
        let of = |world: &World| {
            let closed = (world.source_closed, world.destination_closed);
            (world.source, world.destination, closed, world.question, world.questions_left)
        };
        let is_end = next.iter().all(|next| of(next) == of(&world));
        world.check(is_end);
        if is_end {
            ends += 1;
            match world.source {
                Source::Over(Ending::Moved) => moved += 1,
                Source::Over(Ending::Stays) => stayed += 1,
                _ => unknown += 1,
            }
        }
        for next in next {
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    println!(
        "{} states, {ends} of them ends: {moved} moved, {stayed} stayed, {unknown} unknown or crashed",
        seen.len()
    );
    assert!(moved > 0 && stayed > 0 && unknown > 0);
}
