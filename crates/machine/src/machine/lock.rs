//! Locks that are taken in one order.
//!
//! Two threads that take two locks in different orders can deadlock. So each lock that is taken while another may be
//! held has a rank, and a thread that holds one takes only locks of higher ranks. A debug build panics at the first
//! lock that breaks this rule, even if no other thread holds a lock. A release build does not check.
//!
//! The ranks, and so the order, are in the types of [`super::shared::Shared`]'s fields.

use std::{
    ops::{Deref, DerefMut},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// A lock of the rank `RANK`, at most 63.
#[derive(Default)]
pub(crate) struct Ranked<T, const RANK: u32>(Mutex<T>);

/// What a [`Ranked`] lock holds, locked until it is dropped.
pub(crate) struct Guard<'a, T> {
    value: MutexGuard<'a, T>,
    #[cfg(debug_assertions)]
    _held: held::Held,
}

/// Locks, also after another thread panicked while it held the lock: the data is then as consistent as before.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T, const RANK: u32> Ranked<T, RANK> {
    pub(crate) const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Locks it; see [`lock`].
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        // Checked before waiting for the lock, because a deadlocked wait would never end.
        #[cfg(debug_assertions)]
        let held = held::Held::new(RANK);
        Guard {
            value: lock(&self.0),
            #[cfg(debug_assertions)]
            _held: held,
        }
    }

    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

/// The ranks that a thread holds.
#[cfg(debug_assertions)]
mod held {
    use std::cell::Cell;

    thread_local! {
        /// A bit for each rank.
        static RANKS: Cell<u64> = const { Cell::new(0) };
    }

    /// One held rank, until it is dropped.
    pub(super) struct Held(u32);

    impl Held {
        #[track_caller]
        pub(super) fn new(rank: u32) -> Self {
            let ranks = RANKS.get();
            assert!(ranks >> rank == 0, "a lock of rank {rank} is taken while ranks {ranks:#b} are held");
            RANKS.set(ranks | 1 << rank);
            Self(rank)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            RANKS.set(RANKS.get() & !(1 << self.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Two {
        first: Ranked<u8, 1>,
        second: Ranked<u8, 2>,
    }

    #[test]
    fn locks_are_taken_in_their_order() {
        let two = Two::default();
        let first = two.first.lock();
        *two.second.lock() = 7;
        // The locks may be released in any order.
        let second = two.second.lock();
        drop(first);
        assert_eq!(*second, 7);
        drop(second);
        drop(two.first.lock());
    }

    #[cfg(debug_assertions)]
    #[test]
    #[should_panic(expected = "a lock of rank 1 is taken while ranks 0b100 are held")]
    fn the_other_order_panics() {
        let two = Two::default();
        let _second = two.second.lock();
        drop(two.first.lock());
    }

    #[cfg(debug_assertions)]
    #[test]
    #[should_panic(expected = "a lock of rank 2 is taken while ranks 0b110 are held")]
    fn a_lock_that_is_held_panics_and_does_not_hang() {
        let two = Two::default();
        let (_first, _second) = (two.first.lock(), two.second.lock());
        drop(two.second.lock());
    }

    #[cfg(debug_assertions)]
    #[test]
    #[should_panic(expected = "a lock of rank 1 is taken while ranks 0b100 are held")]
    fn a_lock_released_out_of_order_leaves_the_others_held() {
        let two = Two::default();
        let first = two.first.lock();
        let _second = two.second.lock();
        drop(first);
        drop(two.first.lock());
    }

    #[test]
    fn each_thread_has_its_own_ranks() {
        let two = Two::default();
        let _second = two.second.lock();
        std::thread::scope(|scope| {
            scope.spawn(|| *two.first.lock() = 1);
        });
        assert_eq!(two.first.into_inner(), 1);
    }
}
