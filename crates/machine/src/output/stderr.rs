//! Standard error.

use std::{io, sync::OnceLock, time::Duration};

use super::{FinishLimit, Outlet, Sink, WhenFull};

/// How much is buffered for a slow reader, in bytes.
const LIMIT: usize = 256 << 10;

/// How long the process, when it ends, waits for each output's reader to take what is left.
pub const AT_END: FinishLimit = FinishLimit::WithoutProgress(Duration::from_millis(500));

/// The same when the end was requested: the user then does not want to wait for a slow reader.
pub const AT_REQUESTED_END: FinishLimit = FinishLimit::InAll(Duration::from_millis(500));

/// Standard error, for messages and the log. Bytes beyond the buffer are dropped.
pub fn stderr() -> &'static Outlet {
    static STDERR: OnceLock<Outlet> = OnceLock::new();
    STDERR.get_or_init(|| {
        // A process may be started with a closed standard error. Then messages are dropped.
        Sink::inherited(io::stderr()).map_or_else(Outlet::closed, |sink| Outlet::new(sink, LIMIT, WhenFull::Drop))
    })
}
