//! Getting a vCPU thread out of KVM_RUN, or out of its sleep, without losing the kick.
//!
//! A kick is a signal. One that arrives just before KVM_RUN would be handled without ending it. So the handler also
//! sets `immediate_exit` of the vCPU that its thread has bound, and KVM checks that byte after it has entered the call
//! (Linux `api.rst`, `immediate_exit`): whenever the signal arrives, the next KVM_RUN returns. For the same reason the
//! handler writes the word that [`wait`] sleeps on.

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

/// The signal that is a kick.
fn signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    KICKED.with(|kicked| kicked.store(1, Ordering::Relaxed));
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: a bound pointer is into the live kvm_run mapping of the vCPU that this thread runs; it is unbound
        // before the mapping is removed. Only this thread writes the byte.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

/// Installs the signal's handler. Must be called before the first kick, which would otherwise end the process.
fn handle_kicks() {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // It cannot fail for a real-time signal and a valid handler. If it did, the first kick would end the process,
        // so that the failure would be noticed.
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

/// Clears kicks so far, and returns whether there were any. To be called before the caller checks what a kick may
/// announce: a kick after the check then still ends the next wait.
pub(crate) fn clear_bound(immediate_exit: &mut u8) -> bool {
    *immediate_exit = 0;
    // In this order a kick between the two stores leaves `immediate_exit` set: one needless exit. In the other order it
    // would leave only the word set, and KVM_RUN would not return.
    compiler_fence(Ordering::SeqCst);
    clear()
}

/// Whether the calling thread was kicked since kicks were last cleared.
#[must_use]
pub fn pending() -> bool {
    KICKED.with(|kicked| kicked.load(Ordering::Relaxed) != 0)
}

/// Clears kicks so far of a thread that has no vCPU bound, and returns whether there were any.
pub fn clear() -> bool {
    KICKED.with(|kicked| kicked.swap(0, Ordering::Relaxed) != 0)
}

/// Sleeps until the calling thread is kicked; returns at once if it was kicked since kicks were last cleared. May
/// return without a kick.
pub fn wait() {
    KICKED.with(|kicked| {
        // FUTEX_WAIT compares the word with 0 and goes to sleep in one step. A kick before that step has set the word,
        // and the call returns; a kick after it is a signal, which ends the sleep.
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

/// Clears `immediate_exit` after our own use of it, but sets it again if a kick came meanwhile. The word is read after
/// the byte is cleared: a kick in between sets both, and one after the read sets the byte itself.
pub(crate) fn release(immediate_exit: &mut u8) {
    *immediate_exit = 0;
    compiler_fence(Ordering::SeqCst);
    if pending() {
        *immediate_exit = 1;
    }
}

/// A handle that kicks one thread.
#[derive(Clone, Copy, Debug)]
pub struct Kicker {
    thread: libc::pid_t,
}

impl Kicker {
    /// A handle to the thread that calls this.
    #[must_use]
    pub fn for_this_thread() -> Self {
        handle_kicks();
        // SAFETY: gettid has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        Self { thread }
    }

    /// Makes that thread's current or next KVM_RUN or [`wait`] return. Does nothing if the thread has ended.
    pub fn kick(&self) {
        // SAFETY: getpid has no arguments and cannot fail.
        let process = unsafe { libc::getpid() };
        // SAFETY: tgkill takes three integers; with the process id, a stale thread id gives ESRCH, never another
        // process.
        unsafe { libc::syscall(libc::SYS_tgkill, process, self.thread, signal()) };
    }
}

/// The kernel has no timer left.
#[derive(Debug, thiserror::Error)]
#[error("timer_create failed: {0}")]
pub struct TimerError(pub io::Error);

/// A timer that kicks the thread that created it.
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

    /// Arms a kick after `delay`; zero kicks at once. Replaces an earlier delay.
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
