//! A model of KVM: what each step of a restore does to TSCs, kvmclock and timers.
//!
//! Instants are nanoseconds since the vCPUs stopped, on a clock that both hosts share: their wall clocks agree. What a
//! stopped vCPU's TSC and kvmclock do is what they do on a host: they count on. From Linux `arch/x86/kvm/x86.c` of 6.13
//! and 6.14, and `lapic.c` of 6.18:
//!
//! - The guest's TSC is the host's, times the ratio of their frequencies, plus an offset. Setting the frequency
//!   (`kvm_set_tsc_khz`) leaves the offset as it is, so the TSC jumps. Below 0 it would wrap; here it stands at 0.
//! - A write of IA32_TSC (`kvm_synchronize_tsc`) within a second of what the last write makes expect gets the offset of
//!   the vCPU that was written first; so does a write of 0. Another value starts a new offset.
//! - With all offsets equal kvmclock has one base for all vCPUs and PVCLOCK_TSC_STABLE is set
//!   (`pvclock_update_vm_gtod_copy`). The page is based on the instant of KVM_SET_CLOCK, or of the first entry if a TSC
//!   was written after it. (KVM bases it once more at each vCPU's first entry, because an update is pending since the
//!   vCPU was created: 20260115202256.119820-3-dongli.zhang@oracle.com. With one rate that changes only the rounding.)
//! - KVM publishes a page once its address is known, and KVM_KVMCLOCK_CTRL fails before that (`kvm_set_guest_paused`).
//! - A masterclock update bases the pages on CLOCK_MONOTONIC_RAW (`pvclock_update_vm_gtod_copy`): kvmclock steps by
//!   what that clock and the page have parted since the last base.
//! - A deadline that is written while LVTT is not in deadline mode is dropped (`kvm_set_lapic_tscdeadline_msr`).
//!   Otherwise it starts a host timer for the difference to the TSC of that instant (`start_sw_tscdeadline`), which a
//!   later change of the TSC does not move, as without VMX's preemption timer.
//! - A deadline that passes while the vCPU stands still is still read as armed, since its interrupt is injected at the
//!   next entry only; so it fires at once after the restore.

use machine::policy::restorer::{Restored, RestoredCpu, Saved, SavedCpu};
use vlapic::Armed;
use vmtime::{GuestTsc, Khz, PageClock, Remainder, Scale, TscAdjust, VmTime};

use super::{
    Hosts,
    source::{NS_KHZ, Read, Source, signed},
    step::{ClockBy, Msr, OffsetFrom, Op, SetMsrs, ZeroDeadline},
};

/// Within this of the expected value, a written TSC counts as meant to be the same as the others'.
const SYNC_MS: i128 = 1000;

/// A count as a TSC or a time: 0 if it is negative.
fn unsigned(value: i128) -> u64 {
    u64::try_from(value.max(0)).unwrap_or(u64::MAX)
}

/// Billionths, to the nearest whole.
pub(super) fn billionths(number: i128) -> i128 {
    (number + 500_000_000).div_euclid(1_000_000_000)
}

/// A vCPU's timer on the destination.
#[derive(Clone, Copy)]
enum Timer {
    /// It waits for nothing.
    Idle,
    /// A deadline, and the TSC by which KVM computed its instant.
    Deadline(u64, Tsc),
    /// A count, and the instant at which it ends.
    Count(i128),
    /// A deadline of this VMM's own MSR, of which KVM knows nothing.
    Ns(VmTime),
}

/// How a vCPU's TSC follows the host's.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Tsc {
    khz: i128,
    offset: i128,
}

impl Tsc {
    /// Its value when the host has been up for `up_ns`.
    fn at(self, up_ns: i128) -> i128 {
        up_ns * self.khz / NS_KHZ + self.offset
    }

    /// The same rate, with the value `value` then.
    fn through(self, up_ns: i128, value: i128) -> Self {
        Self { offset: value - up_ns * self.khz / NS_KHZ, ..self }
    }
}

/// A vCPU on the destination.
#[derive(Clone, Copy)]
struct Cpu {
    tsc: Tsc,
    timer: Timer,
    /// Its LAPIC was written.
    lapic: bool,
    /// The address of its kvmclock page was written.
    registered: bool,
    guest_stopped: bool,
}

/// The new VM on the destination.
struct NewVm<'a> {
    source: Source<'a>,
    hosts: Hosts,
    /// When the new VM was created.
    start_ns: u64,
    cpus: Vec<Cpu>,
    /// The TSC that started the present offset.
    first: Tsc,
    /// The last write of a TSC by the VMM: when, and the value.
    last_write: Option<(u64, i128)>,
    /// kvmclock at an instant.
    clock: (u64, i128),
    /// What masterclock updates have added to kvmclock, in billionths of a nanosecond, and the instant of the last
    /// base.
    raw: i128,
    raw_ns: u64,
    /// The instant that the pages are based on; none: the first entry.
    base_ns: Option<u64>,
    /// The last KVM_GET_CLOCK here.
    read_ns: u64,
    /// A TSC of vCPU 0 after the restore, and the VM time that it stands for.
    truth: (i128, i128),
}

impl NewVm<'_> {
    /// How long the host has been up.
    fn up_ns(&self, at_ns: u64) -> i128 {
        i128::from(self.hosts.uptime_ns) + i128::from(at_ns) - i128::from(self.start_ns)
    }

    fn clock(&self, at_ns: u64) -> i128 {
        self.clock.1 + i128::from(at_ns) - i128::from(self.clock.0) + billionths(self.raw)
    }

    fn step(&mut self, at_ns: u64, cpu: usize, op: &Op) {
        match op {
            Op::GetClock => self.read_ns = at_ns,
            Op::SetClock(by) => {
                let Some((read_ns, value)) = self.source.clock else { return };
                let since = match by {
                    ClockBy::Value => 0,
                    ClockBy::Realtime => i128::from(at_ns) - i128::from(read_ns),
                };
                self.clock = (at_ns, value + since);
                self.base_ns = Some(at_ns);
                (self.raw, self.raw_ns) = (0, at_ns);
            }
            Op::SetMsrs(SetMsrs { msrs, zero_deadline, .. }) => {
                for msr in msrs {
                    match msr {
                        Msr::Tsc => self.write_tsc(at_ns, cpu),
                        Msr::Deadline => self.write_deadline(cpu, *zero_deadline),
                        Msr::Kvmclock => self.change(cpu, |cpu| cpu.registered = true),
                    }
                }
            }
            Op::SetLapic => self.write_lapic(at_ns, cpu),
            Op::SetTscKhz if self.hosts.tsc_scaling => {
                let khz = i128::from(self.source.saved.moment.khz.get());
                self.change(cpu, |cpu| cpu.tsc.khz = khz);
            }
            Op::SetTscOffset(from) => self.write_offset(cpu, *from),
            Op::KvmclockCtrl => self.change(cpu, |cpu| cpu.guest_stopped = cpu.registered),
            Op::MasterclockUpdate => self.update_masterclock(at_ns),
            Op::Wait
            | Op::SetTscKhz
            | Op::GetMsrs(_)
            | Op::GetLapic
            | Op::GetTscKhz
            | Op::GetTscOffset
            | Op::PublishPage { .. }
            | Op::UpdateVmclock => {}
        }
    }

    fn update_masterclock(&mut self, at_ns: u64) {
        self.raw += i128::from(self.hosts.raw_ppb) * i128::from(at_ns.saturating_sub(self.raw_ns));
        self.raw_ns = at_ns;
        self.base_ns = Some(at_ns);
    }

    fn change(&mut self, cpu: usize, change: impl FnOnce(&mut Cpu)) {
        if let Some(cpu) = self.cpus.get_mut(cpu) {
            change(cpu);
        }
    }

    fn write_tsc(&mut self, at_ns: u64, cpu: usize) {
        let Some((read_ns, value)) = self.source.cpus.get(cpu).and_then(|read| read.tsc) else { return };
        let Some(old) = self.cpus.get(cpu).map(|cpu| cpu.tsc) else { return };
        let expected = self.last_write.map(|(last_ns, last)| last + i128::from(at_ns - last_ns) * old.khz / NS_KHZ);
        let near = expected.is_some_and(|expected| (value - expected).abs() < SYNC_MS * old.khz);
        let same = (value == 0 || near) && self.first.khz == old.khz;
        let tsc = if same { self.first } else { old.through(self.up_ns(at_ns), value) };
        self.first = tsc;
        self.last_write = Some((at_ns, value));
        self.change(cpu, |cpu| cpu.tsc = tsc);
        self.base_ns = None;
        if cpu == 0 {
            self.truth = (value, self.source.clock(read_ns));
        }
    }

    fn write_offset(&mut self, cpu: usize, from: OffsetFrom) {
        let Some(old) = self.cpus.get(cpu).map(|cpu| cpu.tsc) else { return };
        let tsc = match from {
            OffsetFrom::FirstCpu => Tsc { offset: self.cpus.first().map_or(0, |first| first.tsc.offset), ..old },
            OffsetFrom::Elapsed => {
                let Some((read_ns, _)) = self.source.clock else { return };
                let khz = i128::from(self.source.saved.moment.khz.get());
                let elapsed_ns = i128::from(self.read_ns) - i128::from(read_ns);
                let value = self.source.tsc(cpu, read_ns) + elapsed_ns * khz / NS_KHZ;
                if cpu == 0 {
                    self.truth = (value, self.source.clock(self.read_ns));
                }
                old.through(self.up_ns(self.read_ns), value)
            }
        };
        if tsc != self.first {
            self.base_ns = None;
        }
        self.first = tsc;
        self.change(cpu, |cpu| cpu.tsc = tsc);
    }

    fn write_deadline(&mut self, cpu: usize, zero: ZeroDeadline) {
        let Some(saved) = self.source.saved.cpus.get(cpu) else { return };
        let value = match (saved.armed, zero) {
            (Armed::Tsc(deadline), _) => deadline.0,
            (_, ZeroDeadline::Keep) => 0,
            (_, ZeroDeadline::Now) => {
                self.source.cpus.get(cpu).and_then(|read| read.tsc).map_or(0, |(_, tsc)| unsigned(tsc))
            }
        };
        let in_deadline_mode = saved.in_deadline_mode;
        self.change(cpu, |cpu| {
            // With a deadline of this VMM's own MSR, IA32_TSC_DEADLINE reads 0.
            if cpu.lapic && in_deadline_mode && value != 0 {
                cpu.timer = Timer::Deadline(value, cpu.tsc);
            }
        });
    }

    fn write_lapic(&mut self, at_ns: u64, cpu: usize) {
        let Some(saved) = self.source.saved.cpus.get(cpu) else { return };
        let read_ns = self.source.cpus.get(cpu).map_or(0, |read| read.lapic_ns);
        let timer = match saved.armed {
            // The count that was left when it was read, from now on.
            Armed::Count { expires } => {
                let left = (i128::from(expires.0) - self.source.clock(read_ns)).max(0);
                Timer::Count(i128::from(at_ns) + left)
            }
            Armed::Ns(at) => Timer::Ns(at),
            Armed::Tsc(_) | Armed::Disarmed => Timer::Idle,
        };
        self.change(cpu, |cpu| (cpu.timer, cpu.lapic) = (timer, true));
    }

    /// The guest runs from `end_ns` on.
    fn run(self, end_ns: u64) -> Restored {
        let up_ns = self.up_ns(end_ns);
        let tsc0 = self.cpus.first().map_or(Tsc { khz: 1, offset: 0 }, |cpu| cpu.tsc);
        let adjust0 = self.source.saved.cpus.first().map_or(0, |cpu| signed(cpu.tsc_adjust));
        let stable = self.same_offsets();
        // A page cannot be based on a TSC below 0.
        let based = self.base_ns.filter(|base_ns| stable && tsc0.at(self.up_ns(*base_ns)) >= adjust0.max(0));
        let base_ns = based.unwrap_or(end_ns);
        let system_time = VmTime(unsigned(self.clock(base_ns)));
        let page = |tsc: Tsc, ahead: i128| PageClock {
            tsc_timestamp: GuestTsc(unsigned(tsc.at(self.up_ns(base_ns)) - ahead)),
            system_time,
            scale: Khz::new(unsigned(tsc.khz)).map_or(self.source.saved.own.page.scale, Scale::from_khz),
        };
        let base = tsc0.at(up_ns) - adjust0;
        let (value, vm) = self.truth;
        let elapsed = vm - i128::from(self.source.saved.moment.vm.0) + (tsc0.at(up_ns) - value) * NS_KHZ / tsc0.khz;
        let cpus = self.cpus.iter().map(|cpu| RestoredCpu {
            tsc_adjust: TscAdjust(GuestTsc(wrapped(cpu.tsc.at(up_ns) - base)).0),
            armed: self.armed(cpu),
            due: None,
            page: cpu.registered.then(|| page(cpu.tsc, 0)),
            guest_stopped: cpu.guest_stopped,
        });
        Restored {
            tsc: GuestTsc(unsigned(base)),
            elapsed_ns: unsigned(elapsed),
            page: page(tsc0, adjust0),
            remainder: Remainder::ZERO,
            stable,
            // A VMM with VMClock writes it last. No recipe has one without.
            vmclock: true,
            cpus: cpus.collect(),
        }
    }

    fn same_offsets(&self) -> bool {
        self.cpus.array_windows().all(|[a, b]| a.tsc == b.tsc)
    }

    /// What this VMM's LAPIC waits for, to do what KVM's timer does.
    fn armed(&self, cpu: &Cpu) -> Armed {
        match cpu.timer {
            Timer::Idle => Armed::Disarmed,
            Timer::Ns(at) => Armed::Ns(at),
            Timer::Count(at_ns) => {
                let vm = self.clock.1 + at_ns - i128::from(self.clock.0) + billionths(self.raw);
                Armed::Count { expires: VmTime(unsigned(vm)) }
            }
            Timer::Deadline(deadline, then) => {
                let deadline = i128::from(deadline);
                let moved = if then.khz == cpu.tsc.khz {
                    deadline + cpu.tsc.offset - then.offset
                } else {
                    // The host's uptime at which the timer ends.
                    let up_ns = ((deadline - then.offset) * NS_KHZ + then.khz - 1).div_euclid(then.khz);
                    cpu.tsc.at(up_ns)
                };
                Armed::Tsc(GuestTsc(unsigned(moved).max(1)))
            }
        }
    }
}

/// Modulo 2^64.
fn wrapped(value: i128) -> u64 {
    u64::try_from(value.rem_euclid(1 << 64)).unwrap_or(0)
}

/// How a guest continues that a VMM saves and restores in these steps.
/// `host_khz` is the frequency of the destination's TSC.
pub(super) fn play(recipe: &super::Recipe, host_khz: Khz, saved: &Saved) -> Restored {
    let count = saved.cpus.len();
    let mut source = Source { saved, clock: None, cpus: vec![Read::default(); count] };
    let (steps, saved_ns) = super::schedule::schedule(&recipe.save, count, 0);
    for step in steps {
        source.step(step.at_ns, step.cpu, step.op);
    }
    let start_ns = saved_ns.saturating_add(recipe.hosts.downtime_ns);
    // A new VM's vCPUs all count from 0.
    let khz = i128::from(host_khz.get());
    let fresh = Tsc { khz, offset: 0 }.through(i128::from(recipe.hosts.uptime_ns), 0);
    let cpu =
        |_: &SavedCpu| Cpu { tsc: fresh, timer: Timer::Idle, lapic: false, registered: false, guest_stopped: false };
    let truth = (source.tsc(0, 0), source.clock(0));
    let cpus = saved.cpus.iter().map(cpu).collect();
    let mut there = NewVm {
        source,
        hosts: recipe.hosts,
        start_ns,
        cpus,
        first: fresh,
        last_write: None,
        clock: (start_ns, 0),
        raw: 0,
        raw_ns: start_ns,
        base_ns: Some(start_ns),
        read_ns: start_ns,
        truth,
    };
    let (steps, end_ns) = super::schedule::schedule(&recipe.restore, count, start_ns);
    for step in steps {
        there.step(step.at_ns, step.cpu, step.op);
    }
    there.run(end_ns)
}
