//! Cells for state that the boot code, interrupt handlers and other CPUs share.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

use super::cpu::{IrqsOff, OneCpu};

/// A value for code that runs with interrupts off, while one CPU is up. Access costs no instruction.
pub struct IrqsOffCell<T>(UnsafeCell<T>);

// SAFETY: a reference lives no longer than its borrow of `IrqsOff<OneCpu>`, and while that exists no other code runs.
unsafe impl<T: Send> Sync for IrqsOffCell<T> {}

impl<T> IrqsOffCell<T> {
    /// A cell with `value`.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The value.
    #[inline(always)]
    pub fn get<'a>(&'a self, _: &'a mut IrqsOff<OneCpu>) -> &'a mut T {
        // SAFETY: the token is borrowed as long as the reference lives, and there is no second token.
        unsafe { &mut *self.0.get() }
    }
}

/// A value with one borrower at a time. A second one gets `None` and must not wait: it may have interrupted the first.
pub struct Exclusive<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `taken` admits one borrower at a time, on any CPU, in any handler.
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
        // SAFETY: `taken` was false and is now true, so there is no other reference until it is false again.
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

// SAFETY: written once, before `ready`, by the caller that changed `set` to true; read only after `ready`.
unsafe impl<T: Send + Sync> Sync for Once<T> {}

impl<T> Once<T> {
    /// A cell without a value.
    pub const fn new() -> Self {
        Self { set: AtomicBool::new(false), ready: AtomicBool::new(false), value: UnsafeCell::new(None) }
    }

    /// Sets the value, unless that was done before.
    pub fn set(&self, value: T) {
        if !self.set.swap(true, Ordering::Acquire) {
            // SAFETY: only the first caller gets here, and there is no reader before `ready`.
            unsafe { *self.value.get() = Some(value) };
            self.ready.store(true, Ordering::Release);
        }
    }

    /// The value, once it is set.
    pub fn get(&self) -> Option<&T> {
        if !self.ready.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: `ready` is set after the only write.
        unsafe { &*self.value.get() }.as_ref()
    }
}
