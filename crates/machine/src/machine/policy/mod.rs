//! How a machine goes on after it stood still, and what goes wrong with that on purpose.

pub mod fault;
