//! Changes of the clock: by an operation in virtual time, a stop, a start, or a reading of KVM's clock.

use vmtime::{
    AdjustError, Adjusted, DowntimePolicy, GuestTsc, HostTsc, Khz, Moment, PageClock, Rate, Scale, Stood, Timeline,
    adjust,
};

use super::{Clock, OPERATIONS_PER_MS};
use crate::{
    kvm::KvmClock,
    machine::config::{TimeMode, source::TscSource},
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

    /// Stops VM time and TSC.
    pub fn stop(&mut self) {
        self.stop_at(self.host.tsc());
    }

    /// Stops VM time and TSC at what they were at the host TSC `host`.
    pub fn stop_at(&mut self, host: HostTsc) {
        self.timeline.stop(host);
    }

    /// Starts a stopped clock again at frequency `khz`: rebases page, TSC and reference clock. `stood` is the length of
    /// the stop.
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
        stood: Stood,
        hold: bool,
    ) -> Result<Adjusted, AdjustError> {
        let host = self.host.tsc();
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
        self.timeline = match self.mode {
            TimeMode::Virtual => Timeline::Virtual { tsc: adjusted.tsc, khz },
            TimeMode::Real => {
                // With source `scaled`, `follow_scaled_tsc` then says what the CPU makes of the host's TSC.
                let rate = Rate::Quotient { guest: khz, host: self.host.khz() };
                Timeline::Running { host, tsc: adjusted.tsc, rate }
            }
        };
        Ok(adjusted)
    }

    /// For an injected fault: advances the TSC by `ticks`, and rebases the reference clock with it, but not the page.
    /// Returns the new TSC.
    pub fn jump_tsc(&mut self, ticks: u64) -> GuestTsc {
        let tsc = self.tsc();
        let ahead = GuestTsc(tsc.0.saturating_add(ticks));
        self.reference.rebase(tsc, 0, ahead, self.khz);
        self.timeline = match self.timeline {
            Timeline::Stopped { .. } => Timeline::Stopped { tsc: ahead },
            Timeline::Virtual { khz, .. } => Timeline::Virtual { tsc: ahead, khz },
            Timeline::Running { host, tsc, rate } => {
                Timeline::Running { host, tsc: GuestTsc(tsc.0.saturating_add(ticks)), rate }
            }
        };
        ahead
    }

    /// With KVM's kvmclock: bases the page on this reading of KVM's clock. The page that KVM publishes has the same
    /// rate and differs from this one by rounding.
    pub fn adopt_kvm_clock(&mut self, kvm: KvmClock) {
        let tsc = self.timeline.tsc(kvm.host);
        self.page = PageClock { tsc_timestamp: tsc, system_time: kvm.vm, scale: Scale::from_khz(self.khz) };
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
