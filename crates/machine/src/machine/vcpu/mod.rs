//! One vCPU: KVM's part of it, and the VMM's part with the LAPIC.

pub(crate) mod assist;
pub mod bus;
pub mod disassembly;
pub(crate) mod gate;
pub(crate) mod ioapic;
pub mod ipi;
pub mod lint0;
pub mod next_due;
pub mod single_step;
pub mod step;
pub mod tsc;

use kvm_pv::{Registration, pv_eoi::PvEoi, steal_time::StealTime};
use serde::{Deserialize, Serialize};
use vlapic::{Armed, Deadline, LocalApic};
use vmtime::{Due, HostTsc, Now, TscAdjust, VmTime};

use self::bus::{Changed, VcpuBus};
use super::{audit::TimerAudit, clock::Clock, cpu_index::CpuIndex, error::RunError, shared::Shared};
use crate::kvm::Vcpu;

/// One vCPU.
pub struct Cpu {
    /// The part that KVM holds.
    pub vcpu: Vcpu,
    /// The part that the VMM holds.
    pub local: Local,
}

/// Whether a vCPU executes instructions. Without an in-kernel LAPIC KVM has no MP state but runnable, so the VMM holds
/// the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It executes instructions.
    Running,
    /// After reset or INIT an application processor waits for a start-up message.
    WaitForSipi,
}

/// What the VMM holds for one vCPU.
#[derive(Clone, Debug)]
pub struct Local {
    /// Its number.
    pub index: CpuIndex,
    /// Its LAPIC.
    pub apic: LocalApic,
    /// Its kvmclock page.
    pub pvclock: Registration,
    /// Its PV EOI word, if it was offered one.
    pub pv_eoi: Option<PvEoi>,
    /// Its steal-time area, if it was offered one.
    pub steal_time: Option<StealTime>,
    /// IA32_TSC_ADJUST: how far this CPU's TSC is ahead of the base, modulo 2^64.
    pub tsc_adjust: TscAdjust,
    /// What a TSC deadline was before a restore moved it, if one did.
    pub due: Option<Due>,
    /// Whether it executes instructions at all.
    pub phase: Phase,
    /// It executed HLT and waits.
    pub halted: bool,
    /// Timer interrupts that entered it so far, in this process.
    pub timer_interrupts: u64,
    /// The VM time for which the timer was armed, by the reference clock; none unless it has expired and its interrupt
    /// has not entered yet.
    pub(crate) expired: Option<VmTime>,
    /// What its timer is armed for, and what becomes of that; none unless it was asked for.
    pub(crate) timers: Option<Box<TimerAudit>>,
    /// An NMI was queued in KVM, and may still wait there.
    pub(crate) nmi: bool,
    /// The flags its page was last published with.
    pub(crate) published_flags: u8,
    /// The last stepped instruction was an STI: interrupts are blocked for one more instruction.
    pub(crate) sti_shadow: bool,
}

impl Local {
    /// Now, when the host's TSC is `host`, as this CPU's clocks show it.
    #[must_use]
    pub fn now(&self, clock: &Clock, host: HostTsc) -> Now {
        clock.now_at(host, self.tsc_adjust)
    }

    /// Advances its LAPIC to `now`. If the timer expires, notes for when it was armed.
    pub(crate) fn advance(&mut self, clock: &Clock, now: Now) {
        let armed = self.apic.next_deadline();
        let interrupts = self.apic.advance(now);
        if let Some(timers) = &mut self.timers {
            let next = self.apic.next_deadline();
            if interrupts || armed.is_some() && next.is_none() {
                timers.expired(interrupts, next.map(|next| clock.due_time(next)));
            }
        }
        if interrupts && self.expired.is_none() {
            self.expired = armed.map(|armed| clock.due_time(armed));
        }
    }

    /// Begins to account for what its timer is armed for, or begins anew.
    pub(crate) fn audit_timer(&mut self, clock: &Clock) {
        let due = self.apic.next_deadline().map(|deadline| clock.due_time(deadline));
        self.timers = Some(Box::new(TimerAudit::new(due)));
    }

    /// Notes what a write of the guest armed the timer for, at `now`.
    pub(crate) fn timer_written(&mut self, shared: &Shared, armed: Armed, now: Now) {
        if let Some(timers) = &mut self.timers {
            let clock = shared.clock.lock();
            timers.written(armed, now, |base| clock.reference_time(base));
        }
    }

    /// The next instant at which its timer could interrupt it.
    #[must_use]
    pub fn next_wake(&self) -> Option<Deadline> {
        // While it is halted, it cannot end an interrupt.
        let may_end_silently = !self.halted && self.pv_eoi.is_some_and(|pv_eoi| pv_eoi.is_lent());
        // This instant may be too early: the guest may not have ended the interrupt yet.
        if may_end_silently { self.apic.next_wake_after_end() } else { self.apic.next_wake() }
    }
}

impl Cpu {
    /// Completes the last instruction, and emulates the accesses that it still makes.
    pub(crate) fn drain(&mut self, shared: &Shared) -> Result<(), RunError> {
        let mut access = VcpuBus::new(&mut self.local, shared);
        self.vcpu.drain(&mut access)?;
        let changed = access.changed;
        self.apply_to_kvm(changed, shared)
    }

    /// Sets in KVM what an access changed. The vCPU must be drained.
    pub(crate) fn apply_to_kvm(&mut self, changed: Changed, shared: &Shared) -> Result<(), RunError> {
        if changed.apic_base {
            self.vcpu.set_apic_base(self.local.apic.apic_base());
        }
        if changed.tsc
            && let Some(offset) = shared.clock.lock().vcpu_offset(self.local.tsc_adjust)
        {
            self.vcpu.set_tsc_offset(offset)?;
        }
        Ok(())
    }
}
