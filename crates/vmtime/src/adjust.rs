//! What a restore does to the guest's TSC, to VM time and to the deadline in flight.
//!
//! # Worked example
//!
//! Saved: a TSC of 1 GHz stands at 5,000,000,000; the page says 0 ns at TSC 0; a deadline is armed at TSC
//! 5,001,000,000, in 1 ms. The snapshot is restored 3 s later with a TSC of 2 GHz.
//!
//! | | freeze | catch-up |
//! |---|---|---|
//! | VM time advances by | 0 | 3 s |
//! | TSC goes on at | 5,000,000,000 | 5,000,000,000 + 3·10⁹ ns · 2 GHz = 11,000,000,000 |
//! | new page | 5 s at TSC 5,000,000,000 | 8 s at TSC 11,000,000,000 |
//! | deadline, keep | 5,001,000,000: in 0.5 ms, half of what was asked | 5,001,000,000: due, 2.999 s late |
//! | deadline, rescale | 5,002,000,000: in 1 ms | 11,000,000,000: due, 2.999 s late |
//! | deadline, fire | 5,000,000,000: due, 1 ms early | 11,000,000,000: due |

use core::time::Duration;

use crate::{GuestTsc, Khz, NS_KHZ_PER_TICK, PageClock, Scale, VmTime};

/// What becomes of a deadline that was armed when the VM was saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum DeadlinePolicy {
    /// It keeps its raw TSC value, which means another time now. What every VMM does today.
    Keep,
    /// It fires at the same VM time.
    #[default]
    Rescale,
    /// It fires at once, and the guest arms again.
    Fire,
}

impl DeadlinePolicy {
    /// The policy's name on the command line and in a snapshot.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Rescale => "rescale",
            Self::Fire => "fire",
        }
    }
}

/// What becomes of VM time between save and restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum DowntimePolicy {
    /// It stands still.
    #[default]
    Freeze,
    /// It advances by the wall-clock time that passed, never back.
    CatchUp,
}

impl DowntimePolicy {
    /// The policy's name on the command line and in a snapshot.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::CatchUp => "catch-up",
        }
    }
}

/// The instant of a save, on every clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Moment {
    /// The guest's TSC.
    pub tsc: GuestTsc,
    /// VM time, as `page` gives it for `tsc`.
    pub vm: VmTime,
    /// The guest TSC's frequency until then.
    pub khz: Khz,
    /// The page that the guest had.
    pub page: PageClock,
    /// Wall-clock time, in nanoseconds since the Unix epoch.
    pub wall_ns: u64,
}

impl Moment {
    /// Whether its clocks agree.
    ///
    /// # Errors
    /// [`AdjustError::BeforePage`], [`AdjustError::Contradiction`].
    pub fn check(&self) -> Result<(), AdjustError> {
        let Self { tsc, vm, khz: _, page, wall_ns: _ } = *self;
        if tsc < page.tsc_timestamp {
            return Err(AdjustError::BeforePage { tsc, base: page.tsc_timestamp });
        }
        // vm = page(tsc)
        if page.vm_time(tsc) != vm {
            return Err(AdjustError::Contradiction { vm, page: page.vm_time(tsc) });
        }
        Ok(())
    }
}

/// How long a VM stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stood {
    /// Until this wall-clock time, in nanoseconds since the Unix epoch. The wall clock can be set back meanwhile.
    UntilWall(u64),
    /// For so long: given by the user, or measured by a clock that cannot be set.
    For(Duration),
}

/// Where the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adjusted {
    /// The guest's TSC.
    pub tsc: GuestTsc,
    /// VM time at `tsc`.
    pub vm: VmTime,
    /// The page to publish: its base is this instant.
    pub page: PageClock,
    /// By how much VM time advanced since the save, in nanoseconds: 0 under freeze.
    pub downtime_ns: u64,
    /// For the log: the wall clock said that the restore came before the save, and the downtime was taken as 0.
    pub clamped: bool,
}

/// Why a saved moment cannot be continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdjustError {
    /// The guest would have read a wrapped clock: no VM of ours was saved so.
    #[error("the saved TSC {tsc} is before the base {base} of the saved page", tsc = .tsc.0, base = .base.0)]
    BeforePage {
        /// The saved TSC.
        tsc: GuestTsc,
        /// The page's `tsc_timestamp`.
        base: GuestTsc,
    },
    /// The saved VM time and the saved page contradict each other.
    #[error("the saved VM time is {vm} ns, but the saved page gives {page} ns", vm = .vm.0, page = .page.0)]
    Contradiction {
        /// The saved VM time.
        vm: VmTime,
        /// VM time from the saved page at the saved TSC.
        page: VmTime,
    },
    /// VM time would end.
    #[error(
        "a VM time of {vm} ns and a downtime of {downtime_ns} ns exceed 64 bits; use a shorter --downtime-length, or \
         --downtime freeze",
        vm = .vm.0
    )]
    VmTimeOverflow {
        /// The saved VM time.
        vm: VmTime,
        /// The downtime.
        downtime_ns: u128,
    },
    /// The TSC would end.
    #[error(
        "a TSC of {tsc} and a downtime of {downtime_ns} ns at {khz} exceed 64 bits; use a shorter --downtime-length, or \
         --downtime freeze",
        tsc = .tsc.0
    )]
    TscOverflow {
        /// The saved TSC.
        tsc: GuestTsc,
        /// The downtime.
        downtime_ns: u64,
        /// The new frequency.
        khz: Khz,
    },
}

/// Where a guest saved at `saved` goes on with a TSC of `khz`, after it `stood` still.
///
/// `held_tsc` is the guest's TSC now where the TSC source cannot set it (source `host`): then only the page is
/// rebased.
///
/// `page_new(tsc) − page_old(tsc_saved) = downtime_ns` exactly: the new page's base is the restore itself, where no
/// tick has passed that could be rounded. The same arithmetic serves a restore to the same frequency and a resume.
///
/// # Errors
/// [`AdjustError`]: the saved numbers contradict each other, or a clock would pass 64 bits.
pub fn restore(
    saved: &Moment,
    khz: Khz,
    policy: DowntimePolicy,
    stood: Stood,
    held_tsc: Option<GuestTsc>,
) -> Result<Adjusted, AdjustError> {
    // The old frequency is in the old page already, with the page's rounding.
    let Moment { tsc: tsc_saved, vm: vm_saved, khz: _, page: _, wall_ns } = *saved;
    saved.check()?;

    // downtime = 0                                           freeze
    //          = max(wall_now − wall, 0), or what was given  catch-up
    let (downtime, clamped) = match (policy, stood) {
        (DowntimePolicy::Freeze, _) => (0, false),
        (DowntimePolicy::CatchUp, Stood::UntilWall(now)) => (u128::from(now.saturating_sub(wall_ns)), now < wall_ns),
        (DowntimePolicy::CatchUp, Stood::For(length)) => (length.as_nanos(), false),
    };

    // vm = vm_saved + downtime
    let past_end = AdjustError::VmTimeOverflow { vm: vm_saved, downtime_ns: downtime };
    let downtime_ns = u64::try_from(downtime).map_err(|_| past_end)?;
    let vm = vm_saved.0.checked_add(downtime_ns).map(VmTime).ok_or(past_end)?;

    // tsc = held_tsc, or tsc_saved + ⌊downtime · khz_new / 10⁶⌋
    let tsc = match held_tsc {
        Some(tsc) => tsc,
        None => {
            let ticks = u128::from(downtime_ns) * u128::from(khz.get()) / NS_KHZ_PER_TICK;
            let tsc = u64::try_from(ticks).ok().and_then(|ticks| tsc_saved.0.checked_add(ticks));
            GuestTsc(tsc.ok_or(AdjustError::TscOverflow { tsc: tsc_saved, downtime_ns, khz })?)
        }
    };

    // page_new(t) = vm + scale(khz_new)(t − tsc)
    let page = PageClock { tsc_timestamp: tsc, system_time: vm, scale: Scale::from_khz(khz) };
    Ok(Adjusted { tsc, vm, page, downtime_ns, clamped })
}

/// The TSC deadline in force after a restore, for one `armed` on page `old`, when the guest goes on at `now` on page
/// `new`. Never 0, which would disarm; a disarmed timer (0) is not to be asked about.
///
/// - keep: `armed`.
/// - rescale: the least `d` with `new(d) ≥ old(armed)`. A deadline that was due stays due, since its VM time is not
///   after the new page's base. One that the new TSC reaches only past 64 bits becomes [`u64::MAX`], centuries away.
/// - fire: `now`.
#[must_use]
pub fn deadline(policy: DeadlinePolicy, armed: GuestTsc, old: &PageClock, new: &PageClock, now: GuestTsc) -> GuestTsc {
    let kept = match policy {
        DeadlinePolicy::Keep => armed,
        DeadlinePolicy::Rescale => new.least_tsc(old.vm_time(armed)).unwrap_or(GuestTsc(u64::MAX)),
        DeadlinePolicy::Fire => now,
    };
    kept.max(GuestTsc(1))
}

/// The deadline in force after a restore, for one armed in VM time: it has kept its meaning, so only `fire` changes it,
/// to `now`. Never 0, which would disarm; a disarmed timer (0) is not to be asked about.
#[must_use]
pub fn ns_deadline(policy: DeadlinePolicy, armed: VmTime, now: VmTime) -> VmTime {
    let kept = match policy {
        DeadlinePolicy::Keep | DeadlinePolicy::Rescale => armed,
        DeadlinePolicy::Fire => now,
    };
    kept.max(VmTime(1))
}

#[cfg(test)]
#[path = "adjust_tests.rs"]
mod tests;
