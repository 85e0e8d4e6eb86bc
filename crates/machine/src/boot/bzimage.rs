//! Linux' bzImage (Linux `Documentation/arch/x86/boot.rst`), through linux-loader, entered by the 32-bit boot protocol.

use std::io::Cursor;

use linux_loader::{
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
    loader::{
        KernelLoader,
        bootparam::{boot_e820_entry, boot_params, setup_header},
        bzimage::BzImage,
    },
};
use vm_memory::{ByteValued, GuestAddress};

use super::{
    ImageError,
    image::File,
    payload,
    place::{Block, HIGH_RAM_START, Places, RESERVED, cmdline_bytes, put_initrd},
};
use crate::x86::EntryState;

/// Offsets in the file: of the setup header; of the byte that holds the header's length; and of the byte from which
/// that length counts.
const HEADER: usize = 0x1f1;
const HEADER_END_AT: usize = 0x201;
const HEADER_END_BASE: usize = 0x202;
/// "HdrS".
const MAGIC: [u8; 4] = *b"HdrS";
/// Protocol 2.06: the command line may be as long as `cmdline_size` says. Older kernels are from before 2007.
const OLDEST: u16 = 0x206;
/// Protocol 2.08: the header says where the compressed kernel is.
const WITH_PAYLOAD: u16 = 0x208;
/// `type_of_loader`: not a registered one.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the kernel's part is loaded high.
const LOADED_HIGH: u8 = 1;
/// e820 types: RAM, reserved.
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;
/// Null, unused, flat code, flat data: "a GDT must be loaded with the descriptors for selectors __BOOT_CS(0x10) and
/// __BOOT_DS(0x18)".
const GDT: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Whether the file has Linux' setup header.
pub(super) fn is_one(bytes: &[u8]) -> bool {
    bytes.get(HEADER_END_BASE..).is_some_and(|rest| rest.starts_with(&MAGIC))
}

pub(super) fn load(
    file: File<'_>,
    places: &mut Places<'_>,
    cmdline: &str,
    (initrd, rsdp): (Option<&[u8]>, Option<u64>),
) -> Result<EntryState, ImageError> {
    let wrong = |reason: String| ImageError::Header { name: file.name.to_owned(), format: "Linux setup", reason };
    let header = header(file.bytes).ok_or_else(|| wrong("is cut off".to_owned()))?;
    let version = header.version;
    if version < OLDEST || header.loadflags & LOADED_HIGH == 0 {
        return Err(wrong(format!("is of boot protocol {version:#x} or for low memory; vmm loads 2.06 and later")));
    }
    let start = u64::from(header.code32_start);
    if start < HIGH_RAM_START {
        return Err(wrong(format!("asks for a start below 1 MiB, at {start:#x}")));
    }
    let cmdline = cmdline_bytes(cmdline, usize::try_from(header.cmdline_size).unwrap_or(usize::MAX))?;

    // The order of what follows: everything that the kernel will overwrite is taken before the initrd and the boot data
    // are placed. That is the file's content, and, because the kernel decompresses itself, `init_size` bytes from
    // `pref_address` on (protocol 2.10).
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let file_size = u64::try_from(file.bytes.len()).unwrap_or(u64::MAX);
    let size = file_size.checked_sub((setup_sectors + 1) * 512).filter(|size| *size > 0);
    let size = size.ok_or_else(|| wrong("says that the kernel begins behind the file's end".to_owned()))?;
    file.take(places, start, size)?;
    let (preferred, init_size) = (header.pref_address, u64::from(header.init_size));
    if version >= 0x20a && init_size > 0 {
        file.take(places, preferred.max(start), init_size)?;
    }
    let loaded = BzImage::load(places.memory(), None, &mut Cursor::new(file.bytes), Some(GuestAddress(HIGH_RAM_START)));
    let loaded = loaded.map_err(|error| file.failed(error.to_string()))?;

    let limit = u64::from(header.initrd_addr_max).saturating_add(1);
    let kernel_end = places.end();
    let high = |places: &mut Places<'_>, size| places.highest(size, limit).filter(|at| *at >= kernel_end);
    let module = initrd.map(|bytes| put_initrd(places, bytes, high)).transpose()?;

    let mut block = Block::default();
    block.add(boot_params::default().as_slice());
    let gdt = block.add(&GDT.map(u64::to_le_bytes).concat());
    let text = block.add(&cmdline);
    let at = places.boot_data(block.size()).ok_or_else(|| file.no_room())?;
    block.write(places, at).map_err(|reason| file.failed(reason))?;

    let word = |value: u64| u32::try_from(value).map_err(|error| file.failed(error.to_string()));
    let mut params = boot_params { hdr: header, ..Default::default() };
    params.acpi_rsdp_addr = rsdp.unwrap_or(0);
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.code32_start = word(loaded.kernel_load.0)?;
    params.hdr.cmd_line_ptr = word(at.saturating_add(text))?;
    if let Some((address, size)) = module {
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (word(address)?, word(size)?);
    }
    let ram = places.map().into_iter().map(|ram| (ram, TYPE_RAM));
    let reserved = RESERVED.map(|range| (range, TYPE_RESERVED));
    for (slot, (range, kind)) in params.e820_table.iter_mut().zip(ram.chain(reserved)) {
        let size = range.end.saturating_sub(range.start);
        *slot = boot_e820_entry { addr: range.start, size, r#type: kind };
        params.e820_entries = params.e820_entries.saturating_add(1);
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(at)), places.memory())
        .map_err(|error| file.failed(error.to_string()))?;
    Ok(EntryState {
        rip: loaded.kernel_load.0,
        rsi: at,
        gdt: Some((at.saturating_add(gdt), 31)),
        pc: true,
        ..EntryState::default()
    })
}

/// The ELF kernel that a bzImage unpacks when it is started: its payload, decompressed, of at most `limit` bytes.
pub(super) fn unpack(file: File<'_>, limit: u64) -> Result<Vec<u8>, ImageError> {
    let wrong = |reason: &str| ImageError::Header {
        name: file.name.to_owned(),
        format: "Linux setup",
        reason: reason.to_owned(),
    };
    let header = header(file.bytes).ok_or_else(|| wrong("is cut off"))?;
    if header.version < WITH_PAYLOAD {
        return Err(wrong("is of a boot protocol before 2.08, which does not say where the kernel is"));
    }
    let sectors = if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
    let range = || {
        let start = (sectors + 1).checked_mul(512)?.checked_add(usize::try_from(header.payload_offset).ok()?)?;
        Some(start..start.checked_add(usize::try_from(header.payload_length).ok()?)?)
    };
    let payload = range().and_then(|range| file.bytes.get(range));
    let payload = payload.ok_or_else(|| wrong("says that the kernel ends behind the file's end"))?;
    payload::unpack(payload, limit).map_err(|reason| file.failed(format!("its payload {reason}")))
}

/// The setup header. It is shorter in older kernels; what lies behind its end is code and is replaced by zeros.
fn header(bytes: &[u8]) -> Option<setup_header> {
    let end = HEADER_END_BASE.checked_add(usize::from(*bytes.get(HEADER_END_AT)?))?;
    let mut header = setup_header::default();
    let known = bytes.get(HEADER..end.min(bytes.len()))?;
    let mut raw = vec![0; header.as_slice().len()];
    for (to, from) in raw.iter_mut().zip(known) {
        *to = *from;
    }
    header.as_mut_slice().copy_from_slice(&raw);
    Some(header)
}
