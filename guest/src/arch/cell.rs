//! State that the boot code, the interrupt handler and other CPUs share.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

use super::cpu::{Alone, Closed};

/// A value for code with interrupts closed, while one CPU is up. It costs no instruction.
pub struct Quiet<T>(UnsafeCell<T>);

// SAFETY: a reference lives no longer than the borrow of the one proof that nobody else runs.
unsafe impl<T: Send> Sync for Quiet<T> {}

impl<T> Quiet<T> {
    /// A cell with `value`.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The value.
    #[inline(always)]
    pub fn get<'a>(&'a self, _: &'a mut Closed<Alone>) -> &'a mut T {
        // SAFETY: the proof is borrowed as long as the reference lives, and there is no second one.
        unsafe { &mut *self.0.get() }
    }
}

/// A value with one borrower at a time. A second one is refused, not waited for: the first is what it interrupted.
pub struct Exclusive<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `taken` lets one borrower in at a time, whichever CPU or handler it runs in.
unsafe impl<T: Send> Sync for Exclusive<T> {}

impl<T> Exclusive<T> {
    /// A cell with `value`.
    pub const fn new(value: T) -> Self {
        Self { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Runs `f` on the value; `None` if it is borrowed already.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        if self.taken.swap(true, Ordering::Acquire) {
            return None;
        }
        // SAFETY: `taken` was false and is now true, so nobody else has a reference until it is false again.
        let result = f(unsafe { &mut *self.value.get() });
        self.taken.store(false, Ordering::Release);
        Some(result)
    }
}

/// A value that is set once, by one CPU, and then only read.
pub struct Once<T> {
    set: AtomicBool,
    ready: AtomicBool,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: written once before `ready`, by whoever turned `set`; read only after.
unsafe impl<T: Send + Sync> Sync for Once<T> {}

impl<T> Once<T> {
    /// A cell without a value.
    pub const fn new() -> Self {
        Self { set: AtomicBool::new(false), ready: AtomicBool::new(false), value: UnsafeCell::new(None) }
    }

    /// Sets the value, unless that was done before.
    pub fn set(&self, value: T) {
        if !self.set.swap(true, Ordering::Acquire) {
            // SAFETY: only the first comes here, and nobody reads before `ready`.
            unsafe { *self.value.get() = Some(value) };
            self.ready.store(true, Ordering::Release);
        }
    }

    /// The value, once it is set.
    pub fn get(&self) -> Option<&T> {
        if !self.ready.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: `ready` says that the one write is over.
        unsafe { &*self.value.get() }.as_ref()
    }
}
