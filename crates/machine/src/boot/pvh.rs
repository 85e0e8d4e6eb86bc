//! ELF64 kernels with a PVH entry note (Xen `docs/misc/pvh.pandoc`), through linux-loader.

use std::io::Cursor;

use linux_loader::loader::{
    KernelLoader,
    elf::{
        Elf as Loader, PvhBootCapability,
        start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
    },
};
use vm_memory::{Address, ByteValued};

use super::{
    ImageError,
    elf::Elf,
    image::File,
    place::{Block, CMDLINE_MAX, HIGH_RAM_START, Places, cmdline_bytes, put_initrd},
};
use crate::x86::EntryState;

/// `hvm_start_info.magic`, "xEn3" (Xen `include/public/arch-x86/hvm/start_info.h`).
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// `hvm_memmap_table_entry.type`: RAM.
const TYPE_RAM: u32 = 1;

pub(super) fn load(
    file: File<'_>,
    elf: &Elf,
    places: &mut Places<'_>,
    cmdline: &str,
    (initrd, rsdp): (Option<&[u8]>, Option<u64>),
) -> Result<EntryState, ImageError> {
    let cmdline = cmdline_bytes(cmdline, CMDLINE_MAX)?;
    elf.take(file, places)?;
    let loaded = Loader::load(places.memory(), None, &mut Cursor::new(file.bytes), None);
    let loaded = loaded.map_err(|error| file.failed(error.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(ImageError::NoEntry(file.name.to_owned()));
    };
    // The initrd is at the highest free address below the MMIO hole, and above the kernel.
    let kernel_end = places.end();
    let high = |places: &mut Places<'_>, size| {
        let end = places.low_end();
        places.highest(size, end).filter(|at| *at >= kernel_end.max(HIGH_RAM_START))
    };
    let module = initrd.map(|bytes| put_initrd(places, bytes, high)).transpose()?;

    // The start info is added first, so that the block's address is its address. It is empty for now: it holds the
    // addresses of the other parts, which are known once the block has its size and so its place.
    let mut block = Block::default();
    block.add(hvm_start_info::default().as_slice());
    let map: Vec<u8> = places
        .map()
        .into_iter()
        .flat_map(|ram| {
            let size = ram.end.saturating_sub(ram.start);
            hvm_memmap_table_entry { addr: ram.start, size, type_: TYPE_RAM, reserved: 0 }.as_slice().to_owned()
        })
        .collect();
    let memmap = block.add(&map);
    let modules = module
        .map(|(paddr, size)| block.add(hvm_modlist_entry { paddr, size, cmdline_paddr: 0, reserved: 0 }.as_slice()));
    let text = block.add(&cmdline);
    let at = places.boot_data(block.size()).ok_or_else(|| file.no_room())?;
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: modules.map_or(0, |offset| at.saturating_add(offset)),
        cmdline_paddr: at.saturating_add(text),
        rsdp_paddr: rsdp.unwrap_or(0),
        memmap_paddr: at.saturating_add(memmap),
        memmap_entries: u32::try_from(places.map().len()).map_err(|e| file.failed(e.to_string()))?,
        reserved: 0,
    };
    block.replace(0, info.as_slice());
    block.write(places, at).map_err(|reason| file.failed(reason))?;
    Ok(EntryState { rip: entry.raw_value(), rbx: at, ..EntryState::default() })
}
