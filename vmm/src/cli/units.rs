//! Numbers for people.

pub use lab::report::units::time;
