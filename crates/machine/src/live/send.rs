//! The source.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use sha2::{Digest, Sha256};

use super::{
    Address, Figures, LiveError,
    connection::{Connection, PATIENCE, Patience},
    frame::{Answered, Hello, Kind, MigrationId, PAGE_BYTES, Question, VERSION, Welcome},
    protocol::{Ending, Source, SourceAction, SourceEvent},
    rounds::{self, Next},
};
use crate::{
    host::clock::HostClock,
    mem::{pages::PageSet, ram::GuestRam},
    snapshot::memory::{self, MemoryLayout},
};

const PEER: &str = "the destination";

/// How long it waits before it asks again.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// How a machine is to be sent.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to.
    pub to: Address,
    /// How long the guest may be stopped, as far as that depends on the memory that is left.
    pub max_downtime: Duration,
}

/// The last of a machine: it is stopped, and its RAM has the guest's own instructions at trap sites.
#[derive(Debug)]
pub struct LastOfIt {
    /// Everything but RAM, as the bytes of a `state` file.
    pub state: Vec<u8>,
    /// The pages that have changed since they were last asked for.
    pub changed: PageSet,
}

/// What the source asks of the machine's owner, which may be another thread.
pub trait SourcePorts {
    /// The pages that have changed since the copy began, or since the last call.
    ///
    /// # Errors
    /// [`LiveError::Ended`], or what else keeps the machine from being sent.
    fn changed(&self) -> Result<PageSet, LiveError>;

    /// Stops the machine and returns the last of it.
    ///
    /// # Errors
    /// As [`Self::changed`].
    fn stop(&self) -> Result<LastOfIt, LiveError>;
}

/// How far a migration is.
#[derive(Debug, Default)]
pub struct Progress {
    /// Rounds that are over.
    pub rounds: AtomicU64,
    /// Bytes sent.
    pub sent_bytes: AtomicU64,
    /// Bytes that are to be sent, as of the beginning of this round.
    pub left_bytes: AtomicU64,
    /// The session ends: the destination is not to run the guest, unless it was already told to.
    pub cancelled: AtomicBool,
}

/// Where the guest is after a migration.
#[derive(Debug)]
pub enum Outcome {
    /// At the destination.
    Moved(Figures),
    /// Here, where it goes on; and why.
    Stays(LiveError),
    /// Nobody here knows. The machine must stay stopped.
    Unknown(LiveError),
}

/// Sends a machine with this RAM, and returns where its guest is then. The copy has begun: changes of RAM are recorded.
pub fn send(
    settings: &Settings,
    memory: &Arc<GuestRam>,
    clock: HostClock,
    ports: &impl SourcePorts,
    progress: &Progress,
) -> Outcome {
    send_with(PATIENCE, settings, memory, clock, ports, progress)
}

/// As [`send`], with another patience.
pub(super) fn send_with(
    patience: Patience,
    settings: &Settings,
    memory: &Arc<GuestRam>,
    clock: HostClock,
    ports: &impl SourcePorts,
    progress: &Progress,
) -> Outcome {
    let begun = clock.tsc();
    let id = random_id(clock);
    let mut sending = Sending {
        patience,
        settings,
        memory,
        layout: MemoryLayout::of(memory),
        clock,
        ports,
        progress,
        figures: Figures::default(),
    };
    let mut source = Source::Copying;
    let (mut connection, mut event, mut error) = match sending.copy(&id) {
        Ok((connection, last)) => (Some((connection, last)), SourceEvent::Stop, None),
        Err(error) => (None, SourceEvent::Broken, Some(error)),
    };
    let mut stopped = clock.tsc();
    loop {
        let action;
        (source, action) = source.on(event);
        let result = match (action, &mut connection) {
            (SourceAction::SendState, Some((connection, last))) => {
                stopped = last.1;
                sending.send_last(connection, &last.0).and_then(|()| wait(connection, Kind::Prepared))
            }
            (SourceAction::SendCommit, _) if progress.cancelled.load(Ordering::SeqCst) => {
                return Outcome::Stays(LiveError::Ended);
            }
            (SourceAction::SendCommit, Some((connection, _))) => {
                let sent = connection.send().signal(Kind::Commit).map_err(LiveError::lost(PEER));
                sending.figures.bytes = connection.send().bytes;
                sent.and_then(|()| wait(connection, Kind::Started))
            }
            (SourceAction::Ask, _) => {
                // The destination sees the end of the connection, and decides.
                connection = None;
                match ask(&settings.to, &id, clock, patience) {
                    Some(runs) => Ok(SourceEvent::Answer { runs }),
                    None => Ok(SourceEvent::NoAnswer),
                }
            }
            (SourceAction::SendState | SourceAction::SendCommit, None) => Err(LiveError::Ended),
            (SourceAction::End | SourceAction::GoOn | SourceAction::Wait, _) => break,
        };
        event = match result {
            Ok(event) => event,
            Err(why) => {
                error.get_or_insert(why);
                SourceEvent::Broken
            }
        };
    }
    match source {
        Source::Over(Ending::Moved) => {
            if let Some((connection, _)) = &mut connection {
                // If it does not arrive, the destination waits a little longer for questions.
                let _ = connection.send().signal(Kind::Done);
                sending.figures.bytes = connection.send().bytes;
            }
            let ns = |since| u64::try_from(clock.duration(since, clock.tsc()).as_nanos()).unwrap_or(u64::MAX);
            Outcome::Moved(Figures { total_ns: ns(begun), downtime_ns: ns(stopped), ..sending.figures })
        }
        Source::Over(Ending::Unknown) => Outcome::Unknown(LiveError::Unknown { address: settings.to.clone() }),
        Source::Over(Ending::Stays) | Source::Copying | Source::Stopped | Source::Committed => {
            Outcome::Stays(error.unwrap_or(LiveError::Ended))
        }
    }
}

/// Waits for `kind`, and returns the event that it is.
fn wait(connection: &mut Connection, kind: Kind) -> Result<SourceEvent, LiveError> {
    connection.expect(kind, PEER)?;
    Ok(if kind == Kind::Prepared { SourceEvent::Prepared } else { SourceEvent::Started })
}

/// Asks whether the destination runs the guest; none if there is no answer.
fn ask(to: &Address, id: &MigrationId, clock: HostClock, patience: Patience) -> Option<bool> {
    let begun = clock.tsc();
    let question = Question { version: VERSION, id: hex::encode(id) };
    let once = || -> Option<bool> {
        let mut connection = Connection::open(to, patience).ok()?;
        connection.send().json(Kind::Ask, &question).ok()?;
        let frame = connection.expect(Kind::Answer, PEER).ok()?;
        let Answered { runs } = connection.json(&frame).ok()?;
        let _ = connection.send().signal(Kind::Done);
        Some(runs)
    };
    loop {
        if let Some(runs) = once() {
            return Some(runs);
        }
        if clock.duration(begun, clock.tsc()) >= patience.ask_for {
            return None;
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

/// No secret: it must only be another one for each migration.
fn random_id(clock: HostClock) -> MigrationId {
    let mut sum = Sha256::new();
    sum.update(clock.tsc().0.to_le_bytes());
    sum.update(std::process::id().to_le_bytes());
    sum.update(std::fs::read("/proc/sys/kernel/random/uuid").unwrap_or_default());
    let sum: [u8; 32] = sum.finalize().into();
    let mut id = MigrationId::default();
    id.iter_mut().zip(sum).for_each(|(to, from)| *to = from);
    id
}

struct Sending<'a, P> {
    patience: Patience,
    settings: &'a Settings,
    memory: &'a Arc<GuestRam>,
    layout: MemoryLayout,
    clock: HostClock,
    ports: &'a P,
    progress: &'a Progress,
    figures: Figures,
}

type Stopped = (LastOfIt, vmtime::HostTsc);

impl<P: SourcePorts> Sending<'_, P> {
    /// Connects and copies RAM in rounds, until the rest is small enough, and stops the machine.
    fn copy(&mut self, id: &MigrationId) -> Result<(Connection, Stopped), LiveError> {
        let to = &self.settings.to;
        let failed = |source| LiveError::Connect { address: to.clone(), source };
        let mut connection = Connection::open(to, self.patience).map_err(failed)?;
        let memory = self.layout.regions.iter().map(|region| region.bytes).sum();
        let hello = Hello { version: VERSION, id: hex::encode(id), memory };
        connection.send().json(Kind::Hello, &hello).map_err(LiveError::lost(PEER))?;
        let welcome = connection.expect(Kind::Welcome, PEER)?;
        let Welcome { version } = connection.json(&welcome).map_err(LiveError::of(PEER))?;
        if version != VERSION {
            let why = format!("it speaks version {version} of the protocol, not {VERSION}");
            return Err(LiveError::Protocol { peer: PEER, why });
        }
        let mut pages = memory::in_use(self.memory)?;
        loop {
            self.progress.left_bytes.store(bytes_of(&pages), Ordering::Relaxed);
            let (begun, before) = (self.clock.tsc(), connection.send().bytes);
            self.send_pages(&mut connection, &pages)?;
            connection.send().signal(Kind::RoundEnd).map_err(LiveError::lost(PEER))?;
            connection.expect(Kind::RoundReceived, PEER)?;
            self.figures.rounds = self.figures.rounds.saturating_add(1);
            self.progress.rounds.store(self.figures.rounds.into(), Ordering::Relaxed);
            pages = self.ports.changed()?;
            let took = self.clock.duration(begun, self.clock.tsc());
            let (sent, left) = (connection.send().bytes.saturating_sub(before), bytes_of(&pages));
            let most = self.settings.max_downtime;
            match rounds::next(self.figures.rounds, sent, took, left, most) {
                Next::Round => {}
                Next::Stop => break,
                Next::GiveUp(expected) => {
                    let rate = (u128::from(sent) * 1_000_000_000 / took.as_nanos().max(1)) >> 20;
                    return Err(LiveError::TooFast {
                        rounds: self.figures.rounds,
                        left_bytes: left,
                        expected_ms: expected.as_millis(),
                        rate_mib: u64::try_from(rate).unwrap_or(u64::MAX),
                        most_ms: most.as_millis(),
                    });
                }
            }
        }
        let stopped = self.clock.tsc();
        let mut last = self.ports.stop()?;
        last.changed.union(&pages);
        Ok((connection, (last, stopped)))
    }

    /// Sends the last pages and the state.
    fn send_last(&mut self, connection: &mut Connection, last: &LastOfIt) -> Result<(), LiveError> {
        let before = self.figures.pages;
        self.send_pages(connection, &last.changed)?;
        self.figures.last_pages = self.figures.pages.saturating_sub(before);
        let state = connection.send().frame(Kind::State, &[&last.state]);
        state.and_then(|()| connection.send().flush()).map_err(LiveError::lost(PEER))
    }

    /// Sends the content of `pages`. Neighbours that are zero, or not, share a frame.
    fn send_pages(&mut self, connection: &mut Connection, pages: &PageSet) -> Result<(), LiveError> {
        let first_round = self.figures.rounds == 0;
        let (mut sent, progress) = (0u64, self.progress);
        memory::for_each_piece(self.memory, &self.layout, pages, |piece, chunk| -> Result<(), LiveError> {
            piece.read(chunk)?;
            let mut page = piece.page();
            let (all, _) = chunk.as_chunks::<PAGE_BYTES>();
            for same in all.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
                let count = u64::try_from(same.len()).unwrap_or(u64::MAX);
                let first = page.to_le_bytes();
                page = page.saturating_add(count);
                let written = if !same.first().is_some_and(is_zero) {
                    sent = sent.saturating_add(count);
                    connection.send().frame(Kind::Pages, &[&first, same.as_flattened()])
                } else if first_round {
                    // The destination's RAM is zero.
                    Ok(())
                } else {
                    connection.send().frame(Kind::Zero, &[&first, &count.to_le_bytes()])
                };
                written.map_err(LiveError::lost(PEER))?;
            }
            progress.sent_bytes.store(connection.send().bytes, Ordering::Relaxed);
            Ok(())
        })?;
        self.figures.pages = self.figures.pages.saturating_add(sent);
        Ok(())
    }
}

fn bytes_of(pages: &PageSet) -> u64 {
    u64::try_from(pages.count().saturating_mul(PAGE_BYTES)).unwrap_or(u64::MAX)
}

fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    let (words, _) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0)
}
