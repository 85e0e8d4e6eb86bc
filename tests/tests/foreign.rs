//! Guests that we did not write: Multiboot 1, bzImage, PVH kernels at unusual places; a PC's interrupt controllers and
//! timer; and guests that do not end.

use std::{fs, fs::File};

use vm_tests::{Ended, Lab, doctor, raw, require_kvm, skip, skip_part};

/// Puts `image` into the laboratory and boots it.
#[track_caller]
fn boot(lab: &Lab, image: &[u8], flags: &str) -> Ended {
    fs::write(lab.path("image"), image).unwrap();
    lab.run(&format!("--guest image {flags}"))
}

/// `mov dx, 0x3f8`.
const COM1: [u8; 4] = [0x66, 0xba, 0xf8, 0x03];
/// Prints the string at ESI, then ends with success.
const PRINT: [u8; 8] = [0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8];

/// A Multiboot kernel that checks EAX, prints its module and then its command line.
fn multiboot_printer() -> Vec<u8> {
    let print = [
        &COM1[..],
        // mov esi, [ebx+24]; mov ecx, [esi+4]; mov esi, [esi]; sub ecx, esi; rep outsb: the module.
        &[0x8b, 0x73, 0x18, 0x8b, 0x4e, 0x04, 0x8b, 0x36, 0x29, 0xf1, 0xf3, 0x6e],
        // mov esi, [ebx+16]: the command line.
        &[0x8b, 0x73, 0x10],
        &PRINT,
        &raw::SUCCESS,
    ]
    .concat();
    // cmp eax, 0x2badb002; je print; mov al, 1; out 0xf4, al.
    raw::multiboot(&[&[0x3d, 0x02, 0xb0, 0xad, 0x2b, 0x74, 0x04, 0xb0, 0x01, 0xe6, 0xf4][..], &print].concat())
}

// Catches: a wrong magic number, module list or command line; a module that is not whole.
#[test]
fn a_multiboot_kernel_gets_its_module_and_command_line() {
    require_kvm!();
    let lab = Lab::new();
    fs::write(lab.path("module"), "MEMSIZE=128\n").unwrap();
    let ended = boot(&lab, &multiboot_printer(), "--initrd module --cmdline word").expect(0);
    assert_eq!(ended.stdout, "MEMSIZE=128\nimage word");
}

// Catches: a header that is followed although it cannot be, a panic or a hang on any cut.
#[test]
fn multiboot_headers_that_cannot_be_followed() {
    let lab = Lab::new();
    let spin = [0xeb, 0xfe];
    let (load, entry) = (raw::LOAD, raw::LOAD + 0x20);
    let refused: [(u32, [u32; 5], &str); 6] = [
        (0x1_0008, [load, load, 0, 0, entry], "requires features"),
        (0x1_0003, [load - 4, load, 0, 0, entry], "lies before"),
        (0x1_0003, [load + 64, load, 0, 0, entry], "before the file's beginning"),
        (0x1_0003, [load, load, load + 0x10_0000, 0, entry], "more than the file holds"),
        (0x1_0003, [load, load, load - 1, 0, entry], "ends before it begins"),
        (0x1_0003, [load, load, 0, 0, 0xf000_0000], "outside guest memory"),
    ];
    require_kvm!();
    for (flags, addresses, reason) in refused {
        boot(&lab, &raw::multiboot_with(flags, addresses, &spin), "--timeout 10s").refused(2, &["Multiboot", reason]);
    }
    let bss = raw::multiboot_with(0x1_0003, [load, load, 0, u32::MAX, entry], &spin);
    boot(&lab, &bss, "").refused(2, &["needs memory up to 0xffffffff", "--memory"]);
    let no_addresses = raw::multiboot_with(3, [0; 5], &spin);
    boot(&lab, &no_addresses, "").refused(2, &["no ELF for x86"]);
    let whole = multiboot_printer();
    for length in 0..32 {
        boot(&lab, &whole[..length], "").refused(2, &["image"]);
    }
}

// Catches: boot parameters, GDT, initrd or command line that are not where Linux' 32-bit boot protocol says.
#[test]
fn a_bzimage_gets_its_initrd_and_command_line() {
    require_kvm!();
    let lab = Lab::new();
    let code = [
        // mov eax, 0x18; mov ds, eax; mov es, eax: __BOOT_DS is in a GDT.
        &[0xb8, 0x18, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0][..],
        &COM1,
        // mov ebx, [esi+0x228]; mov ecx, [esi+0x21c]; mov esi, [esi+0x218]; rep outsb: the initrd.
        &[0x8b, 0x9e, 0x28, 2, 0, 0, 0x8b, 0x8e, 0x1c, 2, 0, 0, 0x8b, 0xb6, 0x18, 2, 0, 0, 0xf3, 0x6e],
        // mov esi, ebx: the command line.
        &[0x89, 0xde],
        &PRINT,
        &raw::SUCCESS,
    ]
    .concat();
    fs::write(lab.path("initrd"), "initrd, ").unwrap();
    let image = raw::bzimage(&code);
    let mut command = lab.vmm("--guest image --initrd initrd");
    fs::write(lab.path("image"), &image).unwrap();
    let ended = vm_tests::finish(command.args(["--cmdline", "console=ttyS0 quiet"])).expect(0);
    assert_eq!(ended.stdout, "initrd, console=ttyS0 quiet");
    for length in [0x206, 0x230, 0x268, 1023, 1024] {
        boot(&lab, &image[..length], "").refused(2, &["image"]);
    }
    let changed = |at: usize, to: &[u8]| {
        let mut image = image.clone();
        image[at..at + to.len()].copy_from_slice(to);
        image
    };
    boot(&lab, &changed(0x206, &[4, 2]), "").refused(2, &["boot protocol"]);
    boot(&lab, &changed(0x214, &[0, 0, 1, 0]), "").refused(2, &["below 1 MiB"]);
    boot(&lab, &changed(0x214, &[0, 0, 0, 0xf0]), "").refused(2, &["--memory"]);
    boot(&lab, &changed(0x260, &[0xff; 4]), "").refused(2, &["--memory"]);
    boot(&lab, &changed(0x238, &[3, 0, 0, 0]), "--cmdline longer").refused(2, &["at most 3"]);
}

// Catches: boot data written over a kernel that is loaded where boot data usually goes.
#[test]
fn boot_data_gives_way_to_a_pvh_kernel() {
    require_kvm!();
    let lab = Lab::new();
    let mut contents = vec![0x5a; 0x2_a000];
    let code = [
        // cmp byte [0x20000], 0x5a; je +4; mov al, 1; out 0xf4, al.
        &[0x80, 0x3d, 0x00, 0x00, 0x02, 0x00, 0x5a, 0x74, 0x04, 0xb0, 0x01, 0xe6, 0xf4][..],
        &COM1,
        // mov esi, [ebx+24]: the command line.
        &[0x8b, 0x73, 0x18],
        &PRINT,
        &raw::SUCCESS,
    ]
    .concat();
    contents[..code.len()].copy_from_slice(&code);
    let ended = boot(&lab, &raw::pvh(0x6000, &contents), "--cmdline hello").expect(0);
    assert_eq!(ended.stdout, "hello");
}

/// Ends with the number of the first comparison that fails, or with success.
fn compare(comparisons: &[&[u8]]) -> Vec<u8> {
    let numbered = (1..).zip(comparisons);
    // je +5; mov al, N; out 0xf4, al; hlt.
    let checks = numbered.flat_map(|(n, compare)| [*compare, &[0x74, 5, 0xb0, n, 0xe6, 0xf4, 0xf4]].concat());
    checks.chain(raw::SUCCESS).collect()
}

// Catches: a BIOS data area of zeros, from which a kernel computes that RAM ends below address 0; and one that
// contradicts the memory map.
#[test]
fn the_bios_data_area_says_where_the_first_megabytes_ram_ends() {
    require_kvm!();
    let lab = Lab::new();
    // cmp word [0x400], 0x3f8; cmp word [0x40e], 0x9fc0; cmp word [0x413], 639; cmp byte [0x9fc00], 1.
    let area: [&[u8]; 4] = [
        &[0x66, 0x81, 0x3d, 0x00, 0x04, 0, 0, 0xf8, 0x03],
        &[0x66, 0x81, 0x3d, 0x0e, 0x04, 0, 0, 0xc0, 0x9f],
        &[0x66, 0x81, 0x3d, 0x13, 0x04, 0, 0, 0x7f, 0x02],
        &[0x80, 0x3d, 0x00, 0xfc, 0x09, 0, 1],
    ];
    // cmp dword [ebx+4], 639: the information's lower memory. mov ecx, [ebx+48]; cmp dword [ecx+12], 0x9fc00: its map.
    let information: [&[u8]; 2] =
        [&[0x81, 0x7b, 0x04, 0x7f, 0x02, 0, 0], &[0x8b, 0x4b, 0x30, 0x81, 0x79, 0x0c, 0x00, 0xfc, 0x09, 0]];
    boot(&lab, &raw::multiboot(&compare(&[&area[..], &information].concat())), "").expect(0);
    // cmp dword [esi+0x2d8], 0x9fc00: the size of the first entry of the boot parameters' map.
    let parameters: [&[u8]; 1] = [&[0x81, 0xbe, 0xd8, 0x02, 0, 0, 0x00, 0xfc, 0x09, 0]];
    boot(&lab, &raw::bzimage(&compare(&[&area[..], &parameters].concat())), "").expect(0);
}

// Catches: an instruction that is shown only in part, and cannot be recognised; a wrong one, because of an instruction
// before it that the VMM performs. FINIT is WAIT and FNINIT; where KVM emulates supervisor code it may have neither.
#[test]
fn an_instruction_that_cannot_be_executed_is_named() {
    require_kvm!();
    let lab = Lab::new();
    let finit = [0x9b, 0xdb, 0xe3];
    let flat = boot(&lab, &raw::multiboot(&[&finit[..], &raw::SUCCESS].concat()), "--timeout 60s");
    // lgdt [0x100040]; jmp 8:0x2e, in a code segment that begins at 0x100000; FINIT; ...
    let mut code = vec![0x0f, 0x01, 0x15, 0x40, 0, 0x10, 0, 0xea, 0x2e, 0, 0, 0, 8, 0];
    code.extend([&finit[..], &raw::SUCCESS].concat());
    code.resize(0x20, 0);
    // Limit and address of the table, then the table.
    code.extend([15, 0, 0x48, 0, 0x10, 0, 0, 0]);
    code.extend([0u64, 0x00cf_9b10_0000_ffff].map(u64::to_le_bytes).concat());
    let based = boot(&lab, &raw::multiboot(&code), "--timeout 60s");
    if flat.code() == 0 {
        assert_eq!(based.code(), 0, "{based:#?}");
        skip!("this host executes FINIT");
    }
    flat.refused(1, &["cannot execute the guest's code at 0x100021 (db e3: fninit): KVM cannot emulate"]);
    based.refused(1, &["cannot execute the guest's code at 0x10002f (db e3: fninit): KVM cannot emulate"]);
}

// Catches: a frequency that hardware takes for the host's, announced as the host's.
#[test]
fn a_frequency_near_the_hosts_is_not_announced_as_the_hosts() {
    require_kvm!();
    let lab = Lab::new();
    let doctor = doctor();
    let khz = doctor["host_tsc_khz"].as_u64().unwrap();
    let image = raw::multiboot(&raw::SUCCESS);
    for flags in ["", "--tsc host", "--lapic kvm"] {
        let same = boot(&lab, &image, &format!("--tsc-khz {khz} {flags}"));
        let near = boot(&lab, &image, &format!("--tsc-khz {} {flags}", khz + khz / 10_000));
        if same.code() == 3 {
            skip_part!("no guest TSC at the host's frequency with the flags {flags:?}");
            continue;
        }
        assert!(same.expect(0).stderr.contains("the guest's frequency is the host's ("));
        let near = near.expect(0).stderr;
        assert!(near.contains("the host's frequency is within 250 ppm of the guest's"), "{flags}: {near}");
    }
}

/// Waits for three timer interrupts at vector 8, where PC firmware has them: sti; hlt; cli; cmp [0x1000b0], 3; jb -12.
const WAIT_FOR_THREE: [u8; 12] = [0xfb, 0xf4, 0xfa, 0x83, 0x3d, 0xb0, 0, 0x10, 0, 3, 0x72, 0xf4];
/// inc [0x1000b0]; mov al, 0x20; out 0x20, al; pop eax; add esp, 4; popf; jmp eax: some hosts emulate no 32-bit IRET.
const COUNT: [u8; 17] = [0xff, 0x05, 0xb0, 0, 0x10, 0, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0x83, 0xc4, 4, 0x9d, 0xff, 0xe0];

// Catches: a timer that does not tick, an 8259 that does not reach LINT0, ExtINT that does not wake from HLT.
#[test]
fn the_pc_timer_interrupts_through_lint0() {
    require_kvm!();
    let lab = Lab::new();
    let image = raw::with_tables(&[&WAIT_FOR_THREE[..], &raw::SUCCESS].concat(), 8, &COUNT);
    boot(&lab, &image, "--timeout 60s").expect(0);
    // Masked (mov al, 0xff; out 0x21, al) it does not come.
    let masked = [&[0xb0, 0xff, 0xe6, 0x21][..], &WAIT_FOR_THREE, &raw::SUCCESS].concat();
    boot(&lab, &raw::with_tables(&masked, 8, &COUNT), "--timeout 300ms")
        .refused(1, &["has not ended after 300ms", "cpu 0 halted", "interrupts on"]);
}

// Catches: a timer or an interrupt controller that does not survive a snapshot. The third tick comes after 164 ms.
#[test]
fn the_pc_timer_goes_on_after_a_restore() {
    require_kvm!();
    let lab = Lab::new();
    let image = raw::with_tables(&[&WAIT_FOR_THREE[..], &raw::SUCCESS].concat(), 8, &COUNT);
    boot(&lab, &image, "--save-at 80ms --save-to saved").expect(0);
    lab.run("restore saved --timeout 60s").expect(0);
}

// Catches: a serial port whose interrupt does not reach the CPU: user space of a Linux guest prints by it.
#[test]
fn the_serial_port_interrupts_through_lint0() {
    require_kvm!();
    let code = [
        // mov al, 0xef; out 0x21, al: IRQ 4 alone; mov dx, 0x3f9; mov al, 2; out dx, al: when the transmitter is empty.
        &[0xb0, 0xef, 0xe6, 0x21, 0x66, 0xba, 0xf9, 0x03, 0xb0, 0x02, 0xee][..],
        // sti; hlt; cli; mov eax, [0x1000b0]; dec eax; out 0xf4, al; hlt: success if there was one.
        &[0xfb, 0xf4, 0xfa, 0xa1, 0xb0, 0, 0x10, 0, 0x48, 0xe6, 0xf4, 0xf4],
    ]
    .concat();
    boot(&Lab::new(), &raw::with_tables(&code, 12, &COUNT), "--timeout 60s").expect(0);
}

// Catches: an interrupt that enters again when its handler writes IA32_APIC_BASE.
#[test]
fn an_apic_base_write_in_a_handler_does_not_repeat_the_interrupt() {
    require_kvm!();
    let lab = Lab::new();
    let code = [
        // SVR = 0x1ff; ICR = vector 0x40 to itself; sti.
        &[0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 1, 0, 0, 0xc7, 0x05, 0, 3, 0xe0, 0xfe, 0x40, 0, 4, 0, 0xfb][..],
        // mov ecx, 20000; loop -2: time for a second one.
        &[0xb9, 0x20, 0x4e, 0, 0, 0xe2, 0xfe],
        // mov eax, [0x1000b0]; dec eax; out 0xf4, al: success if there was one.
        &[0xa1, 0xb0, 0, 0x10, 0, 0x48, 0xe6, 0xf4],
    ]
    .concat();
    let handler = [
        // inc [0x1000b0]; mov ecx, 0x1b; rdmsr; xor ah, 8; wrmsr; xor ah, 8; wrmsr: off and on.
        &[0xff, 0x05, 0xb0, 0, 0x10, 0, 0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32][..],
        &[0x80, 0xf4, 8, 0x0f, 0x30, 0x80, 0xf4, 8, 0x0f, 0x30],
        // pop eax; add esp, 4; popf; jmp eax.
        &[0x58, 0x83, 0xc4, 4, 0x9d, 0xff, 0xe0],
    ]
    .concat();
    boot(&lab, &raw::with_tables(&code, 0x40, &handler), "--timeout 60s").expect(0);
}

// Catches: a silent hang of a guest that spins, halts for good or runs away.
#[test]
fn guests_that_do_not_end() {
    require_kvm!();
    let lab = Lab::new();
    let spins = raw::multiboot(&[&raw::INTERRUPTIBLE[..], &[0xeb, 0xfe]].concat());
    boot(&lab, &spins, "--timeout 200ms").refused(1, &["has not ended after 200ms", "cpu 0 at 0x100025"]);
    let waits = "cpu 1 waits for a start-up message";
    boot(&lab, &spins, "--timeout 200ms --cpus 2").refused(1, &["cpu 0 at 0x100025", waits]);
    // The message is from the vCPU that notices it last: the one that halted, or one that waits to be started.
    for cpus in [1, 2, 2, 2, 3, 3] {
        let halts = raw::multiboot(&[0xfa, 0xf4]);
        boot(&lab, &halts, &format!("--cpus {cpus}"))
            .refused(1, &["0x100022", "interrupts off", "nothing can wake it"]);
    }
    // mov dword [0xfee00300], 0x4500; jmp -2: an INIT to itself, which restarts it where a PC has its firmware.
    let restarts = raw::multiboot(&[0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0, 0, 0xeb, 0xfe]);
    boot(&lab, &restarts, "--x2apic off").refused(1, &["0xfffffff0", "cpu 0", "no memory"]);
    // mov eax, 0xd0000000; cmp dword [eax], -1; je +1; hlt; jmp eax: reads all ones, then there is nothing to execute.
    let runs_away = raw::multiboot(&[0xb8, 0, 0, 0, 0xd0, 0x83, 0x38, 0xff, 0x74, 1, 0xf4, 0xff, 0xe0]);
    boot(&lab, &runs_away, "--timeout 60s").refused(1, &["0xd0000000", "cpu 0", "no memory"]);
}

// Catches: an initrd read without a bound, or into memory that it does not fit.
#[test]
fn initrds_that_are_too_large() {
    require_kvm!();
    let lab = Lab::new();
    for (size, reason) in [(2u64 << 40, "larger than 1073741824 bytes"), (127 << 20, "use a larger --memory")] {
        File::create(lab.path("initrd")).unwrap().set_len(size).unwrap();
        boot(&lab, &multiboot_printer(), "--initrd initrd").refused(2, &["initrd", reason]);
    }
    boot(&lab, &multiboot_printer(), "--initrd absent").refused(2, &["initrd absent", "No such file"]);
}

// Catches: an older trace that is gone although nothing ran.
#[test]
fn an_image_that_cannot_run_leaves_the_trace_alone() {
    require_kvm!();
    let lab = Lab::new();
    fs::write(lab.path("trace"), "older").unwrap();
    boot(&lab, b"#!/bin/sh\n", "--trace trace").refused(2, &["image"]);
    let bss = raw::multiboot_with(0x1_0003, [raw::LOAD, raw::LOAD, 0, u32::MAX, raw::LOAD], &[]);
    boot(&lab, &bss, "--trace trace").refused(2, &["--memory"]);
    assert_eq!(fs::read_to_string(lab.path("trace")).unwrap(), "older");
}

// Catches: a kernel that pushes before it has set up a stack, as it may where a PC's firmware left one, and pops
// another value.
#[test]
fn a_kernel_can_push_before_it_has_a_stack_of_its_own() {
    require_kvm!();
    // push 0x12345678; pop eax; cmp eax, 0x12345678; setne al; out 0xf4, al; hlt.
    let number = 0x1234_5678_u32.to_le_bytes();
    let code = [&[0x68][..], &number, &[0x58, 0x3d], &number, &[0x0f, 0x95, 0xc0, 0xe6, 0xf4, 0xf4]].concat();
    for image in [raw::multiboot(&code), raw::pvh(raw::LOAD, &code), raw::bzimage(&code)] {
        boot(&Lab::new(), &image, "").expect(0);
    }
}
