//! An output with a bounded buffer, and the thread that writes the buffer out.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use nix::{poll::PollTimeout, sys::signal::SigSet};

use super::Sink;

/// What happens to bytes when the buffer is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// They are dropped and counted.
    Drop,
    /// They are still buffered, and [`Outlet::is_full`] returns true. The producer must check it and wait; the number
    /// of bytes that it produces between two checks bounds the buffer.
    Wait,
}

/// How long [`Outlet::finish`] waits for a reader.
#[derive(Clone, Copy, Debug)]
pub enum FinishLimit {
    /// While bytes are being written, and at most this long without progress.
    WithoutProgress(Duration),
    /// At most this long in all.
    InAll(Duration),
}

/// How long the thread waits for room before it checks whether the outlet still exists, in milliseconds.
const CHECK_MS: u16 = 50;
/// The most that one write is given, in bytes.
const PIECE: usize = 64 << 10;

/// An output with a buffer. Clones share the buffer.
#[derive(Clone)]
pub struct Outlet {
    shared: Arc<Shared>,
}

struct Shared {
    limit: usize,
    when_full: WhenFull,
    state: Mutex<State>,
    /// Notified when bytes were written, or the sink failed.
    done: Condvar,
}

struct State {
    /// None while the thread that writes the buffer has it.
    sink: Option<Sink>,
    buffer: VecDeque<u8>,
    dropped: u64,
    /// The first final error: from then on bytes are discarded.
    failed: Option<io::Error>,
    /// Called when a full buffer has room again.
    on_room: Option<Box<dyn Fn() + Send>>,
}

impl Outlet {
    /// An outlet to `sink` that buffers at most about `limit` bytes.
    #[must_use]
    pub fn new(sink: Sink, limit: usize, when_full: WhenFull) -> Self {
        let state = State { sink: Some(sink), buffer: VecDeque::new(), dropped: 0, failed: None, on_room: None };
        Self { shared: Arc::new(Shared { limit, when_full, state: Mutex::new(state), done: Condvar::new() }) }
    }

    /// An outlet without a file: it discards all bytes. [`Self::finish`] returns `why`.
    #[must_use]
    pub fn closed(why: io::Error) -> Self {
        let state = State { sink: None, buffer: VecDeque::new(), dropped: 0, failed: Some(why), on_room: None };
        let shared = Shared { limit: 0, when_full: WhenFull::Drop, state: Mutex::new(state), done: Condvar::new() };
        Self { shared: Arc::new(shared) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes or buffers `bytes`. Never blocks.
    pub fn put(&self, bytes: &[u8]) {
        let mut state = self.state();
        if state.failed.is_some() {
            return;
        }
        let mut rest = bytes;
        // Written directly only if the buffer is empty, because otherwise these bytes would overtake buffered ones.
        if state.buffer.is_empty()
            && let Some(sink) = &mut state.sink
        {
            match push(sink, rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) => {
                    state.failed = Some(error);
                    return;
                }
            }
        }
        if rest.is_empty() {
            return;
        }
        let room = match self.shared.when_full {
            WhenFull::Wait => usize::MAX,
            WhenFull::Drop => self.shared.limit.saturating_sub(state.buffer.len()),
        };
        let kept = rest.get(..room).unwrap_or(rest);
        state.buffer.extend(kept);
        let dropped = u64::try_from(rest.len() - kept.len()).unwrap_or(u64::MAX);
        state.dropped = state.dropped.saturating_add(dropped);
        if let Some(sink) = state.sink.take() {
            self.start(sink, &mut state);
        }
    }

    /// Starts the thread that writes the buffer out.
    fn start(&self, sink: Sink, state: &mut State) {
        let shared = Arc::downgrade(&self.shared);
        let thread = thread::Builder::new().name("output".to_owned());
        if let Err(error) = thread.spawn(move || write_out(sink, &shared)) {
            state.failed = Some(error);
            state.buffer.clear();
        }
    }

    /// Whether the producer must wait. Never with [`WhenFull::Drop`].
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.shared.when_full == WhenFull::Wait && self.state().buffer.len() >= self.shared.limit
    }

    /// Calls `wake` whenever a full outlet has room again.
    pub fn on_room(&self, wake: impl Fn() + Send + 'static) {
        self.state().on_room = Some(Box::new(wake));
    }

    /// Whether `other` is a clone of this one.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// How many bytes were dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.state().dropped
    }

    /// Waits until all bytes are written, at most as long as `limit` allows.
    ///
    /// # Errors
    /// The first write that failed, or [`io::ErrorKind::TimedOut`] if bytes are left.
    pub fn finish(&self, limit: FinishLimit) -> io::Result<()> {
        let done = &self.shared.done;
        let mut state = self.state();
        let is_unfinished = |state: &mut State| state.failed.is_none() && !state.buffer.is_empty();
        match limit {
            FinishLimit::InAll(limit) => {
                let waited = done.wait_timeout_while(state, limit, is_unfinished);
                (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            }
            FinishLimit::WithoutProgress(limit) => {
                let mut timed_out = false;
                // The thread that writes the buffer out notifies after each piece.
                while !timed_out && is_unfinished(&mut state) {
                    let (next, waited) = done.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner);
                    (state, timed_out) = (next, waited.timed_out());
                }
            }
        }
        match &state.failed {
            Some(error) => Err(io::Error::new(error.kind(), error.to_string())),
            None if state.buffer.is_empty() => Ok(()),
            None => {
                let why = format!("it is not read, or too slowly: {} bytes are left", state.buffer.len());
                Err(io::Error::new(io::ErrorKind::TimedOut, why))
            }
        }
    }
}

/// Writes as many bytes as the sink takes without blocking, and returns their number.
fn push(sink: &mut Sink, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        match sink.try_write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

/// The thread: writes the buffer out until it is empty, or until all clones of the outlet are dropped.
///
/// It waits for room without the lock, so that [`Outlet::put`] never waits for it. It holds the outlet weakly
/// meanwhile: otherwise a reader that never reads would keep an outlet alive that is used by no other thread.
fn write_out(mut sink: Sink, shared: &Weak<Shared>) {
    // Signals are for the threads that expect them. This one may have been started before they were blocked.
    let _ = SigSet::all().thread_block();
    loop {
        {
            let Some(shared) = shared.upgrade() else { return };
            let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            let before = state.buffer.len();
            let (piece, _) = state.buffer.as_slices();
            let piece = piece.get(..PIECE).unwrap_or(piece);
            match push(&mut sink, piece) {
                Ok(written) => drop(state.buffer.drain(..written)),
                Err(error) => {
                    state.failed = Some(error);
                    state.buffer.clear();
                }
            }
            if before >= shared.limit
                && state.buffer.len() < shared.limit
                && let Some(wake) = &state.on_room
            {
                wake();
            }
            if state.buffer.len() < before || state.failed.is_some() {
                shared.done.notify_all();
            }
            if state.buffer.is_empty() {
                state.sink = Some(sink);
                return;
            }
        }
        sink.wait_for_room(PollTimeout::from(CHECK_MS));
    }
}

impl Write for Outlet {
    /// Accepts all bytes, as [`Outlet::put`].
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{
        fcntl::OFlag,
        unistd::{pipe2, read},
    };
    use std::os::fd::OwnedFd;
    use std::sync::mpsc::channel;

    /// Longer than any of these tests takes.
    const LONG_TIME: Duration = Duration::from_secs(60);
    const LONG: FinishLimit = FinishLimit::WithoutProgress(LONG_TIME);

    fn pipe(limit: usize, when_full: WhenFull) -> (OwnedFd, Outlet) {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        (reader, Outlet::new(Sink::from(writer), limit, when_full))
    }

    /// Reads until `count` bytes are there.
    fn take(reader: &OwnedFd, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buffer = [0; 4096];
        while all.len() < count {
            match read(reader, &mut buffer) {
                Ok(count) => all.extend_from_slice(&buffer[..count]),
                Err(nix::Error::EAGAIN) => thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
        all
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|n| u8::try_from(n % 251).unwrap()).collect()
    }

    // Catches: a byte that is lost or overtakes another between the pipe, the buffer and the thread.
    #[test]
    fn all_bytes_come_out_in_order() {
        let (reader, outlet) = pipe(1 << 20, WhenFull::Wait);
        let all = bytes(500_000);
        for piece in all.chunks(777) {
            outlet.put(piece);
        }
        assert!(take(&reader, all.len()) == all);
        outlet.finish(LONG).unwrap();
        // The thread has ended, and another is started when the buffer is used again.
        for _ in 0..3 {
            outlet.put(&all);
            assert!(take(&reader, all.len()) == all);
        }
        assert_eq!(outlet.dropped(), 0);
    }

    // Catches: a writer that blocks, and a buffer without a limit.
    #[test]
    fn without_a_reader_bytes_are_dropped_and_nothing_blocks() {
        let (reader, outlet) = pipe(1000, WhenFull::Drop);
        let all = bytes(1 << 20);
        outlet.put(&all);
        let dropped = usize::try_from(outlet.dropped()).unwrap();
        assert!(!outlet.is_full());
        // Longer than the thread waits between two checks.
        let left =
            outlet.finish(FinishLimit::WithoutProgress(Duration::from_millis(3 * u64::from(CHECK_MS)))).unwrap_err();
        assert_eq!(left.kind(), io::ErrorKind::TimedOut);
        assert!(take(&reader, all.len() - dropped) == all[..all.len() - dropped]);
        outlet.finish(LONG).unwrap();
    }

    // Catches: a producer that waits and is not woken.
    #[test]
    fn a_full_outlet_calls_back_when_there_is_room() {
        let (reader, outlet) = pipe(1000, WhenFull::Wait);
        let (sender, woken) = channel();
        outlet.on_room(move || sender.send(()).unwrap());
        let all = bytes(1 << 20);
        outlet.put(&all);
        assert!(outlet.is_full());
        assert!(take(&reader, all.len()) == all);
        woken.recv_timeout(LONG_TIME).unwrap();
        assert!(!outlet.is_full());
    }

    #[test]
    fn a_closed_reader_is_an_error() {
        let (reader, outlet) = pipe(1000, WhenFull::Wait);
        drop(reader);
        outlet.put(b"a");
        outlet.put(b"b");
        assert_eq!(outlet.finish(LONG).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert!(!outlet.is_full());
    }
}
