//! Sites in kernels of a few bytes, which are loaded at other addresses than those they run at.

use super::{list::SiteList, *};

/// Where the test's kernel runs, and where it is loaded.
const LINEAR: u64 = 0xffff_ffff_8100_0000;
const PHYSICAL: u64 = 0x0100_0000;

const RDTSC: [u8; 2] = [0x0f, 0x31];
const WRMSR: [u8; 2] = [0x0f, 0x30];
const PAUSE: [u8; 2] = [0xf3, 0x90];
const RDTSCP: [u8; 3] = [0x0f, 0x01, 0xf9];

/// One section: its name, whether it is code, where it is in the kernel, and what is in it.
type Section<'a> = (&'a str, bool, usize, Vec<u8>);

/// An ELF64 file with these sections in one segment, and without symbols.
fn elf(sections: &[Section<'_>]) -> Vec<u8> {
    let quads = |quads: &[u64]| -> Vec<u8> { quads.iter().flat_map(|quad| quad.to_le_bytes()).collect() };
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let mut data = Vec::new();
    let mut names = b"\0.names\0".to_vec();
    let mut headers = vec![0; 64];
    let header = |name: usize, kind: u32, flags: u64, address: u64, at: usize, size: usize| {
        let (name, at, size) = (u32::try_from(name).unwrap(), at as u64, size as u64);
        [words(&[name, kind]), quads(&[flags, address, at, size]), words(&[0, 0]), quads(&[1, 0])].concat()
    };
    for (name, code, at, bytes) in sections {
        data.resize(*at, 0);
        let flags = if *code { 6 } else { 2 };
        headers.extend(header(names.len(), 1, flags, LINEAR + *at as u64, 0x78 + at, bytes.len()));
        names.extend(name.bytes().chain([0]));
        data.extend(bytes);
    }
    let names_at = 0x78 + data.len();
    headers.extend(header(1, 3, 0, 0, names_at, names.len()));
    let headers_at = (names_at + names.len()) as u64;
    let count = u16::try_from(sections.len() + 2).unwrap();
    [
        vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0],
        vec![0; 8],
        vec![2, 0, 62, 0, 1, 0, 0, 0],
        quads(&[LINEAR, 64, headers_at]),
        words(&[0]),
        [64u16, 56, 1, 64, count, count - 1].iter().flat_map(|n| n.to_le_bytes()).collect(),
        words(&[1, 5]),
        quads(&[0x78, LINEAR, PHYSICAL, data.len() as u64, data.len() as u64, 0x1000]),
        data,
        names,
        headers,
    ]
    .concat()
}

fn text(code: &[&[u8]]) -> Vec<u8> {
    elf(&[(".text", true, 0, code.concat())])
}

/// The sites of a file: offset in the kernel, kind, whether the kernel writes it later.
fn sites(file: &[u8]) -> Vec<(u64, Kind, bool)> {
    let found = Found::search(file).unwrap();
    let plain = |found: &FoundSite| {
        assert_eq!(found.site.physical, Some(found.site.address - LINEAR + PHYSICAL));
        (found.site.address - LINEAR, found.kind, found.site.later)
    };
    found.sites.iter().map(plain).collect()
}

/// `mov ecx, index`.
fn mov_ecx(index: u32) -> Vec<u8> {
    [&[0xb9][..], &index.to_le_bytes()].concat()
}

// Catches: bytes of RDTSC within another instruction patched as if they were one, which changes that instruction; a
// physical address that is the linear one.
#[test]
fn operands_are_no_sites() {
    // mov eax, 0x310f310f; rdtsc; pause; rdtscp; ret
    let file = text(&[&[0xb8], &RDTSC, &RDTSC, &RDTSC, &PAUSE, &RDTSCP, &[0xc3]]);
    assert_eq!(sites(&file), [(5, Kind::Rdtsc, false), (7, Kind::Pause, false)]);
    assert_eq!(Found::search(&file).unwrap().rdtscp, [LINEAR + 9]);
}

// Catches: a WRMSR of another MSR emulated as one of the TSC deadline; one of the deadline that is missed because its
// ECX is loaded a few instructions earlier.
#[test]
fn a_wrmsr_is_a_site_only_if_its_msr_is_plain_to_see() {
    // shl rdx, 32 / or rax, rdx stand between in kernels.
    let between: &[u8] = &[0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0];
    let (deadline, other) = (mov_ecx(0x6e0), mov_ecx(0x6e1));
    // A call between may change ECX; `mov ecx, edi` does.
    let (call, moved): (&[u8], &[u8]) = (&[0xe8, 0, 0, 0, 0], &[0x89, 0xf9]);
    let file =
        text(&[&RDTSC, &deadline, between, &WRMSR, &other, &WRMSR, &deadline, call, &WRMSR, &deadline, moved, &WRMSR]);
    let found = Found::search(&file).unwrap();
    assert_eq!(sites(&file), [(0, Kind::Rdtsc, false), (14, Kind::DeadlineWrmsr, false)]);
    assert_eq!(found.other_wrmsr, 3);
}

/// A kernel with `rdtsc; nop; nop; nop` at 0x10, and entries of `size` bytes that replace it by `lfence; rdtsc` or
/// RDTSCP, as Linux' `rdtsc_ordered()`.
fn with_alternatives(size: usize) -> Vec<u8> {
    const STORE: usize = 0x100;
    const ENTRIES: usize = 0x200;
    let lfence_rdtsc = [0x0f, 0xae, 0xe8, 0x0f, 0x31];
    let code = [&[0x90; 16][..], &RDTSC, &[0x90; 3], &[0xc3]].concat();
    let mut entries = Vec::new();
    for (replacement, length) in [(STORE, 5u8), (STORE + 5, 3)] {
        let at = ENTRIES + entries.len();
        let offset = |to: usize, from: usize| (i32::try_from(to).unwrap() - i32::try_from(from).unwrap()).to_le_bytes();
        entries.extend(offset(0x10, at));
        entries.extend(offset(replacement, at + 4));
        // Flags, and in old kernels the length of the padding behind both lengths.
        entries.extend(vec![1; size - 10]);
        entries.extend([5, length]);
    }
    let store = [&lfence_rdtsc[..], &RDTSCP].concat();
    elf(&[
        (".text", true, 0, code),
        (".altinstr_replacement", true, STORE, store),
        (".altinstructions", false, ENTRIES, entries),
    ])
}

// Catches: a kernel's RDTSC that is copied over another one while it boots, and is then not known at its new place; a
// layout of the entries that is taken for another one.
#[test]
fn what_linux_copies_is_a_site_at_both_places() {
    for size in [12, 13, 14] {
        let expected = [(0x10, Kind::Rdtsc, false), (0x13, Kind::Rdtsc, true), (0x103, Kind::Rdtsc, false)];
        assert_eq!(sites(&with_alternatives(size)), expected, "{size}");
    }
    let found = Found::search(&with_alternatives(14)).unwrap();
    let origins: Vec<Origin> = found.sites.iter().map(|found| found.origin).collect();
    assert_eq!(origins, [Origin::Code, Origin::CopiedFrom(LINEAR + 0x103), Origin::Replacement]);
}

// Catches: data in code taken for an instruction: 0x06 is none in 64-bit mode, and what follows may be decoded from a
// wrong byte.
#[test]
fn what_follows_no_instruction_is_left_alone_for_a_while() {
    let file = text(&[&RDTSC, &[0x06], &RDTSC, &[0x90; 40], &RDTSC, &[0xc3]]);
    assert_eq!(sites(&file), [(0, Kind::Rdtsc, false), (45, Kind::Rdtsc, false)]);
    assert_eq!(Found::search(&file).unwrap().unsure, [LINEAR + 3]);
}

// Catches: an empty table, with which a guest would run as if all its RDTSC were patched.
#[test]
fn a_file_without_rdtsc_has_no_sites() {
    assert_eq!(Found::search(&text(&[&PAUSE, &RDTSCP])), Err(FindError::None { rdtscp: 1, unsure: 0 }));
    assert!(matches!(Found::search(b"MZ"), Err(FindError::NotElf(_))));
}

// Catches: a list that loses a place or a kind, or that is used for another kernel.
#[test]
fn a_list_is_for_one_kernel() {
    let file = with_alternatives(14);
    let found = Found::search(&file).unwrap();
    let text = serde_json::to_vec(&SiteList::of(&found, &file)).unwrap();
    let list = SiteList::parse(&text).unwrap();
    assert_eq!(list.table(&file).unwrap(), found.table().unwrap());
    let other = list.table(&with_alternatives(12)).unwrap_err().to_string();
    assert!(other.contains("made for an image with SHA-256"), "{other}");
    let refused = |change: &dyn Fn(&mut SiteList)| {
        let mut list = list.clone();
        change(&mut list);
        SiteList::parse(&serde_json::to_vec(&list).unwrap()).and_then(|list| list.table(&file)).unwrap_err().to_string()
    };
    assert!(refused(&|list| list.format = 2).contains("its format is 2"));
    assert!(refused(&|list| list.sites[0].address = "0x+1".to_owned()).contains("not an address"));
    assert!(refused(&|list| list.sites[1].address = list.sites[0].address.clone()).contains("overlaps"));
}

// Catches: a hostile file that costs memory or time without end: sections that share their bytes, more sites than can
// be used; a prefix within the two bytes of PAUSE, which are then other ones.
#[test]
fn hostile_files_are_refused_early() {
    let code = [&RDTSC[..], &PAUSE].concat();
    let twice = elf(&[(".text", true, 0, code.clone()), (".more", true, 2, code)]);
    assert_eq!(Found::search(&twice), Err(FindError::Overlap(LINEAR + 2)));
    let many = text(&[&PAUSE.repeat(70_000)]);
    assert!(matches!(Found::search(&many), Err(FindError::Sites(SiteError::TooMany(65_537)))));
    let file = text(&[&RDTSC, &[0xf3, 0x66, 0x90], &[0x66, 0xf3, 0x90]]);
    assert_eq!(sites(&file), [(0, Kind::Rdtsc, false), (6, Kind::Pause, false)]);
}
