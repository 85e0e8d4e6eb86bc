//! What brings a vCPU's thread back by itself, out of KVM_RUN or out of its sleep; another thread rings its
//! [`doorbell`](super::shared::doorbell).
//!
//! [`wake_timer`]: an instant has come; how much sooner the timer expires than that, [`halt_poll`] learns. [`pulse`]: the
//! vCPU has run for a while, and its thread notes that.

pub(crate) mod halt_poll;
pub(crate) mod pulse;
pub(crate) mod wake_timer;
