//! Output that never blocks the VMM: the console, the log, the trace, messages at the end.
//!
//! A pipe without a reader takes 64 KiB, and then write(2) blocks. A reader outside must not be able to stop the VMM
//! that way. So neither a vCPU thread nor the event loop writes to such a file itself. They put bytes into an
//! [`Outlet`], which never blocks: it writes what the file takes at once and buffers the rest, which a thread of its
//! own writes later.
//!
//! The buffer has a limit. Beyond it [`WhenFull`] decides: either further bytes are dropped and counted, or the outlet
//! reports that it is full, and the producer waits at a point where it can be interrupted.

mod outlet;
mod sink;
mod stderr;

pub use outlet::{FinishLimit, Outlet, WhenFull};
pub use sink::Sink;
pub use stderr::{AT_END, AT_REQUESTED_END, stderr};

/// Prints one line on standard error, as `eprintln!` does, but never blocks.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {
        $crate::output::stderr().put(format!("{}\n", format_args!($($arg)*)).as_bytes())
    };
}
