//! A tick allocates nothing. This is a test program of its own, because it counts all allocations of its process.

use std::{alloc::System, io};

use guest_image::GUEST_ELF;
use machine::{
    BootOptions, HostEnvironment, LapicKind, Machine, Outputs, StopReason, TimeMode, boot::Image, config::POLL,
    sched::mailbox::NoRequests,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use vm_tests::require_kvm;
use vmtime::VmTime;

#[global_allocator]
static GLOBAL: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Number of allocations during `ticks` ticks, after the first 300. `audited`: what timers are armed for is noted.
fn allocations(time: TimeMode, ticks: u64, audited: bool) -> usize {
    let mut env = HostEnvironment::open(None).expect("a host");
    env.poll = POLL;
    let image = Image::parse("the guest".to_owned(), GUEST_ELF.to_vec()).expect("the guest's image");
    let options = BootOptions {
        memory: 128 << 20,
        cmdline: "clockevent=kvm-tsc-deadline hz=1000 count=100000".to_owned(),
        initrd: None,
        lapic: LapicKind::User,
        time,
        source: machine::config::source::SourceChoice::Auto,
        khz: None,
        cpus: 1,
        seed: 0,
        cpuid: machine::boot::cpuid_changes::CpuidChanges::default(),
        x2apic: true,
        pv_eoi: true,
        vmclock: false,
        acpi: machine::AcpiTables::Auto,
    };
    let outputs = Outputs::new(Box::new(io::sink()), None);
    let mut machine = Machine::boot(&env, &image, &options, outputs).expect("a machine");
    let run = |machine: &mut Machine, ms: u64| {
        loop {
            match machine.run(&NoRequests, Some(VmTime(ms * 1_000_000))).expect("a run") {
                StopReason::Reached => break,
                // A busy machine may delay any thread for a while.
                StopReason::HostStopped { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    };
    run(&mut machine, 300);
    if audited {
        machine.audit_timers();
    }
    let region = Region::new(GLOBAL);
    run(&mut machine, 300 + ticks);
    let change = region.change();
    change.allocations + change.reallocations
}

// Catches: a Vec, a Box or a String made in each vCPU step. A run itself allocates, too: hence the difference of two.
#[test]
fn a_tick_allocates_nothing() {
    require_kvm!();
    for (time, audited) in [(TimeMode::Real, false), (TimeMode::Virtual, false), (TimeMode::Virtual, true)] {
        // A collection that grows by doubling may grow once more, and on a busy machine a histogram grows with
        // lateness. One try without these is enough: an allocation in each step shows in every try.
        let tries: Vec<(usize, usize)> =
            (0..3).map(|_| [100, 600].map(|ticks| allocations(time, ticks, audited)).into()).collect();
        let grown = |(few, many): &(usize, usize)| many > &(few + 4);
        assert!(
            !tries.iter().all(grown),
            "{time:?}, audited {audited}: allocations for 100 and for 600 ticks: {tries:?}"
        );
    }
}
