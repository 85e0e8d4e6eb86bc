//! A machine as it was, within the process: back to an instant in microseconds.
//!
//! What it is: everything that a stretch of virtual time changes, copied in the form it has while it runs. A snapshot
//! says what a machine *is*, for another process and another host; a checkpoint only takes this machine back.
//!
//! What it is not: it holds no FPU state, debug registers or MSRs, which cost an ioctl each. A guest that changes them
//! is found out ([`super::stepper::Stepper::resting`]), not taken back.

pub mod ram;

use std::{mem, sync::atomic::Ordering};

use kvm_pv::WallRegistration;
use vlapic::{Inbox, Route};

use super::{
    audit::JudgeState,
    build::Machine,
    clock::Clock,
    error::RunError,
    paused::Paused,
    sched::round_robin::Turns,
    shared::{Deaf, Post, lock},
    vcpu::{Cpu, Local},
};
use crate::{
    devices::{Devices, PicState, PitState, SerialState},
    kvm::Running,
};

/// What a [`Post`] holds.
type Posted = (Inbox, Option<Route>, Option<Deaf>, u64, u64);

/// A machine at one instant, its RAM aside.
pub(crate) struct Checkpoint {
    cpus: Vec<(Running, Local)>,
    posts: Vec<Posted>,
    turns: Turns,
    clock: Clock,
    devices: (SerialState, PicState, PitState),
    wall: WallRegistration,
    judge: JudgeState,
    tsc_stable: bool,
    paused: Option<Paused>,
}

impl Machine {
    /// The machine as it stands. Every vCPU must be drained.
    pub(crate) fn checkpoint(&mut self) -> Checkpoint {
        // Before the clock is locked: a traced tick asks it for the time.
        lock(&self.platform.judge).read_rings(&self.platform);
        // Only real time asks when a vCPU last ran.
        let post = |Post { bell: _, inbox, route, deaf, page, tsc_adjust, last_run: _ }: &Post| {
            let [page, tsc_adjust] = [page, tsc_adjust].map(|value| value.load(Ordering::Relaxed));
            (*lock(inbox), *lock(route), *lock(deaf), page, tsc_adjust)
        };
        Checkpoint {
            cpus: self.cpus.iter_mut().map(|Cpu { vcpu, local }| (vcpu.running_state(), local.clone())).collect(),
            posts: self.platform.posts.iter().map(post).collect(),
            turns: self.turns.clone(),
            clock: lock(&self.platform.clock).clone(),
            devices: lock(&self.platform.devices).state(),
            wall: lock(&self.platform.wall).clone(),
            judge: lock(&self.platform.judge).state(),
            tsc_stable: self.platform.tsc_stable.load(Ordering::SeqCst),
            paused: self.paused,
        }
    }

    /// Goes back to `checkpoint`. Every vCPU must be drained.
    pub(crate) fn go_back(&mut self, checkpoint: &Checkpoint) -> Result<(), RunError> {
        let Checkpoint { cpus, posts, turns, clock, devices: saved, wall, judge, tsc_stable, paused } = checkpoint;
        for (cpu, (running, local)) in self.cpus.iter_mut().zip(cpus) {
            cpu.vcpu.set_running_state(running);
            cpu.local.clone_from(local);
        }
        for (post, (inbox, route, deaf, page, tsc_adjust)) in self.platform.posts.iter().zip(posts) {
            *lock(&post.deaf) = *deaf;
            post.page.store(*page, Ordering::Relaxed);
            post.tsc_adjust.store(*tsc_adjust, Ordering::Relaxed);
            *lock(&post.inbox) = *inbox;
            *lock(&post.route) = *route;
        }
        self.turns.clone_from(turns);
        lock(&self.platform.clock).clone_from(clock);
        let mut devices = lock(&self.platform.devices);
        let output = mem::replace(&mut *devices, Devices::new(Box::new(std::io::sink()))).into_output();
        let (serial, pic, pit) = saved;
        *devices = Devices::from_state(serial, pic, pit, output)
            .ok_or_else(|| RunError::BadState("a device cannot be in its saved state".to_owned()))?;
        drop(devices);
        lock(&self.platform.wall).clone_from(wall);
        lock(&self.platform.judge).go_back(judge);
        self.platform.tsc_stable.store(*tsc_stable, Ordering::SeqCst);
        self.paused = *paused;
        Ok(())
    }

    /// Where the VMM itself writes guest RAM while the guest runs.
    pub(crate) fn own_writes(&self) -> Vec<u64> {
        /// Size of the largest structure, so that one which crosses a page is seen in both.
        const LAST: u64 = 31;
        let pages = self.cpus.iter().filter_map(|cpu| cpu.local.pvclock.address());
        let words = self.cpus.iter().filter_map(|cpu| cpu.local.pv_eoi?.address());
        let wall = Some(lock(&self.platform.wall).read_msr()).filter(|address| *address != 0);
        pages.chain(words).chain(wall).flat_map(|address| [address, address.saturating_add(LAST)]).collect()
    }
}
