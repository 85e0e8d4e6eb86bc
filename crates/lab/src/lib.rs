//! Experiments on machines: a migration at every instruction, every clockevent under every policy, and reports of them.

pub mod recipe;
pub mod report;
pub mod study;
pub mod sweep;
