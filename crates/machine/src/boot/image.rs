//! Guest images: reading the file, recognising its format, loading it into guest memory.

use std::{fs, io::Read, path::Path};

use object::{
    Endianness,
    elf::{ELFMAG, FileHeader32, FileHeader64},
};

use super::{
    ImageError, acpi::Provided, bzimage, elf::Elf, firmware, multiboot, place::Places, pvh, sites::Sites,
    unlisted::Unlisted,
};
use crate::{host::regular_file::open_regular, mem::ram::GuestRam, x86::EntryState};

/// A larger image or initrd is refused, in bytes.
const FILE_MAX: u64 = 1 << 30;

/// A guest image that was read and parsed.
pub struct Image {
    name: String,
    bytes: Vec<u8>,
    kind: Kind,
    sites: Sites,
    ring: Option<u64>,
}

/// The format of an image, which decides how it is loaded and entered.
enum Kind {
    /// An ELF64 file with a PVH entry note.
    Pvh(Elf),
    /// A file with a Multiboot 1 header; an ELF of either class, unless the header says where to load it.
    Multiboot(multiboot::Header, Option<Elf>),
    /// A Linux bzImage.
    BzImage,
}

/// How much of an image decides its format, in bytes: Multiboot's header may be at the end of it.
const HEAD_BYTES: u64 = 8192;

/// Reads all of the initrd at `path`, for a guest with `memory` bytes of RAM.
///
/// # Errors
/// [`ImageError`] naming the file and the reason; one that is larger than RAM is not read.
pub fn read_initrd(path: &Path, memory: u64) -> Result<Vec<u8>, ImageError> {
    let what = "initrd";
    let (file, length) = open(what, path)?;
    if length > memory {
        return Err(ImageError::InitrdTooBig(usize::try_from(length).unwrap_or(usize::MAX)));
    }
    read(what, path, &file, length, Vec::new())
}

/// Opens a file and checks its size; `what` is the file's use, for error messages.
fn open(what: &'static str, path: &Path) -> Result<(fs::File, u64), ImageError> {
    let name = || path.display().to_string();
    let (file, length) = open_regular(path).map_err(|source| ImageError::Read { what, name: name(), source })?;
    if length > FILE_MAX {
        Err(ImageError::TooLarge { what, name: name(), limit: FILE_MAX })
    } else {
        Ok((file, length))
    }
}

/// Reads `file`, of which `bytes` have been read, up to `length` bytes in all. `length` is the size when it was opened:
/// what is appended later is not read.
fn read(
    what: &'static str,
    path: &Path,
    file: &fs::File,
    length: u64,
    mut bytes: Vec<u8>,
) -> Result<Vec<u8>, ImageError> {
    let left = length.saturating_sub(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    // Reserved in advance, so that one read(2) takes everything.
    bytes.reserve_exact(usize::try_from(left).unwrap_or(0));
    let failed = |source| ImageError::Read { what, name: path.display().to_string(), source };
    file.take(left).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

impl Image {
    /// Reads the image at `path`.
    ///
    /// # Errors
    /// [`ImageError`] naming the file and the reason.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let what = "guest image";
        let (file, length) = open(what, path)?;
        let head = read(what, path, &file, length.min(HEAD_BYTES), Vec::new())?;
        let known = head.starts_with(&ELFMAG) || multiboot::Header::find(&head).is_some() || bzimage::is_one(&head);
        // Of a file of no known format the rest is not read.
        let bytes = if known { read(what, path, &file, length, head)? } else { head };
        Self::parse(path.display().to_string(), bytes)
    }

    /// Parses an image in memory; `name` is for messages.
    ///
    /// A file can have several formats at once. A PVH entry takes precedence over a Multiboot header, because it is the
    /// entry that 64-bit kernels are made for.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn parse(name: String, bytes: Vec<u8>) -> Result<Self, ImageError> {
        let elf64 = Elf::parse::<FileHeader64<Endianness>>(&bytes);
        let header = multiboot::Header::find(&bytes);
        let kind = match (elf64, header) {
            (Ok(elf), _) if elf.has_pvh_note => Kind::Pvh(elf),
            (Ok(elf), Some(header)) => Kind::Multiboot(header, Some(elf)),
            (Err(_), Some(header)) => Kind::Multiboot(header, Elf::parse::<FileHeader32<Endianness>>(&bytes).ok()),
            (Ok(_), None) => return Err(ImageError::NoEntry(name)),
            (Err(_), None) if bzimage::is_one(&bytes) => Kind::BzImage,
            (Err(reason), None) => return Err(ImageError::Unknown { name, reason }),
        };
        let (sites, ring) = match &kind {
            Kind::Pvh(elf) | Kind::Multiboot(_, Some(elf)) => (elf.sites.as_deref(), elf.ring),
            Kind::Multiboot(_, None) | Kind::BzImage => (None, None),
        };
        let sites = sites.map(Sites::from_section).transpose();
        let sites = sites.map_err(|source| ImageError::Sites { name: name.clone(), source })?.unwrap_or_default();
        Ok(Self { name, bytes, kind, sites, ring })
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

    /// The same image with the trap sites that were found in it.
    #[must_use]
    pub fn with_found_sites(self, sites: Sites) -> Self {
        Self { sites: sites.found(true), ..self }
    }

    /// The kernel that a bzImage unpacks when it is started; any other image as it is. Its code is then known before
    /// the guest runs.
    ///
    /// # Errors
    /// [`ImageError`]: the payload cannot be unpacked, or is no kernel with a PVH entry.
    pub fn unpacked(self) -> Result<Self, ImageError> {
        let Kind::BzImage = self.kind else { return Ok(self) };
        let bytes = bzimage::unpack(File { name: &self.name, bytes: &self.bytes }, FILE_MAX)?;
        Self::parse(self.name, bytes)
    }

    /// The instructions of the image that read the TSC and are not among its trap sites. None if the sites were found:
    /// what was not found is reported by those who searched.
    #[must_use]
    pub fn unlisted(&self) -> Unlisted {
        if self.sites.are_found() { Unlisted::default() } else { Unlisted::scan(&self.bytes, &self.sites) }
    }

    /// Guest physical address of its tick ring, if it has one.
    #[must_use]
    pub fn ring(&self) -> Option<u64> {
        self.ring
    }

    /// Writes the image, its command line and boot data into `memory`, in which `acpi` is already; a Multiboot kernel
    /// searches for the ACPI tables.
    ///
    /// # Errors
    /// [`ImageError`]; `memory` is then unusable.
    pub fn load(
        &self,
        memory: &GuestRam,
        cmdline: &str,
        initrd: Option<&[u8]>,
        acpi: &Provided,
    ) -> Result<EntryState, ImageError> {
        let Provided { rsdp, mp_table, reserved } = acpi;
        let mut places = Places::new(memory);
        if !matches!(self.kind, Kind::Pvh(_)) {
            // Before the image, whose segments may overwrite it.
            firmware::write(memory, mp_table)
                .map_err(|error| ImageError::Load { name: self.name.clone(), reason: error.to_string() })?;
        }
        let file = File { name: &self.name, bytes: &self.bytes };
        let entry = match &self.kind {
            Kind::Pvh(elf) => pvh::load(file, elf, &mut places, cmdline, (initrd, *rsdp)),
            Kind::Multiboot(header, elf) => multiboot::load(file, header, elf.as_ref(), &mut places, cmdline, initrd),
            Kind::BzImage => bzimage::load(file, &mut places, cmdline, (initrd, *rsdp)),
        }?;
        if places.image_is_in(reserved) {
            return Err(file.failed(format!(
                "it is loaded into {:#x} to {:#x}, where a guest has its ACPI tables and VMClock; use --acpi off --vmclock off",
                reserved.start, reserved.end
            )));
        }
        self.sites.check(memory).map_err(|source| ImageError::Sites { name: self.name.clone(), source })?;
        if let Some(address) = self.ring.filter(|address| !places.is_ram(*address, 1)) {
            return Err(ImageError::Ring { name: self.name.clone(), address });
        }
        Ok(entry)
    }
}

/// An image's bytes, and its name for messages.
#[derive(Clone, Copy)]
pub(super) struct File<'a> {
    pub(super) name: &'a str,
    pub(super) bytes: &'a [u8],
}

impl File<'_> {
    /// Checks that `size` bytes from `start` are RAM, and marks them as taken.
    pub(super) fn take(self, places: &mut Places<'_>, start: u64, size: u64) -> Result<(), ImageError> {
        if size > 0 && !places.is_ram(start, size) {
            let (needed, available) = (start.saturating_add(size), places.available());
            return Err(ImageError::TooBigForMemory { name: self.name.to_owned(), needed, available });
        }
        places.take(start, size);
        Ok(())
    }

    pub(super) fn failed(self, reason: String) -> ImageError {
        ImageError::Load { name: self.name.to_owned(), reason }
    }

    pub(super) fn no_room(self) -> ImageError {
        ImageError::NoRoom(self.name.to_owned())
    }
}
