//! The part of a PC firmware's memory that guests rely on: interrupt vectors for real-mode code, and the BIOS data
//! area, in which kernels without a memory map find the end of the first megabyte's RAM; the MP table.
//!
//! There is no firmware, and so no BIOS service: every vector's handler only returns, those of the 8259 pair after an
//! EOI. They are needed because the timer's interrupt is enabled, as a PC's firmware leaves it. Without a handler the
//! first one would make real-mode code continue at address 0.

use vm_memory::{Bytes, GuestAddress};

use super::{mp_table, place::LOW_RAM_END};
use crate::mem::ram::GuestRam;

/// The handlers' segment, in the part of the first megabyte that no memory map lists as RAM.
const SEGMENT: u16 = 0xf000;
/// Offset and code of the handlers, first the one that only returns: `iret`.
const RETURN: (u16, &[u8]) = (0xff00, &[0xcf]);
/// `push ax; mov al, 0x20; out 0x20, al; pop ax; iret`: EOI to the first 8259.
const FIRST: (u16, &[u8]) = (0xff10, &[0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf]);
/// EOI to the second 8259 and to the first, which it is cascaded to.
const SECOND: (u16, &[u8]) = (0xff20, &[0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf]);

/// The BIOS data area: address and value. For example, Xen's Multiboot entry puts its trampoline below the extended
/// area; with zeros here that would be below address 0.
const DATA_AREA: [(u64, u16); 3] = [
    (0x400, 0x3f8),            // the first serial port
    (0x40e, EXTENDED_SEGMENT), // the extended BIOS data area
    (0x413, LOW_RAM_KIB),      // RAM below it, in KiB
];
const EXTENDED_SEGMENT: u16 = 0x9fc0;
const LOW_RAM_KIB: u16 = 639;
const _: () = assert!(LOW_RAM_END == EXTENDED_SEGMENT as u64 * 16 && LOW_RAM_END == LOW_RAM_KIB as u64 * 1024);
/// The extended area's first byte: its size in KiB.
const EXTENDED_KIB: u8 = 1;

/// The first vector of each 8259, as PC firmware programs them.
pub const PIC_VECTORS: [u8; 2] = [0x08, 0x70];

/// Writes vectors, handlers, data and `mp_table`. To be called before the image is written, which may overwrite them.
///
/// # Errors
/// If the first megabyte is not RAM.
pub(super) fn write(memory: &GuestRam, mp_table: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
    for (offset, code) in [RETURN, FIRST, SECOND] {
        memory.write_slice(code, GuestAddress(u64::from(SEGMENT) * 16 + u64::from(offset)))?;
    }
    for (address, value) in DATA_AREA {
        memory.write_slice(&value.to_le_bytes(), GuestAddress(address))?;
    }
    memory.write_slice(mp_table, GuestAddress(mp_table::ADDRESS.into()))?;
    memory.write_slice(&[EXTENDED_KIB], GuestAddress(LOW_RAM_END))?;
    let [first, second] = PIC_VECTORS;
    let vectors: Vec<u8> = (0..=u8::MAX)
        .flat_map(|vector| {
            let (handler, _) = match vector {
                _ if (first..first.saturating_add(8)).contains(&vector) => FIRST,
                _ if (second..second.saturating_add(8)).contains(&vector) => SECOND,
                _ => RETURN,
            };
            (u32::from(SEGMENT) << 16 | u32::from(handler)).to_le_bytes()
        })
        .collect();
    memory.write_slice(&vectors, GuestAddress(0))
}
