//! Connections: over a Unix socket, or over TCP.

use std::{
    io::{self, BufReader, BufWriter, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    Address, LiveError,
    frame::{Frame, FrameError, Kind, Reader, Writer},
};
use crate::host::unix_socket::{self, PrivateSocket};

/// How long the ends wait for each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For the next byte, or for room to write one, before the connection is taken for lost.
    pub silence: Duration,
    /// How long a source that lost the confirmation asks for it: longer than the destination takes to notice that the
    /// connection is lost.
    pub ask_for: Duration,
    /// How long a destination answers that: longer than the source asks.
    pub answer_for: Duration,
}

/// The usual one.
pub(super) const PATIENCE: Patience = Patience {
    silence: Duration::from_secs(10),
    ask_for: Duration::from_secs(25),
    answer_for: Duration::from_secs(30),
};

/// Bytes that are written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// A connection, on which both ends send frames.
pub(super) struct Connection {
    reader: Reader<BufReader<Box<dyn Read + Send>>>,
    writer: Writer<BufWriter<Box<dyn Write + Send>>>,
    set_silence: Box<dyn Fn(Duration) -> io::Result<()> + Send>,
}

impl Connection {
    fn unix(stream: UnixStream, patience: Patience) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(patience.silence))?;
        let (from, timed) = (stream.try_clone()?, stream.try_clone()?);
        let set_silence = move |silence| timed.set_read_timeout(Some(silence));
        set_silence(patience.silence)?;
        Ok(Self::new(Box::new(from), Box::new(stream), Box::new(set_silence)))
    }

    fn tcp(stream: TcpStream, patience: Patience) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(patience.silence))?;
        // The last frames before the guest goes on elsewhere must not wait for more.
        stream.set_nodelay(true)?;
        let (from, timed) = (stream.try_clone()?, stream.try_clone()?);
        let set_silence = move |silence| timed.set_read_timeout(Some(silence));
        set_silence(patience.silence)?;
        Ok(Self::new(Box::new(from), Box::new(stream), Box::new(set_silence)))
    }

    fn new(
        from: Box<dyn Read + Send>,
        to: Box<dyn Write + Send>,
        set_silence: Box<dyn Fn(Duration) -> io::Result<()> + Send>,
    ) -> Self {
        Self {
            set_silence,
            reader: Reader::new(BufReader::with_capacity(BUFFER_BYTES, from)),
            writer: Writer::new(BufWriter::with_capacity(BUFFER_BYTES, to)),
        }
    }

    /// Connects to a VMM that waits at `address`.
    pub(super) fn open(address: &Address, patience: Patience) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Self::unix(unix_socket::open(path)?, patience),
            Address::Tcp(host) => {
                let mut failed = io::ErrorKind::NotFound.into();
                for address in host.as_str().to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, patience.silence) {
                        Ok(stream) => return Self::tcp(stream, patience),
                        Err(error) => failed = error,
                    }
                }
                Err(failed)
            }
        }
    }

    /// Sets how long it waits for the next byte.
    pub(super) fn set_silence(&self, silence: Duration) -> io::Result<()> {
        (self.set_silence)(silence)
    }

    /// Reads the next frame.
    pub(super) fn receive(&mut self) -> Result<Frame, FrameError> {
        self.reader.frame()
    }

    /// The frames to be written.
    pub(super) fn send(&mut self) -> &mut Writer<impl Write> {
        &mut self.writer
    }

    /// The value of the JSON in a frame that was received.
    pub(super) fn json<T: serde::de::DeserializeOwned>(&self, frame: &Frame) -> Result<T, FrameError> {
        self.reader.json(frame)
    }

    /// Reads the next frame, which must be of this kind.
    pub(super) fn expect(&mut self, kind: Kind, peer: &'static str) -> Result<Frame, LiveError> {
        let frame = self.receive().map_err(LiveError::of(peer))?;
        match frame.kind {
            found if found == kind => Ok(frame),
            Kind::Refused => Err(LiveError::Refused(printable(&frame.payload))),
            found => Err(LiveError::Protocol { peer, why: format!("it sent {found:?} in place of {kind:?}") }),
        }
    }
}

/// What the peer says, for a person: without control characters.
fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Where a VMM waits for a migration.
pub(super) enum Listener {
    Unix(PrivateSocket),
    Tcp(TcpListener),
}

impl Listener {
    pub(super) fn bind(address: &Address) -> Result<Self, LiveError> {
        match address {
            Address::Unix(path) => Ok(Self::Unix(PrivateSocket::bind(path)?)),
            Address::Tcp(host) => {
                let failed = |source| LiveError::Listen { address: address.clone(), source };
                let listener = TcpListener::bind(host.as_str()).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Self::Tcp(listener))
            }
        }
    }

    /// The port that the host chose, if the address named 0.
    pub(super) fn port(&self) -> Option<u16> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(listener) => listener.local_addr().ok().map(|address| address.port()),
        }
    }

    /// The next connection; none after `within`.
    pub(super) fn accept(&self, within: Option<Duration>, patience: Patience) -> io::Result<Option<Connection>> {
        use std::os::fd::AsFd;

        let fd = match self {
            Self::Unix(socket) => socket.listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        };
        let timeout =
            within.map_or(PollTimeout::NONE, |within| PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX));
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let accepted = match self {
            Self::Unix(socket) => socket.listener.accept().and_then(|(stream, _)| Connection::unix(stream, patience)),
            Self::Tcp(listener) => listener.accept().and_then(|(stream, _)| Connection::tcp(stream, patience)),
        };
        match accepted {
            Ok(connection) => Ok(Some(connection)),
            // The client has gone again.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
