//! Loads the guest's ELF file as PVH boot requires (Xen `docs/misc/pvh.pandoc`).

use std::{fs, path::Path};

use anyhow::{Context, Result};
use object::{
    Endianness,
    elf::{FileHeader64, PT_LOAD},
    read::elf::{FileHeader, ProgramHeader},
};

/// Address of the start info: below the kernel, above a PC's data at 0.
const START_INFO: usize = 0x6000;
/// `hvm_start_info.magic`, and the version that has a memory map.
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const ENTRY_NOTE: u32 = 18;

/// The vCPU's first instruction and its argument.
#[derive(Clone, Copy, Debug)]
pub struct PvhEntry {
    /// EIP.
    pub rip: u64,
    /// EBX: the start info.
    pub start_info: u64,
}

/// Loads the guest into `ram`, with an empty command line and without the memory map, which it does not read.
pub fn load(guest: &Path, ram: &mut [u8]) -> Result<PvhEntry> {
    let file = fs::read(guest).with_context(|| format!("guest {}", guest.display()))?;
    let rip = segments(&file, ram).with_context(|| format!("guest {}", guest.display()))?;
    let info = ram.get_mut(START_INFO..).and_then(<[u8]>::first_chunk_mut::<8>).context("there is no room in RAM")?;
    // The rest of the start info is zero, as RAM is.
    *info = (u64::from(VERSION) << 32 | u64::from(MAGIC)).to_le_bytes();
    Ok(PvhEntry { rip, start_info: START_INFO as u64 })
}

/// Copies the loadable segments; returns the address of the PVH entry.
fn segments(file: &[u8], ram: &mut [u8]) -> Result<u64> {
    let header = FileHeader64::<Endianness>::parse(file)?;
    let endian = header.endian()?;
    let mut entry = None;
    for segment in header.program_headers(endian, file)? {
        if segment.p_type(endian) == PT_LOAD {
            let data = segment.data(endian, file).ok().context("a segment is not in the file")?;
            let to = usize::try_from(segment.p_paddr(endian))?;
            let to = ram.get_mut(to..).and_then(|rest| rest.get_mut(..data.len()));
            to.context("a segment does not fit into RAM")?.copy_from_slice(data);
        }
        if let Some(mut notes) = segment.notes(endian, file)? {
            while let Some(note) = notes.next()? {
                if note.n_type(endian).0 == ENTRY_NOTE && note.name() == b"Xen" {
                    entry = note.desc().first_chunk().map(|address| u64::from(u32::from_le_bytes(*address)));
                }
            }
        }
    }
    entry.context("it has no PVH entry")
}
