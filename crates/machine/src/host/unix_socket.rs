//! A Unix socket for its owner only. Its file has mode 0600 before a client can connect, an existing one is replaced
//! only if no process listens on it, and it is removed when the server ends.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};

use crate::blame::{Blame, Blamed};

/// The longest path of a socket, in bytes. unix(7): sun_path has 108 with the terminating zero.
pub const PATH_BYTES: usize = 107;
/// How many clients may wait to be accepted.
const BACKLOG: i32 = 64;

/// Why there is no such socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit a socket address.
    #[error("socket {}: a socket's path has at most {PATH_BYTES} bytes: choose a shorter one", path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens at this path.
    #[error("socket {} is in use by another process: end it, or choose another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The path names something that must not be deleted.
    #[error("socket {}: a file that is not a socket is already there: choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("socket {}: cannot {action}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The error that the host returned.
        source: io::Error,
    },
}

impl Blamed for SocketError {
    fn blame(&self) -> Blame {
        match self {
            Self::TooLong { .. } | Self::InUse { .. } | Self::NotASocket { .. } | Self::Io { .. } => Blame::Usage,
        }
    }
}

/// A listening socket and its file.
#[derive(Debug)]
pub struct PrivateSocket {
    /// The listening socket, non-blocking.
    pub listener: UnixListener,
    /// Absolute: the process may change its working directory before the file is removed.
    path: PathBuf,
    /// Device and inode of our file, so that a file that another VMM has put in its place is not removed.
    id: (u64, u64),
}

impl PrivateSocket {
    /// Listens at `path`, non-blocking, mode 0600.
    ///
    /// Calls bind(2), chmod(2) and listen(2) in that order, unlike [`UnixListener::bind`]. Until listen(2), connect(2)
    /// is refused, so that no client can connect before the file has its mode. A umask around bind(2) would do the
    /// same, but it is a property of the process, and would change files that other threads create.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let io = |action| move |source| SocketError::Io { path: path.to_owned(), action, source };
        let errno = |action| move |errno: Errno| io(action)(errno.into());
        let address = address(path).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidFilename => SocketError::TooLong { path: path.to_owned() },
            _ => io("use this path")(error),
        })?;
        let absolute = std::path::absolute(path).map_err(io("use this path"))?;
        remove_stale(path)?;
        let fd = stream_socket().map_err(errno("create a socket"))?;
        bind(fd.as_raw_fd(), &address).map_err(|e| match e {
            // Another process has created a file there since `remove_stale`.
            Errno::EADDRINUSE => SocketError::InUse { path: path.to_owned() },
            _ => errno("create it")(e),
        })?;
        let publish = || {
            fs::set_permissions(&absolute, Permissions::from_mode(0o600))?;
            let id = identity(&absolute)?;
            listen(&fd, Backlog::new(BACKLOG)?)?;
            Ok(id)
        };
        match publish() {
            Ok(id) => Ok(Self { listener: UnixListener::from(fd), path: absolute, id }),
            Err(error) => {
                // Best effort: the error that matters is the one being returned.
                let _ = fs::remove_file(&absolute);
                Err(io("make it private and listen")(error))
            }
        }
    }
}

impl PrivateSocket {
    /// Removes the file, if it is still there and ours. From then on no client can connect.
    pub fn leave(&self) {
        if identity(&self.path).is_ok_and(|id| id == self.id)
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("socket {} is left behind: {error}", self.path.display());
        }
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Connects to the socket at `path` without blocking: if the listener's queue is full, it returns `WouldBlock`.
pub fn open(path: &Path) -> io::Result<UnixStream> {
    let address = address(path)?;
    let fd = stream_socket()?;
    connect(fd.as_raw_fd(), &address)?;
    Ok(UnixStream::from(fd))
}

fn stream_socket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

fn address(path: &Path) -> io::Result<UnixAddr> {
    if path.as_os_str().is_empty() {
        // Linux would choose an abstract address for an empty path.
        return Err(io::ErrorKind::NotFound.into());
    }
    if path.as_os_str().as_bytes().len() > PATH_BYTES {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    Ok(UnixAddr::new(path)?)
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Removes a socket file that a VMM left when it was killed. Two VMMs that start at the same time on the same stale
/// path may both find it stale. Then the second removes the first one's file and has the path, as if it had been
/// started later.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let io = |action| move |source| SocketError::Io { path: path.to_owned(), action, source };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("look at it")(error)),
    };
    if !meta.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path.to_owned() });
    }
    match open(path) {
        Ok(_) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(io("replace the unused socket")),
            // The owner has removed the file in the meantime.
            io::ErrorKind::NotFound => Ok(()),
            // The listener's queue is full, so there is a listener.
            io::ErrorKind::WouldBlock => Err(SocketError::InUse { path: path.to_owned() }),
            _ => Err(io("find out whether it is in use")(error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blame::tests::all_blame;

    // Catches: a path that cannot be a socket, reported as a guest that failed.
    #[test]
    fn a_sockets_path_is_the_users() {
        let path = || PathBuf::from("socket");
        let errors = [
            SocketError::TooLong { path: path() },
            SocketError::InUse { path: path() },
            SocketError::NotASocket { path: path() },
            SocketError::Io { path: path(), action: "create it", source: io::Error::other("x") },
        ];
        all_blame(Blame::Usage, errors);
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        (dir, path)
    }

    #[test]
    fn only_the_owner_may_connect_and_the_file_goes_with_the_socket() {
        let (_dir, path) = place();
        let socket = PrivateSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        open(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let (_dir, path) = place();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file");
        let _socket = PrivateSocket::bind(&path).unwrap();
        open(&path).unwrap();
    }

    #[test]
    fn a_live_socket_is_not_replaced() {
        let (_dir, path) = place();
        let _first = PrivateSocket::bind(&path).unwrap();
        let error = PrivateSocket::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }), "{error}");
        // Not even when its queue is full.
        let waiting: Vec<_> = std::iter::from_fn(|| open(&path).ok()).take(1000).collect();
        assert!(waiting.len() < 1000);
        assert!(matches!(PrivateSocket::bind(&path), Err(SocketError::InUse { .. })));
        open(&path).unwrap_err();
    }

    #[test]
    fn a_file_that_is_no_socket_is_kept() {
        let (dir, path) = place();
        fs::write(&path, b"precious").unwrap();
        assert!(matches!(PrivateSocket::bind(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert!(matches!(PrivateSocket::bind(dir.path()), Err(SocketError::NotASocket { .. })));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(PrivateSocket::bind(&link), Err(SocketError::NotASocket { .. })));
    }

    #[test]
    fn the_file_of_a_successor_is_kept() {
        let (_dir, path) = place();
        let first = PrivateSocket::bind(&path).unwrap();
        // While `first` holds its inode, the successor's number cannot be the same.
        fs::remove_file(&path).unwrap();
        let _second = PrivateSocket::bind(&path).unwrap();
        drop(first);
        open(&path).unwrap();
    }

    #[test]
    fn a_path_that_cannot_be_used_is_named() {
        let (dir, _) = place();
        let fill = PATH_BYTES - dir.path().as_os_str().len() - 1;
        let _longest = PrivateSocket::bind(&dir.path().join("x".repeat(fill))).unwrap();
        let error = PrivateSocket::bind(&dir.path().join("x".repeat(fill + 1))).unwrap_err();
        assert!(matches!(error, SocketError::TooLong { .. }), "{error}");
        for (path, reason) in [("/nonexistent-directory/s", "No such file"), ("", "not found")] {
            let error = PrivateSocket::bind(Path::new(path)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("socket {path}: cannot ")) && error.contains(reason), "{error}");
        }
    }
}
