//! Formats numbers for people.

pub use lab::report::units::time;
