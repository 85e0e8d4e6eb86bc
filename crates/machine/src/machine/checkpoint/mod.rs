//! Checkpoints: return a machine to an earlier instant, within the process and in microseconds.
//!
//! What it is: everything that virtual time changes, copied in the form it has while the machine runs. A snapshot
//! contains the whole machine, for another process and another host. A checkpoint works for this machine only.
//!
//! What it is not: it holds no FPU state, debug registers or MSRs, which cost an ioctl each. A guest that changes them
//! is detected ([`super::stepper::Stepper::state_outside_checkpoint`]), and cannot be returned to a checkpoint.

pub mod ram;

use std::{mem, sync::atomic::Ordering};

use kvm_pv::WallRegistration;
use vlapic::{Inbox, Route};

use super::{
    Machine,
    audit::TickAuditState,
    clock::Clock,
    error::RunError,
    paused::Paused,
    sched::round_robin::RoundRobin,
    shared::{Unwakeable, VcpuShared},
    vcpu::{Cpu, Local},
};
use crate::{
    devices::{Devices, SavedDevices},
    kvm::Running,
};

/// The contents of a [`VcpuShared`].
type SharedContents = (Inbox, Option<Route>, Option<Unwakeable>, u64, u64);

/// A machine at one instant, without its RAM.
pub(crate) struct Checkpoint {
    cpus: Vec<(Running, Local)>,
    vcpus: Vec<SharedContents>,
    round_robin: RoundRobin,
    clock: Clock,
    devices: SavedDevices,
    wall: WallRegistration,
    audit: TickAuditState,
    tsc_stable: bool,
    paused: Option<Paused>,
}

impl Machine {
    /// A checkpoint of the machine as it is now. Every vCPU must be drained.
    pub(crate) fn checkpoint(&mut self) -> Checkpoint {
        self.shared.read_rings();
        let audit = self.shared.audit.lock().state();
        // `last_run` is used in real time only, and checkpoints in virtual time only.
        let vcpu_shared =
            |VcpuShared { doorbell: _, inbox, route, unwakeable, page, tsc_adjust, last_run: _ }: &VcpuShared| {
                let [page, tsc_adjust] = [page, tsc_adjust].map(|value| value.load(Ordering::Relaxed));
                (*inbox.lock(), *route.lock(), *unwakeable.lock(), page, tsc_adjust)
            };
        Checkpoint {
            cpus: self
                .vcpus
                .user_mut()
                .iter_mut()
                .map(|Cpu { vcpu, local }| (vcpu.running_state(), local.clone()))
                .collect(),
            vcpus: self.shared.vcpus.iter().map(vcpu_shared).collect(),
            round_robin: self.round_robin.clone(),
            clock: self.shared.clock.lock().clone(),
            devices: self.shared.devices.lock().state(),
            wall: self.shared.wall.lock().clone(),
            audit,
            tsc_stable: self.shared.tsc_stable.load(Ordering::SeqCst),
            paused: self.paused,
        }
    }

    /// Goes back to `checkpoint`. Every vCPU must be drained.
    pub(crate) fn restore_checkpoint(&mut self, checkpoint: &Checkpoint) -> Result<(), RunError> {
        let Checkpoint { cpus, vcpus, round_robin, clock, devices: saved, wall, audit, tsc_stable, paused } =
            checkpoint;
        for (cpu, (running, local)) in self.vcpus.user_mut().iter_mut().zip(cpus) {
            cpu.vcpu.set_running_state(running);
            cpu.local.clone_from(local);
        }
        for (vcpu_shared, (inbox, route, unwakeable, page, tsc_adjust)) in self.shared.vcpus.iter().zip(vcpus) {
            *vcpu_shared.unwakeable.lock() = *unwakeable;
            vcpu_shared.page.store(*page, Ordering::Relaxed);
            vcpu_shared.tsc_adjust.store(*tsc_adjust, Ordering::Relaxed);
            *vcpu_shared.inbox.lock() = *inbox;
            *vcpu_shared.route.lock() = *route;
        }
        self.round_robin.clone_from(round_robin);
        self.shared.clock.lock().clone_from(clock);
        let mut devices = self.shared.devices.lock();
        let output = mem::replace(&mut *devices, Devices::new(Box::new(std::io::sink()))).into_output();
        *devices = Devices::from_state(saved, output)
            .ok_or_else(|| RunError::BadState("a device cannot be in its saved state".to_owned()))?;
        drop(devices);
        self.shared.wall.lock().clone_from(wall);
        self.shared.audit.lock().go_back(audit);
        self.shared.tsc_stable.store(*tsc_stable, Ordering::SeqCst);
        self.paused = *paused;
        Ok(())
    }
}
