//! Guest images: an ELF64 kernel with a PVH entry note.

use std::{
    fs,
    io::{self, Cursor, Read},
    path::Path,
};

use linux_loader::{
    configurator::{BootConfigurator, BootParams, pvh::PvhBootConfigurator},
    loader::{
        KernelLoader,
        elf::{
            Elf, PvhBootCapability,
            start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
        },
    },
};
use object::{Object, ObjectSection, read::elf::ElfFile64};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::sites::{SiteError, Sites};

/// Where boot data goes: below 1 MiB, where PVH kernels do not load.
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6800;
const MEMORY_MAP: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
const CMDLINE_MAX: usize = 0x1_0000;
/// The first megabyte's RAM ends where the PC's video memory and firmware began.
const LOW_RAM_END: u64 = 0xa_0000;
const HIGH_RAM_START: u64 = 0x10_0000;
/// `hvm_start_info.magic`, "xEn3" (Xen `include/public/arch-x86/hvm/start_info.h`).
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// `hvm_memmap_table_entry.type`: RAM.
const TYPE_RAM: u32 = 1;
/// An image larger than this is a mistake.
const IMAGE_MAX: u64 = 1 << 30;

/// An image that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("guest image {name}: {source}")]
    Read {
        /// The image.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The file is too large to be an image.
    #[error("guest image {0}: larger than 1 GiB")]
    TooLarge(String),
    /// Not an ELF64 file for x86-64.
    #[error("guest image {name}: not an ELF64 executable for x86-64 ({reason}); build one or use the embedded guest")]
    NotElf {
        /// The image.
        name: String,
        /// What the parser said.
        reason: String,
    },
    /// No way in.
    #[error("guest image {0}: no PVH entry point (an ELF note `Xen`, type 18); Linux has one with CONFIG_PVH=y")]
    NoPvhEntry(String),
    /// It does not fit.
    #[error(
        "guest image {name}: needs memory up to {needed:#x}, but the guest has {available:#x} bytes; use a larger --memory"
    )]
    TooBigForMemory {
        /// The image.
        name: String,
        /// End of its highest segment.
        needed: u64,
        /// RAM size.
        available: u64,
    },
    /// The loader refused it.
    #[error("guest image {name}: {reason}")]
    Load {
        /// The image.
        name: String,
        /// Why.
        reason: String,
    },
    /// Its trap sites are wrong.
    #[error("guest image {name}: {source}")]
    Sites {
        /// The image.
        name: String,
        /// Why.
        source: SiteError,
    },
    /// Its tick ring is wrong.
    #[error("guest image {name}: the tick ring at {address:#x} is not in guest memory")]
    Ring {
        /// The image.
        name: String,
        /// Its address.
        address: u64,
    },
    /// The command line does not fit.
    #[error("the guest command line has {0} bytes; at most {max} are possible", max = CMDLINE_MAX - 1)]
    CmdlineTooLong(usize),
    /// The command line holds a byte that would end it.
    #[error("the guest command line contains a NUL byte")]
    CmdlineNul,
    /// The initrd does not fit.
    #[error("the initrd of {0} bytes does not fit into guest memory beside the kernel; use a larger --memory")]
    InitrdTooBig(usize),
}

/// A guest image, read and understood.
pub struct Image {
    name: String,
    bytes: Vec<u8>,
    sites: Sites,
    ring: Option<u64>,
}

/// Where a loaded image starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// Address of the PVH start info, for EBX.
    pub start_info: u64,
}

impl Image {
    /// Reads the image at `path`.
    ///
    /// # Errors
    /// [`ImageError`] naming the file and the reason.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let name = path.display().to_string();
        let read = |source| ImageError::Read { name: name.clone(), source };
        let file = fs::File::open(path).map_err(read)?;
        let mut bytes = Vec::new();
        let length = file.take(IMAGE_MAX + 1).read_to_end(&mut bytes).map_err(read)?;
        if u64::try_from(length).is_ok_and(|length| length > IMAGE_MAX) {
            return Err(ImageError::TooLarge(name));
        }
        Self::parse(name, bytes)
    }

    /// Understands an image in memory; `name` is for messages.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn parse(name: String, bytes: Vec<u8>) -> Result<Self, ImageError> {
        let not_elf = |reason: String| ImageError::NotElf { name: name.clone(), reason };
        let elf = ElfFile64::<object::LittleEndian>::parse(bytes.as_slice()).map_err(|e| not_elf(e.to_string()))?;
        if elf.architecture() != object::Architecture::X86_64 {
            return Err(not_elf(format!("machine {:?}", elf.architecture())));
        }
        let sites = match elf.section_by_name(guest_abi::sites::SECTION) {
            Some(section) => {
                let data = section.data().map_err(|e| not_elf(e.to_string()))?;
                Sites::from_section(data).map_err(|source| ImageError::Sites { name: name.clone(), source })?
            }
            None => Sites::default(),
        };
        let ring = elf.section_by_name(guest_abi::report::SECTION).map(|section| section.address());
        Ok(Self { name, sites, ring, bytes })
    }

    /// The name for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The trap sites it lists.
    #[must_use]
    pub fn sites(&self) -> &Sites {
        &self.sites
    }

    /// Guest physical address of its tick ring, if it has one.
    #[must_use]
    pub fn ring(&self) -> Option<u64> {
        self.ring
    }

    /// Puts the image, its command line and boot data into `memory`.
    ///
    /// # Errors
    /// [`ImageError`]; `memory` is then of no use.
    pub fn load(&self, memory: &GuestMemoryMmap, cmdline: &str, initrd: Option<&[u8]>) -> Result<Entry, ImageError> {
        self.check_fits(memory)?;
        let failed = |reason: String| ImageError::Load { name: self.name.clone(), reason };
        let mut cursor = Cursor::new(self.bytes.as_slice());
        let loaded = Elf::load(memory, None, &mut cursor, None).map_err(|e| failed(e.to_string()))?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(ImageError::NoPvhEntry(self.name.clone()));
        };
        self.sites.check(memory).map_err(|source| ImageError::Sites { name: self.name.clone(), source })?;
        if let Some(address) = self.ring.filter(|address| !memory.address_in_range(GuestAddress(*address))) {
            return Err(ImageError::Ring { name: self.name.clone(), address });
        }
        write_cmdline(memory, cmdline)?;
        let module = initrd.map(|bytes| place_initrd(memory, bytes, loaded.kernel_end)).transpose()?;
        write_boot_params(memory, module).map_err(failed)?;
        Ok(Entry { rip: entry.raw_value(), start_info: START_INFO })
    }

    /// Every loadable segment must lie in RAM; the loader's own message would not say what is needed.
    fn check_fits(&self, memory: &GuestMemoryMmap) -> Result<(), ImageError> {
        let elf = ElfFile64::<object::LittleEndian>::parse(self.bytes.as_slice())
            .map_err(|e| ImageError::NotElf { name: self.name.clone(), reason: e.to_string() })?;
        let available: u64 = memory.iter().map(GuestMemoryRegion::len).fold(0, u64::saturating_add);
        for header in elf.elf_program_headers() {
            use object::read::elf::ProgramHeader;
            let endian = object::LittleEndian;
            let (start, size) = (header.p_paddr(endian), header.p_memsz(endian));
            if header.p_type(endian) != object::elf::PT_LOAD || size == 0 {
                continue;
            }
            let needed = start.saturating_add(size);
            let fits = usize::try_from(size).is_ok_and(|size| {
                memory.check_range(GuestAddress(start), size) && start.checked_add(size as u64).is_some()
            });
            if !fits {
                return Err(ImageError::TooBigForMemory { name: self.name.clone(), needed, available });
            }
        }
        Ok(())
    }
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), ImageError> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(ImageError::CmdlineTooLong(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(ImageError::CmdlineNul);
    }
    let text = [cmdline.as_bytes(), &[0]].concat();
    memory.write_slice(&text, GuestAddress(CMDLINE)).map_err(|_| ImageError::CmdlineTooLong(cmdline.len()))
}

/// Puts the initrd as high as the first RAM region allows; gives (address, size).
fn place_initrd(memory: &GuestMemoryMmap, bytes: &[u8], kernel_end: u64) -> Result<(u64, u64), ImageError> {
    let too_big = || ImageError::InitrdTooBig(bytes.len());
    let size = u64::try_from(bytes.len()).map_err(|_| too_big())?;
    let end = memory.iter().next().map_or(0, |region| region.last_addr().raw_value().saturating_add(1));
    let address = end.checked_sub(size).map(|address| address & !0xfff).ok_or_else(too_big)?;
    if address < kernel_end.max(HIGH_RAM_START) {
        return Err(too_big());
    }
    memory.write_slice(bytes, GuestAddress(address)).map_err(|_| too_big())?;
    Ok((address, size))
}

fn write_boot_params(memory: &GuestMemoryMmap, module: Option<(u64, u64)>) -> Result<(), String> {
    let ram = |addr: u64, end: u64| hvm_memmap_table_entry {
        addr,
        size: end.saturating_sub(addr),
        type_: TYPE_RAM,
        reserved: 0,
    };
    let mut map = vec![ram(0, LOW_RAM_END)];
    for region in memory.iter() {
        let end = region.last_addr().raw_value().saturating_add(1);
        map.push(ram(region.start_addr().raw_value().max(HIGH_RAM_START), end));
    }
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: 0,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).map_err(|e| e.to_string())?,
        reserved: 0,
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if let Some((paddr, size)) = module {
        let entry = hvm_modlist_entry { paddr, size, cmdline_paddr: 0, reserved: 0 };
        params.set_modules(&[entry], GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(|e| e.to_string())
}
