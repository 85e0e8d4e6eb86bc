//! What brings a vCPU's thread back, out of KVM_RUN or out of its sleep.
//!
//! [`doorbell`]: another thread wants it. [`wake_timer`]: an instant has come, which [`next_due`] chose; how much sooner the
//! timer expires than that, [`halt_poll`] learns. [`host_stop`]: the host stopped the thread, and it runs again.

pub mod doorbell;
pub mod halt_poll;
pub mod host_stop;
pub mod next_due;
pub mod wake_timer;
