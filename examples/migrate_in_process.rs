//! Boots the embedded guest, moves it to a TSC of half the frequency between two ticks, and prints what came of it.
//!
//! Needs /dev/kvm. The guest's time is virtual: every run prints the same, and a second of sleep takes no time.

use std::io;

use anyhow::{Context, ensure};
use guest_image::GUEST_ELF;
use machine::{
    BootOptions, End, HostEnvironment, LapicKind, Machine, Outputs, Policies, StopReason, TimeMode, boot::Image,
    config::source::SourceChoice, sched::mailbox::NoRequests,
};
use vmtime::{DeadlinePolicy, Khz, VmTime};

fn main() -> anyhow::Result<()> {
    let env = HostEnvironment::open(None)?;
    let image = Image::parse("the embedded guest".to_owned(), GUEST_ELF.to_vec())?;
    let options = BootOptions {
        memory: 128 << 20,
        // 100 ticks a second; each deadline is computed from the kvmclock page.
        cmdline: "clockevent=kvm-tsc-deadline hz=100 count=100".to_owned(),
        initrd: None,
        lapic: LapicKind::User,
        time: TimeMode::Virtual,
        source: SourceChoice::Auto,
        khz: Some(Khz::new(2_600_000)?),
        cpus: 1,
        seed: 0,
        cpuid: machine::boot::cpuid_changes::CpuidChanges::default(),
        x2apic: true,
        pv_eoi: true,
        vmclock: false,
        acpi: machine::AcpiTables::Auto,
    };
    let outputs = Outputs::new(Box::new(io::stdout()), None); // the guest's console, and no trace
    let mut machine = Machine::boot(&env, &image, &options, outputs)?;

    // No other thread posts requests, such as a pause. So the machine runs to this VM time, 5 ms before the next tick.
    let stop = machine.run(&NoRequests, Some(VmTime(505_000_000)))?;
    ensure!(stop == StopReason::Reached, "the guest ended early: {stop:?}");

    // As after a live migration: the deadline that the guest has armed is in ticks of the old TSC. `Rescale` gives it
    // the value at which the new TSC reaches the same VM time. With `Keep` this tick would be 5 ms late.
    machine.pause()?;
    let policies = Policies { deadline: DeadlinePolicy::Rescale, ..Policies::default() };
    let migration = machine.resume_at(Khz::new(1_300_000)?, &policies)?.context("a machine that has run migrates")?;
    println!("at {} ns: {} -> {}", migration.vm_ns.0, migration.from_khz, migration.to_khz);

    let stop = machine.run(&NoRequests, None)?;
    println!("stopped: {stop:?}");
    // The guest records each tick in its memory, and the host has its own account of when it injected each.
    let ticks = machine.tick_summary().context("the guest has a ring of ticks")?;
    let late = |late: Option<machine::audit::Lateness>| late.map_or(0, |late| late.worst_ns);
    println!("{} ticks, {} lost, {} early wakes", ticks.ticks, ticks.lost(true), ticks.early_wakes);
    println!("worst: {} ns late by the guest, {} ns by the host", late(ticks.late_by_guest), late(ticks.late_by_host));
    ensure!(matches!(stop, StopReason::Ended(End::Guest(_))), "the guest did not end by itself");
    Ok(())
}
