//! Rules of the manual for rare cases of the local APIC: asserted for ours, and only printed for KVM's, which differs
//! from kernel to kernel (`cargo test --test lapic_rules -- --nocapture`; docs/lapic-kvm.md has what was measured).

use std::fs;

use vm_tests::{Lab, deadline_write, doctor, raw, require, require_kvm, skip};

/// Where code goes that does not fit before [`raw::with_tables`]' tables, behind which it is.
const MORE: u32 = raw::LOAD + 0x900;
/// `mov dx, 0x3f8`.
const COM1: [u8; 4] = [0x66, 0xba, 0xf8, 0x03];
/// SVR = 0x1ff.
const ENABLE: [u8; 10] = [0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 1, 0, 0];
/// Counts at 0x1000b0, writes EOI, and returns without IRET, which some hosts do not emulate.
const COUNT: [u8; 27] = [
    0xff, 0x05, 0xb0, 0, 0x10, 0, // inc dword [0x1000b0]
    0xc7, 0x05, 0xb0, 0, 0xe0, 0xfe, 0, 0, 0, 0, // EOI
    0x58, 0x83, 0xc4, 4, 0x9d, 0xff, 0xe0, // pop eax; add esp, 4; popf; jmp eax
    0, 0, 0, 0,
];
/// A #GP handler that counts at 0x1000b0 and goes on behind the RDMSR or WRMSR.
const SKIP: [u8; 20] = [
    0xff, 0x05, 0xb0, 0, 0x10, 0, // inc dword [0x1000b0]
    0x83, 0xc4, 4, 0x58, 0x83, 0xc0, 2, // add esp, 4; pop eax; add eax, 2
    0x83, 0xc4, 4, 0x9d, 0xff, 0xe0, 0, // add esp, 4; popf; jmp eax
];
/// `mov al, [0x1000b0]; add al, '0'; out dx, al; mov byte [0x1000b0], 0`: prints the count, and begins anew.
const TELL: [u8; 15] = [0xa0, 0xb0, 0, 0x10, 0, 0x04, b'0', 0xee, 0xc6, 0x05, 0xb0, 0, 0x10, 0, 0];

/// A guest that is `code`, however long, with `handler` for `vector`.
fn guest(code: &[u8], vector: u8, handler: &[u8]) -> Vec<u8> {
    // mov eax, MORE; jmp eax.
    let [a, b, c, d] = MORE.to_le_bytes();
    let mut image = raw::with_tables(&[0xb8, a, b, c, d, 0xff, 0xe0], vector, handler);
    image.resize(0x900, 0);
    image.extend([&COM1[..], code, &raw::SUCCESS].concat());
    image
}

/// What the guest prints with our LAPIC, and with KVM's if there is one.
fn both(image: &[u8]) -> (String, Option<String>) {
    let lab = Lab::new();
    fs::write(lab.path("image"), image).unwrap();
    let run = |lapic: &str| lab.run(&format!("--guest image --timeout 60s --lapic {lapic}"));
    let ours = run("user").expect(0).stdout;
    let kvms = run("kvm");
    (ours, (kvms.code() != 3).then(|| kvms.expect(0).stdout))
}

// SDM vol. 3, "Local Vector Table": a masked entry inhibits the delivery. The expiry is over then.
#[test]
fn a_masked_expiry_is_not_delivered_later() {
    require_kvm!();
    require!(deadline_write());
    // rdtsc; mov esi, eax; WAIT: rdtsc; sub eax, esi; cmp eax, 20,000,000; jb WAIT.
    const WAIT: [u8; 15] = [0x0f, 0x31, 0x89, 0xc6, 0x0f, 0x31, 0x29, 0xf0, 0x3d, 0x00, 0x2d, 0x31, 0x01, 0x72, 0xf5];
    let code = [
        // mov al, 0xff; out 0x21, al; out 0xa1, al: no 8254 tick of the BIOS, should the waits be long in VM time.
        &[0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1],
        &ENABLE[..],
        // LVTT = masked, deadline mode, vector 0x40; mfence.
        &[0xc7, 0x05, 0x20, 3, 0xe0, 0xfe, 0x40, 0, 5, 0, 0x0f, 0xae, 0xf0],
        // rdtsc; add eax, 100,000; adc edx, 0; mov ecx, 0x6e0; wrmsr.
        &[0x0f, 0x31, 0x05, 0xa0, 0x86, 1, 0, 0x83, 0xd2, 0, 0xb9, 0xe0, 6, 0, 0, 0x0f, 0x30],
        &WAIT,
        // LVTT = the same, not masked; sti; ...; cli.
        &[0xc7, 0x05, 0x20, 3, 0xe0, 0xfe, 0x40, 0, 4, 0, 0xfb],
        &WAIT,
        &[0xfa],
        &COM1,
        &TELL,
    ]
    .concat();
    let (ours, kvms) = both(&guest(&code, 0x40, &COUNT));
    eprintln!("deliveries after unmasking: ours {ours}, KVM's {kvms:?}");
    assert_eq!(ours, "0");
}

// SDM vol. 3, "Error Handling": Send Illegal Vector (bit 5) and Receive Illegal Vector (bit 6), the latter for the LVT
// too.
#[test]
fn vectors_below_16_are_errors() {
    require_kvm!();
    // mov dword [ESR], 0; mov eax, [ESR]; shr al, 4; add al, '0'; out dx, al.
    const TELL_ESR: [u8; 20] =
        [0xc7, 0x05, 0x80, 2, 0xe0, 0xfe, 0, 0, 0, 0, 0xa1, 0x80, 2, 0xe0, 0xfe, 0xc0, 0xe8, 4, 0x04, b'0'];
    let code = [
        &ENABLE[..],
        // ICR = vector 5 to itself.
        &[0xc7, 0x05, 0, 3, 0xe0, 0xfe, 5, 0x40, 4, 0],
        &TELL_ESR,
        &[0xee],
        // LVTT = one-shot, vector 5; TDCR = 1; TMICT = 1; mov ecx, 20,000; loop -2: until it is over.
        &[0xc7, 0x05, 0x20, 3, 0xe0, 0xfe, 5, 0, 0, 0, 0xc7, 0x05, 0xe0, 3, 0xe0, 0xfe, 0x0b, 0, 0, 0],
        &[0xc7, 0x05, 0x80, 3, 0xe0, 0xfe, 1, 0, 0, 0, 0xb9, 0x20, 0x4e, 0, 0, 0xe2, 0xfe],
        &TELL_ESR,
        &[0xee],
    ]
    .concat();
    let (ours, kvms) = both(&guest(&code, 0x40, &COUNT));
    eprintln!("ESR bits 7:4 after a self-IPI and an LVT interrupt of vector 5: ours {ours}, KVM's {kvms:?}");
    assert_eq!(ours, "64");
}

/// x2APIC registers that the manual's table does not have (SDM vol. 3, "Local APIC Register Address Map Supported by
/// x2APIC").
fn reserved() -> impl Iterator<Item = u32> {
    let ranges = [0x800..=0x801, 0x804..=0x807, 0x809..=0x809, 0x80c..=0x80c, 0x80e..=0x80e];
    let more = [0x829..=0x82e, 0x831..=0x831, 0x83a..=0x83d];
    ranges.into_iter().chain(more).flatten()
}

/// One access of an x2APIC register, and the value that it writes.
#[derive(Clone, Copy)]
enum Access {
    Read(u32),
    Write(u32, u64),
}

impl Access {
    /// `mov ecx, MSR; mov eax, LOW; mov edx, HIGH; rdmsr` or `wrmsr`.
    fn code(self) -> Vec<u8> {
        let (msr, value, opcode) = match self {
            Self::Read(msr) => (msr, 0, 0x32),
            Self::Write(msr, value) => (msr, value, 0x30),
        };
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        [&[0xb9], &msr.to_le_bytes()[..], &[0xb8, a, b, c, d, 0xba, e, f, g, h, 0x0f, opcode]].concat()
    }

    fn name(self) -> String {
        match self {
            Self::Read(msr) => format!("RDMSR {msr:#x}"),
            Self::Write(msr, value) => format!("WRMSR {msr:#x} of {value:#x}"),
        }
    }
}

/// Accesses that fault.
fn faulting() -> Vec<Access> {
    let mut accesses: Vec<Access> = reserved().flat_map(|msr| [Access::Read(msr), Access::Write(msr, 0)]).collect();
    // Without CMCI, which no guest is offered, its LVT entry is reserved too.
    accesses.extend([Access::Read(0x82f), Access::Write(0x82f, 0x1_0000)]);
    // Write-only: EOI, self-IPI. Read-only: ID, version, PPR, LDR, the first of ISR, TMR and IRR, current count.
    accesses.extend([0x80b, 0x83f].map(Access::Read));
    accesses.extend([0x802, 0x803, 0x80a, 0x80d, 0x810, 0x818, 0x820, 0x839].map(|msr| Access::Write(msr, 0)));
    // Reserved bits: all that EOI and ESR have; of TPR, SVR, ICR, each LVT entry, divide configuration and self-IPI one
    // below bit 32; and one above in each that has 32 bits.
    accesses.extend([0x80b, 0x828].map(|msr| Access::Write(msr, 1)));
    accesses
        .extend([(0x808, 0x100), (0x80f, 0x2_01ff), (0x830, 0x4_2040)].map(|(msr, value)| Access::Write(msr, value)));
    accesses.extend((0x832..=0x837).map(|msr| Access::Write(msr, 0x9_0040)));
    accesses.extend([(0x83e, 0x10), (0x83f, 0x140)].map(|(msr, value)| Access::Write(msr, value)));
    let wide = [0x808, 0x80b, 0x80f, 0x828].into_iter().chain(0x832..=0x838).chain([0x83e, 0x83f]);
    accesses.extend(wide.map(|msr| Access::Write(msr, 1 << 32)));
    accesses
}

// SDM vol. 3, "Reserved Bit Checking": RDMSR and WRMSR of a reserved register, and WRMSR of a reserved bit, cause #GP;
// so do a read of a write-only register and a write of a read-only one.
#[test]
fn reserved_x2apic_accesses_fault() {
    require_kvm!();
    if doctor()["x2apic_exits"] == false {
        skip!("x2APIC MSRs do not exit here");
    }
    // mov ecx, 0x1b; rdmsr; or ah, 12; wrmsr: x2APIC mode.
    let mut code = vec![0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32, 0x80, 0xcc, 12, 0x0f, 0x30];
    let accesses = faulting();
    for access in &accesses {
        code.extend([&access.code()[..], &COM1, &TELL].concat());
    }
    let (ours, kvms) = both(&guest(&code, 13, &SKIP));
    let passed = |printed: &str| -> Vec<String> {
        let zipped = accesses.iter().zip(printed.bytes());
        zipped.filter(|(_, faults)| *faults == b'0').map(|(access, _)| access.name()).collect()
    };
    if let Some(kvms) = kvms {
        eprintln!("of {} accesses that fault KVM's LAPIC lets pass: {:#?}", accesses.len(), passed(&kvms));
    }
    assert_eq!(passed(&ours), [""; 0]);
    assert_eq!(ours, "1".repeat(accesses.len()));
}
