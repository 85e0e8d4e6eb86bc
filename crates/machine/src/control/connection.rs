//! One client: receive a request, send the answer, see the client off. Never waits.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use event_manager::EventSet;

use super::{
    api::ApiError,
    http::{self, Parsed, Request},
};

/// How much a client may still send after its answer before it is cut off, in bytes: a body that was refused for its size.
const DRAIN_BYTES: usize = 256 << 20;
/// Steps at a time: a client that sends as fast as it is read must let others be served.
const STEPS: usize = 64;

/// What a connection needs next.
#[derive(Debug)]
pub(super) enum Progress {
    /// To be called again when the stream is ready for this.
    Wait(EventSet),
    /// An answer to this, by [`Connection::respond`].
    Answer(Result<Request, ApiError>),
    /// Nothing any more.
    Closed,
}

#[derive(Debug)]
enum Phase {
    /// The request arrives.
    Receiving { buffer: Vec<u8>, continued: bool },
    /// The request is with the server.
    Asking,
    /// The answer leaves.
    Sending { bytes: Vec<u8>, sent: usize },
    /// The answer is out; the rest of what the client sends is thrown away. Closing a Unix socket with unread bytes
    /// resets it, and a client that is still sending would then not look for the answer.
    Draining { left: usize },
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    phase: Phase,
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Connection {
    /// A connection that was just accepted.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, phase: Phase::Receiving { buffer: Vec::new(), continued: false } })
    }

    /// Does what can be done without waiting.
    pub(super) fn advance(&mut self) -> Progress {
        for _ in 0..STEPS {
            let step = match &mut self.phase {
                Phase::Receiving { buffer, continued } => receive(&mut self.stream, buffer, continued),
                Phase::Asking => return Progress::Wait(EventSet::empty()),
                Phase::Sending { bytes, sent } => send(&mut self.stream, bytes, sent),
                Phase::Draining { left } => drain(&mut self.stream, left),
            };
            match step {
                Ok(Step::Again) => {}
                Ok(Step::Answer(request)) => {
                    self.phase = Phase::Asking;
                    return Progress::Answer(request);
                }
                Ok(Step::Sent) => self.phase = Phase::Draining { left: DRAIN_BYTES },
                Ok(Step::Finished) => return Progress::Closed,
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => return Progress::Wait(self.wants()),
                    // The client went away. Nobody is left to tell.
                    _ => return Progress::Closed,
                },
            }
        }
        Progress::Wait(self.wants())
    }

    /// Whether the request is with the server.
    pub(super) fn is_asking(&self) -> bool {
        matches!(self.phase, Phase::Asking)
    }

    /// Gives the answer, ready to be sent.
    pub(super) fn respond(&mut self, bytes: Vec<u8>) {
        self.phase = Phase::Sending { bytes, sent: 0 };
    }

    fn wants(&self) -> EventSet {
        match self.phase {
            Phase::Sending { .. } => EventSet::OUT,
            Phase::Receiving { .. } | Phase::Asking | Phase::Draining { .. } => EventSet::IN,
        }
    }
}

enum Step {
    Again,
    Answer(Result<Request, ApiError>),
    Sent,
    Finished,
}

fn receive(stream: &mut UnixStream, buffer: &mut Vec<u8>, continued: &mut bool) -> io::Result<Step> {
    let received = read_some(stream, |bytes| buffer.extend_from_slice(bytes))?;
    if received == 0 {
        return Ok(if buffer.is_empty() {
            Step::Finished
        } else {
            // It may have closed its sending half only.
            Step::Answer(Err(ApiError::BadRequest("the request ends before it is complete".to_owned())))
        });
    }
    match http::parse(buffer) {
        Ok(Parsed::Partial { wants_continue }) => {
            if wants_continue && !*continued {
                *continued = true;
                // Nothing else was sent on this stream, so its buffer takes these few bytes at once.
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            Ok(Step::Again)
        }
        Ok(Parsed::Whole(request)) => Ok(Step::Answer(Ok(request))),
        Err(error) => Ok(Step::Answer(Err(error))),
    }
}

fn send(stream: &mut UnixStream, bytes: &[u8], sent: &mut usize) -> io::Result<Step> {
    let rest = bytes.get(*sent..).unwrap_or_default();
    if rest.is_empty() {
        stream.shutdown(Shutdown::Write)?;
        return Ok(Step::Sent);
    }
    match stream.write(rest)? {
        0 => Ok(Step::Finished),
        written => {
            *sent = sent.saturating_add(written);
            Ok(Step::Again)
        }
    }
}

fn drain(stream: &mut UnixStream, left: &mut usize) -> io::Result<Step> {
    let received = read_some(stream, |_| {})?;
    *left = left.saturating_sub(received);
    Ok(if received == 0 || *left == 0 { Step::Finished } else { Step::Again })
}

fn read_some(stream: &mut UnixStream, take: impl FnOnce(&[u8])) -> io::Result<usize> {
    let mut bytes = [0; 4096];
    let received = stream.read(&mut bytes)?;
    take(bytes.get(..received).unwrap_or_default());
    Ok(received)
}
