//! The server: accepts clients and answers them, on the event loop's thread.

#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

use super::{
    answer::Answers,
    api::{ApiError, Command, Handler, Reply},
    connection::{Connection, Progress},
    http,
};
use crate::host::unix_socket::{PrivateSocket, SocketError};

/// How many clients can be connected at a time. If there is one more, the oldest connection that waits for no answer is
/// closed. So idle clients cannot keep others out, and no timeout is needed.
const CLIENTS: usize = 32;
/// How long to wait after accept(2) has failed for want of descriptors or memory, until another part of the process or
/// of the host has freed some.
const RETRY: Duration = Duration::from_millis(100);

/// The control socket of one VM, to be added to its event manager. The socket's file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlServer<H> {
    socket: PrivateSocket,
    /// Oldest first.
    clients: Vec<Client>,
    handler: H,
    /// Answers to the clients' requests, by [`Client::number`].
    answers: Answers<Result<Reply, ApiError>>,
    /// How many clients were accepted so far.
    accepted: u64,
    /// Armed while accepting clients is suspended.
    retry: TimerFd,
}

#[derive(Debug)]
struct Client {
    number: u64,
    connection: Connection,
    /// Its request, for the log; none until it is complete.
    asked: Option<String>,
    /// Its request is to end the VM.
    quits: bool,
    /// The events that the event manager reports for it.
    watched: EventSet,
}

impl<H: Handler> ControlServer<H> {
    /// Listens at `path`, with mode 0600. A socket file on which no process listens is replaced.
    ///
    /// # Errors
    /// The path is taken, too long, or cannot be written.
    pub fn bind(path: &Path, handler: H) -> Result<Self, SocketError> {
        let io = |action| move |source| SocketError::Io { path: path.to_owned(), action, source };
        let answers = Answers::new().map_err(io("wait for answers"))?;
        let retry = TimerFd::new().map_err(|error| io("make a timer")(error.into()))?;
        Ok(Self { socket: PrivateSocket::bind(path)?, clients: Vec::new(), handler, answers, accepted: 0, retry })
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        // Bounded, so that connected clients are served, too. The listener stays readable if more clients wait.
        for _ in 0..CLIENTS {
            match self.socket.listener.accept().and_then(|(stream, _)| Connection::new(stream)) {
                Ok(connection) => self.add(connection, ops),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    _ => return self.accept_failed(&error, ops),
                },
            }
        }
    }

    /// Suspends accepting clients for [`RETRY`] when descriptors or memory are used up. The listener stays readable, so
    /// the event loop would spin if it went on watching it.
    fn accept_failed(&mut self, error: &io::Error, ops: &mut EventOps<'_>) {
        log::warn!("control socket: cannot accept a client for now: {error}");
        match self.retry.reset(RETRY, None) {
            Ok(()) => unwatch(&self.socket.listener, ops),
            Err(error) => log::error!("control socket: cannot set a timer: {error}"),
        }
    }

    /// Accepts clients again, after [`RETRY`].
    fn retry(&mut self, ops: &mut EventOps<'_>) {
        let _ = self.retry.wait();
        if let Err(error) = ops.add(Events::new(&self.socket.listener, EventSet::IN)) {
            log::warn!("control socket: cannot be watched for now: {error}");
            let _ = self.retry.reset(RETRY, None);
        }
    }

    fn add(&mut self, connection: Connection, ops: &mut EventOps<'_>) {
        if self.clients.len() >= CLIENTS {
            log::warn!("control socket: more than {CLIENTS} clients, the oldest that waits for no answer is cut off");
            // If all wait for an answer, the new connection is closed.
            let Some(idle) = self.clients.iter().position(|client| !client.connection.is_asking()) else { return };
            self.remove(idle, ops);
        }
        let watched = EventSet::IN;
        match ops.add(Events::new(&connection, watched)) {
            Ok(()) => {
                self.accepted = self.accepted.wrapping_add(1);
                self.clients.push(Client { number: self.accepted, connection, asked: None, quits: false, watched });
            }
            Err(error) => log::warn!("control socket: cannot watch a client: {error}"),
        }
    }

    fn serve(&mut self, fd: RawFd, events: EventSet, ops: &mut EventOps<'_>) {
        let Some(at) = self.clients.iter().position(|client| client.connection.as_raw_fd() == fd) else { return };
        let waits = self.clients.get(at).is_some_and(|client| client.connection.is_asking());
        // For a client that waits for its answer no events are requested. epoll(7) reports that it hung up all the
        // same.
        if waits && events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            return self.remove(at, ops);
        }
        self.advance(at, ops);
    }

    /// Sends the answers that have arrived.
    fn answer(&mut self, ops: &mut EventOps<'_>) {
        while let Some((number, result)) = self.answers.take() {
            // The client may have disconnected.
            let Some(at) = self.clients.iter().position(|client| client.number == number) else { continue };
            let Some(client) = self.clients.get_mut(at) else { continue };
            let result = result.unwrap_or_else(|| Err(ApiError::WrongState("the VM has ended".to_owned())));
            match (&result, &client.asked) {
                (Err(error), Some(asked)) => log::info!("control socket: {asked} refused: {error}"),
                (Ok(_), Some(asked)) => log::debug!("control socket: {asked}"),
                (_, None) => {}
            }
            // The socket file is removed before a quit is answered. A client that comes after the answer then finds no
            // socket, and not one that closes the connection without an answer.
            if client.quits && result.is_ok() {
                self.socket.leave();
            }
            client.connection.respond(http::render(&result));
            self.advance(at, ops);
        }
    }

    fn advance(&mut self, at: usize, ops: &mut EventOps<'_>) {
        while let Some(client) = self.clients.get_mut(at) {
            match client.connection.advance() {
                Progress::Answer(Ok(request)) => {
                    client.asked = Some(format!("{} {}", request.method, request.path));
                    match self.answers.expect(client.number) {
                        Ok(answer) => match Command::parse(&request.method, &request.path, &request.body) {
                            Ok(command) => {
                                client.quits = matches!(command, Command::Quit);
                                self.handler.handle(command, answer);
                            }
                            Err(error) => answer.send(Err(error)),
                        },
                        Err(error) => {
                            client.connection.respond(http::render(&Err(ApiError::Internal(error.to_string()))))
                        }
                    }
                }
                Progress::Answer(Err(error)) => client.connection.respond(http::render(&Err(error))),
                Progress::Wait(events) => {
                    if events == client.watched {
                        return;
                    }
                    match ops.modify(Events::new(&client.connection, events)) {
                        Ok(()) => {
                            client.watched = events;
                            return;
                        }
                        Err(error) => {
                            log::warn!("control socket: cannot watch a client: {error}");
                            return self.remove(at, ops);
                        }
                    }
                }
                Progress::Closed => return self.remove(at, ops),
            }
        }
    }

    fn remove(&mut self, at: usize, ops: &mut EventOps<'_>) {
        if at < self.clients.len() {
            // Unregistered before the descriptor is closed, because its number may be reused for another client.
            let client = self.clients.remove(at);
            unwatch(&client.connection, ops);
        }
    }
}

fn unwatch(source: &impl AsRawFd, ops: &mut EventOps<'_>) {
    if let Err(error) = ops.remove(Events::empty(source)) {
        log::warn!("control socket: cannot stop watching: {error}");
    }
}

impl<H: Handler> MutEventSubscriber for ControlServer<H> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let watched = [
            ops.add(Events::new(&self.socket.listener, EventSet::IN)),
            ops.add(Events::new(&self.answers, EventSet::IN)),
            ops.add(Events::new(&self.retry, EventSet::IN)),
        ];
        if let Some(error) = watched.into_iter().find_map(Result::err) {
            log::error!("control socket: cannot be watched, so no client will be answered: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.fd() {
            fd if fd == self.socket.listener.as_raw_fd() => self.accept(ops),
            fd if fd == self.answers.as_raw_fd() => self.answer(ops),
            fd if fd == self.retry.as_raw_fd() => self.retry(ops),
            fd => self.serve(fd, events.event_set(), ops),
        }
    }
}
