//! Tests of the server over a real socket, with an event manager on another thread.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use event_manager::{EventManager, SubscriberOps};
use serde_json::{Value, json};
use vmtime::{GuestTsc, Khz, VmTime};

use super::*;
use crate::{
    control::{
        answer::Answer,
        api::{Migrate, RunState, Snapshot, Status},
        client::{ClientError, call},
    },
    machine::config::{LapicKind, source::TscSource},
};

/// The answers to snapshot commands that are still outstanding.
type Saving = Arc<Mutex<Vec<Answer<Result<Reply, ApiError>>>>>;

/// A handler that records commands, and refuses the second pause.
#[derive(Default)]
struct Toy {
    seen: Arc<Mutex<Vec<Command>>>,
    /// Snapshots to `/slow`, which a test answers itself.
    saving: Saving,
}

impl Handler for Toy {
    fn handle(&mut self, command: Command, answer: Answer<Result<Reply, ApiError>>) {
        let mut seen = self.seen.lock().unwrap();
        if command == Command::Pause && seen.contains(&command) {
            return answer.send(Err(ApiError::WrongState("the guest \"has\" ended".to_owned())));
        }
        seen.push(command.clone());
        if matches!(&command, Command::Snapshot(snapshot) if snapshot.dir == Path::new("/slow")) {
            // Answered later, by the test's thread.
            self.saving.lock().unwrap().push(answer);
            return;
        }
        answer.send(Ok(if command == Command::Status { Reply::Status(Box::new(status())) } else { Reply::Done }));
    }
}

fn status() -> Status {
    Status {
        state: RunState::Running,
        lapic: LapicKind::User,
        tsc_source: TscSource::Trapped,
        tsc_khz: Khz::new(2_600_000).unwrap(),
        guest_tsc: GuestTsc(u64::MAX),
        vm_time_ns: VmTime(1),
        judged: true,
        ticks: Some(1000),
        migrations: 0,
        migrations_here: 0,
        saving: None,
        moving: None,
    }
}

struct Served {
    dir: tempfile::TempDir,
    seen: Arc<Mutex<Vec<Command>>>,
    saving: Saving,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let toy = Toy::default();
        let (seen, saving, stop) = (toy.seen.clone(), toy.saving.clone(), Arc::new(AtomicBool::new(false)));
        // Bound before the thread starts, so that no test has to wait for it.
        let server = ControlServer::bind(&dir.path().join("api.sock"), toy).unwrap();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut manager = EventManager::new().unwrap();
            manager.add_subscriber(server);
            while !stopped.load(Ordering::Acquire) {
                // With a timeout, because after a quit no client can connect to wake it.
                manager.run_with_timeout(20).unwrap();
            }
        });
        Self { dir, seen, saving, stop, thread: Some(thread) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path()).unwrap()
    }

    /// Sends bytes as they are and returns what comes back until the server closes.
    fn raw(&self, request: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(request).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn assert_alive(&self) {
        assert_eq!(call(&self.path(), &Command::Status).unwrap()["ticks"], 1000);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
            assert!(!self.path().exists(), "the file goes with the server");
        }
    }
}

#[test]
fn commands_arrive_and_answers_return() {
    let served = Served::new();
    assert_eq!(std::fs::metadata(served.path()).unwrap().permissions().mode() & 0o777, 0o600);
    let answer = call(&served.path(), &Command::Status).unwrap();
    assert_eq!(serde_json::from_value::<Status>(answer.clone()).unwrap(), status());
    assert_eq!(answer["state"], "running");
    assert_eq!(answer["guest_tsc"], json!(u64::MAX));
    let migrate = Migrate { tsc_khz: Some(Khz::new(1_300_000).unwrap()), ..Default::default() };
    for command in [Command::Pause, Command::Resume(Default::default()), Command::Migrate(migrate), Command::Quit] {
        assert_eq!(call(&served.path(), &command).unwrap(), Value::Null);
        assert_eq!(served.seen.lock().unwrap().last(), Some(&command));
    }
}

// Catches: an event loop that waits for one client's answer while others send requests.
#[test]
fn a_slow_command_does_not_delay_other_clients() {
    let served = Served::new();
    let path = served.path();
    let snapshot = Command::Snapshot(Snapshot { dir: "/slow".into(), base: None, stay_paused: false });
    let asked = snapshot.clone();
    let waiting = std::thread::spawn(move || call(&path, &asked));
    while served.saving.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    // More clients than the limit: the one that waits for its answer keeps its connection.
    let idle: Vec<_> = (0..2 * CLIENTS).map(|_| served.connect()).collect();
    served.assert_alive();
    drop(idle);
    assert!(!waiting.is_finished());
    served.saving.lock().unwrap().pop().unwrap().send(Ok(Reply::Done));
    assert_eq!(waiting.join().unwrap().unwrap(), Value::Null);
    // A client whose answer is dropped gets a refusal.
    let path = served.path();
    let waiting = std::thread::spawn(move || call(&path, &snapshot));
    while served.saving.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    drop(served.saving.lock().unwrap().pop());
    let error = waiting.join().unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Refused { code: 409, .. }), "{error}");
}

// Catches: a server that spins, or answers another client, when a client disconnects while it waits.
#[test]
fn a_client_that_does_not_wait_for_its_answer_is_forgotten() {
    let served = Served::new();
    let mut stream = served.connect();
    stream.write_all(b"PUT /v1/snapshot HTTP/1.1\r\nContent-Length: 16\r\n\r\n{\"dir\": \"/slow\"}").unwrap();
    while served.saving.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    drop(stream);
    served.assert_alive();
    served.saving.lock().unwrap().pop().unwrap().send(Ok(Reply::Done));
    served.assert_alive();
}

// Catches: a sender of a body that is refused for its size, who gets a reset and no answer.
#[test]
fn a_large_body_gets_its_answer() {
    let served = Served::new();
    let mut stream = served.connect();
    const BYTES: usize = 8 << 20;
    stream.write_all(format!("PUT /v1/snapshot HTTP/1.1\r\nContent-Length: {BYTES}\r\n\r\n").as_bytes()).unwrap();
    // Some clients read the answer only after they have sent everything.
    stream.write_all(&vec![b' '; BYTES]).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[test]
fn a_refusal_carries_code_and_reason() {
    let served = Served::new();
    call(&served.path(), &Command::Pause).unwrap();
    let error = call(&served.path(), &Command::Pause).unwrap_err();
    assert!(matches!(&error, ClientError::Refused { code: 409, message } if message == "the guest \"has\" ended"));
}

#[test]
fn the_client_makes_a_directory_absolute() {
    let served = Served::new();
    call(
        &served.path(),
        &Command::Snapshot(Snapshot { dir: "snap".into(), base: Some("last".into()), stay_paused: true }),
    )
    .unwrap();
    let dir = std::env::current_dir().unwrap().join("snap");
    let expected = Command::Snapshot(Snapshot { dir, base: std::path::absolute("last").ok(), stay_paused: true });
    assert_eq!(served.seen.lock().unwrap().last(), Some(&expected));
}

#[test]
fn malformed_requests_are_answered_and_do_no_harm() {
    let served = Served::new();
    for (request, code) in [
        (&b"nonsense\r\n\r\n"[..], "400"),
        (b"\x00\xff\xfe", "400"),
        (b"GET /v2 HTTP/1.1\r\n\r\n", "404"),
        (b"DELETE /v1/status HTTP/1.1\r\n\r\n", "405"),
        (b"PUT /v1/migrate HTTP/1.1\r\nContent-Length: 1\r\n\r\n{", "400"),
        (b"PUT /v1/snapshot HTTP/1.1\r\nContent-Length: 14\r\n\r\n{\"dir\": \"snap\"}", "400"),
        (b"PUT /v1/pause HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "411"),
    ] {
        let answer = served.raw(request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        assert!(serde_json::from_str::<Value>(body).unwrap()["error"].is_string(), "{answer}");
        served.assert_alive();
    }
}

#[test]
fn a_huge_body_is_refused_without_being_stored() {
    let served = Served::new();
    let mut stream = served.connect();
    stream.write_all(b"PUT /v1/snapshot HTTP/1.1\r\nContent-Length: 4294967296\r\n\r\n").unwrap();
    // The server reads on for a while, for clients that read the answer late, and then closes the connection.
    let block = [b' '; 1 << 16];
    let sent = std::iter::from_fn(|| stream.write_all(&block).ok()).take(10_000).count();
    assert!((1..10_000).contains(&sent), "{sent}");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.starts_with(b"HTTP/1.1 413 "), "{}", String::from_utf8_lossy(&answer));
    served.assert_alive();
}

#[test]
fn a_request_in_single_bytes_is_a_request() {
    let served = Served::new();
    let mut stream = served.connect();
    for byte in b"PUT /v1/resume HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}" {
        stream.write_all(&[*byte]).unwrap();
        // Gives the server the chance to see every length; the result does not depend on it.
        std::thread::yield_now();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
}

#[test]
fn a_truncated_request_is_answered_if_the_client_still_reads() {
    let served = Served::new();
    let mut stream = served.connect();
    stream.write_all(b"PUT /v1/pause HTTP/1.1\r\nContent-Length: 5\r\n\r\n{").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("before it is complete"), "{answer}");
    assert!(served.seen.lock().unwrap().is_empty());
}

#[test]
fn clients_that_vanish_do_no_harm() {
    let served = Served::new();
    for request in [&b""[..], b"GET /v1/st", b"GET /v1/status HTTP/1.1\r\n\r\n", b"junk\r\n\r\n"] {
        for _ in 0..20 {
            served.connect().write_all(request).unwrap();
        }
    }
    served.assert_alive();
}

#[test]
fn idle_clients_do_not_keep_others_out() {
    let served = Served::new();
    let mut idle: Vec<_> = (0..CLIENTS * 2).map(|_| served.connect()).collect();
    served.assert_alive();
    // The oldest connection was closed, the youngest is served.
    assert_eq!(idle[0].read(&mut [0]).unwrap(), 0);
    let youngest = idle.last_mut().unwrap();
    youngest.write_all(b"GET /v1/status HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    youngest.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

#[test]
fn two_clients_are_both_served() {
    let served = Served::new();
    let path = &served.path();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(move || (0..200).for_each(|_| assert!(call(path, &Command::Status).is_ok())));
        }
    });
    assert_eq!(served.seen.lock().unwrap().len(), 400);
}

#[test]
fn a_second_server_is_refused_and_the_first_goes_on() {
    let served = Served::new();
    let error = ControlServer::bind(&served.path(), Toy::default()).map(|_| ()).unwrap_err();
    assert!(matches!(error, SocketError::InUse { .. }), "{error}");
    served.assert_alive();
}

#[test]
fn a_client_that_expects_100_continue_gets_it() {
    let served = Served::new();
    let mut stream = served.connect();
    stream.write_all(b"PUT /v1/quit HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n").unwrap();
    let mut answer = [0; 25];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"{}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
}

#[test]
fn curl_is_a_client() {
    let served = Served::new();
    let curl = |arguments: &[&str]| {
        let mut command = std::process::Command::new("curl");
        command.args(["-sS", "--max-time", "20", "-w", "%{http_code}", "--unix-socket"]).arg(served.path());
        command.args(arguments).output().map(|output| String::from_utf8(output.stdout).unwrap())
    };
    let status = match curl(&["http://localhost/v1/status"]) {
        Err(error) => vm_tests::skip!("curl cannot be run here: {error}"),
        Ok(status) => status,
    };
    assert!(status.contains("\"ticks\":1000") && status.ends_with("\n200"), "{status}");
    assert_eq!(curl(&["-X", "PUT", "http://localhost/v1/pause"]).unwrap(), "204");
    let snapshot = ["-X", "PUT", "-d", r#"{"dir": "/tmp/snap"}"#, "http://localhost/v1/snapshot"];
    assert_eq!(curl(&snapshot).unwrap(), "204");
    let large = format!("@{}", served.dir.path().join("large").display());
    std::fs::write(served.dir.path().join("large"), vec![b' '; 3 << 20]).unwrap();
    let refused = curl(&["-X", "PUT", "--data-binary", &large, "http://localhost/v1/snapshot"]).unwrap();
    assert!(refused.ends_with("\n413"), "{refused}");
}
