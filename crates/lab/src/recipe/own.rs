//! Recipes without KVM's LAPIC and kvmclock: this VMM's own restore with a step left out, too early or wrong, and a VM
//! that stays where it is.

use machine::policy::restorer::{Restored, RestoredCpu, Saved, SavedCpu};
use vlapic::Armed;
use vmtime::{GuestTsc, Khz, NS_KHZ_PER_TICK, PageClock, Remainder, TscAdjust, VmTime};

use super::{
    Recipe,
    kvm::billionths,
    schedule::schedule,
    step::{DeadlineBy, Destination, Msr, Op, SetMsrs, ZeroDeadline},
};

/// A vCPU while the steps are taken.
struct Cpu {
    saved: SavedCpu,
    /// LVTT has its value.
    lapic: bool,
    /// The TSC has its value; before that it counts from 0.
    tsc: bool,
    /// A deadline that was written before the TSC.
    early: bool,
    armed: Armed,
    adjust: TscAdjust,
    page: Option<PageClock>,
    guest_stopped: bool,
}

/// Ticks in `ns` nanoseconds.
fn ticks(ns: u64, khz: Khz) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(khz.get()) / NS_KHZ_PER_TICK).unwrap_or(u64::MAX)
}

/// How a guest continues after these steps.
pub(super) fn play(recipe: &Recipe, saved: &Saved) -> Restored {
    let own = saved.own;
    let same = recipe.destination == Destination::Same;
    let cpu = |saved: &SavedCpu| Cpu {
        saved: *saved,
        lapic: same,
        tsc: same,
        early: false,
        armed: if same || matches!(saved.own_armed, Armed::Ns(_) | Armed::Count { .. }) {
            saved.own_armed
        } else {
            Armed::Disarmed
        },
        adjust: saved.tsc_adjust,
        page: None,
        guest_stopped: false,
    };
    let mut cpus: Vec<Cpu> = saved.cpus.iter().map(cpu).collect();
    let (mut tsc, mut page, mut remainder) = (own.tsc, own.page, own.remainder);
    // Of a VM that stays where it is, the page stays right.
    let mut vmclock = false;
    // The last base of KVM's page, and what updates of it have added, in billionths of a nanosecond.
    let (mut based_ns, mut raw) = (-i128::from(recipe.hosts.page_age_ns), 0);
    for step in schedule(&recipe.restore, cpus.len(), recipe.hosts.downtime_ns).0 {
        let number = u64::try_from(step.cpu).unwrap_or(u64::MAX);
        match step.op {
            Op::SetMsrs(SetMsrs { msrs, zero_deadline, deadline_by, tsc_ahead_ns, tsc_ahead_ns_per_cpu }) => {
                if msrs.contains(&Msr::Tsc) && step.cpu == 0 {
                    tsc = GuestTsc(tsc.0.saturating_add(ticks(*tsc_ahead_ns, saved.khz)));
                }
                let Some(cpu) = cpus.get_mut(step.cpu) else { continue };
                let ahead = ticks(tsc_ahead_ns_per_cpu.saturating_mul(number), saved.khz);
                if *deadline_by == DeadlineBy::Khz {
                    let armed = by_khz(cpu.saved.own_armed, saved, recipe.hosts.guest_uptime_ns);
                    (cpu.saved.own_armed, cpu.saved.own_due) = (armed, None);
                    // One of this VMM's own MSR is in place already.
                    if matches!(armed, Armed::Ns(_)) {
                        cpu.armed = armed;
                    }
                }
                cpu.write_msrs(msrs, *zero_deadline, TscAdjust(cpu.adjust.0.wrapping_add(ahead)), tsc);
            }
            Op::SetLapic => {
                if let Some(cpu) = cpus.get_mut(step.cpu) {
                    cpu.lapic = true;
                }
            }
            Op::PublishPage { base_ahead_ns } => {
                if let Some(cpu) = cpus.get_mut(step.cpu) {
                    // From where the guest continues: the page's own base may be long ago.
                    let base = if *base_ahead_ns == 0 {
                        own.page
                    } else {
                        PageClock {
                            tsc_timestamp: GuestTsc(own.tsc.0.saturating_add(ticks(*base_ahead_ns, saved.khz))),
                            system_time: VmTime(own.vm.0.saturating_add(*base_ahead_ns)),
                            ..own.page
                        }
                    };
                    cpu.page = Some(PageClock { tsc_timestamp: cpu.adjust.from_base(base.tsc_timestamp), ..base });
                }
            }
            Op::UpdateVmclock => vmclock = true,
            Op::KvmclockCtrl => {
                if let Some(cpu) = cpus.get_mut(step.cpu) {
                    cpu.guest_stopped = cpu.page.is_some();
                }
            }
            Op::MasterclockUpdate => {
                raw += i128::from(recipe.hosts.raw_ppb) * (i128::from(step.at_ns) - based_ns);
                based_ns = i128::from(step.at_ns);
                page = rebased(saved, step.at_ns, billionths(raw));
                remainder = Remainder::ZERO;
                for cpu in &mut cpus {
                    let tsc_timestamp = cpu.adjust.from_base(page.tsc_timestamp);
                    cpu.page = Some(PageClock { tsc_timestamp, ..page });
                }
            }
            _ => {}
        }
    }
    let cpus = cpus.iter().map(|cpu| cpu.restored(tsc)).collect();
    Restored { tsc, elapsed_ns: 0, page, remainder, stable: true, vmclock, cpus }
}

/// When `armed` fires by ticks over kHz, counted from the boot of a guest that has been up for `uptime_ns`: when so
/// many nanoseconds have passed. The page then shows what it makes of their ticks.
fn by_khz(armed: Armed, saved: &Saved, uptime_ns: u64) -> Armed {
    let shown = i128::try_from(saved.own.page.scale.ns(ticks(uptime_ns, saved.khz))).unwrap_or(i128::MAX);
    let ahead_ns = shown.saturating_sub(i128::from(uptime_ns));
    let moved = |at: u64, by: i128| u64::try_from(i128::from(at).saturating_add(by).max(1)).unwrap_or(u64::MAX);
    match armed {
        Armed::Ns(at) => Armed::Ns(VmTime(moved(at.0, ahead_ns))),
        Armed::Tsc(tsc) => {
            let by = ahead_ns.saturating_mul(i128::from(saved.khz.get())) / 1_000_000;
            Armed::Tsc(GuestTsc(moved(tsc.0, by)))
        }
        Armed::Disarmed | Armed::Count { .. } => armed,
    }
}

/// The page that KVM bases on the instant `at_ns` after the stop, where its clock is `ahead_ns` of the old page's line.
fn rebased(saved: &Saved, at_ns: u64, ahead_ns: i128) -> PageClock {
    let old = saved.moment.page;
    let tsc = saved.moment.tsc.0.saturating_add(ticks(at_ns, saved.khz));
    let khz = i128::from(saved.khz.get());
    let since = i128::from(tsc) - i128::from(old.tsc_timestamp.0);
    // To the nearest nanosecond.
    let line = i128::from(old.system_time.0) + (since * 2_000_000 + khz).div_euclid(khz * 2);
    let system_time = VmTime(u64::try_from((line + ahead_ns).max(0)).unwrap_or(u64::MAX));
    PageClock { tsc_timestamp: GuestTsc(tsc), system_time, scale: saved.own.page.scale }
}

impl Cpu {
    fn write_msrs(&mut self, msrs: &[Msr], zero: ZeroDeadline, adjust: TscAdjust, tsc: GuestTsc) {
        for msr in msrs {
            match msr {
                Msr::Tsc => (self.tsc, self.adjust) = (true, adjust),
                // LVTT is not in deadline mode before the LAPIC is written: the write is dropped.
                Msr::Deadline if !self.lapic => {}
                Msr::Deadline => {
                    self.armed = match (self.saved.own_armed, zero) {
                        (Armed::Disarmed, ZeroDeadline::Now) if self.saved.in_deadline_mode => {
                            Armed::Tsc(GuestTsc(self.adjust.from_base(tsc).0.max(1)))
                        }
                        (armed, _) => armed,
                    };
                    self.early = !self.tsc;
                }
                Msr::Kvmclock => {}
            }
        }
    }

    fn restored(&self, tsc: GuestTsc) -> RestoredCpu {
        let armed = match self.armed {
            // The host's timer was set for the distance from 0 to the deadline.
            Armed::Tsc(deadline) if self.early => {
                Armed::Tsc(GuestTsc(self.adjust.from_base(tsc).0.saturating_add(deadline.0)))
            }
            armed => armed,
        };
        RestoredCpu {
            tsc_adjust: self.adjust,
            armed,
            due: self.saved.own_due.filter(|_| armed == self.saved.own_armed),
            page: self.page,
            guest_stopped: self.guest_stopped,
        }
    }
}
