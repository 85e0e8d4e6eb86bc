//! The same guest.bin, unpatched, on somebody else's VMM.

use std::process::Command;

use vm_tests::{finish, guest, kvm};

// Catches: a guest that runs on our VMM only: a device, MSR or CPUID leaf that nobody else has.
#[test]
fn the_guest_ticks_under_qemu() {
    if !kvm() {
        return;
    }
    if let Err(error) = Command::new("qemu-system-x86_64").arg("--version").output() {
        eprintln!("skipped: qemu-system-x86_64 cannot be run: {error}");
        return;
    }
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args("-M microvm -accel kvm -nodefaults -no-reboot -serial stdio -display none".split(' '));
    qemu.args("-device isa-debug-exit,iobase=0xf4,iosize=0x4 -kernel".split(' ')).arg(guest());
    let ended = finish(qemu.args(["-append", "hz=100 count=50"]));
    // QEMU's own status is (code << 1) | 1, and the guest's code for a good end is 0.
    assert_eq!(ended.code(), 1, "{ended:#?}");
    assert!(ended.stdout.contains("guest: 50 ticks, "), "{ended:#?}");
}
