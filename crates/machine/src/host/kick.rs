//! Getting a vCPU thread out of KVM_RUN, or out of its sleep, without losing the kick.
//!
//! A signal that lands just before KVM_RUN would be handled and forgotten. So the handler writes `immediate_exit` of the
//! vCPU that its thread has bound, and KVM looks at that byte after entering the call (Linux `api.rst`,
//! `immediate_exit`): wherever the signal lands, the next KVM_RUN returns. Likewise it writes the word that [`wait`]
//! sleeps on.

use std::{
    cell::Cell,
    io, ptr,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering, compiler_fence},
    },
    time::Duration,
};

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread runs, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
    /// 1 after a kick; survives our own use of `immediate_exit` for draining.
    static KICKED: AtomicU32 = const { AtomicU32::new(0) };
}

/// The signal that kicks.
fn signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    KICKED.with(|kicked| kicked.store(1, Ordering::Relaxed));
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: a bound pointer is into the live kvm_run mapping of the vCPU that this very thread runs; it is unbound
        // before the mapping goes. Only this thread writes the byte.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

/// Makes kicks harmless: before the first of them can come.
fn handle_kicks() {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // It cannot fail for a real-time signal and a valid handler; if it did, kicks would end the process, which is loud
        // enough.
        let _ = vmm_sys_util::signal::register_signal_handler(signal(), on_kick);
    });
}

/// Binds a vCPU's `immediate_exit` to this thread, so that kicks reach it; unbinds when dropped.
pub(crate) struct Binding;

impl Binding {
    pub(crate) fn new(immediate_exit: &mut u8) -> Self {
        IMMEDIATE_EXIT.set(immediate_exit);
        Self
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Forgets kicks so far, and tells whether there were any: call before looking at what they might be about.
pub(crate) fn forget(immediate_exit: &mut u8) -> bool {
    *immediate_exit = 0;
    // A kick between these two leaves `immediate_exit` set: one needless exit, nothing lost.
    compiler_fence(Ordering::SeqCst);
    clear()
}

/// Whether the calling thread was kicked since kicks were last forgotten.
#[must_use]
pub fn pending() -> bool {
    KICKED.with(|kicked| kicked.load(Ordering::Relaxed) != 0)
}

/// Forgets kicks so far of a thread that runs no vCPU at the moment, and tells whether there were any.
pub fn clear() -> bool {
    KICKED.with(|kicked| kicked.swap(0, Ordering::Relaxed) != 0)
}

/// Sleeps until the calling thread is kicked; returns at once if it was, since kicks were last forgotten. May return
/// early.
pub fn wait() {
    KICKED.with(|kicked| {
        // The kernel compares the word with 0 and sleeps in one step: a kick before that is seen, one after it is a signal,
        // which ends the sleep.
        // SAFETY: the word is this thread's and lives as long as the thread; without a timeout nothing else is read.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                kicked.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                0,
                ptr::null::<libc::timespec>(),
            )
        };
    });
}

/// Ends our own use of `immediate_exit`, keeping a kick that came meanwhile.
pub(crate) fn release(immediate_exit: &mut u8) {
    *immediate_exit = 0;
    compiler_fence(Ordering::SeqCst);
    if pending() {
        *immediate_exit = 1;
    }
}

/// Kicks one thread.
#[derive(Clone, Copy, Debug)]
pub struct Kicker {
    thread: libc::pid_t,
}

impl Kicker {
    /// Kicks the thread that calls this.
    #[must_use]
    pub fn for_this_thread() -> Self {
        handle_kicks();
        // SAFETY: gettid has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        Self { thread }
    }

    /// Makes that thread's present or next KVM_RUN return. Does nothing if the thread has ended.
    pub fn kick(&self) {
        // SAFETY: getpid has no arguments and cannot fail.
        let process = unsafe { libc::getpid() };
        // SAFETY: tgkill takes three integers; with the process id, a stale thread id gives ESRCH, never another process.
        unsafe { libc::syscall(libc::SYS_tgkill, process, self.thread, signal()) };
    }
}

/// The kernel has no timer left.
#[derive(Debug, thiserror::Error)]
#[error("timer_create failed: {0}")]
pub struct TimerError(pub io::Error);

/// A timer that kicks the thread which made it.
#[derive(Debug)]
pub struct KickTimer {
    timer: libc::timer_t,
}

// SAFETY: a POSIX timer id belongs to the process; any thread may set or delete it.
unsafe impl Send for KickTimer {}

impl KickTimer {
    /// A disarmed timer for this thread.
    ///
    /// # Errors
    /// If the kernel has no timer left.
    pub fn new() -> Result<Self, TimerError> {
        // SAFETY: all-zero is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        event.sigev_notify_thread_id = Kicker::for_this_thread().thread;
        let mut timer = ptr::null_mut();
        // SAFETY: both pointers are to live locals of the right type.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } != 0 {
            return Err(TimerError(io::Error::last_os_error()));
        }
        Ok(Self { timer })
    }

    /// Kicks once after `delay`; zero kicks at once. Replaces what was armed.
    pub fn arm(&self, delay: Duration) {
        // An all-zero value would disarm.
        let delay = delay.max(Duration::from_nanos(1));
        self.set(libc::timespec {
            tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(delay.subsec_nanos()),
        });
    }

    fn set(&self, it_value: libc::timespec) {
        let value = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // SAFETY: the timer is ours until drop; the value is a live local, and a null old value is allowed.
        unsafe { libc::timer_settime(self.timer, 0, &raw const value, ptr::null_mut()) };
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // SAFETY: the timer was created by us and is deleted once.
        unsafe { libc::timer_delete(self.timer) };
    }
}
