//! The source of a migration in the model of KVM: stopped vCPUs, whose TSCs and kvmclock count on, and what is read of
//! them.

use machine::policy::restorer::Saved;
use vmtime::TscAdjust;

use super::step::{Msr, Op};

/// Nanoseconds times kHz in a tick.
pub(super) const NS_KHZ: i128 = 1_000_000;

/// How far a TSC is ahead of the base, as a number with a sign.
pub(super) fn signed(adjust: TscAdjust) -> i128 {
    i128::from(adjust.0.cast_signed())
}

/// The stopped vCPUs on the source, and what was read from them.
pub(super) struct Source<'a> {
    pub saved: &'a Saved,
    /// What the last KVM_GET_CLOCK gave, and its instant.
    pub clock: Option<(u64, i128)>,
    pub cpus: Vec<Read>,
}

/// What was read from a vCPU.
#[derive(Clone, Copy, Default)]
pub(super) struct Read {
    /// The TSC, and its instant.
    pub tsc: Option<(u64, i128)>,
    /// When its LAPIC was read.
    pub lapic_ns: u64,
}

impl Source<'_> {
    /// The TSC of vCPU `cpu`.
    pub fn tsc(&self, cpu: usize, at_ns: u64) -> i128 {
        let adjust = self.saved.cpus.get(cpu).map_or(0, |cpu| signed(cpu.tsc_adjust));
        let khz = i128::from(self.saved.moment.khz.get());
        i128::from(self.saved.moment.tsc.0) + i128::from(at_ns) * khz / NS_KHZ + adjust
    }

    /// kvmclock.
    pub fn clock(&self, at_ns: u64) -> i128 {
        i128::from(self.saved.moment.vm.0) + i128::from(at_ns)
    }

    pub fn step(&mut self, at_ns: u64, cpu: usize, op: &Op) {
        let tsc = self.tsc(cpu, at_ns);
        let clock = self.clock(at_ns);
        match op {
            Op::GetClock => self.clock = Some((at_ns, clock)),
            Op::GetMsrs(msrs) if msrs.contains(&Msr::Tsc) => {
                if let Some(read) = self.cpus.get_mut(cpu) {
                    read.tsc = Some((at_ns, tsc));
                }
            }
            Op::GetLapic => {
                if let Some(read) = self.cpus.get_mut(cpu) {
                    read.lapic_ns = at_ns;
                }
            }
            // The frequency, the offsets and the deadlines are the same whenever they are read.
            _ => {}
        }
    }
}
