//! Plays a recipe in place of this VMM's own restore, and measures the error of the pages that the guest then has.

use std::sync::{Mutex, PoisonError};

use machine::{
    Machine,
    policy::restorer::{Restored, Restorer, Saved},
};
use vmtime::{Khz, TscAdjust};

use super::{
    Recipe, kvm, own,
    step::{Destination, Op},
};

/// A recipe to be played, and then what it was played on.
#[derive(Debug)]
pub struct Played<'a> {
    recipe: &'a Recipe,
    host_khz: Khz,
    was: Mutex<Option<(Saved, Restored)>>,
}

impl<'a> Played<'a> {
    /// `recipe`, to a host whose TSC has the frequency `host_khz`.
    #[must_use]
    pub fn new(recipe: &'a Recipe, host_khz: Khz) -> Self {
        Self { recipe, host_khz, was: Mutex::new(None) }
    }

    /// How far each vCPU's TSC is ahead of vCPU 0's by the restore alone.
    #[must_use]
    pub fn tscs_ahead(&self) -> Vec<TscAdjust> {
        let was = self.was.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((saved, restored)) = &*was else { return Vec::new() };
        let cpus = saved.cpus.iter().zip(&restored.cpus);
        cpus.map(|(before, after)| TscAdjust(after.tsc_adjust.0.wrapping_sub(before.tsc_adjust.0))).collect()
    }

    /// How far the kvmclock page of each vCPU, as it is in guest RAM after the restore, is ahead of that vCPU's TSC, in
    /// nanoseconds; none for a vCPU without a page. Call it before the guest runs.
    #[must_use]
    pub fn page_errors_ns(&self, machine: &Machine) -> Vec<Option<i64>> {
        let was = self.was.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((saved, restored)) = &*was else { return Vec::new() };
        let errors = saved.cpus.iter().enumerate().map(|(cpu, before)| {
            let (page, adjust) = machine.kvmclock_page(cpu)?;
            // A TSC that was moved while the VM stayed where it is does not stand for another VM time.
            let adjust = if self.recipe.destination == Destination::Same { adjust } else { before.tsc_adjust };
            let page = (page.tsc_timestamp, page.system_time);
            Some(error_ns(saved, restored, self.recipe.destination, adjust, page))
        });
        errors.collect()
    }
}

impl Restorer for Played<'_> {
    fn restore(&self, saved: &Saved) -> Restored {
        let restored = self.recipe.restored(self.host_khz, saved);
        *self.was.lock().unwrap_or_else(PoisonError::into_inner) = Some((saved.clone(), restored.clone()));
        restored
    }
}

/// How far a page that shows `system_time` at the TSC `tsc` of a vCPU is ahead of that TSC, to the nearest nanosecond.
///
/// Before the restore the vCPU's TSC, less its `adjust`, was one clock with VM time. With the same frequency it still
/// is, counted from the stop. With another one it is counted from where the guest continues.
pub(super) fn error_ns(
    saved: &Saved,
    restored: &Restored,
    destination: Destination,
    adjust: TscAdjust,
    (tsc, system_time): (u64, u64),
) -> i64 {
    let (from, vm) = if destination == Destination::Same {
        // The page that it had counts on.
        (saved.moment.page.tsc_timestamp.0, i128::from(saved.moment.page.system_time.0))
    } else if saved.khz == saved.moment.khz {
        (saved.moment.tsc.0, i128::from(saved.moment.vm.0))
    } else {
        (restored.tsc.0, i128::from(saved.moment.vm.0) + i128::from(restored.elapsed_ns))
    };
    let khz = i128::from(saved.khz.get());
    let ticks = i128::from(tsc) - i128::from(adjust.0.cast_signed()) - i128::from(from);
    // Half of the divisor more, then down: to the nearest.
    let told = (ticks * 2_000_000 + khz).div_euclid(khz * 2);
    let error = i128::from(system_time) - vm - told;
    i64::try_from(error).unwrap_or(if error < 0 { i64::MIN } else { i64::MAX })
}

/// To a host whose TSC has the frequency that the guest's is to have.
impl Restorer for Recipe {
    fn restore(&self, saved: &Saved) -> Restored {
        self.restored(saved.khz, saved)
    }
}

impl Recipe {
    fn restored(&self, host_khz: Khz, saved: &Saved) -> Restored {
        match self.destination {
            Destination::Kvm => kvm::play(self, host_khz, saved),
            Destination::Vmm | Destination::Same => own::play(self, saved),
        }
    }

    /// Whether the guest stands still for a time: not if the VM stays where it is and nothing but its clocks changes.
    #[must_use]
    pub fn stops_the_guest(&self) -> bool {
        self.destination != Destination::Same || self.hosts.downtime_ns != 0
    }

    /// The frequency that a guest of `guest_khz` has on a host of `host_khz`.
    #[must_use]
    pub fn khz_there(&self, guest_khz: Khz, host_khz: Khz) -> Khz {
        let sets = self.restore.iter().flat_map(|group| group.steps()).any(|step| step.op == Op::SetTscKhz);
        if sets && self.hosts.tsc_scaling { guest_khz } else { host_khz }
    }
}
