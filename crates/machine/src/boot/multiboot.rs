//! Multiboot 1 kernels (GNU GRUB, "Multiboot Specification version 0.6.96").
//!
//! As with QEMU's `-kernel`, the initrd is the only module, and the command line begins with the image's name.

use vm_memory::{Bytes, GuestAddress};

use super::{
    ImageError,
    elf::Elf,
    image::File,
    place::{Block, CMDLINE_MAX, HIGH_RAM_START, LOW_RAM_END, Places, RESERVED, cmdline_bytes, put_initrd},
};
use crate::x86::EntryState;

/// The header's magic number, and what EAX holds at the entry.
const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// "The Multiboot header must be contained completely within the first 8192 bytes", and it is aligned to 4.
const SEARCHED: usize = 8192;
/// Header flags: modules aligned to pages, memory information, a video mode; and the addresses that say where to load.
const WANTS_PAGE_ALIGN: u32 = 1 << 0;
const WANTS_MEMORY: u32 = 1 << 1;
const WANTS_VIDEO: u32 = 1 << 2;
const HAS_ADDRESSES: u32 = 1 << 16;
/// "If the boot loader sees any of the flag bits 0-15 set but doesn't understand", it must not load the image.
const REQUIRED: u32 = 0xffff;
/// Information flags: memory, command line, modules, memory map, boot loader's name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
/// Size of the information structure, including the fields that are left zero, in 32-bit words.
const INFO_WORDS: usize = 29;
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;

/// A Multiboot header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Where in the file it is.
    offset: u64,
    flags: u32,
    /// The five addresses: of the header, load, load end, bss end, entry.
    addresses: Option<[u32; 5]>,
}

/// The 32-bit word at `offset`.
fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

impl Header {
    /// The header in a file, if there is one.
    pub(super) fn find(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..SEARCHED.min(bytes.len()))?;
        (0..bytes.len()).step_by(4).find_map(|offset| {
            let [magic, flags, checksum] = [0, 4, 8].map(|field| word(bytes, offset.saturating_add(field)));
            let flags = flags.filter(|_| magic == Some(HEADER_MAGIC))?;
            if checksum?.wrapping_add(flags).wrapping_add(HEADER_MAGIC) != 0 {
                return None;
            }
            let [a, b, c, d, e] = [12, 16, 20, 24, 28].map(|field| word(bytes, offset.saturating_add(field)));
            let addresses = (flags & HAS_ADDRESSES != 0).then(|| Some([a?, b?, c?, d?, e?]));
            // The flag says that there are addresses, and the file ends before them: not a header.
            let addresses = match addresses {
                Some(None) => return None,
                other => other.flatten(),
            };
            Some(Self { offset: u64::try_from(offset).ok()?, flags, addresses })
        })
    }

    /// Loads the image at the addresses in its header, and returns the entry point.
    fn load_by_addresses(
        &self,
        file: File<'_>,
        places: &mut Places<'_>,
        addresses: [u32; 5],
    ) -> Result<u64, ImageError> {
        let [header, load, load_end, bss_end, entry] = addresses.map(u64::from);
        let wrong = |reason: &str| ImageError::Header {
            name: file.name.to_owned(),
            format: "Multiboot",
            reason: reason.to_owned(),
        };
        let before = header.checked_sub(load).ok_or_else(|| wrong("lies before the address that it is loaded to"))?;
        let start =
            self.offset.checked_sub(before).ok_or_else(|| wrong("is loaded from before the file's beginning"))?;
        let rest = usize::try_from(start).ok().and_then(|start| file.bytes.get(start..)).unwrap_or(&[]);
        let data = match load_end {
            0 => rest,
            end => {
                let size = end.checked_sub(load).ok_or_else(|| wrong("ends before it begins"))?;
                let data = usize::try_from(size).ok().and_then(|size| rest.get(..size));
                data.ok_or_else(|| wrong("asks for more than the file holds"))?
            }
        };
        let loaded = load.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
        file.take(places, load, bss_end.max(loaded).saturating_sub(load))?;
        places.memory().write_slice(data, GuestAddress(load)).map_err(|error| file.failed(error.to_string()))?;
        Ok(entry)
    }
}

pub(super) fn load(
    file: File<'_>,
    header: &Header,
    elf: Option<&Elf>,
    places: &mut Places<'_>,
    cmdline: &str,
    initrd: Option<&[u8]>,
) -> Result<EntryState, ImageError> {
    let wrong = |reason: String| ImageError::Header { name: file.name.to_owned(), format: "Multiboot", reason };
    let unknown = header.flags & REQUIRED & !(WANTS_PAGE_ALIGN | WANTS_MEMORY | WANTS_VIDEO);
    if unknown != 0 {
        return Err(wrong(format!("requires features that vmm does not have (flags {unknown:#x})")));
    }
    if header.flags & WANTS_VIDEO != 0 {
        log::warn!("{} asks for a video mode: there is no video", file.name);
    }
    let cmdline = cmdline_bytes(format!("{} {cmdline}", file.name).trim_end(), CMDLINE_MAX)?;
    let entry = match (header.addresses, elf) {
        (Some(addresses), _) => header.load_by_addresses(file, places, addresses)?,
        (None, Some(elf)) => {
            elf.take(file, places)?;
            elf.write(file, places)?;
            elf.entry
        }
        (None, None) => return Err(wrong("has no load addresses, and the file is no ELF for x86".to_owned())),
    };
    if !places.is_ram(entry, 1) {
        return Err(wrong(format!("leads to an entry point outside guest memory, {entry:#x}")));
    }
    // The module is above the kernel, and aligned to a page whether the kernel asks for it or not.
    let above = |places: &mut Places<'_>, size| places.lowest(size, places.end()..places.low_end());
    let module = initrd.map(|bytes| put_initrd(places, bytes, above)).transpose()?;
    let at = write_information(file, places, &cmdline, module)?;
    Ok(EntryState { rip: entry, rax: LOADER_MAGIC, rbx: at, pc: true, ..EntryState::default() })
}

/// Writes the information structure and what it points to, and returns its address.
fn write_information(
    file: File<'_>,
    places: &mut Places<'_>,
    cmdline: &[u8],
    module: Option<(u64, u64)>,
) -> Result<u64, ImageError> {
    let mut block = Block::default();
    block.add(&[0; INFO_WORDS * 4]);
    let entries =
        places.map().into_iter().map(|ram| (ram, TYPE_RAM)).chain(RESERVED.map(|range| (range, TYPE_RESERVED)));
    let map: Vec<u8> = entries
        .flat_map(|(range, kind)| {
            let size = range.end.saturating_sub(range.start);
            // The entry's size does not count itself.
            let (start, size) = (range.start.to_le_bytes(), size.to_le_bytes());
            [&20u32.to_le_bytes()[..], &start, &size, &kind.to_le_bytes()].concat()
        })
        .collect();
    let mmap = block.add(&map);
    let text = block.add(cmdline);
    let loader = block.add(b"vmm\0");
    let module_at = module.map(|_| block.add(&[0; 16]));
    let at = places.boot_data(block.size()).ok_or_else(|| file.no_room())?;

    // Everything lies below the MMIO hole, so below 4 GiB.
    let word = |value: u64| u32::try_from(value).map_err(|error| file.failed(error.to_string()));
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    if let Some(((start, size), offset)) = module.zip(module_at) {
        // The module's string is empty: it points to the NUL at the end of the boot loader's name.
        let string = at.saturating_add(loader).saturating_add(3);
        block.replace(offset, &words(&[word(start)?, word(start.saturating_add(size))?, word(string)?, 0]));
    }
    let upper_kib = places.low_end().saturating_sub(HIGH_RAM_START) / 1024;
    let mut info = [0u32; INFO_WORDS];
    let fields = [
        (0, u64::from(INFO_FLAGS)),
        (1, LOW_RAM_END / 1024),
        (2, upper_kib),
        (4, at.saturating_add(text)),
        (5, u64::from(module.is_some())),
        (6, module_at.map_or(0, |offset| at.saturating_add(offset))),
        (11, u64::try_from(map.len()).unwrap_or(0)),
        (12, at.saturating_add(mmap)),
        (16, at.saturating_add(loader)),
    ];
    for (index, value) in fields {
        if let Some(field) = info.get_mut(index) {
            *field = word(value)?;
        }
    }
    block.replace(0, &words(&info));
    block.write(places, at).map_err(|reason| file.failed(reason))?;
    Ok(at)
}
