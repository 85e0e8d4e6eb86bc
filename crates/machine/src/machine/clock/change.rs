//! What changes the clock: an operation in virtual time, a stop, a start, a measurement of KVM's.

use vmtime::{
    AdjustError, Adjusted, DowntimePolicy, GuestTsc, HostTsc, Khz, Moment, PageClock, Scale, Stood, Timeline, adjust,
};

use super::{Clock, OPERATIONS_PER_MS};
use crate::{
    kvm::KvmClock,
    machine::config::{TimeMode, source::TscSource},
};

impl Clock {
    /// One guest operation passes: in virtual time, time moves.
    pub fn spend_operation(&mut self) {
        if self.mode == TimeMode::Virtual {
            self.operations = self.operations.saturating_add(1);
            self.last_operation = self.host.tsc();
            self.timeline.spend(u64::from((self.khz.get() / OPERATIONS_PER_MS).max(1)));
        }
    }

    /// Virtual time: goes on at `target`, never back.
    pub fn jump_to(&mut self, target: GuestTsc) {
        self.timeline.jump_to(target);
    }

    /// Stops; VM time and TSC then stand still.
    pub fn stop(&mut self) {
        self.stop_at(self.host.tsc());
    }

    /// Stops, as of the host TSC `host`: VM time and TSC are what they were then.
    pub fn stop_at(&mut self, host: HostTsc) {
        self.timeline.stop(host);
    }

    /// Starts a stopped clock again at frequency `khz`, after it `stood` still: rebases page, TSC and reference clock.
    ///
    /// `hold`: the TSC goes on from its value, if it can be moved; false for one that is what the source gives.
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
            TscSource::Host | TscSource::Scaled if self.tsc_moves && hold => None,
            TscSource::Host => Some(GuestTsc(host.0)),
            TscSource::Scaled => Some(self.timeline.tsc(host)),
        };
        let adjusted = adjust::restore(saved, khz, policy, stood, held)?;
        self.before.rotate_right(1);
        self.before[0] = Some((self.reference, saved.tsc));
        self.reference.rebase(saved.tsc, adjusted.downtime_ns, adjusted.tsc, khz);
        self.khz = khz;
        self.last_operation = host;
        self.page = adjusted.page;
        self.timeline = match self.mode {
            TimeMode::Virtual => Timeline::Virtual { tsc: adjusted.tsc, khz },
            TimeMode::Real => Timeline::Running { host, tsc: adjusted.tsc, host_khz: self.host.khz(), khz },
        };
        Ok(adjusted)
    }

    /// For an injected fault: moves the TSC `ticks` ahead, and the reference clock with it, but not the page. Returns the TSC.
    pub fn bend(&mut self, ticks: u64) -> GuestTsc {
        let tsc = self.tsc();
        let bent = GuestTsc(tsc.0.saturating_add(ticks));
        self.reference.rebase(tsc, 0, bent, self.khz);
        self.timeline = match self.timeline {
            Timeline::Stopped { .. } => Timeline::Stopped { tsc: bent },
            Timeline::Virtual { khz, .. } => Timeline::Virtual { tsc: bent, khz },
            Timeline::Running { host, tsc, host_khz, khz } => {
                Timeline::Running { host, tsc: GuestTsc(tsc.0.saturating_add(ticks)), host_khz, khz }
            }
        };
        bent
    }

    /// The clock is KVM's: the page goes on from what KVM's clock showed. Its rate is that of the page that KVM publishes;
    /// the two differ by their roundings.
    pub fn follow(&mut self, kvm: KvmClock) {
        let tsc = self.timeline.tsc(kvm.host);
        self.page = PageClock { tsc_timestamp: tsc, system_time: kvm.vm, scale: Scale::from_khz(self.khz) };
    }

    /// As [`Self::stop`], at the instant of `kvm`.
    pub fn stop_with(&mut self, kvm: KvmClock) {
        self.follow(kvm);
        self.timeline = Timeline::Stopped { tsc: self.page.tsc_timestamp };
    }

    /// Source `scaled`: what a vCPU's TSC was measured to be at `host`.
    pub fn measured(&mut self, host: HostTsc, tsc: GuestTsc, khz: Khz) {
        self.timeline = Timeline::Running { host, tsc, host_khz: self.host.khz(), khz };
    }
}
