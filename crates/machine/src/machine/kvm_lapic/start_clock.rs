//! Sets KVM's clock so that it shows a given VM time at a given instant of the past.
//!
//! KVM_SET_CLOCK takes effect some time after it is called, and KVM bases its clock on an instant before the one at
//! which it reads CLOCK_REALTIME (`kvm_vm_ioctl_set_clock` in Linux `arch/x86/kvm/x86.c`): 0.1 to 0.8 us were measured,
//! other from call to call. KVM_GET_CLOCK returns VM time and host TSC of one instant. So the clock is set, read, and
//! set again with what it was off. A clock that is right already is not set: the guest's page then stays, bit for bit.

use vmtime::{Adjusted, HostTsc, Remainder, TscAdjust, VmTime};

use crate::{
    host::reading::nanos,
    kvm::{Error, KvmClock, Vm},
    machine::{clock::Clock, error::RunError},
};

/// How near is near enough, in nanoseconds. KVM's arithmetic and this one round by a few.
const CLOSE_NS: u64 = 50;

/// How often the clock is set at most. Three times are usual.
const TRIES: u32 = 8;

/// KVM's clock.
trait SetClock {
    fn read(&self) -> Result<KvmClock, Error>;
    fn set(&self, vm: VmTime) -> Result<(), Error>;
    fn set_at(&self, vm: VmTime, realtime_ns: u64) -> Result<(), Error>;
}

impl SetClock for Vm {
    fn read(&self) -> Result<KvmClock, Error> {
        self.clock()
    }

    fn set(&self, vm: VmTime) -> Result<(), Error> {
        self.set_clock(vm)
    }

    fn set_at(&self, vm: VmTime, realtime_ns: u64) -> Result<(), Error> {
        self.set_clock_at(vm, realtime_ns)
    }
}

/// Makes KVM's clock show the VM time of `adjusted` as of the host TSC `start`. Returns the instant that it shows
/// afterwards, and by how many nanoseconds it may be wrong. All TSCs must have been set before: KVM derives the page
/// from them.
pub fn start_clock(
    vm: &Vm,
    clock: &mut Clock,
    adjusted: &Adjusted,
    start: HostTsc,
) -> Result<(Adjusted, u64), RunError> {
    let host = clock.host();
    let due = |at| VmTime(adjusted.vm.0.saturating_add(nanos(host.vm_time_between(start, at))));
    let (now, off_ns) = approach(vm, due)?;
    let late_ns = nanos(host.duration(HostTsc(0), HostTsc(now.late_ticks)));
    clock.adopt_kvm_clock(now);
    let page = clock.page(TscAdjust::ZERO);
    let adjusted = Adjusted { tsc: page.tsc_timestamp, vm: now.vm, page, remainder: Remainder::ZERO, ..*adjusted };
    Ok((adjusted, off_ns.unsigned_abs().saturating_add(late_ns)))
}

/// Sets the clock until it is near what `due` says for the host TSC. Returns its last reading, and how far it is ahead.
fn approach(clock: &impl SetClock, due: impl Fn(HostTsc) -> VmTime) -> Result<(KvmClock, i64), Error> {
    let mut now = clock.read()?;
    let mut ahead = ahead_ns(now, &due);
    // By how much a clock that is set shows more than it was set to.
    let mut bias_ns = 0_i64;
    for _ in 0..TRIES {
        if ahead.unsigned_abs() <= CLOSE_NS {
            break;
        }
        let to = VmTime(due(now.host).0.saturating_add_signed(bias_ns.saturating_neg()));
        match now.realtime_ns {
            // With CLOCK_REALTIME of the same instant, KVM adds what has passed since.
            Some(realtime_ns) => clock.set_at(to, realtime_ns)?,
            None => clock.set(to)?,
        }
        now = clock.read()?;
        ahead = ahead_ns(now, &due);
        bias_ns = bias_ns.saturating_add(ahead);
    }
    Ok((now, ahead))
}

/// How far KVM's clock is ahead of what `due` says, in nanoseconds.
fn ahead_ns(now: KvmClock, due: impl Fn(HostTsc) -> VmTime) -> i64 {
    let due = due(now.host);
    let distance = i64::try_from(now.vm.0.abs_diff(due.0)).unwrap_or(i64::MAX);
    if now.vm >= due { distance } else { -distance }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    /// A clock of 1 GHz that takes effect late, by other lengths from call to call, on a host where each call takes 1
    /// us.
    struct Kvm {
        tsc: Cell<u64>,
        /// VM time less the host's TSC.
        ahead: Cell<i64>,
        reports_realtime: bool,
        /// By how much each setting misses, in nanoseconds, the last first.
        misses: RefCell<Vec<i64>>,
        sets: Cell<usize>,
    }

    /// CLOCK_REALTIME less the host's TSC.
    const REALTIME: u64 = 1 << 60;

    impl Kvm {
        fn new(ahead: i64, reports_realtime: bool, misses: &[i64]) -> Self {
            let misses = RefCell::new(misses.iter().rev().copied().collect());
            Self { tsc: Cell::new(1_000_000), ahead: Cell::new(ahead), reports_realtime, misses, sets: Cell::new(0) }
        }

        fn call(&self) -> u64 {
            self.tsc.set(self.tsc.get() + 1000);
            self.tsc.get()
        }

        /// Sets the clock to what is `vm` at the host TSC `at`.
        fn shows(&self, vm: VmTime, at: u64) {
            let miss = self.misses.borrow_mut().pop().expect("set once more than expected");
            self.ahead.set(vm.0.cast_signed() - at.cast_signed() + miss);
            self.sets.set(self.sets.get() + 1);
        }
    }

    impl SetClock for Kvm {
        fn read(&self) -> Result<KvmClock, Error> {
            let host = self.call();
            let vm = VmTime(host.wrapping_add_signed(self.ahead.get()));
            let realtime_ns = self.reports_realtime.then_some(REALTIME + host);
            Ok(KvmClock { vm, host: HostTsc(host), late_ticks: 0, realtime_ns })
        }

        fn set(&self, vm: VmTime) -> Result<(), Error> {
            let now = self.call();
            self.shows(vm, now);
            Ok(())
        }

        fn set_at(&self, vm: VmTime, realtime_ns: u64) -> Result<(), Error> {
            assert!(self.reports_realtime);
            self.call();
            self.shows(vm, realtime_ns - REALTIME);
            Ok(())
        }
    }

    /// VM time is to be the host's TSC plus 500.
    fn due(at: HostTsc) -> VmTime {
        VmTime(at.0 + 500)
    }

    // Catches: a clock that is set although it is right. KVM then makes another page, and a resume is no longer exact.
    #[test]
    fn a_clock_that_is_right_is_left_alone() {
        for ahead in [500, 550, 450] {
            let kvm = Kvm::new(ahead, true, &[]);
            let (_, off) = approach(&kvm, due).unwrap();
            assert_eq!((off, kvm.sets.get()), (ahead - 500, 0));
        }
    }

    // Catches: a clock that stays off by what KVM takes to set it, and a correction with the wrong sign.
    #[test]
    fn what_the_clock_is_off_is_corrected() {
        for (realtime, misses) in [(true, [480, 80, 90, 100].as_slice()), (false, &[-31_000, -900, -980, -1000])] {
            let kvm = Kvm::new(-1_000_000, realtime, misses);
            let (now, off) = approach(&kvm, due).unwrap();
            assert!(off.unsigned_abs() <= CLOSE_NS, "{off}");
            assert_eq!(now.vm.0.cast_signed(), due(now.host).0.cast_signed() + off);
        }
    }

    // Catches: a resume that never ends on a host whose calls take another time each.
    #[test]
    fn a_restless_host_gets_an_answer_with_its_error() {
        let misses: Vec<i64> = (0..TRIES).map(|n| i64::from(n) * i64::from(n) * 1000 + 700).collect();
        let kvm = Kvm::new(0, true, &misses);
        let (_, off) = approach(&kvm, due).unwrap();
        assert!(off.unsigned_abs() > CLOSE_NS);
        assert_eq!(kvm.sets.get(), misses.len());
    }
}
