//! The same guest.bin, unpatched, on QEMU.

use vm_tests::{finish, guest, qemu, require, require_kvm};

// Catches: a guest that runs on our VMM only: that needs a device, MSR or CPUID leaf that other VMMs lack.
#[test]
fn the_guest_ticks_under_qemu() {
    require_kvm!();
    let mut qemu = require!(qemu());
    qemu.args("-M microvm -accel kvm -nodefaults -no-reboot -serial stdio -display none".split(' '));
    qemu.args("-device isa-debug-exit,iobase=0xf4,iosize=0x4 -kernel".split(' ')).arg(guest());
    let ended = finish(qemu.args(["-append", "hz=100 count=50"]));
    // QEMU's own status is (code << 1) | 1, and the guest's code for a good end is 0.
    assert_eq!(ended.code(), 1, "{ended:#?}");
    assert!(ended.stdout.contains("guest: 50 ticks, "), "{ended:#?}");
}
