//! A machine on its way to another process, while it runs.
//!
//! [`send()`] copies its RAM in rounds: first all that is in use, then what has changed meanwhile, until the rest is
//! small enough. Then the machine stops, the rest and its state follow, and the destination ([`receive`]) builds the
//! machine and says so. `protocol` decides which of the two runs the guest, whatever is lost.
//!
//! What it is not: it neither pauses nor resumes a machine. [`crate::session`] does that at the source, by
//! [`SourcePorts`], and the caller of [`receive`] at the destination.

mod address;
mod connection;
mod error;
mod frame;
mod protocol;
pub mod receive;
mod rounds;
pub mod send;
#[cfg(test)]
mod tests;

pub use address::Address;
pub use error::LiveError;
pub use receive::{Answers, Arrived, Incoming, Limits, Waiting};
pub use rounds::Figures;
pub use send::{LastOfIt, Outcome, Settings, SourcePorts, send};
