//! The loop of one vCPU: time, injection, entry, exit.

use std::time::Duration;

use guest_abi::sites::Kind;

use super::{
    End, Outcome, Platform, RunError, TimeMode,
    access::Access,
    cpu::{Cpu, Local},
    idle::{self, Wake},
    mailbox::Interruptions,
    platform::lock,
    step,
    trace::Event,
};
use crate::{
    kvm::{Exit, kick::KickTimer},
    time::{GuestTsc, HostTsc, Now},
};

/// Virtual time: how long a guest may run without an operation before it counts as spinning. Host time, because guest
/// time stands still meanwhile.
const SPIN_BUDGET: Duration = Duration::from_secs(10);

/// Runs `cpu` until the guest ends, `stop` (base TSC) is reached or somebody waits in the mailbox.
///
/// Every way out leaves the vCPU drained: its state may be read at once.
pub(super) fn run(
    cpu: &mut Cpu,
    platform: &Platform,
    mailbox: &impl Interruptions,
    stop: Option<GuestTsc>,
) -> Result<Outcome, RunError> {
    // A vCPU whose state was just set has nothing in the shared page yet.
    cpu.vcpu.drain()?;
    let _binding = cpu.vcpu.bind();
    mailbox.attach();
    let mut alarm = Alarm { timer: KickTimer::new()?, armed: None };
    let result = turn_until_done(cpu, platform, mailbox, stop, &mut alarm);
    mailbox.detach();
    let result = result?;
    cpu.vcpu.stop_stepping()?;
    cpu.vcpu.request_window(false);
    cpu.vcpu.drain()?;
    Ok(result)
}

fn turn_until_done(
    cpu: &mut Cpu,
    platform: &Platform,
    mailbox: &impl Interruptions,
    stop: Option<GuestTsc>,
    alarm: &mut Alarm,
) -> Result<Outcome, RunError> {
    loop {
        if cpu.vcpu.forget_kicks()
            && let Some(end) = alarm.rang(cpu, platform)
        {
            return Ok(Outcome::Ended(end));
        }
        if mailbox.waiting() {
            return Ok(Outcome::Requested);
        }
        let (now, base, mode) = {
            let clock = lock(&platform.clock);
            (cpu.local.now(&clock), clock.tsc(), clock.mode())
        };
        cpu.local.apic.advance(now);
        if stop.is_some_and(|stop| base >= stop) {
            return Ok(Outcome::Reached);
        }
        let entry = inject(cpu, platform, now, base)?;
        if cpu.local.halted {
            lock(&platform.judge).read_ring(platform);
            if !cpu.vcpu.interrupts_enabled() {
                return Ok(Outcome::Ended(End::HaltedForever { rip: cpu.vcpu.registers().rip }));
            }
            if idle::wait(cpu, platform, mailbox, stop) == Wake::Never {
                return Ok(Outcome::Ended(End::NothingWillWake { rip: cpu.vcpu.registers().rip }));
            }
            continue;
        }
        alarm.set(&cpu.local, platform, mode, stop);
        cpu.vcpu.set_cr8(cpu.local.apic.cr8());
        let (exit, base_changed) = match entry {
            // What waits for priority may be let in by MOV CR8, which exits on no host that we know of but one.
            Entry::Blocked if mode == TimeMode::Virtual || blocked_by_tpr(&cpu.local) => step::one(cpu, platform)?,
            _ => {
                cpu.vcpu.stop_stepping()?;
                cpu.vcpu.request_window(matches!(entry, Entry::Blocked));
                let mut access = Access::new(&mut cpu.local, platform);
                let exit = cpu.vcpu.run(&mut access)?;
                (exit, access.apic_base_changed)
            }
        };
        if base_changed {
            cpu.vcpu.drain()?;
            cpu.vcpu.set_apic_base(cpu.local.apic.apic_base());
        }
        if let Some(end) = handle(cpu, platform, exit)? {
            lock(&platform.judge).read_ring(platform);
            return Ok(Outcome::Ended(end));
        }
    }
}

/// How the vCPU is to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// Nothing waits, or it was injected.
    Free,
    /// An interrupt waits and cannot enter yet.
    Blocked,
}

/// Injects the highest pending interrupt if it would enter at once.
fn inject(cpu: &mut Cpu, platform: &Platform, now: Now, base: GuestTsc) -> Result<Entry, RunError> {
    let Some(vector) = cpu.local.apic.pending() else {
        let waits = cpu.local.apic.blocked_by_priority() && blocked_by_tpr(&cpu.local);
        return Ok(if waits && !cpu.local.halted { Entry::Blocked } else { Entry::Free });
    };
    // Before it is drained, the last access is incomplete and the flags below are those of its beginning.
    cpu.vcpu.drain()?;
    if cpu.local.sti_shadow || !cpu.vcpu.ready_for_injection() {
        return Ok(Entry::Blocked);
    }
    cpu.local.apic.acknowledge(vector);
    cpu.vcpu.inject(vector)?;
    cpu.local.halted = false;
    if vector == cpu.local.apic.timer_vector() {
        let judged = lock(&platform.clock).judged(base);
        lock(&platform.judge).injected(judged);
    }
    platform.event(cpu.local.index, now, &Event::Inject { vector });
    Ok(Entry::Free)
}

/// Whether TPR alone (not an interrupt in service, whose EOI exits) could hold back what is requested.
fn blocked_by_tpr(local: &Local) -> bool {
    local.apic.blocked_by_priority() && local.apic.cr8() != 0
}

fn handle(cpu: &mut Cpu, platform: &Platform, exit: Exit) -> Result<Option<End>, RunError> {
    match exit {
        Exit::Operation(_) => Ok(lock(&platform.devices).take_exit().map(End::Guest)),
        Exit::Halt => {
            let after = cpu.vcpu.registers().rip;
            let at = after.wrapping_sub(1);
            match platform.sites.at(at) {
                Some(kind) => perform_site(cpu, platform, kind, at),
                None => {
                    let now = Access::new(&mut cpu.local, platform).operation();
                    platform.event(cpu.local.index, now, &Event::Halt);
                    cpu.local.halted = true;
                }
            }
            Ok(None)
        }
        // Kicked: the loop looks why.
        Exit::Interrupted | Exit::WindowOpen | Exit::Debug => Ok(None),
        Exit::Shutdown => Ok(Some(End::TripleFault)),
        Exit::InternalError(suberror) => {
            let reason = match suberror {
                1 => "KVM cannot emulate this instruction".to_owned(),
                other => format!("KVM internal error, suberror {other}"),
            };
            cannot_execute(cpu, platform, reason).map(Some)
        }
        Exit::FailEntry(reason) => {
            cannot_execute(cpu, platform, format!("the CPU refused the guest's state ({reason:#x})")).map(Some)
        }
        Exit::Other(reason) => cannot_execute(cpu, platform, format!("KVM exit reason {reason}")).map(Some),
    }
}

fn cannot_execute(cpu: &mut Cpu, platform: &Platform, reason: String) -> Result<End, RunError> {
    let rip = cpu.vcpu.registers().rip;
    let bytes = step::bytes_at(cpu, platform, rip)?.to_vec();
    Ok(End::CannotExecute { rip, bytes, reason })
}

/// Does what the guest's own instruction at a trap site would have done. All are two bytes long.
fn perform_site(cpu: &mut Cpu, platform: &Platform, kind: Kind, at: u64) {
    let next = at.wrapping_add(2);
    let registers = cpu.vcpu.registers();
    let mut access = Access::new(&mut cpu.local, platform);
    match kind {
        Kind::Rdtsc => {
            let now = access.operation();
            platform.event(access.local.index, now, &Event::Rdtsc { rip: at, value: now.tsc });
            cpu.vcpu.continue_with(next, now.tsc.0);
        }
        Kind::DeadlineWrmsr => {
            // WRMSR ignores the upper halves of its registers.
            let [index, low, high] =
                [registers.rcx, registers.rax, registers.rdx].map(|r| u32::try_from(r & 0xffff_ffff).unwrap_or(0));
            let written = access.msr_write_at_site(index, u64::from(high) << 32 | u64::from(low));
            if access.apic_base_changed {
                cpu.vcpu.set_apic_base(access.local.apic.apic_base());
            }
            match written {
                Ok(()) => cpu.vcpu.continue_at(next),
                Err(_) => cpu.vcpu.raise_gp_at(at),
            }
        }
        Kind::Pause => {
            access.operation();
            cpu.vcpu.continue_at(next);
        }
    }
}

/// The timer that kicks this thread out of KVM_RUN: at the next deadline in real time, after the spin budget in virtual.
struct Alarm {
    timer: KickTimer,
    armed: Option<Armed>,
}

/// What the alarm is set for, so that it is not set again on every exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Armed {
    /// Real time: this base TSC.
    At(GuestTsc),
    /// Virtual time: the spin budget, since this host TSC, when there had been so many operations.
    Budget { since: HostTsc, operations: u64 },
}

impl Alarm {
    fn set(&mut self, local: &Local, platform: &Platform, mode: TimeMode, stop: Option<GuestTsc>) {
        let clock = lock(&platform.clock);
        match mode {
            TimeMode::Virtual if self.armed.is_none() => {
                self.armed = Some(Armed::Budget { since: clock.stopwatch(), operations: clock.operations() });
                self.timer.arm(SPIN_BUDGET);
            }
            TimeMode::Virtual => {}
            TimeMode::Real => {
                let due = local.apic.next_wake().and_then(|deadline| clock.due(deadline, local.tsc_adjust));
                let target = [due, stop].into_iter().flatten().min();
                if let Some(target) = target.filter(|target| self.armed != Some(Armed::At(*target))) {
                    if let Some(left) = clock.until(target) {
                        self.timer.arm(left);
                    }
                    self.armed = Some(Armed::At(target));
                }
            }
        }
    }

    /// The thread was kicked, perhaps by this timer, perhaps sooner than the TSC says (NTP slews the timer's clock): it is
    /// set again.
    fn rang(&mut self, cpu: &mut Cpu, platform: &Platform) -> Option<End> {
        let clock = lock(&platform.clock);
        let Some(Armed::Budget { since, operations }) = self.armed.take() else { return None };
        let stuck = clock.operations() == operations && clock.host_time_since(since) >= SPIN_BUDGET;
        stuck.then(|| End::Spins { rip: cpu.vcpu.registers().rip, seconds: SPIN_BUDGET.as_secs() })
    }
}
