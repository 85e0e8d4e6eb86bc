//! Several CPUs that tick and interrupt each other: the pure parts of scenario `smp`.
//!
//! The CPUs form a ring. On every tick a CPU owes the next one an interrupt. The local APIC keeps one request per
//! vector (Intel SDM vol. 3, "Interrupt Acceptance for Fixed Interrupts"): an interrupt that is sent before the one
//! before it was taken merges with it. So [`Link`] sends the next only after the one before has arrived: exactly as
//! many arrive as were sent, however late a CPU is.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

/// Vector of the interrupt that is counted.
pub const IPI_VECTOR: u32 = 0x41;
/// Vector that only ends a halt; several may merge.
pub const WAKE_VECTOR: u32 = 0x42;

/// The CPU that CPU `cpu` of `cpus` sends to. A single CPU sends to itself.
#[must_use]
pub fn next_cpu(cpu: usize, cpus: usize) -> usize {
    if cpu + 1 < cpus { cpu + 1 } else { 0 }
}

/// The CPU that sends to CPU `cpu` of `cpus`.
#[must_use]
pub fn previous_cpu(cpu: usize, cpus: usize) -> usize {
    cpu.checked_sub(1).unwrap_or(cpus.saturating_sub(1))
}

/// How much later than CPU 0's the ticks of CPU `cpu` of `cpus` expire: spread evenly over the period.
#[must_use]
pub fn phase_ns(hz: u32, cpu: usize, cpus: usize) -> u64 {
    let ticks = u64::from(hz.max(1)).saturating_mul(u64::try_from(cpus.max(1)).unwrap_or(u64::MAX));
    (1_000_000_000 / ticks).saturating_mul(u64::try_from(cpu).unwrap_or(0))
}

/// Counts of interrupts from one CPU to the next. The sender calls all methods but [`arrived`](Self::arrived), with
/// interrupts off.
///
/// Sequentially consistent throughout: the sender writes `owed` and then reads `received`, the receiver writes
/// `received` and then reads `owed`; in any weaker order each could miss the other's write, and the sender would sleep
/// on an interrupt that it could send.
#[derive(Debug, Default)]
pub struct Link {
    owed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Link {
    /// Nothing owed, sent or received.
    #[must_use]
    pub const fn new() -> Self {
        Self { owed: AtomicU64::new(0), sent: AtomicU64::new(0), received: AtomicU64::new(0) }
    }

    /// Called by the sender on a tick: one more interrupt is owed.
    pub fn owe(&self) {
        self.owed.store(self.owed().wrapping_add(1), Ordering::SeqCst);
    }

    /// Whether the sender must send an interrupt now. If so, it is counted as sent.
    #[must_use]
    pub fn take(&self) -> bool {
        let (owed, sent) = (self.owed(), self.sent());
        if owed == 0 || self.received() != sent {
            return false;
        }
        // `sent` is raised before `owed` is lowered: a CPU that adds them up may count one twice, but never miss one.
        self.sent.store(sent.wrapping_add(1), Ordering::SeqCst);
        self.owed.store(owed - 1, Ordering::SeqCst);
        true
    }

    /// Called by the receiver's handler. Returns whether the sender has another one to send and may be waiting for
    /// this.
    #[must_use]
    pub fn arrived(&self) -> bool {
        self.received.store(self.received().wrapping_add(1), Ordering::SeqCst);
        self.owed() != 0
    }

    /// Interrupts owed and not yet sent.
    #[must_use]
    pub fn owed(&self) -> u64 {
        self.owed.load(Ordering::SeqCst)
    }

    /// Interrupts sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }

    /// Interrupts received.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::SeqCst)
    }
}

/// One CPU's progress through its part of the scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The CPU.
    pub cpu: usize,
    /// Number of CPUs.
    pub cpus: usize,
    /// Ticks, and interrupts in either direction, that make its part complete.
    pub count: u64,
    /// Ticks that it has handled.
    pub ticks: u64,
    /// Interrupts that it has sent to the next.
    pub sent: u64,
    /// Interrupts that the next has received from it.
    pub received: u64,
}

impl Part {
    /// CPU `cpu`'s part, computed from its link: each tick owes one interrupt.
    #[must_use]
    pub fn of(link: &Link, cpu: usize, cpus: usize, count: u64) -> Self {
        // `owed` is read before `sent`, since `take` writes them in the other order.
        let owed = link.owed();
        let sent = link.sent();
        Self { cpu, cpus, count, ticks: sent.saturating_add(owed), sent, received: link.received() }
    }

    /// Whether all ticks and interrupts came.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.ticks == self.count && self.sent == self.count && self.received == self.count
    }

    /// A number that grows with every tick and every interrupt.
    #[must_use]
    pub fn progress(&self) -> u64 {
        self.ticks.wrapping_add(self.sent).wrapping_add(self.received)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cpus, count, ticks, sent, received } = *self;
        let next = next_cpu(cpu, cpus);
        write!(f, "cpu {cpu}: {ticks} of {count} ticks, {sent} IPIs sent to cpu {next}, {received} received there")
    }
}

#[cfg(test)]
mod tests;
