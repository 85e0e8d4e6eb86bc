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
//! | new page, if restored at 1 GHz instead | 0 s at TSC 0, as before | 3 s at TSC 3,000,000,000 |
//! | deadline, keep | 5,001,000,000: in 0.5 ms, half of what was asked | 5,001,000,000: due, 2.999 s late |
//! | deadline, rescale | 5,002,000,000: in 1 ms | 11,000,000,000: due, 2.999 s late |
//! | deadline, fire | 5,000,000,000: due, 1 ms early | 11,000,000,000: due |

use core::time::Duration;

use crate::{ExactTime, GuestTsc, Khz, NS_KHZ_PER_TICK, PageClock, Remainder, Scale, VmTime, rebase};

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
    /// As [`Self::CatchUp`]; the host also tells the guest, as steal time, that its vCPUs did not run.
    Steal,
}

impl DowntimePolicy {
    /// The policy's name on the command line and in a snapshot.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::CatchUp => "catch-up",
            Self::Steal => "steal",
        }
    }

    /// Whether VM time advances.
    #[must_use]
    pub const fn advances(self) -> bool {
        matches!(self, Self::CatchUp | Self::Steal)
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
    /// How far VM time is ahead of that page's line.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Remainder::is_zero"))]
    pub remainder: Remainder,
    /// Wall-clock time (CLOCK_REALTIME), in nanoseconds since the Unix epoch.
    pub wall_ns: u64,
    /// TAI − UTC at that instant, in seconds; none if the host's kernel was not told, and in virtual time.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub tai_offset_s: Option<i32>,
    /// By how many nanoseconds `wall_ns` may differ from the wall clock at the instant of `tsc`; none if that is
    /// unknown, and in virtual time.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub wall_error_ns: Option<u64>,
}

impl Moment {
    /// A save when the guest's TSC, of `khz`, was `tsc` and its page `page`, at `wall_ns` of CLOCK_REALTIME.
    #[must_use]
    pub fn new(page: PageClock, tsc: GuestTsc, khz: Khz, wall_ns: u64) -> Self {
        let (vm, remainder) = (page.vm_time(tsc), Remainder::ZERO);
        Self { tsc, vm, khz, page, remainder, wall_ns, tai_offset_s: None, wall_error_ns: None }
    }

    /// Whether its clocks agree.
    ///
    /// # Errors
    /// [`AdjustError::BeforePage`], [`AdjustError::Contradiction`].
    pub fn check(&self) -> Result<(), AdjustError> {
        let Self { tsc, vm, khz: _, page, remainder: _, wall_ns: _, tai_offset_s: _, wall_error_ns: _ } = *self;
        if tsc < page.tsc_timestamp {
            return Err(AdjustError::BeforePage { tsc, base: page.tsc_timestamp });
        }
        // vm = page(tsc)
        if page.vm_time(tsc) != vm {
            return Err(AdjustError::Contradiction { vm, page: page.vm_time(tsc) });
        }
        Ok(())
    }

    /// VM time without rounding, when the guest's TSC was or is `tsc`.
    #[must_use]
    pub fn exact(&self, tsc: GuestTsc) -> ExactTime {
        self.page.exact(tsc).ahead_by(self.remainder)
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
    /// VM time at `tsc`, as `page` gives it.
    pub vm: VmTime,
    /// The page to publish. Its base is this instant or a little earlier: see [`rebase`].
    pub page: PageClock,
    /// How far VM time is ahead of the page's line.
    pub remainder: Remainder,
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
/// VM time without rounding continues from its value at the save, plus the downtime. With the same multiplier and shift
/// the guest reads the same function of its TSC: the same page, if the TSC continues with its value under freeze. With
/// others the new page passes as near to it as a base can, and what is left is the remainder: see [`rebase`]. The
/// same arithmetic serves a restore to the same frequency and a resume.
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
    let Moment { tsc: tsc_saved, vm: vm_saved, khz: _, page: old, remainder, wall_ns, .. } = *saved;
    saved.check()?;

    // downtime = 0                                           freeze
    //          = max(wall_now − wall, 0), or what was given  catch-up, steal
    let (downtime, clamped) = match (policy, stood) {
        (DowntimePolicy::Freeze, _) => (0, false),
        (DowntimePolicy::CatchUp | DowntimePolicy::Steal, Stood::UntilWall(now)) => {
            (u128::from(now.saturating_sub(wall_ns)), now < wall_ns)
        }
        (DowntimePolicy::CatchUp | DowntimePolicy::Steal, Stood::For(length)) => (length.as_nanos(), false),
    };

    // The guest's clock never goes back: it reads at least vm_saved + downtime.
    let past_end = AdjustError::VmTimeOverflow { vm: vm_saved, downtime_ns: downtime };
    let downtime_ns = u64::try_from(downtime).map_err(|_| past_end)?;
    let least = vm_saved.0.checked_add(downtime_ns).map(VmTime).ok_or(past_end)?;

    // tsc = held_tsc, or tsc_saved + ⌊downtime · khz_new / 10⁶⌋
    let tsc = match held_tsc {
        Some(tsc) => tsc,
        None => {
            let ticks = u128::from(downtime_ns) * u128::from(khz.get()) / NS_KHZ_PER_TICK;
            let tsc = u64::try_from(ticks).ok().and_then(|ticks| tsc_saved.0.checked_add(ticks));
            GuestTsc(tsc.ok_or(AdjustError::TscOverflow { tsc: tsc_saved, downtime_ns, khz })?)
        }
    };

    // exact_new(tsc) = exact_old(tsc_saved) + downtime
    let scale = Scale::from_khz(khz);
    let same = if scale == old.scale { rebase::moved(&old, tsc_saved, tsc, downtime_ns) } else { None };
    let (page, remainder) = match same {
        Some(page) => (page, remainder),
        None => rebase::through(saved.exact(tsc_saved).after_ns(downtime_ns), tsc, least, scale),
    };
    Ok(Adjusted { tsc, vm: page.vm_time(tsc), page, remainder, downtime_ns, clamped })
}

/// When a deadline falls due that a restore has moved: what it was when the guest armed it. Each later restore computes
/// from this and not from the moved deadline, which was rounded to a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Due {
    /// The deadline in force, as a base TSC. If another is in force, the guest has armed anew, and this is void.
    pub tsc: GuestTsc,
    /// VM time without rounding at the deadline that the guest armed.
    pub exact: ExactTime,
    /// What the guest's clock would have read there.
    pub read: VmTime,
}

/// The TSC deadline in force after a restore, for one `armed` at the save; `due` if an earlier restore has moved it.
/// Never 0, which would disarm; `armed` must not be 0 (disarmed) either. Also returns the state that the next restore
/// needs.
///
/// - keep: `armed`.
/// - rescale: `armed` if the page is the same. Otherwise the least TSC at which both VM time without rounding and the
///   guest's reading of it are what they were to be at the deadline that the guest armed: not early by either.
///   A deadline that was due stays due, since neither goes back. One that the new TSC reaches only past 64 bits becomes
///   [`u64::MAX`], centuries away.
/// - fire: the TSC with which the guest continues.
#[must_use]
pub fn deadline(
    policy: DeadlinePolicy,
    armed: GuestTsc,
    due: Option<Due>,
    saved: &Moment,
    new: &Adjusted,
) -> (GuestTsc, Option<Due>) {
    let never_0 = |tsc: GuestTsc| tsc.max(GuestTsc(1));
    match policy {
        DeadlinePolicy::Keep => (never_0(armed), None),
        DeadlinePolicy::Fire => (never_0(new.tsc), None),
        DeadlinePolicy::Rescale => {
            let fresh = || Due { tsc: armed, exact: saved.exact(armed), read: saved.page.vm_time(armed) };
            let due = due.filter(|due| due.tsc == armed).unwrap_or_else(fresh);
            let tsc = if (new.page, new.remainder) == (saved.page, saved.remainder) {
                armed
            } else {
                let by_line = new.page.least_tsc_of_line(due.exact.on_line(new.remainder));
                let by_reading = new.page.least_tsc(due.read);
                by_line.zip(by_reading).map_or(GuestTsc(u64::MAX), |(line, reading)| line.max(reading))
            };
            let tsc = never_0(tsc);
            (tsc, Some(Due { tsc, ..due }))
        }
    }
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
