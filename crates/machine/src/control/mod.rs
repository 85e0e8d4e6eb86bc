//! Control of a running VM: HTTP/1.1 and JSON over a Unix socket, and a client for it.
//!
//! [`api`] defines requests and answers, [`server`] handles them on the event loop, and [`client`] is the client of
//! `vmm ctl`. Any other HTTP client that can use a Unix socket works as well:
//!
//! ```text
//! curl --unix-socket S http://localhost/v1/status
//! curl --unix-socket S -X PUT -d '{"dir": "/tmp/snap"}' http://localhost/v1/snapshot
//! ```
//!
//! It is not a web server. A connection carries one request and is closed after the answer, bodies are small and have a
//! length, and there is no authentication but the socket's mode, 0600: a process that can open the socket can do
//! everything. That keeps the code that parses untrusted bytes short; the grammar of HTTP itself is left to the
//! `httparse` crate.

mod answer;
pub mod api;
pub mod client;
mod command;
mod connection;
mod http;
pub mod server;

pub use answer::{Answer, Answers};
pub use api::{ApiError, Command, Handler, Reply, Status};
pub use client::{ClientError, call};
pub use server::ControlServer;
