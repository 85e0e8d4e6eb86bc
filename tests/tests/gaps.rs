//! A process that the host stops, and that continues before any vCPU runs again. The library is called directly, so
//! that the stop is between a resume and a pause in every run.

use std::{io, thread, time::Duration};

use guest_image::GUEST_ELF;
use machine::{
    BootOptions, HostEnvironment, LapicKind, Machine, Outputs, StopReason, TimeMode,
    boot::Image,
    config::{POLL, source::SourceChoice},
    policy::Policies,
    sched::mailbox::NoRequests,
};
use vm_tests::require_kvm;
use vmtime::VmTime;

/// Longer than the longest delay that counts as the scheduler's, and the tenth of a second that a vCPU may have run.
const STOP: Duration = Duration::from_millis(1200);

// Catches: VM time that jumps over a stop between a resume and the first entry, if a pause comes before that entry.
#[test]
fn a_pause_after_a_stop_begins_with_the_stop() {
    require_kvm!();
    let mut env = HostEnvironment::open(None).expect("a host");
    env.poll = POLL;
    let image = Image::parse("the guest".to_owned(), GUEST_ELF.to_vec()).expect("the guest's image");
    for lapic in [LapicKind::User, LapicKind::Kvm] {
        let options = BootOptions {
            memory: 128 << 20,
            cmdline: "hz=100 count=100000".to_owned(),
            initrd: None,
            lapic,
            time: TimeMode::Real,
            source: SourceChoice::Auto,
            khz: None,
            cpus: 1,
            seed: 0,
            cpuid: machine::boot::cpuid_changes::CpuidChanges::default(),
            x2apic: true,
            pv_eoi: false,
            vmclock: false,
            acpi: machine::AcpiTables::Auto,
        };
        let outputs = Outputs::new(Box::new(io::sink()), None);
        let mut machine = Machine::boot(&env, &image, &options, outputs).expect("a machine");
        while machine.run(&NoRequests, Some(VmTime(300_000_000))).expect("a run") != StopReason::Reached {}
        machine.pause().expect("a pause");
        let before = machine.vm_time();
        machine.resume(&Policies::default()).expect("a resume");
        thread::sleep(STOP);
        let gap = machine.pause().expect("a pause");
        assert!(gap.is_some_and(|gap| gap >= STOP / 2), "{lapic:?}: {gap:?}");
        let ran = Duration::from_nanos(machine.vm_time().0 - before.0);
        assert!(ran < STOP / 2, "{lapic:?}: VM time advanced by {ran:?}");
        assert_eq!(machine.pause().expect("a pause"), None, "{lapic:?}: it is paused");
    }
}
