//! The server: accepts clients and answers them from the event loop.

#[cfg(test)]
mod tests;

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::control::api::{ApiError, Command, Handler, Reply};
use crate::control::connection::{Connection, Progress};
use crate::control::http::{self, Request};
use crate::control::socket::{ControlSocket, SocketError};

/// How many clients are served at a time. One more, and the one that has been connected for longest is cut off: with a
/// limit in number there is no need for one in time, and no idle client can keep the others out.
const CLIENTS: usize = 32;

/// The control socket of one VM, to be added to its event manager. The socket's file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlServer<H> {
    socket: ControlSocket,
    /// Oldest first.
    clients: Vec<Client>,
    handler: H,
}

#[derive(Debug)]
struct Client {
    connection: Connection,
    /// What the event manager watches for.
    watched: EventSet,
}

impl<H: Handler> ControlServer<H> {
    /// Listens at `path`, with mode 0600. A socket file that nobody serves any more is replaced.
    ///
    /// # Errors
    /// The path is taken, too long, or cannot be written.
    pub fn bind(path: &Path, handler: H) -> Result<Self, SocketError> {
        Ok(Self { socket: ControlSocket::bind(path)?, clients: Vec::new(), handler })
    }

    /// Whoever carries out the commands.
    pub fn handler_mut(&mut self) -> &mut H {
        &mut self.handler
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        loop {
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

    /// Out of file descriptors or memory. The listener stays readable, so without a change here the loop would spin.
    fn accept_failed(&mut self, error: &std::io::Error, ops: &mut EventOps<'_>) {
        if self.clients.is_empty() {
            log::error!("control socket: cannot accept a client, so no more are accepted: {error}");
            unwatch(&self.socket.listener, ops);
        } else {
            log::warn!("control socket: cannot accept a client, so the oldest is cut off: {error}");
            self.remove(0, ops);
        }
    }

    fn add(&mut self, connection: Connection, ops: &mut EventOps<'_>) {
        if self.clients.len() >= CLIENTS {
            log::warn!("control socket: more than {CLIENTS} clients, the oldest is cut off");
            self.remove(0, ops);
        }
        let watched = EventSet::IN;
        match ops.add(Events::new(&connection, watched)) {
            Ok(()) => self.clients.push(Client { connection, watched }),
            Err(error) => log::warn!("control socket: cannot watch a client: {error}"),
        }
    }

    fn serve(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(at) = self.clients.iter().position(|client| client.connection.as_raw_fd() == fd) else { return };
        while let Some(client) = self.clients.get_mut(at) {
            match client.connection.advance() {
                Progress::Answer(request) => {
                    let result = request.and_then(|request| carry_out(&mut self.handler, &request));
                    client.connection.respond(http::render(&result));
                }
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
            // Before the descriptor is closed: its number may come back as another client's.
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

fn carry_out(handler: &mut impl Handler, request: &Request) -> Result<Reply, ApiError> {
    let result = Command::parse(&request.method, &request.path, &request.body).and_then(|c| handler.handle(c));
    match &result {
        Ok(_) => log::debug!("control socket: {} {}", request.method, request.path),
        Err(error) => log::info!("control socket: {} {} refused: {error}", request.method, request.path),
    }
    result
}

impl<H: Handler> MutEventSubscriber for ControlServer<H> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.socket.listener, EventSet::IN)) {
            log::error!("control socket: cannot be watched, so nobody will be answered: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.socket.listener.as_raw_fd() { self.accept(ops) } else { self.serve(events.fd(), ops) }
    }
}
