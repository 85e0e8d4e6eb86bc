//! Sends requests to a VM's control socket, and times the answers.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How long a VMM may take to create its socket.
const PATIENCE: Duration = Duration::from_secs(10);

/// The control socket of a running VM.
#[derive(Debug)]
pub struct Api(PathBuf);

impl Api {
    /// Waits until the VMM listens at `path`.
    ///
    /// # Errors
    /// If it does not within ten seconds.
    pub fn wait(path: &Path) -> Result<Self> {
        let begin = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(_) => return Ok(Self(path.to_owned())),
                Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                    return Err(error).with_context(|| format!("control socket {}", path.display()));
                }
                Err(_) if begin.elapsed() > PATIENCE => bail!("no process listens at {}", path.display()),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Sends `PUT /v1/COMMAND`. Returns the time from before the connection to the end of the answer.
    ///
    /// # Errors
    /// If the answer is not 204; with its text.
    pub fn put(&self, command: &str, body: &Value) -> Result<Duration> {
        let body = body.to_string();
        let begin = Instant::now();
        let answer = self.send(&format!(
            "PUT /v1/{command} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))?;
        let took = begin.elapsed();
        if !answer.starts_with("HTTP/1.1 204") {
            bail!("{command}: {answer}");
        }
        Ok(took)
    }

    /// Sends `GET /v1/status`.
    ///
    /// # Errors
    /// If the request fails.
    pub fn status(&self) -> Result<Value> {
        let answer = self.send("GET /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
        serde_json::from_str(body).with_context(|| answer.clone())
    }

    fn send(&self, request: &str) -> Result<String> {
        let mut stream = UnixStream::connect(&self.0)?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        // The VMM closes after one answer.
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}
