//! What happened: the trace, and counters.

pub mod counters;
pub mod trace;
