//! Records of a run: the trace, and counters.

pub mod assists;
pub mod counters;
pub mod trace;
