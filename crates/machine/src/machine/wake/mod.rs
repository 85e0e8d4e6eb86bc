//! The timers by which a vCPU's thread leaves KVM_RUN or its sleep. (Other threads ring its
//! [`doorbell`](super::shared::doorbell) for that.)
//!
//! [`wake_timer`] expires for a deadline of the guest, or a little before it; [`halt_poll`] computes how much.
//! [`pulse`] ends long entries, so that the thread notes regularly that the vCPU runs.

pub(crate) mod halt_poll;
pub(crate) mod pulse;
pub(crate) mod wake_timer;
