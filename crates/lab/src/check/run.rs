//! Drives a guest from migration to migration.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use machine::{
    End, HostEnvironment, LapicKind, Machine, Outputs, Policies, RunError, StopReason, audit::Arming, boot::Image,
    check_ratio, devices::GuestExit, guest_clock::StoppedClocks, host::reading::nanos, sched::mailbox::NoRequests,
};
use vmtime::{DeadlinePolicy, Khz, Scale, VmTime};

use super::{
    CheckError, Options,
    compare::{COMPARED, compare},
    console::Console,
    result::{Ended, Findings, Migrated, PageFound, SCHEMA, Setup, Stretch},
};
use crate::clock::account::{Context, Kind, Stop, account};

/// VM time between two looks at the console, or at whether a copy has armed its timers, in nanoseconds.
const LOOK_NS: u64 = 10_000_000;
/// Timer interrupts that a guest must have had before the first migration, unless there is a text to wait for.
const SETTLED: u64 = 10;

/// Runs the guest, migrates it, and notes what happens. `progress` is called after each migration, with their number so
/// far and in all. When `cancel` is set, it ends.
///
/// # Errors
/// [`CheckError`].
pub fn check(
    env: &HostEnvironment,
    image: &Image,
    options: &Options,
    console: &Console,
    cancel: &AtomicBool,
    progress: &dyn Fn(u64, u64),
) -> Result<Findings, CheckError> {
    if options.boot.lapic == LapicKind::Kvm {
        let why = "KVM's local APICs cannot be judged: the VMM does not see what their timers are armed for";
        return Err(RunError::Usage(why.to_owned()).into());
    }
    let mut machine = Machine::boot(env, image, &options.boot, Outputs::new(Box::new(console.clone()), None))?;
    let tsc_khz = machine.tsc_khz();
    let cycle = cycle(options, tsc_khz)?;
    check_cycle(env, &machine, &cycle)?;
    machine.check_downtime(options.policies.downtime)?;
    let mut run = Run { env, options, cancel, migrations: Vec::new(), stretches: Vec::new(), end: None };
    run.approach(&mut machine, console)?;
    machine.audit_timers();
    run.stretch(&mut machine)?;
    for khz in cycle.iter().copied().cycle().take(usize::try_from(options.migrations).unwrap_or(usize::MAX)) {
        if run.end.is_some() {
            break;
        }
        machine = run.migrate(machine, khz)?;
        progress(run.made(), options.migrations);
    }
    run.until_end(&mut machine)?;
    let setup = setup(image, options, &machine, tsc_khz, cycle);
    let Run { migrations, stretches, end, .. } = run;
    Ok(Findings {
        schema: SCHEMA,
        setup,
        migrations,
        stretches,
        timers: machine.timer_accounts(),
        interrupts: machine.timer_summary().unwrap_or_default(),
        guest_stopped: machine.guest_stopped(),
        console: console.found(),
        end,
        vm_ns: machine.vm_time(),
    })
}

fn setup(image: &Image, options: &Options, machine: &Machine, tsc_khz: Khz, khz_cycle: Vec<Khz>) -> Setup {
    let Options { boot, migrations, every, policies, inject, late, linux, .. } = options;
    Setup {
        guest: image.name().to_owned(),
        cmdline: boot.cmdline.clone(),
        cpus: boot.cpus,
        time: boot.time.as_str(),
        source: machine.tsc_source().as_str(),
        tsc_khz,
        khz_cycle,
        wanted: *migrations,
        every_ns: nanos(*every),
        deadline: policies.deadline.as_str(),
        downtime: policies.downtime.as_str(),
        fault: inject.clone(),
        late_ns: late.map(nanos),
        linux: *linux,
    }
}

/// The frequencies after the migrations, in turn.
fn cycle(options: &Options, boot: Khz) -> Result<Vec<Khz>, CheckError> {
    if !options.khz_cycle.is_empty() {
        return Ok(options.khz_cycle.clone());
    }
    let present = u64::from(boot.get());
    [present / 2, present, present * 2, present]
        .into_iter()
        .map(|khz| {
            Khz::new(khz).map_err(|error| RunError::Usage(format!("{error}: name others with --tsc-khz-cycle")).into())
        })
        .collect()
}

/// Checks all frequencies, so that an impossible one is reported before the guest runs.
fn check_cycle(env: &HostEnvironment, machine: &Machine, cycle: &[Khz]) -> Result<(), CheckError> {
    let mut present = machine.tsc_khz();
    for khz in cycle.iter().chain(cycle.first()) {
        check_ratio(present, *khz)?;
        machine.check_source(env, *khz)?;
        present = *khz;
    }
    Ok(())
}

struct Run<'a> {
    env: &'a HostEnvironment,
    options: &'a Options,
    cancel: &'a AtomicBool,
    migrations: Vec<Migrated>,
    stretches: Vec<Stretch>,
    end: Option<Ended>,
}

impl Run<'_> {
    fn made(&self) -> u64 {
        u64::try_from(self.migrations.len()).unwrap_or(u64::MAX)
    }

    /// Runs until the console shows what is waited for.
    fn approach(&mut self, machine: &mut Machine, console: &Console) -> Result<(), CheckError> {
        let within = nanos(self.options.within);
        let wanted = self.options.wait_for.as_deref();
        loop {
            self.run(machine, LOOK_NS)?;
            let ready = match wanted {
                Some(_) => console.found().wanted,
                None => (0..machine.cpu_count()).any(|cpu| machine.timer_interrupts(cpu) >= SETTLED),
            };
            if ready && self.end.is_none() {
                return Ok(());
            }
            let passed = self.end.as_ref().map(|ended| ended.how.clone());
            let why = match passed {
                Some(how) => format!("the guest ended ({how})"),
                None if machine.vm_time().0 >= within => {
                    format!("{} of VM time have passed", vmtime::Length(self.options.within))
                }
                None => continue,
            };
            let what = match wanted {
                Some(text) => format!("its console showed {text:?}"),
                None => format!("it had {SETTLED} interrupts of a LAPIC timer"),
            };
            let last = match console.last_lines() {
                lines if lines.is_empty() => "it printed nothing".to_owned(),
                lines => format!("its last lines: {lines}"),
            };
            return Err(CheckError::NotReady(format!("{why} before {what}; {last}")));
        }
    }

    /// Runs for so many nanoseconds of VM time, or until the guest ends.
    fn run(&mut self, machine: &mut Machine, length_ns: u64) -> Result<(), CheckError> {
        let until = machine.vm_time().0.saturating_add(length_ns);
        while self.end.is_none() && machine.vm_time().0 < until {
            if self.cancel.load(Ordering::SeqCst) {
                return Err(CheckError::Interrupted { made: self.made(), wanted: self.options.migrations });
            }
            let stop = VmTime(machine.vm_time().0.saturating_add(LOOK_NS).min(until));
            if let StopReason::Ended(end) = machine.run(&NoRequests, Some(stop))? {
                self.end = Some(ended(&end));
            }
        }
        Ok(())
    }

    /// Runs for the time between two migrations.
    fn stretch(&mut self, machine: &mut Machine) -> Result<(), CheckError> {
        let interrupts = |machine: &Machine| machine.timer_summary().map_or(0, |timer| timer.interrupts);
        let (from, before) = (machine.vm_time(), interrupts(machine));
        self.run(machine, nanos(self.options.every))?;
        self.stretches.push(Stretch {
            tsc_khz: machine.tsc_khz(),
            vm_ns: machine.vm_time().0.saturating_sub(from.0),
            interrupts: interrupts(machine).saturating_sub(before),
        });
        Ok(())
    }

    /// Migrates the machine, runs on, and compares what the guest arms its timers for with what a copy does that is not
    /// migrated.
    fn migrate(&mut self, mut machine: Machine, khz: Khz) -> Result<Machine, CheckError> {
        machine.pause()?;
        let (number, from) = (self.made().saturating_add(1), machine.tsc_khz());
        // The copies keep the VM time of deadlines in flight. So the guest is judged by itself only if it does, too.
        let Policies { deadline, restorer, .. } = &self.options.policies;
        let by_itself = *deadline == DeadlinePolicy::Rescale && restorer.is_none();
        let (stayed, moved) = match khz == from {
            true => (Vec::new(), None),
            false if by_itself => (self.armings_of_copy(&mut machine, from)?, None),
            false => (self.armings_of_copy(&mut machine, from)?, Some(self.armings_of_copy(&mut machine, khz)?)),
        };
        let before = machine.stopped_clocks()?.ok_or_else(|| RunError::BadState("the machine runs".to_owned()))?;
        let reference = machine.reference();
        let (mut machine, migration) = machine.migrate(self.env, khz, &self.options.policies)?;
        let off = |tsc| before.moment.vm.0.wrapping_sub(reference.at(tsc).0).cast_signed();
        let pages = self.pages(&machine, &before, number, off(before.moment.tsc));
        self.stretch(&mut machine)?;
        let own = || machine.timer_accounts().into_iter().map(|account| account.first).collect();
        let moved: Vec<Vec<Arming>> = moved.unwrap_or_else(own);
        let (from_khz, to_khz) = (migration.from_khz, migration.to_khz);
        let armings =
            stayed.iter().zip(&moved).map(|(stayed, moved)| compare(stayed, moved, from_khz, to_khz)).collect();
        self.migrations.push(Migrated { number, vm_ns: migration.vm_ns, from_khz, to_khz, armings, pages });
        Ok(machine)
    }

    /// For what a copy of the paused machine that continues at `khz` arms its timers first.
    fn armings_of_copy(&self, machine: &mut Machine, khz: Khz) -> Result<Vec<Vec<Arming>>, CheckError> {
        let mut twin = machine.twin(self.env, khz)?;
        twin.audit_timers();
        let deadline = DeadlinePolicy::Rescale;
        twin.resume(&Policies { deadline, restorer: None, ..self.options.policies.clone() })?;
        let until = twin.vm_time().0.saturating_add(nanos(self.options.every));
        loop {
            let stop = VmTime(twin.vm_time().0.saturating_add(LOOK_NS).min(until));
            let ended = matches!(twin.run(&NoRequests, Some(stop))?, StopReason::Ended(_));
            let accounts = twin.timer_accounts();
            let enough = accounts.iter().all(|account| account.first.len() >= COMPARED);
            if ended || enough || twin.vm_time().0 >= until || self.cancel.load(Ordering::SeqCst) {
                return Ok(accounts.into_iter().map(|account| account.first).collect());
            }
        }
    }

    /// What the migration did to the kvmclock pages. Empty if vCPU 0 has none.
    fn pages(&self, machine: &Machine, before: &StoppedClocks, number: u64, off_ns: i64) -> Vec<PageFound> {
        let Some(resumed) = machine.resumed_clocks() else { return Vec::new() };
        let mut after = before.clone();
        for (cpu, vcpu) in after.vcpus.iter_mut().enumerate() {
            vcpu.page = machine.kvmclock_page(cpu).map(|(page, _)| page);
        }
        let khz = machine.tsc_khz();
        let context = Context { number, kind: Kind::Migration, khz, counts_downtime: false, kvm_pages: false };
        let Ok(Stop { vcpus, .. }) = account(context, before, resumed, &after) else { return Vec::new() };
        let with_page = before.vcpus.iter().enumerate().filter(|(_, vcpu)| vcpu.page.is_some());
        let scale = Scale::from_khz(khz);
        let found = with_page.zip(vcpus).map(|((cpu, _), stop)| PageFound {
            cpu,
            step_ns: stop.reading_ns,
            scale: (stop.new.tsc_to_system_mul, stop.new.tsc_shift) == (scale.mul(), scale.shift()),
            ahead_of_first_ns: stop.ahead_of_first_ns,
            off_ns,
        });
        found.collect()
    }

    /// Lets the guest end, if it is to.
    fn until_end(&mut self, machine: &mut Machine) -> Result<(), CheckError> {
        if self.options.end_within > Duration::ZERO {
            self.run(machine, nanos(self.options.end_within))?;
        }
        Ok(())
    }
}

fn ended(end: &End) -> Ended {
    let good = matches!(end, End::Guest(GuestExit::Debug(0) | GuestExit::Reset | GuestExit::PowerOff));
    let how = match end {
        End::Guest(GuestExit::Reset) => "reset".to_owned(),
        End::Guest(GuestExit::PowerOff) => "power-off".to_owned(),
        End::Guest(GuestExit::Debug(code)) => format!("code {code} at the debug-exit port"),
        end => end.message().unwrap_or_else(|| "it ended".to_owned()),
    };
    Ended { good, how }
}
