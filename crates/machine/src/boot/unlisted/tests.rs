use super::*;

/// The address of the code in [`elf`], and of its second symbol.
const CODE: u64 = 0x10_0000;
const SECOND: u64 = 0x40;

/// An ELF64 file with one section of code: `boot` at its beginning, which is the entry point, and `main` at 0x40, in
/// 64-bit code. If `symbols` is false it has no symbols; if `sections` is false it has only a segment.
fn elf(boot: &[u8], main: &[u8], symbols: bool, sections: bool) -> Vec<u8> {
    let mut code = boot.to_vec();
    code.resize(0x40, 0x90);
    code.extend(main);
    let quads = |quads: &[u64]| -> Vec<u8> { quads.iter().flat_map(|quad| quad.to_le_bytes()).collect() };
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let (data, size) = (0x78u64, code.len() as u64);
    let names = b"\0.text\0.symtab\0.names\0boot\0main\0";
    let names_at = data + size;
    // Null, boot, main: global, no type, in section 1.
    let symbol = |name: u32, at: u64| [words(&[name, 0x0001_0010]), quads(&[CODE + at, 0])].concat();
    let table = [vec![0; 24], symbol(22, 0), symbol(27, SECOND)].concat();
    let table_at = names_at + names.len() as u64;
    let headers_at = table_at + table.len() as u64;
    let section = |name: u32, kind: u32, flags: u64, address: u64, at: u64, size: u64, link: u32, entry: u64| {
        [words(&[name, kind]), quads(&[flags, address, at, size]), words(&[link, 0]), quads(&[1, entry])].concat()
    };
    let count = if !sections { 0u16 } else { 4 };
    [
        vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0],
        vec![0; 8],
        vec![2, 0, 62, 0, 1, 0, 0, 0],
        quads(&[CODE, 64, if sections { headers_at } else { 0 }]),
        words(&[0]),
        [64u16, 56, 1, 64, count, if sections { 3 } else { 0 }].iter().flat_map(|n| n.to_le_bytes()).collect(),
        words(&[1, 5]),
        quads(&[data, CODE, CODE, size, size, 0x1000]),
        code,
        names.to_vec(),
        table,
        if sections {
            [
                section(0, 0, 0, 0, 0, 0, 0, 0),
                section(1, 1, 6, CODE, data, size, 0, 0),
                section(7, if symbols { 2 } else { 1 }, 0, 0, table_at, 72, 3, 24),
                section(15, 3, 0, 0, names_at, names.len() as u64, 0, 0),
            ]
            .concat()
        } else {
            Vec::new()
        },
    ]
    .concat()
}

fn found(file: &[u8]) -> Vec<(u64, bool, bool)> {
    let Unlisted { first, more } = Unlisted::scan(file, &Sites::default());
    assert_eq!(more, 0);
    first.into_iter().map(|TscRead { address, rdtscp, sure }| (address - CODE, rdtscp, sure)).collect()
}

const RDTSC: &[u8] = &[0x0f, 0x31];
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];

#[test]
fn what_the_table_forgets_is_found_in_every_kind_of_file() {
    let main = [&[0x90, 0x48, 0x89, 0xc8], RDTSC, RDTSCP, &[0xc3]].concat();
    let boot = [&[0xfa][..], RDTSC, &[0xc3]].concat();
    let all = [(1, false, true), (SECOND + 4, false, true), (SECOND + 6, true, true)];
    assert_eq!(found(&elf(&boot, &main, true, true)), all);
    // Decoding begins at the section's beginning or at the entry point. Without symbols no path is known to reach the
    // code after a RET.
    let some = [all[0], (SECOND + 4, false, false), (SECOND + 6, true, false)];
    assert_eq!(found(&elf(&boot, &main, false, true)), some);
    assert_eq!(found(&elf(&boot, &main, false, false)), some);
    assert_eq!(found(b"\x0f\x31"), []);
}

#[test]
fn listed_instructions_are_not_reported() {
    let file = elf(&[], &[RDTSC, &[0x90], RDTSC].concat(), true, true);
    let entry = [(CODE + SECOND).to_le_bytes(), 1u64.to_le_bytes()].concat();
    let unlisted = Unlisted::scan(&file, &Sites::from_section(&entry).unwrap());
    assert_eq!(unlisted.first, [TscRead { address: CODE + SECOND + 3, rdtscp: false, sure: true }]);
    assert_eq!(unlisted.to_string(), "RDTSC at 0x100043");
}

// Catches: a search that takes all bytes 0f 31 for an instruction.
#[test]
fn operands_are_no_instructions() {
    for operand in [
        &[0xb8, 0x0f, 0x31, 0x00, 0x00][..],                           // mov eax, 0x310f
        &[0xe8, 0x0f, 0x31, 0x00, 0x00],                               // call
        &[0x48, 0x8d, 0x05, 0x0f, 0x31, 0x00, 0x00],                   // lea rax, [rip + 0x310f]
        &[0x81, 0x80, 0x0f, 0x01, 0xf9, 0x00, 0x0f, 0x31, 0x00, 0x00], // add dword [rax + 0xf9010f], 0x310f
        &[0x48, 0xb8, 0x11, 0x22, 0x33, 0x44, 0x0f, 0x31, 0x66, 0x77], // mov rax, imm64: in 32-bit code an RDTSC
        &[0x48, 0xb8, 0x11, 0x22, 0x33, 0x44, 0x0f, 0x01, 0xf9, 0x77, 0x90], // and an RDTSCP
    ] {
        assert_eq!(found(&elf(&[], &[operand, &[0xc3]].concat(), true, true)), [], "{operand:02x?}");
    }
}

#[test]
fn code_that_is_entered_may_run_in_either_mode() {
    // In 32-bit code an RDTSC, in 64-bit code a part of MOV RAX, imm64.
    let either = [0x48, 0xb8, 0x11, 0x22, 0x33, 0x44, 0x0f, 0x31, 0x66, 0x77];
    let file = elf(&either, &[0xc3], true, true);
    assert_eq!(found(&file), [(6, false, false)]);
    let unlisted = Unlisted::scan(&file, &Sites::default());
    assert!(!unlisted.any_is_sure());
    assert_eq!(unlisted.to_string(), "RDTSC at 0x100006");
}

#[test]
fn after_bytes_that_are_no_instruction_results_are_unsure() {
    // 06 is no instruction in 64-bit code.
    assert_eq!(found(&elf(&[], &[&[0x06][..], RDTSC].concat(), true, true)), [(SECOND + 1, false, false)]);
    // Only up to a branch's target: the code jumps over four bytes of data, which end within an instruction (b8). From
    // the target on the result is sure again, also at the target of the next branch.
    let code = [&[0xeb, 0x04, 0x06][..], RDTSC, &[0xb8], RDTSC, &[0x74, 0x02, 0xc3, 0x06], RDTSC, &[0xc3]].concat();
    let at = [(SECOND + 3, false, false), (SECOND + 6, false, true), (SECOND + 12, false, true)];
    assert_eq!(found(&elf(&[], &code, true, true)), at);
    // Behind a jump there may be data, though it looks like code; an operand is none even there.
    let code = [&[0xeb, 0x02][..], RDTSC, &[0xc3, 0xe8, 0x0f, 0x31, 0x00, 0x00]].concat();
    assert_eq!(found(&elf(&[], &code, true, true)), [(SECOND + 2, false, false)]);
    // A segment without sections may begin with anything, here with a Multiboot header; the entry is code.
    let file = elf(&[0xc3], &[], false, false);
    assert_eq!(found(&file), []);
}

#[test]
fn the_list_is_bounded() {
    let many: Vec<u8> = RDTSC.repeat(1000);
    let unlisted = Unlisted::scan(&elf(&[], &many, true, true), &Sites::default());
    assert_eq!((unlisted.first.len(), unlisted.more), (NAMED, 1000 - NAMED as u64));
    assert!(unlisted.to_string().ends_with(" and 984 more"), "{unlisted}");
}
