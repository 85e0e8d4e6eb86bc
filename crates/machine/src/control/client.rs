//! The client behind `vmm ctl`: one request, one answer.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::api::{Command, Migrate, Snapshot};
use crate::blame::{Blame, Blamed};
use crate::host::unix_socket;

/// How long to wait for the VM's answer, in seconds. It is long because a snapshot of a large guest to a slow disk is.
const TIMEOUT_SECONDS: u64 = 120;
/// The same for a move to another VMM.
const MOVE_SECONDS: u64 = 24 * 3600;
/// The largest answer that is read, in bytes.
const ANSWER_BYTES: u64 = 1 << 20;

/// Why a command was not carried out, or got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no such file.
    #[error("no control socket at {}: is the VM running, with --api-sock and this path?", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// There is a socket file, but no process accepts connections.
    #[error("no process listens at {}: the VM that made this socket has ended", path.display())]
    NotListening {
        /// The path.
        path: PathBuf,
    },
    /// The VM has not answered in time. It may still carry the command out.
    #[error("no answer at {} within {TIMEOUT_SECONDS} s: the VM is busy or stuck", path.display())]
    Timeout {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("control socket {}: cannot {action}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The error that the host returned.
        source: io::Error,
    },
    /// The command cannot be sent, such as a snapshot to a directory whose name is not UTF-8.
    #[error("the command cannot be sent: {0}")]
    Command(#[from] serde_json::Error),
    /// The bytes received are not an answer of the API.
    #[error("what answers at {} is not the control socket of a VM: {reason}", path.display())]
    Answer {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The VM refused the command, or failed at it.
    #[error("{message}")]
    Refused {
        /// The HTTP status code.
        code: u16,
        /// The VM's reason.
        message: String,
    },
}

impl Blamed for ClientError {
    fn blame(&self) -> Blame {
        match self {
            Self::NoSocket { .. } | Self::NotListening { .. } => Blame::Usage,
            Self::Timeout { .. } | Self::Io { .. } | Self::Command(_) | Self::Answer { .. } | Self::Refused { .. } => {
                Blame::Run
            }
        }
    }
}

/// Sends `command` to the VM at `path` and waits for its answer, which is [`Value::Null`] if it has no body. A relative
/// snapshot directory is relative to the working directory of this process, and is made absolute here.
///
/// # Errors
/// No VM accepts connections at `path`, no valid answer comes in time, or the VM refused.
pub fn call(path: &Path, command: &Command) -> Result<Value, ClientError> {
    // How long a move takes depends on the guest and the network; the VMM itself gives up when nothing moves.
    let moves = matches!(command, Command::Migrate(Migrate { to: Some(_), .. }));
    exchange(path, command, Duration::from_secs(if moves { MOVE_SECONDS } else { TIMEOUT_SECONDS }))
}

fn exchange(path: &Path, command: &Command, timeout: Duration) -> Result<Value, ClientError> {
    let io = |action| move |source: io::Error| failed(path, action, source);
    let command = with_absolute_paths(command).map_err(io("find the snapshot directory"))?;
    let (method, target, body) = command.to_request()?;
    let mut stream = unix_socket::open(path).map_err(io("connect"))?;
    stream.set_nonblocking(false).map_err(io("set it up"))?;
    stream.set_read_timeout(Some(timeout)).map_err(io("set it up"))?;
    stream.set_write_timeout(Some(timeout)).map_err(io("set it up"))?;
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let request = [head.as_bytes(), &body].concat();
    match stream.write_all(&request) {
        // A server that refuses early may close before it has read all of the request. Its answer can still be read.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(failed(path, "send", error)),
        _ => {}
    }
    let answer = read_answer(&stream).map_err(io("receive"))?;
    parse(&answer).map_err(|reason| ClientError::Answer { path: path.to_owned(), reason })?
}

fn with_absolute_paths(command: &Command) -> io::Result<Command> {
    Ok(match command {
        Command::Snapshot(Snapshot { dir, base, stay_paused }) => Command::Snapshot(Snapshot {
            dir: std::path::absolute(dir)?,
            base: base.as_ref().map(std::path::absolute).transpose()?,
            stay_paused: *stay_paused,
        }),
        other => other.clone(),
    })
}

/// Reads the answer up to its end, which is where the server closes the connection.
fn read_answer(stream: &UnixStream) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    match stream.take(ANSWER_BYTES).read_to_end(&mut answer) {
        // A reset after the answer only means that the server did not read all of the request.
        Err(error) if error.kind() == ErrorKind::ConnectionReset && !answer.is_empty() => Ok(answer),
        result => result.map(|_| answer),
    }
}

/// Parses an answer. The outer error is for bytes that are not an answer of the API.
fn parse(answer: &[u8]) -> Result<Result<Value, ClientError>, String> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut headers);
    let head_bytes = match head.parse(answer) {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) => return Err("it closed the connection without an answer".to_owned()),
        Err(error) => return Err(format!("it does not speak HTTP ({error})")),
    };
    let body = answer.get(head_bytes..).unwrap_or_default();
    let announced = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    if announced.is_some_and(|header| header.value != body.len().to_string().as_bytes()) {
        return Err("its answer is cut short".to_owned());
    }
    let code = head.code.unwrap_or_default();
    let value = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(body).map_err(|error| format!("its answer is not JSON ({error})"))?
    };
    if (200..300).contains(&code) {
        return Ok(Ok(value));
    }
    match value.get("error").and_then(Value::as_str) {
        Some(message) => Ok(Err(ClientError::Refused { code, message: message.to_owned() })),
        None => Err(format!("it answers with code {code} and no reason")),
    }
}

fn failed(path: &Path, action: &'static str, source: io::Error) -> ClientError {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::NotFound if action == "connect" => ClientError::NoSocket { path },
        ErrorKind::ConnectionRefused => ClientError::NotListening { path },
        // A socket's timeout is reported as "would block". From connect(2) it means that the listener's queue is full.
        ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::Timeout { path },
        _ => ClientError::Io { path, action, source },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::blame::tests::all_blame;

    // Catches: a command that the VM refused, reported as a wrong command line, or a wrong path that is not.
    #[test]
    fn a_path_without_a_vm_is_the_users() {
        let path = || PathBuf::from("socket");
        all_blame(Blame::Usage, [ClientError::NoSocket { path: path() }, ClientError::NotListening { path: path() }]);
        let errors = [
            ClientError::Timeout { path: path() },
            ClientError::Io { path: path(), action: "read", source: io::Error::other("x") },
            ClientError::Command(serde_json::Error::io(io::Error::other("x"))),
            ClientError::Answer { path: path(), reason: String::new() },
            ClientError::Refused { code: 400, message: String::new() },
        ];
        all_blame(Blame::Run, errors);
    }

    /// The client's result if the server sends `answer` and closes.
    fn answered(answer: &'static [u8]) -> Result<Value, ClientError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(answer).unwrap();
        });
        let result = call(&path, &Command::Status);
        server.join().unwrap();
        result
    }

    #[test]
    fn answers_and_refusals() {
        assert_eq!(answered(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap(), Value::Null);
        let value = answered(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{\"a\":1}").unwrap();
        assert_eq!(value, serde_json::json!({"a": 1}));
        let error = answered(b"HTTP/1.1 409 Conflict\r\n\r\n{\"error\":\"it has ended\"}").unwrap_err();
        assert!(matches!(&error, ClientError::Refused { code: 409, .. }) && error.to_string() == "it has ended");
    }

    #[test]
    fn what_is_no_answer_is_one_clear_line() {
        for (answer, reason) in [
            (&b""[..], "without an answer"),
            (b"HTTP/1.1 200 OK\r\nContent-Le", "without an answer"),
            (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{\"a\":1}", "cut short"),
            (b"HTTP/1.1 200 OK\r\n\r\n<html>", "not JSON"),
            (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "code 502"),
        ] {
            let error = answered(answer).unwrap_err().to_string();
            assert!(error.contains(reason) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_missing_or_dead_socket_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let error = call(&path, &Command::Status).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("no control socket at {}: is the VM running, with --api-sock and this path?", path.display())
        );
        drop(UnixListener::bind(&path).unwrap());
        let error = call(&path, &Command::Status).unwrap_err().to_string();
        assert!(error.starts_with("no process listens at "), "{error}");
    }

    #[test]
    fn a_vm_that_does_not_answer_is_a_timeout() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = exchange(&path, &Command::Status, Duration::from_millis(10)).unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    }

    #[test]
    fn a_directory_that_json_cannot_hold_is_an_error() {
        use std::os::unix::ffi::OsStrExt;
        let dir = PathBuf::from(std::ffi::OsStr::from_bytes(b"/tmp/\xff"));
        let command = Command::Snapshot(Snapshot { dir, base: None, stay_paused: false });
        assert!(matches!(call(Path::new("/nonexistent"), &command), Err(ClientError::Command(_))));
    }
}
