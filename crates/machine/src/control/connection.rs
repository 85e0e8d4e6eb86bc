//! One client's connection: receives a request, sends the answer, closes. Never blocks.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use event_manager::EventSet;

use super::{
    api::ApiError,
    http::{self, Parsed, Request},
};

/// How much a client may still send after its answer before the connection is closed, in bytes. A body that was refused
/// for its size is such.
const DRAIN_BYTES: usize = 256 << 20;
/// The most steps of one [`Connection::advance`], so that a client that sends continuously does not keep the event loop
/// from others.
const STEPS: usize = 64;

/// What a connection needs next.
#[derive(Debug)]
pub(super) enum Progress {
    /// Wait for these events, then call [`Connection::advance`] again.
    Wait(EventSet),
    /// Answer this request with [`Connection::respond`].
    Answer(Result<Request, ApiError>),
    /// The connection is over and can be dropped.
    Closed,
}

#[derive(Debug)]
enum Phase {
    /// The request is being received.
    Receiving { buffer: Vec<u8>, continued: bool },
    /// The request is being handled.
    Asking,
    /// The answer is being sent.
    Sending { bytes: Vec<u8>, sent: usize },
    /// The answer is sent. What the client still sends is read and discarded, because closing a Unix socket with unread
    /// bytes resets it: a client that is still sending would get an error and not read the answer.
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
    /// The state for a connection that was just accepted.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, phase: Phase::Receiving { buffer: Vec::new(), continued: false } })
    }

    /// Receives or sends as much as is possible without blocking.
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
                    // The client has closed the connection: there is nothing to answer.
                    _ => return Progress::Closed,
                },
            }
        }
        Progress::Wait(self.wants())
    }

    /// Whether the request is complete and its answer is outstanding.
    pub(super) fn is_asking(&self) -> bool {
        matches!(self.phase, Phase::Asking)
    }

    /// Sets the response to be sent; [`Self::advance`] sends it.
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
            // The client may have closed only its sending half, so it gets an answer.
            Step::Answer(Err(ApiError::BadRequest("the request ends before it is complete".to_owned())))
        });
    }
    match http::parse(buffer) {
        Ok(Parsed::Partial { wants_continue }) => {
            if wants_continue && !*continued {
                *continued = true;
                // Nothing was sent on this stream before, so that the socket's buffer has room for these few bytes.
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
