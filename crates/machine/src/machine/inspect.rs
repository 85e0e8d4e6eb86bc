//! Reads a machine's clock, ticks, vCPUs and costs, so that callers need not take its locks.

use std::collections::BTreeMap;

use guest_abi::{
    pvclock::{TIME_INFO_BYTES, TimeInfo, WALL_CLOCK_BYTES},
    report::Header,
    sites::Kind,
};
use vm_memory::{Bytes, GuestAddress};
use vmtime::{GuestTsc, Khz, Now, ReferenceClock, TscAdjust, VmTime};

use super::{
    Machine,
    audit::{GuestStopped, Summary, TimerAccount, TimerSummary},
    config::{LapicKind, TimeMode, source::TscSource},
    error::RunError,
    guest_clock::{ClockIoctls, ResumedClocks, StoppedClocks, VcpuClock},
    record::counters::Costs,
    vcpu::{Cpu, Phase},
    vcpus::Vcpus,
};
use crate::host::reading::Reading;

impl Machine {
    /// Now, by the clocks of a vCPU that has not moved its TSC.
    #[must_use]
    pub fn now(&self) -> Now {
        self.shared.clock.lock().now(TscAdjust::ZERO)
    }

    /// VM time, now.
    #[must_use]
    pub fn vm_time(&self) -> VmTime {
        self.now().vm
    }

    /// Real time: the base TSC of the guest and the host's CLOCK_MONOTONIC_RAW at one instant.
    #[must_use]
    pub fn beside_monotonic_raw(&self) -> (GuestTsc, Reading) {
        let clock = self.shared.clock.lock();
        let host = clock.host();
        let reading = Reading::of(host, host.os_clocks().raw_ns);
        (clock.tsc_at(reading.tsc), reading)
    }

    /// The guest's TSC frequency.
    #[must_use]
    pub fn tsc_khz(&self) -> Khz {
        self.shared.clock.lock().khz()
    }

    /// The TSC frequency with which a paused machine continues; the present one of a machine that runs.
    #[must_use]
    pub fn next_khz(&self) -> Khz {
        self.paused.map_or_else(|| self.tsc_khz(), |paused| paused.khz)
    }

    /// How time passes.
    #[must_use]
    pub fn time_mode(&self) -> TimeMode {
        self.shared.clock.lock().mode()
    }

    /// The kvmclock page of vCPU number `cpu` as it is in guest RAM, and how far that vCPU's TSC is ahead of the base;
    /// none if it has none.
    #[must_use]
    pub fn kvmclock_page(&self, cpu: usize) -> Option<(TimeInfo, TscAdjust)> {
        let local = &self.vcpus.user().get(cpu)?.local;
        Some((self.page_at(local.pvclock.address()?)?, local.tsc_adjust))
    }

    /// A copy of the reference clock.
    #[must_use]
    pub fn reference(&self) -> ReferenceClock {
        *self.shared.clock.lock().reference()
    }

    /// The source of the values that the guest's RDTSC returns.
    #[must_use]
    pub fn tsc_source(&self) -> TscSource {
        self.shared.clock.lock().source()
    }

    /// Real time: whether VM time ever reaches `at`. It does not if the guest's TSC overflows before.
    #[must_use]
    pub fn reaches(&self, at: VmTime) -> bool {
        let clock = self.shared.clock.lock();
        clock.least_tsc(at).and_then(|tsc| clock.host_at(tsc)).is_some()
    }

    /// Reads the tick rings, and returns the tick audit's counts; none if there is no tick ring that can be read.
    #[must_use]
    pub fn tick_summary(&self) -> Option<Summary> {
        self.shared.read_rings();
        self.shared.audit.lock().summary()
    }

    /// The number of ticks since boot, as far as their records have been read. It reads none itself, so that the trace
    /// stays as it is without the call.
    #[must_use]
    pub fn ticks_read(&self) -> Option<u64> {
        self.shared.audit.lock().summary().map(|summary| summary.next_seq)
    }

    /// The counts of the LAPICs' timer interrupts; none if KVM emulates the LAPICs.
    #[must_use]
    pub fn timer_summary(&self) -> Option<TimerSummary> {
        (self.lapic() == LapicKind::User).then(|| self.shared.audit.lock().timer())
    }

    /// Begins to account for what each vCPU's timer is armed for, or begins anew. Not with KVM's LAPICs. The machine
    /// must not run meanwhile.
    pub fn audit_timers(&mut self) {
        let clock = self.shared.clock.lock();
        for cpu in self.vcpus.user_mut() {
            cpu.local.audit_timer(&clock);
        }
    }

    /// What each vCPU's timer was armed for since [`Self::audit_timers`], and what became of it; by number of vCPU.
    /// Empty if that was not called.
    #[must_use]
    pub fn timer_accounts(&self) -> Vec<TimerAccount> {
        self.vcpus.user().iter().filter_map(|cpu| cpu.local.timers.as_ref().map(|timers| timers.account())).collect()
    }

    /// How often PVCLOCK_GUEST_STOPPED was set, and found cleared, in this process.
    #[must_use]
    pub fn guest_stopped(&self) -> GuestStopped {
        self.guest_stopped.sum_up(&self.shared.memory)
    }

    /// How far the guest's time of day is ahead of the host's (negative: behind), in nanoseconds, if the guest computes
    /// it from the wall clock that it last asked for. None if it has not asked, in virtual time, while VM time stands
    /// still, and with KVM's LAPICs, whose wall clock is KVM's.
    #[must_use]
    pub fn wall_error_ns(&self) -> Option<i64> {
        const NS_PER_SEC: u64 = 1_000_000_000;
        let (address, at_zero) = {
            let address = self.shared.wall.lock().read_msr();
            let clock = self.shared.clock.lock();
            let judged = address != 0 && clock.mode() == TimeMode::Real && !clock.is_stopped();
            (judged.then_some(address)?, clock.wall_ns_at_zero())
        };
        let mut words = [[0; 4]; WALL_CLOCK_BYTES / 4];
        self.shared.memory.read_slice(words.as_flattened_mut(), GuestAddress(address)).ok()?;
        let [_version, sec, nsec] = words.map(|word| u64::from(u32::from_le_bytes(word)));
        let told = sec.saturating_mul(NS_PER_SEC).saturating_add(nsec);
        Some(told.wrapping_sub(at_zero).cast_signed())
    }

    /// Why there is no tick ring to read, as text.
    #[must_use]
    pub fn why_no_ring(&self) -> String {
        self.shared.audit.lock().why_no_ring()
    }

    /// Whether the guest's image announces a tick ring that can be read. The guest may not have created it yet.
    #[must_use]
    pub fn announces_ring(&self) -> bool {
        self.shared.audit.lock().announces_ring()
    }

    /// Counters of what running has cost so far.
    #[must_use]
    pub fn costs(&self) -> Costs {
        self.shared.costs.read()
    }

    /// How many instructions were performed so far because this host's KVM cannot emulate them, by kind.
    #[must_use]
    pub fn assists(&self) -> BTreeMap<&'static str, u64> {
        self.shared.assists.read()
    }

    /// How many vCPUs it has.
    #[must_use]
    pub fn cpu_count(&self) -> usize {
        self.shared.vcpus.len()
    }

    /// What kind of trap site is patched at `address`, if one is.
    #[must_use]
    pub fn patched_site(&self, address: u64) -> Option<Kind> {
        self.shared.sites.at(address)
    }

    /// Timer interrupts that entered vCPU number `cpu` so far, in this process.
    #[must_use]
    pub fn timer_interrupts(&self, cpu: usize) -> u64 {
        self.vcpus.user().get(cpu).map_or(0, |cpu| cpu.local.timer_interrupts)
    }

    /// Whether the timer of vCPU number `cpu` is armed.
    #[must_use]
    pub fn has_timer_armed(&self, cpu: usize) -> bool {
        self.vcpus.user().get(cpu).is_some_and(|cpu| cpu.local.apic.next_deadline().is_some())
    }

    /// The header of the tick ring of vCPU number `cpu`, as the guest has it now; none if there is none.
    #[must_use]
    pub fn ring_header(&self, cpu: usize) -> Option<Header> {
        self.shared.audit.lock().header(&self.shared.memory, cpu)
    }

    /// Ticks that the guest has handled on vCPU number `cpu`.
    #[must_use]
    pub fn ticks_handled(&self, cpu: usize) -> Option<u64> {
        self.ring_header(cpu).map(|header| header.written)
    }

    /// Ticks that the guest will make on vCPU number `cpu`; 0 = without end.
    #[must_use]
    pub fn ticks_expected(&self, cpu: usize) -> Option<u64> {
        self.ring_header(cpu).map(|header| header.expected)
    }

    /// Where each vCPU is, as one line of text each; empty if KVM emulates the LAPICs.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn positions(&mut self) -> Result<Vec<String>, RunError> {
        let mut lines = Vec::new();
        for cpu in self.vcpus.user_mut() {
            cpu.drain(&self.shared)?;
            let Cpu { vcpu, local } = cpu;
            let (index, address) = (local.index, vcpu.registers().linear_rip);
            let interrupts = if vcpu.interrupts_enabled() { "on" } else { "off" };
            lines.push(match local.phase {
                Phase::WaitForSipi => format!("cpu {index} waits for a start-up message"),
                Phase::Running if local.halted => {
                    format!("cpu {index} halted before {address:#x}, interrupts {interrupts}")
                }
                Phase::Running => format!("cpu {index} at {address:#x}, interrupts {interrupts}"),
            });
        }
        Ok(lines)
    }

    /// The clocks of a paused machine; none while it runs.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn stopped_clocks(&self) -> Result<Option<StoppedClocks>, RunError> {
        let Some(paused) = &self.paused else { return Ok(None) };
        let vcpus = match &self.vcpus {
            Vcpus::User(cpus) => cpus
                .iter()
                .map(|cpu| VcpuClock {
                    page: cpu.local.pvclock.address().and_then(|address| self.page_at(address)),
                    armed: cpu.local.apic.armed(),
                    tsc_adjust: cpu.local.tsc_adjust,
                })
                .collect(),
            Vcpus::Kvm(cpus) => cpus
                .iter()
                .map(|cpu| {
                    let frozen = cpu.frozen()?;
                    Ok(VcpuClock {
                        page: cpu.page_address().and_then(|address| self.page_at(address)),
                        armed: frozen.armed,
                        tsc_adjust: frozen.tsc_adjust,
                    })
                })
                .collect::<Result<_, RunError>>()?,
        };
        Ok(Some(StoppedClocks { moment: paused.moment, vcpus }))
    }

    /// Which of the ioctls proposed for KVM's kvmclock this host has; none if the VMM publishes the pages.
    #[must_use]
    pub fn kvm_clock_ioctls(&self) -> Option<ClockIoctls> {
        let Vcpus::Kvm(cpus) = &self.vcpus else { return None };
        let vcpu = &cpus.first()?.vcpu;
        Some(ClockIoctls { clock_guest: vcpu.has_clock_guest(), tsc_scale: vcpu.has_tsc_scale() })
    }

    /// Where the last resume continued; none before the first one that was no boot.
    #[must_use]
    pub fn resumed_clocks(&self) -> Option<&ResumedClocks> {
        self.resumed.as_ref()
    }

    fn page_at(&self, address: u64) -> Option<TimeInfo> {
        let mut bytes = [0; TIME_INFO_BYTES];
        self.shared.memory.read_slice(&mut bytes, GuestAddress(address)).ok()?;
        Some(TimeInfo::from_bytes(&bytes))
    }
}
