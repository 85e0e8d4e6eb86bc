//! Guests of a few instructions, put together byte by byte in the formats that `vmm` boots.

use guest_abi::sites::Kind;

/// Where [`multiboot`] is loaded, and where its code begins.
pub const LOAD: u32 = 0x10_0000;
const CODE: usize = 0x20;
/// Where [`with_tables`] has its handler, its GDT and what loads it and the IDT, a counter for the handler, and the
/// IDT.
const HANDLER: usize = 0x60;
const GDT: usize = 0x80;
const GDTR: usize = 0xa0;
const IDTR: usize = 0xa8;
const IDT: usize = 0x100;

/// `lgdt [GDTR]; lidt [IDTR]; mov esp, 0x200000`.
const LOAD_TABLES: [u8; 19] =
    [0x0f, 0x01, 0x15, 0xa0, 0x00, 0x10, 0x00, 0x0f, 0x01, 0x1d, 0xa8, 0x00, 0x10, 0x00, 0xbc, 0x00, 0x00, 0x20, 0x00];

/// `mov al, 0xff; out 0x21, al; sti`: no interrupt comes, and one could. For guests that spin: not every emulated host
/// interrupts a guest that spins with interrupts off.
pub const INTERRUPTIBLE: [u8; 5] = [0xb0, 0xff, 0xe6, 0x21, 0xfb];

/// `xor eax, eax; out 0xf4, al; hlt`: success.
pub const SUCCESS: [u8; 5] = [0x31, 0xc0, 0xe6, 0xf4, 0xf4];

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn put(bytes: &mut Vec<u8>, at: usize, part: &[u8]) {
    bytes.resize(bytes.len().max(at + part.len()), 0);
    bytes[at..at + part.len()].copy_from_slice(part);
}

/// A Multiboot 1 header with `flags` and the addresses that follow it, and `code` at 0x100020 in flat 32-bit mode.
#[must_use]
pub fn multiboot_with(flags: u32, addresses: [u32; 5], code: &[u8]) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    let mut bytes = words(&[MAGIC, flags, 0u32.wrapping_sub(MAGIC).wrapping_sub(flags)]);
    bytes.extend(words(&addresses));
    put(&mut bytes, CODE, code);
    bytes
}

/// A Multiboot 1 kernel that is `code`.
#[must_use]
pub fn multiboot(code: &[u8]) -> Vec<u8> {
    multiboot_with(0x1_0003, [LOAD, LOAD, 0, 0, LOAD + 0x20], code)
}

/// A Multiboot 1 kernel with a GDT and with `handler` as the interrupt handler of `vector`: at most 32 bytes, which may
/// count at 0x1000b0. `code` is at most 45 bytes, entered with interrupts off.
#[must_use]
pub fn with_tables(code: &[u8], vector: u8, handler: &[u8]) -> Vec<u8> {
    assert!(code.len() <= HANDLER - CODE - LOAD_TABLES.len() && handler.len() <= GDT - HANDLER, "no room");
    let mut bytes = multiboot(&[&LOAD_TABLES, code].concat());
    put(&mut bytes, HANDLER, handler);
    // Null, flat code at 8, flat data at 16.
    let gdt = [0u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat();
    put(&mut bytes, GDT, &gdt);
    let at = |offset: usize| (LOAD + u32::try_from(offset).unwrap()).to_le_bytes();
    put(&mut bytes, GDTR, &[&23u16.to_le_bytes()[..], &at(GDT)].concat());
    put(&mut bytes, IDTR, &[&0x7ffu16.to_le_bytes()[..], &at(IDT)].concat());
    // A 32-bit interrupt gate.
    let [a, b, c, d] = at(HANDLER);
    put(&mut bytes, IDT + usize::from(vector) * 8, &[a, b, 8, 0, 0, 0x8e, c, d]);
    put(&mut bytes, IDT + 0x7ff, &[0]);
    bytes
}

/// A bzImage whose 32-bit kernel is `code`.
#[must_use]
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    put(&mut bytes, 0x1f1, &[1]);
    put(&mut bytes, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut bytes, 0x202, b"HdrS");
    put(&mut bytes, 0x206, &0x20fu16.to_le_bytes());
    put(&mut bytes, 0x211, &[1]);
    put(&mut bytes, 0x214, &LOAD.to_le_bytes());
    put(&mut bytes, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut bytes, 0x238, &2047u32.to_le_bytes());
    put(&mut bytes, 0x258, &u64::from(LOAD).to_le_bytes());
    put(&mut bytes, 0x260, &0x1000u32.to_le_bytes());
    put(&mut bytes, 1024, code);
    bytes
}

/// An ELF64 kernel with a PVH entry: one segment of `contents` at `address`, entered at its beginning.
#[must_use]
pub fn pvh(address: u32, contents: &[u8]) -> Vec<u8> {
    const NOTE: usize = 0xc0;
    const DATA: usize = 0x1000;
    let quads = |quads: &[u64]| -> Vec<u8> { quads.iter().flat_map(|quad| quad.to_le_bytes()).collect() };
    let (address64, size) = (u64::from(address), contents.len() as u64);
    let mut bytes = Vec::new();
    put(&mut bytes, 0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(&mut bytes, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut bytes, 24, &quads(&[address64, 64, 0]));
    // Size of this header; size and number of program headers; no sections.
    put(&mut bytes, 52, &[64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    // PT_LOAD, PT_NOTE.
    put(&mut bytes, 64, &words(&[1, 7]));
    put(&mut bytes, 72, &quads(&[DATA as u64, address64, address64, size, size, 0x1000]));
    put(&mut bytes, 120, &words(&[4, 4]));
    put(&mut bytes, 128, &quads(&[NOTE as u64, 0, 0, 20, 20, 4]));
    put(&mut bytes, NOTE, &[&words(&[4, 4, 18])[..], b"Xen\0", &address.to_le_bytes()].concat());
    put(&mut bytes, DATA, contents);
    bytes
}

/// The same with trap sites: addresses, and what kind of instruction is there.
#[must_use]
pub fn pvh_with_sites(address: u32, contents: &[u8], sites: &[(u32, Kind)]) -> Vec<u8> {
    const NAMES: &[u8] = b"\0.trap_sites\0.names\0";
    let quads = |quads: &[u64]| -> Vec<u8> { quads.iter().flat_map(|quad| quad.to_le_bytes()).collect() };
    let mut bytes = pvh(address, contents);
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    let table = bytes.len() as u64;
    bytes.extend(sites.iter().flat_map(|(address, kind)| quads(&[u64::from(*address), *kind as u64])));
    let names = bytes.len() as u64;
    bytes.extend(NAMES);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let headers = bytes.len() as u64;
    // Name, type, flags, address, offset, size, link and info, alignment, entry size.
    let header = |name: u32, kind: u32, offset: u64, size: usize| {
        [words(&[name, kind]), quads(&[0, 0, offset, size as u64, 0, 1, 0])].concat()
    };
    bytes.extend(
        [header(0, 0, 0, 0), header(1, 1, table, 16 * sites.len()), header(13, 3, names, NAMES.len())].concat(),
    );
    put(&mut bytes, 40, &quads(&[headers]));
    // Size and number of section headers, and which has the names.
    put(&mut bytes, 58, &[64, 0, 3, 0, 2, 0]);
    bytes
}

/// As [`pvh`], of `code` at 0x100000, with a section `.tick_ring` that holds `ring`, at 0x101000. A guest that is
/// loaded with a ring needs no code to fill it.
#[must_use]
pub fn pvh_with_ring(code: &[u8], ring: &[u8]) -> Vec<u8> {
    const RING: usize = 0x1000;
    let mut contents = Vec::new();
    put(&mut contents, 0, code);
    put(&mut contents, RING, ring);
    let mut bytes = pvh(LOAD, &contents);
    let names = b"\0.tick_ring\0.shstrtab\0";
    let names_at = bytes.len() as u64;
    bytes.extend_from_slice(names);
    let headers_at = bytes.len() as u64;
    // Name, type, flags, address, offset, size, and what is 0 here (System V ABI, `Elf64_Shdr`).
    let section = |name: u32, kind: u32, address: u64, offset: u64, size: usize| {
        let quads = [0, address, offset, size as u64, 0, 1, 0].map(u64::to_le_bytes).concat();
        [words(&[name, kind]), quads].concat()
    };
    let at = u64::from(LOAD) + RING as u64;
    bytes.extend(
        [section(0, 0, 0, 0, 0), section(1, 1, at, 0x2000, ring.len()), section(12, 3, 0, names_at, names.len())]
            .concat(),
    );
    put(&mut bytes, 40, &headers_at.to_le_bytes());
    // Size and number of section headers, and which of them has the names.
    put(&mut bytes, 58, &[64, 0, 3, 0, 2, 0]);
    bytes
}
