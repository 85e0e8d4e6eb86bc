//! Which of the two ends of a live migration runs the guest: one state machine for each, without any I/O.
//!
//! ```text
//! source                                   destination
//! Copying    ── hello, rounds of pages ──▶  Receiving
//! Stopped    ── last pages, state ───────▶
//!            ◀─────────────── prepared ──  Prepared     the machine is built, and does not run
//! Committed  ── commit ──────────────────▶  Running
//!            ◀──────────────── started ──
//! Over       ── done ────────────────────▶
//! ```
//!
//! - Until the source has sent `commit` the destination cannot run: whatever goes wrong, the source goes on by itself.
//! - From then on the source does not run again, unless the destination says that it has not started and never will. If
//!   the connection breaks, the source connects anew and asks. The destination answers only when it has decided: it has
//!   read `commit`, or its connection has ended without one.
//! - If no answer can be had, the source stays stopped: its VM may be running elsewhere, and only a person can know.
//!
//! No protocol can do better than the last point: the message after which the destination runs, or its confirmation,
//! can be the one that is lost. `model.rs` tries every interleaving of messages, losses and crashes.

mod destination;
#[cfg(test)]
mod model;
mod source;

pub(crate) use destination::{Destination, DestinationAction, DestinationEvent};
pub(crate) use source::{Ending, Source, SourceAction, SourceEvent};
