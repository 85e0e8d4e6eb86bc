//! Messages between LAPICs.
//!
//! Every vCPU keeps its entry in a table of routes: who it answers to, and how busy it is. The sender finds the targets
//! there, puts the message into their [`Inbox`](crate::apic::Inbox)es, which hold any number, and rings. No CPU ever touches another one's LAPIC, so that nothing is
//! locked while guests run.

use super::{
    Platform, RunError,
    cpu::{Cpu, Local, Phase},
    platform::{Post, Ram, lock},
};
use crate::apic::{Delivery, DeliveryMode, Ipi, Route, lowest_priority};

/// Where `local` is reached.
fn post<'a>(platform: &'a Platform, local: &Local) -> Option<&'a Post> {
    usize::try_from(local.index).ok().and_then(|index| platform.posts.get(index))
}

/// Makes the table say what `local`'s LAPIC answers to.
pub(super) fn publish_route(platform: &Platform, local: &Local) {
    if let Some(post) = post(platform, local) {
        *lock(&post.route) = Some(local.apic.route());
    }
}

/// Sends `ipi` from `local`.
pub(super) fn send(platform: &Platform, local: &Local, ipi: Ipi) {
    publish_route(platform, local);
    let own = usize::try_from(local.index).unwrap_or(usize::MAX);
    let route = |post: &Post| -> Option<Route> { *lock(&post.route) };
    let mut targets: Vec<(usize, Route)> = platform
        .posts
        .iter()
        .enumerate()
        .filter_map(|(index, post)| Some((index, route(post)?)))
        .filter(|(index, route)| route.addressed_by(ipi.destination, *index == own))
        .collect();
    if ipi.mode == DeliveryMode::LowestPriority {
        let chosen = lowest_priority(targets.iter().copied());
        targets.retain(|(index, _)| Some(*index) == chosen);
    }
    for (index, _) in targets {
        let Some(post) = platform.posts.get(index) else { continue };
        lock(&post.inbox).post(&ipi);
        // The sender looks into its own inbox before it enters the guest again.
        if index != own {
            post.bell.ring();
        }
    }
}

/// Takes what waits for `cpu`.
pub(super) fn receive(cpu: &mut Cpu, platform: &Platform) -> Result<(), RunError> {
    loop {
        let Some(post) = post(platform, &cpu.local) else { return Ok(()) };
        let Some(ipi) = lock(&post.inbox).take() else { return Ok(()) };
        let delivery = cpu.local.apic.deliver(&ipi);
        carry_out(cpu, platform, delivery)?;
    }
}

/// What the CPU does about a message or a pin that its LAPIC passed on.
pub(super) fn carry_out(cpu: &mut Cpu, platform: &Platform, delivery: Delivery) -> Result<(), RunError> {
    match delivery {
        // System management mode does not exist here. What the 8259 pair asks for is injected when it can enter.
        Delivery::None | Delivery::Accepted | Delivery::ExtInt | Delivery::Smi => {}
        Delivery::Nmi => {
            if cpu.local.phase == Phase::Running {
                cpu.drain(platform)?;
                cpu.vcpu.nmi()?;
                cpu.local.nmi = true;
                // One that halted in its NMI handler sleeps on.
                cpu.local.halted &= cpu.vcpu.nmis().1;
            }
        }
        Delivery::Init => {
            cpu.drain(platform)?;
            cpu.vcpu.reset_after_init()?;
            if let Some(pv_eoi) = &mut cpu.local.pv_eoi {
                pv_eoi.reset(&Ram(&platform.memory));
            }
            cpu.local.apic.init();
            cpu.local.halted = false;
            cpu.local.nmi = false;
            cpu.local.phase = Phase::WaitForSipi;
            publish_route(platform, &cpu.local);
        }
        // The page number becomes CS (SDM vol. 3, "MP Initialization Protocol Algorithm"). A second SIPI is ignored.
        Delivery::StartUp { vector } => {
            if cpu.local.phase == Phase::WaitForSipi {
                cpu.vcpu.set_real_mode_entry(u16::from(vector) << 8)?;
                cpu.local.phase = Phase::Running;
            }
        }
    }
    Ok(())
}
