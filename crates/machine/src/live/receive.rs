//! The destination.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use vm_memory::{Bytes, GuestAddress};

use super::{
    Address, LiveError,
    connection::{Connection, Listener, PATIENCE, Patience},
    frame::{Answered, Frame, Hello, Kind, PAGE_BYTES, Question, VERSION, Welcome},
    protocol::{Destination, DestinationAction, DestinationEvent},
};
use crate::{
    host::{clock::HostClock, pending_signals::end_is_pending},
    machine::{config::host_fingerprint::HostFingerprint, state::MachineState},
    mem::ram::{self, GuestRam},
    snapshot::{machine::decode_without_memory, memory::MemoryLayout},
};

const PEER: &str = "the source";

/// How often it looks whether it may end.
const LOOK: Duration = Duration::from_millis(50);
/// How long a client may take from one byte of its first frame to the next.
const FIRST_SILENCE: Duration = Duration::from_secs(2);

/// What a source may ask of this host.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most guest RAM, in bytes.
    pub memory: u64,
}

/// A VMM that waits for a machine.
pub struct Waiting {
    listener: Listener,
    address: Address,
    clock: HostClock,
    patience: Patience,
}

/// A machine that has arrived, and does not run yet.
pub struct Incoming {
    waiting: Waiting,
    connection: Connection,
    id: String,
    destination: Destination,
    /// Everything but RAM.
    pub state: MachineState,
    /// The host that it comes from, if it says so.
    pub host: Option<HostFingerprint>,
    /// RAM.
    pub memory: Arc<GuestRam>,
}

impl Waiting {
    /// Listens at `address`. `insecure`: TCP without encryption is meant.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn at(address: &Address, insecure: bool, clock: HostClock) -> Result<Self, LiveError> {
        if matches!(address, Address::Tcp(_)) && !insecure {
            return Err(LiveError::Insecure(address.clone()));
        }
        Self::at_with(address, PATIENCE, clock)
    }

    /// As [`Self::at`], with another patience.
    pub(super) fn at_with(address: &Address, patience: Patience, clock: HostClock) -> Result<Self, LiveError> {
        let listener = Listener::bind(address)?;
        let address = match (address, listener.port()) {
            (Address::Tcp(host), Some(port)) => {
                let name = host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name);
                Address::Tcp(format!("{name}:{port}"))
            }
            _ => address.clone(),
        };
        Ok(Self { listener, address, clock, patience })
    }

    /// Where it listens, with the port that the host chose if the address named 0.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for a source, and receives its machine. A client that is no source is turned away.
    ///
    /// # Errors
    /// The machine has not arrived; the source keeps it.
    pub fn receive(self, limits: Limits) -> Result<Incoming, LiveError> {
        let failed = |source| LiveError::Listen { address: self.address.clone(), source };
        let (connection, hello, memory) = loop {
            if end_is_pending() {
                return Err(LiveError::Stopped);
            }
            let accepted = self.listener.accept(Some(LOOK), self.patience).map_err(failed)?;
            let Some(mut connection) = accepted else { continue };
            match begin(&mut connection, limits, self.patience) {
                Ok((hello, memory)) => break (connection, hello, memory),
                Err(error) => {
                    log::warn!("{}: a client was turned away: {error}", self.address);
                    refuse(&mut connection, &error.to_string());
                }
            }
        };
        let mut receiving = Receiving { connection, memory };
        let received = receiving.machine();
        let Receiving { mut connection, memory } = receiving;
        match received {
            Ok((state, host)) => {
                let (id, destination) = (hello.id, Destination::Receiving);
                Ok(Incoming { waiting: self, connection, id, destination, state, host, memory })
            }
            Err(error) => {
                refuse(&mut connection, &error.to_string());
                Err(error)
            }
        }
    }
}

/// Reads the first frame, and answers it. Returns it, and RAM for the guest.
fn begin(connection: &mut Connection, limits: Limits, patience: Patience) -> Result<(Hello, Arc<GuestRam>), LiveError> {
    connection.set_silence(FIRST_SILENCE.min(patience.silence)).map_err(LiveError::lost(PEER))?;
    let frame = connection.expect(Kind::Hello, PEER)?;
    let hello: Hello = connection.json(&frame).map_err(LiveError::of(PEER))?;
    if hello.version != VERSION {
        let why = format!("it speaks version {} of the protocol, not {VERSION}", hello.version);
        return Err(LiveError::Protocol { peer: PEER, why });
    }
    if hello.memory > limits.memory {
        return Err(LiveError::TooLarge { bytes: hello.memory, most: limits.memory });
    }
    let memory = Arc::new(ram::allocate(hello.memory)?);
    connection.set_silence(patience.silence).map_err(LiveError::lost(PEER))?;
    connection.send().json(Kind::Welcome, &Welcome { version: VERSION }).map_err(LiveError::lost(PEER))?;
    Ok((hello, memory))
}

fn refuse(connection: &mut Connection, why: &str) {
    // Best effort: without it the source sees that the connection ends.
    let why: String = why.chars().take(1000).collect();
    let _ = connection.send().frame(Kind::Refused, &[why.as_bytes()]);
    let _ = connection.send().flush();
}

struct Receiving {
    connection: Connection,
    memory: Arc<GuestRam>,
}

impl Receiving {
    /// Receives rounds of pages, the last of them, and the state.
    fn machine(&mut self) -> Result<(MachineState, Option<HostFingerprint>), LiveError> {
        let layout = MemoryLayout::of(&self.memory);
        loop {
            let Frame { kind, payload } = self.connection.receive().map_err(LiveError::of(PEER))?;
            if end_is_pending() {
                return Err(LiveError::Stopped);
            }
            match kind {
                Kind::Pages => self.pages(&layout, &payload)?,
                Kind::Zero => self.zero(&layout, &payload)?,
                Kind::RoundEnd => {
                    self.connection.send().signal(Kind::RoundReceived).map_err(LiveError::lost(PEER))?;
                }
                Kind::State => return Ok(decode_without_memory(&payload)?),
                other => return Err(bad(format!("it sent {other:?} among the pages"))),
            }
        }
    }

    fn pages(&self, layout: &MemoryLayout, payload: &[u8]) -> Result<(), LiveError> {
        let (first, content) =
            payload.split_first_chunk::<8>().ok_or_else(|| bad("pages without a number".to_owned()))?;
        let (pages, rest) = content.as_chunks::<PAGE_BYTES>();
        if !rest.is_empty() {
            return Err(bad("pages that are not whole".to_owned()));
        }
        let at = address(layout, u64::from_le_bytes(*first), u64::try_from(pages.len()).unwrap_or(u64::MAX))?;
        self.write(content, at)
    }

    fn zero(&self, layout: &MemoryLayout, payload: &[u8]) -> Result<(), LiveError> {
        let ([first, count], []) = payload.as_chunks::<8>() else {
            return Err(bad("zero pages without a number".to_owned()));
        };
        let (first, count) = (u64::from_le_bytes(*first), u64::from_le_bytes(*count));
        let at = address(layout, first, count)?;
        let mut there = [0; PAGE_BYTES];
        for page in 0..count {
            let at = GuestAddress(at.0.saturating_add(page.saturating_mul(PAGE_BYTES as u64)));
            let read = self.memory.read_slice(&mut there, at);
            read.map_err(|error| bad(format!("zero pages at {:#x}: {error}", at.0)))?;
            // A page that is zero already takes no memory of the host's.
            if there != [0; PAGE_BYTES] {
                self.write(&[0; PAGE_BYTES], at)?;
            }
        }
        Ok(())
    }

    fn write(&self, content: &[u8], at: GuestAddress) -> Result<(), LiveError> {
        self.memory.write_slice(content, at).map_err(|error| bad(format!("pages at {:#x}: {error}", at.0)))
    }
}

fn address(layout: &MemoryLayout, page: u64, pages: u64) -> Result<GuestAddress, LiveError> {
    let at = layout.address_of(page, pages);
    at.map(GuestAddress).ok_or_else(|| bad(format!("{pages} pages from number {page} on, where there is no RAM")))
}

fn bad(why: String) -> LiveError {
    LiveError::Protocol { peer: PEER, why }
}

impl Incoming {
    /// The machine cannot run here: tells the source, which keeps it.
    pub fn refuse(mut self, why: &str) {
        refuse(&mut self.connection, why);
    }

    /// The machine is built: tells the source, and waits until it hands the guest over. The guest is to run then.
    ///
    /// # Errors
    /// The source keeps the guest, and the machine must not run.
    pub fn hand_over(mut self) -> Result<Arrived, LiveError> {
        let (state, action) = self.destination.on(DestinationEvent::Built);
        self.destination = state;
        let sent = match action {
            DestinationAction::SendPrepared => self.connection.send().signal(Kind::Prepared),
            _ => Ok(()),
        };
        let commit = sent.map_err(LiveError::lost(PEER)).and_then(|()| self.connection.expect(Kind::Commit, PEER));
        let (event, error) = match commit {
            // Who ends this VMM now does not want it to run a guest. The source asks, and keeps it.
            Ok(_) if end_is_pending() => (DestinationEvent::Broken, Some(LiveError::Stopped)),
            Ok(_) => (DestinationEvent::Commit, None),
            Err(error) => (DestinationEvent::Broken, Some(error)),
        };
        let action;
        (self.destination, action) = self.destination.on(event);
        let runs = action == DestinationAction::Run;
        if runs {
            // Lost or not: the guest runs from here on.
            let _ = self.connection.send().signal(Kind::Started);
        }
        let Self { waiting, connection, id, destination, .. } = self;
        let answerer = Answerer { waiting, connection, id, destination };
        let Some(error) = error else { return Ok(Arrived(answerer)) };
        // The source may have sent `commit`, and asks.
        answerer.answer(&AtomicBool::new(true));
        Err(error)
    }
}

/// What a destination that has decided still does for the source.
struct Answerer {
    waiting: Waiting,
    connection: Connection,
    id: String,
    destination: Destination,
}

impl Answerer {
    /// Waits for the source's `done`, or answers its questions, until it knows the answer, or some time has passed
    /// since `over` was set.
    fn answer(self, over: &AtomicBool) {
        let Self { waiting, mut connection, id, destination } = self;
        let Some(runs) = destination.answer() else { return };
        if runs {
            // `done` follows on `started` at once. Without it the source may ask, over another connection.
            if let Ok(Frame { kind: Kind::Done, .. }) = connection.receive() {
                return;
            }
        }
        drop(connection);
        let mut ends = None;
        loop {
            if over.load(Ordering::SeqCst) {
                let begun = *ends.get_or_insert(waiting.clock.tsc());
                if waiting.clock.duration(begun, waiting.clock.tsc()) >= waiting.patience.answer_for {
                    return;
                }
            }
            let Ok(accepted) = waiting.listener.accept(Some(LOOK), waiting.patience) else {
                thread::sleep(LOOK);
                continue;
            };
            let Some(mut connection) = accepted else { continue };
            if connection.set_silence(FIRST_SILENCE.min(waiting.patience.silence)).is_err() {
                continue;
            }
            let Ok(frame) = connection.expect(Kind::Ask, PEER) else { continue };
            let asked: Result<Question, _> = connection.json(&frame);
            if asked.is_ok_and(|question| question.id == id)
                && connection.send().json(Kind::Answer, &Answered { runs }).is_ok()
                && connection.expect(Kind::Done, PEER).is_ok()
            {
                return;
            }
        }
    }
}

/// A machine that is to run here now. Its source may not know yet.
pub struct Arrived(Answerer);

impl Arrived {
    /// Starts a thread that answers the source if it asks.
    #[must_use]
    pub fn answer_questions(self) -> Answers {
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let thread = thread::Builder::new().name("moved".to_owned()).spawn(move || self.0.answer(&ended));
        Answers { over, thread: thread.ok() }
    }
}

/// The thread that answers the source.
pub struct Answers {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Answers {
    /// The machine has ended. Waits, for a while at most, until the source knows that the guest ran here: otherwise it
    /// could take it for lost.
    pub fn end(mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
