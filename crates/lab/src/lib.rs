//! Experiments on machines: a judge of any guest's timer, a migration at every instruction, every clockevent under
//! every policy, what stops do to a clock, and reports of them.

pub mod check;
pub mod clock;
pub mod recipe;
pub mod report;
pub mod study;
pub mod sweep;
