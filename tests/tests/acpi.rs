//! What the ACPI tables and the MP table name, and who gets them; how a guest powers itself off.

use std::fs;

use vm_tests::{Ended, Lab, raw, require_kvm};

fn boot(lab: &Lab, image: &[u8], flags: &str) -> Ended {
    fs::write(lab.path("image"), image).unwrap();
    lab.run(&format!("--guest image {flags}"))
}

// Catches: a guest that powers itself off, or resets as the FADT says, and does not end, or ends as one that failed.
#[test]
fn power_off_and_reset_end_with_success() {
    require_kvm!();
    // mov dx, 0x604; mov ax, SLP_EN and the type; out dx, ax; mov dx, 0xf4; out dx, al; hlt.
    let sleep =
        |high: u8| [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x01, high, 0x66, 0xef, 0x66, 0xba, 0xf4, 0, 0xee, 0xf4];
    boot(&Lab::new(), &raw::multiboot(&sleep(0x34)), "").expect(0);
    // SLP_TYP alone, and a state that does not exist.
    for high in [0x14, 0x30] {
        boot(&Lab::new(), &raw::multiboot(&sleep(high)), "").refused(1, &["failed with code 1"]);
    }
    // mov al, 0xfe; out 0x64, al; hlt.
    boot(&Lab::new(), &raw::multiboot(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4]), "").expect(0);
}

// Catches: ACPI tables that a PVH kernel is not told of, or that are there although nobody wants them.
#[test]
fn a_pvh_kernel_finds_acpi_tables_unless_they_are_off() {
    require_kvm!();
    // mov eax, [ebx+32]; cmp eax, 0xe0000; jne end; cmp dword [eax], "RSD "; end: setne al; out 0xf4, al; hlt.
    let code = [
        &[0x8b, 0x43, 32, 0x3d, 0, 0, 0x0e, 0, 0x75, 6, 0x81, 0x38][..],
        b"RSD ",
        &[0x0f, 0x95, 0xc0, 0xe6, 0xf4, 0xf4],
    ]
    .concat();
    let kernel = raw::pvh(raw::LOAD, &code);
    for (flags, code) in [("", 0), ("--acpi on", 0), ("--acpi off", 1), ("--lapic kvm", 0)] {
        let ended = boot(&Lab::new(), &kernel, flags);
        assert_eq!(ended.code(), code, "{flags}: {ended:#?}");
    }
    // One that is loaded where they are.
    let there = raw::pvh(0xe_0000, &raw::SUCCESS);
    boot(&Lab::new(), &there, "").refused(2, &["0xe0000", "--acpi off"]);
    boot(&Lab::new(), &there, "--acpi off").expect(0);
}

// Catches: a kernel without ACPI that finds no CPU, or one that finds CPUs although it shall have no tables.
#[test]
fn a_multiboot_kernel_finds_the_mp_table_where_there_are_acpi_tables() {
    require_kvm!();
    // cmp dword [0xf0000], "_MP_"; setne al; out 0xf4, al; hlt.
    let code = [&[0x81, 0x3d, 0, 0, 0x0f, 0][..], b"_MP_", &[0x0f, 0x95, 0xc0, 0xe6, 0xf4, 0xf4]].concat();
    for (flags, code_expected) in [("--cpus 2", 0), ("--acpi off", 1), ("--lapic kvm", 1)] {
        let ended = boot(&Lab::new(), &raw::multiboot(&code), flags);
        assert_eq!(ended.code(), code_expected, "{flags}: {ended:#?}");
    }
}
