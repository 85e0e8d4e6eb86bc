//! Standard error.

use std::{io, sync::OnceLock, time::Duration};

use super::{Outlet, Patience, Sink, WhenFull};

/// What is kept for somebody who reads slowly.
const LIMIT: usize = 256 << 10;

/// How long the process waits, for each output, for somebody to read what is left when it ends.
pub const AT_END: Patience = Patience::WithoutProgress(Duration::from_millis(500));

/// The same if somebody asked for the end, who does not wait for a reader that is slow.
pub const AT_REQUESTED_END: Patience = Patience::InAll(Duration::from_millis(500));

/// Standard error, for messages and the log. What nobody reads is dropped.
pub fn stderr() -> &'static Outlet {
    static STDERR: OnceLock<Outlet> = OnceLock::new();
    STDERR.get_or_init(|| {
        // A process may be started without it: then there is nobody to tell.
        Sink::inherited(io::stderr()).map_or_else(Outlet::closed, |sink| Outlet::new(sink, LIMIT, WhenFull::Drop))
    })
}
