//! The cost of a start, counted in system calls: time is too noisy to assert.

use std::{fs, process::Command};

use vm_tests::{Lab, doctor, finish, require, require_kvm, skip, state_file::change_sections, strace};

/// The system calls of `vmm` up to the guest's first byte, a line each; an error where strace cannot be used.
fn calls_to_first_byte(lab: &Lab, vmm: &Command) -> Result<Vec<String>, String> {
    let log = lab.path("calls");
    let mut strace = strace(&["-f", "-e", "trace=ioctl,write,clone,clone3"])?;
    strace.arg("-o").arg(&log).arg(vmm.get_program()).args(vmm.get_args());
    finish(&mut strace).expect(0);
    let calls = fs::read_to_string(log).unwrap();
    let calls: Vec<String> = calls.lines().map(str::to_owned).collect();
    // The guest's own: "guest: …", a byte at a time.
    let own = |call: &String| call.contains("write(") && call.contains(", \"g\", 1)");
    let first = calls.iter().position(own).unwrap_or_else(|| panic!("{calls:#?}"));
    Ok(calls[..first].to_vec())
}

fn count(calls: &[String], name: &str) -> usize {
    calls.iter().filter(|call| call.contains(name)).count()
}

// Catches: a probe in a VM of its own, a guest that waits for other threads than the one for signals, repeated ioctls
// in the set-up, the MSR filter after the memory slots (which made a start ten times as long).
#[test]
fn one_vm_and_few_calls_until_the_guest_runs() {
    require_kvm!();
    let lab = Lab::new();
    let host = doctor();
    if (&host["tsc_equals_host"], &host["deadline_wrmsr"], &host["x2apic_exits"])
        != (&true.into(), &"exits".into(), &true.into())
    {
        skip!("this host needs more than one VM to be known");
    }
    let calls = require!(calls_to_first_byte(&lab, &lab.guest("count=1", "")));
    assert_eq!(count(&calls, "KVM_CREATE_VM,"), 1, "{calls:#?}");
    assert_eq!(count(&calls, "KVM_CREATE_VCPU"), 1, "{calls:#?}");
    assert_eq!(count(&calls, "KVM_GET_SUPPORTED_CPUID"), 1, "{calls:#?}");
    // None, unless strace makes the first byte take longer than the head start.
    assert!(count(&calls, "clone") <= 1, "{calls:#?}");
    let set_up = calls.iter().filter(|call| call.contains("KVM_") && !call.contains("KVM_RUN")).count();
    assert!(set_up <= 32, "{set_up} KVM calls: {calls:#?}");
    let at = |name: &str| calls.iter().position(|call| call.contains(name));
    assert!(at("KVM_X86_SET_MSR_FILTER").unwrap() < at("KVM_SET_USER_MEMORY_REGION").unwrap(), "{calls:#?}");
}

// Catches: facts that were assumed, not probed. A vCPU without x2APIC cannot show whether its MSRs exit.
#[test]
fn a_vcpu_that_cannot_tell_is_not_asked() {
    require_kvm!();
    let lab = Lab::new();
    let calls = require!(calls_to_first_byte(&lab, &lab.guest("count=1", "--x2apic off")));
    let vms = count(&calls, "KVM_CREATE_VM,");
    assert!(vms >= 2, "{vms} VMs, and none of them for the probe: {calls:#?}");
}

// Catches: a restore that asks again what the snapshot says of this very boot, or that runs code of its own in the
// guest's vCPU to find it out.
#[test]
fn a_restore_on_the_same_boot_asks_nothing_twice() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--tsc-khz 2600000 --time virtual --save-at 25ms --save-to snapshot";
    let _ = lab.boot("count=4", flags);
    let mut restore = lab.vmm("restore");
    restore.arg(lab.path("snapshot"));
    let known = require!(calls_to_first_byte(&lab, &restore));
    assert_eq!(count(&known, "KVM_GET_SUPPORTED_CPUID"), 0, "{known:#?}");
    change_sections(&lab.path("snapshot/state"), |name, payload| (name != "host").then_some(payload));
    let unknown = require!(calls_to_first_byte(&lab, &restore));
    assert_eq!(count(&unknown, "KVM_GET_SUPPORTED_CPUID"), 1, "{unknown:#?}");
    let asked = count(&unknown, "KVM_RUN") - count(&known, "KVM_RUN");
    assert_eq!(count(&known, "KVM_CREATE_VM,"), 1, "{known:#?}");
    assert!(count(&unknown, "KVM_CREATE_VM,") > 1 || asked > 1, "{unknown:#?}");
}
