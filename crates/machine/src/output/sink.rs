//! A file that is written without blocking.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, send},
};

/// An output file, and how to write to it without blocking.
#[derive(Debug)]
pub struct Sink {
    file: File,
    kind: Kind,
}

/// The way in which a file is written without blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A plain write: regular files and `/dev/null` take everything.
    Ready,
    /// The descriptor is in non-blocking mode.
    NonBlocking,
    /// A socket. Other processes may share it, so its mode is left alone, and each call has MSG_DONTWAIT.
    Socket,
    /// A pipe or terminal that could not be opened again: poll(2), and if there is room a write of at most [`ATOMIC`]
    /// bytes.
    Polled,
}

/// pipe(7), "PIPE_BUF": a pipe that poll(2) reports as writable has room for so many bytes.
const ATOMIC: usize = 4096;

impl Sink {
    /// A sink for a descriptor that this process inherited. Other processes share its file status flags, which are not
    /// changed.
    ///
    /// # Errors
    /// If the descriptor is closed.
    pub fn inherited(fd: impl AsFd) -> io::Result<Self> {
        let file = File::from(fd.as_fd().try_clone_to_owned()?);
        let kind = file.metadata()?.file_type();
        if kind.is_socket() {
            return Ok(Self { file, kind: Kind::Socket });
        }
        // devices.txt: major number 1 is memory devices, such as /dev/null and /dev/full.
        let memory_device = kind.is_char_device() && nix::sys::stat::major(rdev(&file)?) == 1;
        if !kind.is_fifo() && (!kind.is_char_device() || memory_device) {
            return Ok(Self { file, kind: Kind::Ready });
        }
        // Opened again, the file has status flags of its own.
        let again = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok(match again {
            Ok(file) => Self { file, kind: Kind::NonBlocking },
            Err(_) => Self { file, kind: Kind::Polled },
        })
    }

    /// Creates the file at `path`, or opens an existing FIFO or device. A FIFO need not have a reader yet.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn create(path: &Path) -> io::Result<Self> {
        let there = std::fs::metadata(path).map(|meta| meta.file_type());
        if there.is_ok_and(|kind| kind.is_fifo()) {
            // fifo(7): opened for reading and writing, it does not wait for a reader.
            let options = libc::O_NONBLOCK;
            let file = OpenOptions::new().read(true).write(true).custom_flags(options).open(path)?;
            return Ok(Self { file, kind: Kind::NonBlocking });
        }
        Self::inherited(File::create(path)?)
    }

    /// Whether a write could block.
    #[must_use]
    pub fn can_stall(&self) -> bool {
        self.kind != Kind::Ready
    }

    /// Writes as many bytes as the file takes without blocking, and returns their number.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if it takes none; other errors are final.
    pub fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.kind {
            Kind::Ready | Kind::NonBlocking => self.file.write(bytes),
            Kind::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(send(self.file.as_raw_fd(), bytes, flags)?)
            }
            Kind::Polled if self.has_room(PollTimeout::ZERO) => self.file.write(bytes.get(..ATOMIC).unwrap_or(bytes)),
            Kind::Polled => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Waits until the file can take bytes, at most for `timeout`.
    pub fn wait_for_room(&self, timeout: PollTimeout) {
        self.has_room(timeout);
    }

    fn has_room(&self, timeout: PollTimeout) -> bool {
        let fd: BorrowedFd<'_> = self.file.as_fd();
        poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], timeout).is_ok_and(|ready| ready > 0)
    }
}

fn rdev(file: &File) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(file.metadata()?.rdev())
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl From<OwnedFd> for Sink {
    /// A sink for a descriptor that is not shared and is in non-blocking mode.
    fn from(fd: OwnedFd) -> Self {
        Self { file: File::from(fd), kind: Kind::NonBlocking }
    }
}
