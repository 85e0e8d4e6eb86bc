//! Compares the armings of a migrated guest with those of a copy that was not migrated.
//!
//! Let the copy arm its timer for the VM time T. The migrated guest is in the same state, and wants T too. At its own
//! instant t it has to wait for T − t. If it computes with the new TSC frequency, its timer is due at T. If it computes
//! with the one before the migration, it arms as many ticks as that would need, and these last
//! (T − t) · f(before) / f(after): so its timer is due at t + that. The two instants are far apart, unless the interval
//! or the change of the frequency is small; then an arming says nothing.

use machine::audit::Arming;
use serde::Serialize;
use vmtime::{Khz, VmTime};

/// Instants that are nearer to each other than this are not told apart, in nanoseconds. An operation costs a
/// microsecond of virtual time, and a guest may take another path, say through a loop that reads the page again.
const NEAR_NS: u128 = 20_000;
/// Guests are in the same state as long as they arm their timers within this time of each other, in nanoseconds.
const SAME_STATE_NS: u64 = 10_000;
/// A guest that arms its timer again within this time has corrected it, in nanoseconds.
const CORRECTED_NS: u64 = 20_000;
/// Armings of a CPU that are compared after a migration. Later ones depend on what became of the first ones.
pub const COMPARED: usize = 4;

/// What an arming says about the frequency that the guest computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is due at the same VM time: the guest uses the new frequency, or none.
    Follows,
    /// It is as many TSC ticks away: the guest uses the frequency before the migration.
    Old,
    /// It was, and the guest armed for the right VM time at once.
    Corrected,
    /// Neither.
    Neither,
    /// Nothing: both would be due at nearly the same instant.
    Nothing,
}

/// An arming and the one that it is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// The migrated guest's.
    pub migrated: Arming,
    /// That of the copy.
    pub copy: Arming,
    /// What it says.
    pub answer: Answer,
}

/// Compares a CPU's first armings after a migration from the frequency `from` to `to`. In these lists they are in
/// order.
#[must_use]
pub fn compare(copy: &[Arming], migrated: &[Arming], from: Khz, to: Khz) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for (index, (copy, arming)) in copy.iter().zip(migrated).take(COMPARED).enumerate() {
        // The first one follows the interrupt of a deadline in flight, which in real time comes at another instant.
        let same = if index == 0 { copy.due.0.saturating_sub(copy.at.0) / 4 } else { SAME_STATE_NS };
        if copy.at.0.abs_diff(arming.at.0) > same {
            break;
        }
        let later = migrated.get(index.saturating_add(1)..).unwrap_or_default();
        let soon = |other: &&Arming| other.at.0.saturating_sub(arming.at.0) <= CORRECTED_NS;
        let answer = match answer(copy.due, arming, from, to) {
            Answer::Old
                if later
                    .iter()
                    .take_while(soon)
                    .any(|other| answer_for(copy.due, arming.at, other.due, from, to) == Answer::Follows) =>
            {
                Answer::Corrected
            }
            answer => answer,
        };
        comparisons.push(Comparison { migrated: *arming, copy: *copy, answer });
        // From here on the lists have another number of armings for the same instants.
        if answer == Answer::Corrected {
            break;
        }
    }
    comparisons
}

fn answer(wanted: VmTime, arming: &Arming, from: Khz, to: Khz) -> Answer {
    answer_for(wanted, arming.at, arming.due, from, to)
}

/// What a timer says that is armed at `at` and due at `due`, where `wanted` is wanted.
fn answer_for(wanted: VmTime, at: VmTime, due: VmTime, from: Khz, to: Khz) -> Answer {
    let Some(left) = wanted.0.checked_sub(at.0) else { return Answer::Nothing };
    // 64 bits times 27 bits.
    let old_left = u128::from(left) * u128::from(from.get()) / u128::from(to.get());
    let old = u128::from(at.0) + old_left;
    let (wanted, due) = (u128::from(wanted.0), u128::from(due.0));
    let apart = old.abs_diff(wanted);
    if apart < NEAR_NS {
        Answer::Nothing
    } else if due.abs_diff(wanted) <= apart / 4 {
        Answer::Follows
    } else if due.abs_diff(old) <= apart / 4 {
        Answer::Old
    } else {
        Answer::Neither
    }
}

#[cfg(test)]
mod tests {
    use machine::audit::ArmingKind;
    use proptest::prelude::*;

    use super::*;

    fn khz(khz: u64) -> Khz {
        Khz::new(khz).unwrap()
    }

    fn arming(at_us: u64, due_us: u64) -> Arming {
        Arming { kind: ArmingKind::Tsc, at: VmTime(at_us * 1000), due: VmTime(due_us * 1000) }
    }

    fn answers(copy: &[Arming], migrated: &[Arming], to: u64) -> Vec<Answer> {
        let comparisons = compare(copy, migrated, khz(2_000_000), khz(to));
        comparisons.iter().map(|comparison| comparison.answer).collect()
    }

    // Catches: the ratio the wrong way round; an interval compared in place of an instant.
    #[test]
    fn ticks_of_the_old_frequency_are_told_from_the_same_vm_time() {
        let copy = [arming(1_000, 11_000)];
        assert_eq!(answers(&copy, &[arming(1_000, 11_000)], 1_000_000), [Answer::Follows]);
        assert_eq!(answers(&copy, &[arming(1_000, 21_000)], 1_000_000), [Answer::Old]);
        assert_eq!(answers(&copy, &[arming(1_000, 6_000)], 4_000_000), [Answer::Old]);
        assert_eq!(answers(&copy, &[arming(1_000, 6_000)], 1_000_000), [Answer::Neither]);
        // Woken 2 ms later, it wants the same instant: 8 ms are left, of the old ticks.
        assert_eq!(answers(&copy, &[arming(3_000, 11_000)], 1_000_000), [Answer::Follows]);
        assert_eq!(answers(&copy, &[arming(3_000, 19_000)], 1_000_000), [Answer::Old]);
    }

    // Catches: a verdict made of a tiny interval, of one in the past, or of a frequency that hardly changed.
    #[test]
    fn small_differences_say_nothing() {
        let copy = [arming(1_000, 11_000)];
        assert_eq!(answers(&copy, &[arming(1_000, 11_000)], 2_002_000), [Answer::Nothing]);
        assert_eq!(answers(&[arming(1_000, 1_010)], &[arming(1_000, 1_020)], 1_000_000), [Answer::Nothing]);
        assert_eq!(answers(&[arming(9, 9)], &[arming(9, 9)], 1_000_000), [Answer::Nothing]);
    }

    // Catches: armings that are compared although the guests have been woken at different times.
    #[test]
    fn only_armings_in_the_same_state_are_compared() {
        let copy = [arming(0, 3_000), arming(5, 50_000), arming(3_000, 10_000)];
        let late = [arming(0, 6_000), arming(5, 100_000), arming(6_000, 14_000)];
        assert_eq!(answers(&copy, &late, 1_000_000), [Answer::Old, Answer::Old]);
        assert_eq!(answers(&copy, &copy, 1_000_000), [Answer::Follows; 3]);
        assert_eq!(answers(&copy, &[], 1_000_000), []);
        assert_eq!(answers(&[arming(0, 3_000)], &[arming(800, 3_000)], 1_000_000), []);
        let many = [arming(0, 9_000); 7];
        assert_eq!(answers(&many, &many, 1_000_000).len(), COMPARED);
    }

    // Catches: a guest that looks at the page again, and corrects what it armed in the meantime, called wrong.
    #[test]
    fn a_deadline_that_is_corrected_at_once_is_none_of_the_old_frequency() {
        let copy = [arming(0, 10_000), arming(10_000, 20_000)];
        let corrected = [arming(0, 20_000), arming(3, 10_000), arming(10_000, 20_000)];
        assert_eq!(answers(&copy, &corrected, 1_000_000), [Answer::Corrected]);
        let later = [arming(0, 20_000), arming(30, 10_000)];
        assert_eq!(answers(&copy, &later, 1_000_000), [Answer::Old]);
    }

    proptest! {
        // Catches: a product that wraps or a rounding that turns one answer into the other. The model guest arms for a
        // wanted instant by either frequency, in 128 bits, and rounds as it likes.
        #[test]
        fn a_guest_that_computes_with_one_frequency_is_recognised(
            (from, to) in (10_000..100_000_000u64, 10_000..100_000_000u64),
            at in 0..u64::MAX / 2,
            left in 0..1u64 << 50,
            rounding in 0..100u64,
            old in any::<bool>(),
        ) {
            let ticks = u128::from(left) * u128::from(if old { from } else { to }) / 1_000_000;
            let lasts = u64::try_from(ticks * 1_000_000 / u128::from(to)).unwrap_or(u64::MAX);
            let due = VmTime(at.saturating_add(lasts).saturating_add(rounding));
            prop_assume!(due.0 < u64::MAX);
            let told = answer_for(VmTime(at + left), VmTime(at), due, khz(from), khz(to));
            let apart = (i128::from(left) * i128::from(from) / i128::from(to) - i128::from(left)).unsigned_abs();
            // At 10 MHz a tick is 100 ns long.
            prop_assume!(apart > 1_000_000);
            prop_assert_eq!(told, if old { Answer::Old } else { Answer::Follows });
        }
    }
}
