//! Standard error.

use std::{io, sync::OnceLock, time::Duration};

use super::{Outlet, Sink, WhenFull};

/// What is kept for somebody who reads slowly.
const LIMIT: usize = 256 << 10;

/// How long the process waits at its end for somebody to read what is left.
pub const END_PATIENCE: Duration = Duration::from_millis(500);

/// Standard error, for messages and the log. What nobody reads is dropped.
pub fn stderr() -> &'static Outlet {
    static STDERR: OnceLock<Outlet> = OnceLock::new();
    STDERR.get_or_init(|| {
        // A process may be started without it: then there is nobody to tell.
        Sink::inherited(io::stderr()).map_or_else(Outlet::closed, |sink| Outlet::new(sink, LIMIT, WhenFull::Drop))
    })
}
