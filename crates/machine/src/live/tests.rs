//! Both ends over real sockets, with a machine that is only RAM and a state. A relay between them cuts the connection.

use std::{
    cell::RefCell,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use vm_memory::{Bytes, GuestAddress};
use vmtime::Khz;

use super::{
    connection::Patience,
    frame::{Kind, Writer},
    receive::Limits,
    send::{Progress, send_with},
    *,
};
use crate::{
    host::clock::HostClock,
    mem::{
        pages::PageSet,
        ram::{self, GuestRam},
    },
    snapshot::machine::{Verify, encode_without_memory, load},
};

const RAM: u64 = 2 << 20;
const PAGES: usize = 512;

const SHORT: Patience =
    Patience { silence: Duration::from_secs(5), ask_for: Duration::from_secs(3), answer_for: Duration::from_secs(4) };

fn clock() -> HostClock {
    HostClock::new(crate::host::tsc::read_tsc, Khz::new(1_000_000).unwrap())
}

/// The state of a real machine.
fn state() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/golden-snapshots");
    let newest = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let loaded = load(&newest.join("whole"), Verify::First).unwrap();
    encode_without_memory(&loaded.state, loaded.host.as_ref()).unwrap()
}

/// A guest that writes some pages in each round: in the last one it clears one, too.
struct Guest {
    memory: Arc<GuestRam>,
    state: Vec<u8>,
    rounds: RefCell<u8>,
}

impl Guest {
    fn new(state: &[u8]) -> Self {
        let memory = Arc::new(ram::allocate(RAM).unwrap());
        for page in [0u64, 1, 2, 77, 511] {
            memory.write_slice(&[u8::try_from(page % 251).unwrap() + 1; 4096], GuestAddress(page * 4096)).unwrap();
        }
        Self { memory, state: state.to_vec(), rounds: RefCell::new(0) }
    }

    fn write(&self, pages: &[(usize, u8)]) -> PageSet {
        let mut changed = PageSet::none(PAGES);
        for (page, byte) in pages {
            let at = GuestAddress(u64::try_from(*page).unwrap() * 4096);
            self.memory.write_slice(&[*byte; 4096], at).unwrap();
            changed.insert(*page..page + 1);
        }
        changed
    }
}

impl SourcePorts for Guest {
    fn changed(&self) -> Result<PageSet, LiveError> {
        *self.rounds.borrow_mut() += 1;
        let round = *self.rounds.borrow();
        Ok(self.write(&[(2, round + 100), (300, round)]))
    }

    fn stop(&self) -> Result<LastOfIt, LiveError> {
        Ok(LastOfIt { state: self.state.clone(), changed: self.write(&[(77, 0), (5, 9)]) })
    }
}

/// What the destination came to.
#[derive(Debug, PartialEq, Eq)]
enum Arrival {
    Runs,
    DoesNot,
}

/// Which bytes of the first connection pass, in each direction; and how many connections after it are cut at once.
#[derive(Clone, Copy, Debug)]
struct Cut {
    to_destination: usize,
    to_source: usize,
    more: usize,
}

const NO_CUT: Cut = Cut { to_destination: usize::MAX, to_source: usize::MAX, more: 0 };

/// Copies at most `most` bytes, and then cuts the connection. Returns how many it were.
fn copy(mut from: UnixStream, mut to: UnixStream, most: usize, passed: &AtomicUsize) {
    let mut buffer = vec![0; 65536];
    let mut left = most;
    while left > 0 {
        let room = buffer.len().min(left);
        match from.read(&mut buffer[..room]) {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                if to.write_all(&buffer[..count]).is_err() {
                    break;
                }
                passed.fetch_add(count, Ordering::SeqCst);
                left -= count;
            }
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Relays connections from `at` to `to`. Returns the bytes that passed over the first one, in each direction.
fn relay(at: &Path, to: &Path, cut: Cut) -> Arc<[AtomicUsize; 2]> {
    let listener = UnixListener::bind(at).unwrap();
    let to = to.to_owned();
    let counts: Arc<[AtomicUsize; 2]> = Arc::default();
    let passed = Arc::clone(&counts);
    thread::spawn(move || {
        for (number, source) in listener.incoming().enumerate() {
            let Ok(source) = source else { return };
            if (1..=cut.more).contains(&number) {
                continue;
            }
            let Ok(destination) = UnixStream::connect(&to) else { continue };
            let (there, back) =
                if number == 0 { (cut.to_destination, cut.to_source) } else { (usize::MAX, usize::MAX) };
            let pair = [source.try_clone().unwrap(), destination.try_clone().unwrap()];
            let counts = Arc::clone(&passed);
            let unseen = AtomicUsize::new(0);
            thread::spawn(move || copy(source, destination, there, if number == 0 { &counts[0] } else { &unseen }));
            let counts = Arc::clone(&passed);
            let unseen = AtomicUsize::new(0);
            thread::spawn(move || {
                let [source, destination] = pair;
                copy(destination, source, back, if number == 0 { &counts[1] } else { &unseen });
            });
        }
    });
    counts
}

/// Moves a machine through a relay with that cut. Returns both ends' findings, and the bytes that passed.
fn migrate(state: &[u8], cut: Cut) -> (Outcome, Arrival, [usize; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let [near, far]: [PathBuf; 2] = ["near", "far"].map(|name| dir.path().join(name));
    let waiting = Waiting::at_with(&Address::Unix(far.clone()), SHORT, clock()).unwrap();
    let passed = relay(&near, &far, cut);
    let guest = Guest::new(state);
    let memory = Arc::new(Mutex::new(None));
    let arrived = Arc::clone(&memory);
    let destination = thread::spawn(move || {
        let Ok(incoming) = waiting.receive(Limits { memory: RAM }) else { return Arrival::DoesNot };
        *arrived.lock().unwrap() = Some(Arc::clone(&incoming.memory));
        match incoming.hand_over() {
            Ok(arrived) => {
                arrived.answer_questions().end();
                Arrival::Runs
            }
            Err(_) => Arrival::DoesNot,
        }
    });
    let settings = Settings { to: Address::Unix(near), max_downtime: Duration::from_secs(60) };
    let outcome = send_with(SHORT, &settings, &guest.memory, clock(), &guest, &Progress::default());
    // A destination that nobody has reached waits for ever: it is told to stop by a source that it refuses.
    while !destination.is_finished() {
        if let Ok(mut stream) = UnixStream::connect(&far) {
            let mut writer = Writer::new(&mut stream);
            let hello = frame::Hello { version: frame::VERSION, id: String::new(), memory: RAM };
            let _ = writer.json(Kind::Hello, &hello).and_then(|()| writer.signal(Kind::Commit));
        }
        thread::sleep(Duration::from_millis(1));
    }
    let arrival = destination.join().unwrap();
    if arrival == Arrival::Runs {
        let memory = memory.lock().unwrap().take().unwrap();
        let all = |memory: &GuestRam| {
            let mut bytes = vec![0; PAGES * 4096];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        assert!(all(&memory) == all(&guest.memory), "the guest arrived with other memory");
    }
    (outcome, arrival, [passed[0].load(Ordering::SeqCst), passed[1].load(Ordering::SeqCst)])
}

// Catches: pages that are lost, old or not cleared at the destination; figures that do not add up.
#[test]
fn a_machine_arrives_as_it_was() {
    let (outcome, arrival, [there, _]) = migrate(&state(), NO_CUT);
    let Outcome::Moved(figures) = outcome else { panic!("{outcome:?}") };
    assert_eq!(arrival, Arrival::Runs);
    // Five pages at first; then two that the first round changed, one that was written last, and one that is zero.
    assert_eq!((figures.rounds, figures.pages, figures.last_pages), (1, 8, 3));
    assert_eq!(u64::try_from(there), Ok(figures.bytes));
    assert!(figures.downtime_ns <= figures.total_ns);
}

// Catches: a connection that is cut at the wrong byte, after which both ends run the guest, or neither.
#[test]
fn exactly_one_end_runs_wherever_the_connection_is_cut() {
    let state = state();
    let (_, _, [there, back]) = migrate(&state, NO_CUT);
    // Every byte of the first and last frames, and some of those in between.
    let near_the_ends = |all: usize| (0..all).filter(move |at| at % 4093 == 0 || all - at <= 34);
    let cuts = near_the_ends(there)
        .map(|to_destination| Cut { to_destination, ..NO_CUT })
        // A destination whose `prepared` is lost waits for a question that does not come: few of these.
        .chain((0..back).filter(|at| at % 8 == 3).map(|to_source| Cut { to_source, ..NO_CUT }));
    let (mut moved, mut stayed) = (0, 0);
    for cut in cuts {
        let (outcome, arrival, _) = migrate(&state, cut);
        match (&outcome, arrival) {
            (Outcome::Moved(_), Arrival::Runs) => moved += 1,
            (Outcome::Stays(_), Arrival::DoesNot) => stayed += 1,
            (_, arrival) => panic!("{cut:?}: the source {outcome:?}, the destination {arrival:?}"),
        }
    }
    assert!(moved > 16 && stayed > 16, "{moved} moved, {stayed} stayed");
}

// Catches: a source that goes on because it gets no answer.
#[test]
fn a_source_that_cannot_learn_it_stays_stopped() {
    let state = state();
    let (_, _, [_, back]) = migrate(&state, NO_CUT);
    // `started` is lost, and so are all questions.
    let cut = Cut { to_source: back - 1, more: usize::MAX, ..NO_CUT };
    let (outcome, arrival, _) = migrate(&state, cut);
    assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
    assert_eq!(arrival, Arrival::Runs);
}

// Catches: a destination that takes memory without end, or is ended by what a stranger sends.
#[test]
fn strangers_are_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("far");
    let waiting = Waiting::at_with(&Address::Unix(path.clone()), SHORT, clock()).unwrap();
    let destination = thread::spawn(move || waiting.receive(Limits { memory: RAM }).map(drop));
    let answer = |kind: Kind, payload: &[u8]| {
        let mut stream = UnixStream::connect(&path).unwrap();
        Writer::new(&mut stream).frame(kind, &[payload]).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let hello = |version, memory| serde_json::to_vec(&frame::Hello { version, id: "x".to_owned(), memory }).unwrap();
    assert!(answer(Kind::Hello, b"{}").contains("not usable"));
    assert!(answer(Kind::Hello, &hello(2, RAM)).contains("speaks version 2"));
    assert!(answer(Kind::Hello, &hello(1, RAM + 4096)).contains("--max-memory allows 2097152"));
    assert!(answer(Kind::Commit, b"").contains("Commit in place of Hello"));
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    drop(stream);
    // One who is welcome, and then sends pages where there is no RAM.
    let mut stream = UnixStream::connect(&path).unwrap();
    let mut writer = Writer::new(&mut stream);
    writer.frame(Kind::Hello, &[&hello(1, RAM)]).unwrap();
    writer.frame(Kind::Pages, &[&511u64.to_le_bytes(), &[1; 8192]]).unwrap();
    let error = destination.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("2 pages from number 511 on, where there is no RAM"), "{error}");
}

// Catches: TCP without a word about encryption.
#[test]
fn tcp_must_be_asked_for() {
    let address: Address = "tcp:127.0.0.1:0".parse().unwrap();
    assert!(matches!(Waiting::at(&address, false, clock()), Err(LiveError::Insecure(_))));
    let waiting = Waiting::at(&address, true, clock()).unwrap();
    assert!(waiting.address().to_string().starts_with("tcp:127.0.0.1:"));
    assert_ne!(waiting.address(), &address);
}
