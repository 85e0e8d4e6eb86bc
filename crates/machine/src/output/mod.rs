//! Bytes for readers who may not read: the console, the log, the trace, messages at the end.
//!
//! A pipe whose other end nobody reads takes 64 KiB, and a write then waits for ever. Nothing outside may hold the VMM so:
//! neither a vCPU's thread nor the event loop writes to such a file itself. They put bytes into an [`Outlet`], which never
//! waits: what the reader takes at once goes out at once, the rest is kept, and a thread that is started for it passes it on.
//!
//! What is kept has a limit. Beyond it, [`WhenFull`] says: bytes are dropped and counted, or the outlet says that it is full,
//! and whoever produces the bytes waits, in a place where it can be reached.

mod outlet;
mod sink;
mod stderr;

pub use outlet::{Outlet, Patience, WhenFull};
pub use sink::Sink;
pub use stderr::{AT_END, AT_REQUESTED_END, stderr};

/// Says one line on standard error, as `eprintln!` does, and never waits for who reads it.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {
        $crate::output::stderr().put(format!("{}\n", format_args!($($arg)*)).as_bytes())
    };
}
