//! Changes of the clock: by an operation in virtual time, a stop, a start, or a reading of KVM's clock.

use vmtime::{
    AdjustError, Adjusted, DowntimePolicy, GuestTsc, HostTsc, Khz, Moment, PageClock, Rate, Remainder, Scale, Stood,
    Timeline, adjust,
};

use super::{Clock, OPERATIONS_PER_MS};
use crate::{
    kvm::KvmClock,
    machine::{
        config::{TimeMode, source::TscSource},
        policy::restorer::Restored,
    },
};

impl Clock {
    /// Counts one guest operation, which in virtual time advances the clock.
    pub fn spend_operation(&mut self) {
        if self.mode == TimeMode::Virtual {
            self.operations = self.operations.saturating_add(1);
            self.last_operation = self.host.tsc();
            self.timeline.spend(u64::from((self.khz.get() / OPERATIONS_PER_MS).max(1)));
        }
    }

    /// Virtual time: advances to `target`; does nothing if that is in the past.
    pub fn jump_to(&mut self, target: GuestTsc) {
        self.timeline.jump_to(target);
    }

    /// Stops VM time and TSC at what they were at the host TSC `host`.
    pub fn stop_at(&mut self, host: HostTsc) {
        self.timeline.stop(host);
    }

    /// Starts a stopped clock again at frequency `khz`, as of the host TSC `host`: rebases page, TSC and reference
    /// clock. `stood` is the length of the stop.
    ///
    /// `hold`: the TSC continues from its value at the stop, if the source can set it. Otherwise it continues with the
    /// source's value.
    ///
    /// # Errors
    /// [`AdjustError`] if a clock would leave its range.
    pub fn start(
        &mut self,
        saved: &Moment,
        khz: Khz,
        policy: DowntimePolicy,
        (stood, host): (Stood, HostTsc),
        hold: bool,
    ) -> Result<Adjusted, AdjustError> {
        let held = match self.source {
            TscSource::Trapped => None,
            TscSource::Host | TscSource::Scaled if self.tsc_settable && hold => None,
            TscSource::Host => Some(GuestTsc(host.0)),
            TscSource::Scaled => Some(self.timeline.tsc(host)),
        };
        let adjusted = adjust::restore(saved, khz, policy, stood, held)?;
        self.past_references.rotate_right(1);
        self.past_references[0] = Some((self.reference, saved.tsc));
        self.reference.rebase(saved.tsc, adjusted.downtime_ns, adjusted.tsc, khz);
        self.khz = khz;
        self.last_operation = host;
        self.page = adjusted.page;
        self.remainder = adjusted.remainder;
        self.timeline = match self.mode {
            TimeMode::Virtual => Timeline::Virtual { tsc: adjusted.tsc, khz },
            TimeMode::Real => {
                // With source `scaled`, `follow_scaled_tsc` says before or after this what the CPU makes of the host's
                // TSC.
                let rate = match self.timeline {
                    Timeline::Running { rate, .. } if self.source == TscSource::Scaled => rate,
                    _ => Rate::Quotient { guest: khz, host: self.host.khz() },
                };
                Timeline::Running { host, tsc: adjusted.tsc, rate }
            }
        };
        Ok(adjusted)
    }

    /// For a restore by another VMM's rules: continues as `restored` says, and not from `own`, where the clock was just
    /// started. The reference clock counts the VM time that the TSC stands for.
    pub fn continue_as(&mut self, own: GuestTsc, restored: &Restored) {
        let Restored { tsc, elapsed_ns, page, remainder, .. } = *restored;
        self.reference.rebase(own, elapsed_ns, tsc, self.khz);
        self.timeline = match self.timeline {
            Timeline::Stopped { .. } => Timeline::Stopped { tsc },
            Timeline::Virtual { khz, .. } => Timeline::Virtual { tsc, khz },
            Timeline::Running { host, tsc: at, rate } => {
                Timeline::Running { host, tsc: GuestTsc((at.0.saturating_add(tsc.0)).saturating_sub(own.0)), rate }
            }
        };
        (self.page, self.remainder) = (page, remainder);
    }

    /// With KVM's kvmclock: bases the page on this reading of KVM's clock. The page that KVM publishes has the same
    /// rate and differs from this one by rounding.
    pub fn adopt_kvm_clock(&mut self, kvm: KvmClock) {
        let tsc = self.timeline.tsc(kvm.host);
        let scale = Scale::from_khz(self.kvm_page_khz());
        self.page = PageClock { tsc_timestamp: tsc, system_time: kvm.vm, scale };
        self.remainder = Remainder::ZERO;
    }

    /// The frequency from which KVM computes the page's numbers: where the CPU scales the TSC, the host's times the
    /// ratio, in whole kHz rounded down (`kvm_guest_time_update` in Linux `arch/x86/kvm/x86.c`). It may be 1 kHz below
    /// the guest's.
    fn kvm_page_khz(&self) -> Khz {
        match self.timeline {
            Timeline::Running { rate: rate @ Rate::FixedPoint { .. }, .. } => {
                let khz = rate.scaled(u64::from(self.host.as_it_is().khz().get()));
                Khz::new(khz).unwrap_or(self.khz)
            }
            _ => self.khz,
        }
    }

    /// With KVM's kvmclock: stops VM time and TSC at this reading of KVM's clock.
    pub fn stop_at_kvm_clock(&mut self, kvm: KvmClock) {
        self.adopt_kvm_clock(kvm);
        self.timeline = Timeline::Stopped { tsc: self.page.tsc_timestamp };
    }

    /// Source `scaled`: the TSC is `tsc` when the host's is `host`, and follows it as the CPU scales it.
    pub fn follow_scaled_tsc(&mut self, host: HostTsc, tsc: GuestTsc, rate: Rate) {
        self.timeline = Timeline::Running { host, tsc, rate };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{host::clock::HostClock, machine::instant::HostInstant};

    const HOST_TSC: u64 = 1 << 50;

    fn khz(n: u64) -> Khz {
        Khz::new(n).unwrap()
    }

    /// A clock whose TSC of 1 GHz a CPU scales from 3 GHz, with AMD's 32 fraction bits, and the rate.
    fn scaled() -> (Clock, Rate) {
        let host = HostClock::new(|| HOST_TSC, khz(3_000_000));
        let mut clock = Clock::new(TscSource::Scaled, TimeMode::Real, host, khz(1_000_000));
        let rate = Rate::fixed_point(khz(1_000_000), khz(3_000_000), Rate::SVM_BITS).unwrap();
        clock.follow_scaled_tsc(HostTsc(HOST_TSC), GuestTsc(7), rate);
        (clock, rate)
    }

    // Catches: a first start after which the guest's TSC is computed with the exact quotient, which the CPU does not
    // have.
    #[test]
    fn a_start_keeps_the_rate_of_a_scaled_tsc() {
        let (mut clock, rate) = scaled();
        let saved = clock.moment(HostInstant::now(clock.host()));
        clock
            .start(&saved, khz(1_000_000), DowntimePolicy::Freeze, (Stood::UntilWall(0), HostTsc(HOST_TSC)), false)
            .unwrap();
        assert_eq!(clock.tsc_at(HostTsc(HOST_TSC)), GuestTsc(7));
        let later = HOST_TSC + 825_000_000_000;
        assert_eq!(clock.tsc_at(HostTsc(later)).0, 7 + rate.ticks(HOST_TSC, later));
        assert!(rate.ticks(HOST_TSC, later) < 275_000_000_000 - 40);
    }

    // Catches: a page of KVM's kvmclock that is taken to have the frequency that was requested. KVM computes it from
    // the host's frequency times the ratio, rounded down: 3 GHz times a third is 999,999 kHz.
    #[test]
    fn kvms_page_has_the_frequency_that_the_cpu_makes() {
        let (mut clock, _) = scaled();
        clock.adopt_kvm_clock(KvmClock {
            vm: vmtime::VmTime(5),
            host: HostTsc(HOST_TSC),
            late_ticks: 0,
            realtime_ns: None,
        });
        let expected = PageClock {
            tsc_timestamp: GuestTsc(7),
            system_time: vmtime::VmTime(5),
            scale: Scale::from_khz(khz(999_999)),
        };
        assert_eq!(clock.page(vmtime::TscAdjust::ZERO), expected);
    }
}
