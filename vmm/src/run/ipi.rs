//! Messages between LAPICs.
//!
//! The sender puts a message into every CPU's inbox and rings; each receiver asks its own LAPIC whether it is meant. No
//! CPU ever touches another one's LAPIC, so that nothing is locked while guests run.

use super::{
    Platform, RunError,
    cpu::{Cpu, Phase},
    platform::lock,
};
use crate::{
    apic::{DeliveryMode, Interrupt, Ipi},
    kvm::Vcpu,
};

/// A message on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    from: u32,
    ipi: Ipi,
}

/// Messages that a CPU may have waiting: a guest that sends to a CPU that never looks (a parked one) makes us hold no
/// more. Fixed interrupts collapse in IRR anyway.
const MAX_WAITING: usize = 1024;

/// Sends `ipi` from CPU number `from`.
pub(super) fn send(platform: &Platform, from: u32, ipi: Ipi) {
    for (index, post) in (0u32..).zip(&platform.posts) {
        let mut inbox = lock(&post.inbox);
        let message = Message { from, ipi };
        if inbox.len() < MAX_WAITING {
            inbox.push_back(message);
        }
        drop(inbox);
        // The sender looks into its own inbox before it enters the guest again.
        if index != from {
            post.bell.ring();
        }
    }
}

/// Takes what waits for `cpu`, in order.
pub(super) fn receive(cpu: &mut Cpu, platform: &Platform) -> Result<(), RunError> {
    let Some(post) = usize::try_from(cpu.local.index).ok().and_then(|index| platform.posts.get(index)) else {
        return Ok(());
    };
    loop {
        let Some(Message { from, ipi }) = lock(&post.inbox).pop_front() else { return Ok(()) };
        if cpu.local.apic.addressed_by(ipi.destination, from == cpu.local.index) {
            deliver(cpu, platform, ipi)?;
        }
    }
}

fn deliver(cpu: &mut Cpu, platform: &Platform, ipi: Ipi) -> Result<(), RunError> {
    if matches!(ipi.mode, DeliveryMode::Nmi | DeliveryMode::Init) {
        cpu.drain(platform)?;
    }
    let Cpu { vcpu, local } = cpu;
    match ipi.mode {
        DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
            local.apic.accept(Interrupt { vector: ipi.vector, level: false });
        }
        DeliveryMode::Nmi => {
            if local.phase == Phase::Running {
                vcpu.nmi()?;
                local.halted = false;
            }
        }
        // The level de-assert message is for bus arbitration of old (SDM vol. 3, "Interrupt Command Register").
        DeliveryMode::Init if ipi.assert => {
            vcpu.reset_after_init()?;
            local.apic.init();
            local.halted = false;
            local.phase = Phase::WaitForSipi;
        }
        DeliveryMode::StartUp if local.phase == Phase::WaitForSipi => {
            start(vcpu, ipi.vector)?;
            local.phase = Phase::Running;
        }
        // System management mode does not exist here; a second SIPI is ignored, as on a CPU.
        DeliveryMode::Init | DeliveryMode::StartUp | DeliveryMode::Smi => {}
    }
    Ok(())
}

/// The page number in a SIPI becomes CS (SDM vol. 3, "MP Initialization").
fn start(vcpu: &mut Vcpu, page: u8) -> Result<(), RunError> {
    Ok(vcpu.set_real_mode_entry(u16::from(page) << 8)?)
}
