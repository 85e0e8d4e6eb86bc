//! Numbers for people.

pub use vmm::report::units::time;
