//! The naive bus: offers every message to every CPU.

use super::naive::Naive;
use vlapic::{Delivery, Mode};

/// A write of ICR, or of SELF IPI.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    pub(super) command: u32,
    pub(super) to: u32,
    pub(super) x2apic: bool,
}

impl Message {
    /// Whether the sender can do it alone: a vector, to itself by shorthand.
    pub(super) fn inside(&self) -> bool {
        self.command >> 18 & 3 == 1 && self.mode() <= 1
    }

    /// Whether it is a message at all.
    pub(super) fn is_sent(&self) -> bool {
        self.mode() != 3 && self.mode() != 7
    }

    fn mode(&self) -> u32 {
        self.command >> 8 & 7
    }

    /// "Determining IPI Destination".
    fn is_for(&self, receiver: &Naive, same: bool) -> bool {
        let broadcast = if self.x2apic { self.to == 0xffff_ffff } else { self.to == 0xff };
        let logical = self.command >> 11 & 1 == 1;
        match (self.command >> 18 & 3, receiver.mode()) {
            (_, Mode::Disabled) => false,
            (1, _) => same,
            (2, _) => true,
            (3, _) => !same,
            _ if broadcast && (self.x2apic || !logical) => true,
            _ if !logical => self.to == receiver.id(),
            (_, Mode::X2Apic) => self.to >> 16 == receiver.ldr() >> 16 && self.to & receiver.ldr() & 0xffff != 0,
            _ if self.to == 0xff => true,
            _ if self.to > 0xff => false,
            _ => {
                let own = receiver.ldr() >> 24;
                match receiver.page[0xe] >> 28 {
                    15 => self.to & own != 0,
                    0 => self.to / 16 == own / 16 && (self.to % 16) & (own % 16) != 0,
                    _ => false,
                }
            }
        }
    }

    /// Delivers it; says what each CPU that it was for has to do.
    pub(super) fn deliver(&self, cpus: &mut [Naive], sender: usize) -> Vec<(usize, Delivery)> {
        if !self.is_sent() {
            return vec![];
        }
        if self.mode() <= 1 && self.command & 0xff < 16 {
            let _ = cpus[sender].error(0x20);
        }
        let mut targets: Vec<usize> = (0..cpus.len()).filter(|cpu| self.is_for(&cpus[*cpu], *cpu == sender)).collect();
        if self.mode() == 1 && !self.inside() {
            targets.retain(|cpu| cpus[*cpu].enabled());
            // Stable: of equals the first.
            targets.sort_by_key(|cpu| cpus[*cpu].route().priority);
            targets.truncate(1);
        }
        targets.into_iter().map(|cpu| (cpu, self.arrive(&mut cpus[cpu]))).collect()
    }

    fn arrive(&self, receiver: &mut Naive) -> Delivery {
        match self.mode() {
            0 | 1 if receiver.enabled() => receiver.request(self.command, false),
            2 => Delivery::Smi,
            4 => Delivery::Nmi,
            // Level trigger without assert is INIT level de-assert.
            5 if self.command >> 14 & 3 != 2 => Delivery::Init,
            6 => Delivery::StartUp { vector: u8::try_from(self.command & 0xff).unwrap() },
            _ => Delivery::None,
        }
    }
}
