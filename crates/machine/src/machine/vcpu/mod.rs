//! One vCPU with what belongs to it alone.

pub mod bus;
pub mod disassembly;
pub mod ipi;
pub mod lint0;
pub mod next_due;
pub mod single_step;
pub mod step;
pub mod tsc;

use kvm_pv::{Registration, pv_eoi::PvEoi};
use serde::{Deserialize, Serialize};
use vlapic::{Deadline, LocalApic};
use vmtime::{HostTsc, Now, TscAdjust, VmTime};

use self::bus::{Changed, VcpuBus};
use super::{clock::Clock, cpu_index::CpuIndex, error::RunError, shared::Shared};
use crate::kvm::Vcpu;

/// One vCPU.
pub struct Cpu {
    /// KVM's half.
    pub vcpu: Vcpu,
    /// Our half.
    pub local: Local,
}

/// Whether a vCPU executes instructions. KVM can hold no other than the first without an in-kernel LAPIC, so the second
/// is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It does.
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
    /// IA32_TSC_ADJUST: what this CPU's TSC is ahead of the base, modulo 2^64.
    pub tsc_adjust: TscAdjust,
    /// Whether it executes instructions at all.
    pub phase: Phase,
    /// It executed HLT and waits.
    pub halted: bool,
    /// Timer interrupts that entered it so far, in this process.
    pub timer_interrupts: u64,
    /// VM time by the host's account for which the timer was armed, if it has expired since and the interrupt has not entered.
    pub(crate) expired: Option<VmTime>,
    /// KVM was given an NMI, and may hold it still.
    pub(crate) nmi: bool,
    /// The flags its page was last published with.
    pub(crate) published_flags: u8,
    /// The last stepped instruction was an STI: interrupts wait for one more.
    pub(crate) sti_shadow: bool,
}

impl Local {
    /// Now, when the host's TSC is `host`, as this CPU's clocks show it.
    #[must_use]
    pub fn now(&self, clock: &Clock, host: HostTsc) -> Now {
        clock.now_at(host, self.tsc_adjust)
    }

    /// Takes its LAPIC to `now`, and notes for when the timer was armed if it interrupts.
    pub(crate) fn advance(&mut self, clock: &Clock, now: Now) {
        let armed = self.apic.next_deadline();
        if self.apic.advance(now) && self.expired.is_none() {
            self.expired = armed.map(|armed| match armed {
                Deadline::Tsc(due) => clock.reference_time(due),
                Deadline::Vm(at) => at,
            });
        }
    }

    /// The next instant at which its timer could interrupt it.
    #[must_use]
    pub fn next_wake(&self) -> Option<Deadline> {
        // Halted, it ends no interrupt.
        let may_end_silently = !self.halted && self.pv_eoi.is_some_and(|pv_eoi| pv_eoi.is_lent());
        // It may be too early: the guest may not have ended the interrupt yet.
        if may_end_silently { self.apic.next_wake_after_end() } else { self.apic.next_wake() }
    }
}

impl Cpu {
    /// Completes the last instruction, answering what it still accesses.
    pub(crate) fn drain(&mut self, shared: &Shared) -> Result<(), RunError> {
        let mut access = VcpuBus::new(&mut self.local, shared);
        self.vcpu.drain(&mut access)?;
        let changed = access.changed;
        self.tell_kvm(changed, shared)
    }

    /// Tells KVM what an access changed. The vCPU must be drained.
    pub(crate) fn tell_kvm(&mut self, changed: Changed, shared: &Shared) -> Result<(), RunError> {
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
