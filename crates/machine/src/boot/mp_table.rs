//! The table of CPUs and interrupts that a PC's firmware had before ACPI, for kernels that know no other, as xv6 does.
//!
//! It says what the MADT says. There is none without an I/O APIC: it would describe a machine that a kernel uses as
//! well without a table.
//!
//! Source: Intel, "MultiProcessor Specification", version 1.4, chapter 4 and appendix D.

use guest_abi::ioapic;

use super::acpi::Hardware;

/// Guest physical address: the beginning of the BIOS' ROM, one of the three places where kernels search.
pub(super) const ADDRESS: u32 = 0xf_0000;

/// Version 1.4.
const REVISION: u8 = 4;
const POINTER_BYTES: u32 = 16;
const LAPIC: u32 = 0xfee0_0000;
/// Versions of the local APICs and of the I/O APIC, as their registers have them.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const ISA_IRQS: u8 = 16;
/// The only bus and the only I/O APIC.
const BUS: u8 = 0;
const IOAPIC: u8 = 0;
/// A local interrupt's destination: every local APIC.
const ALL: u8 = 0xff;

/// Types of entries.
const PROCESSOR: u8 = 0;
const BUS_ENTRY: u8 = 1;
const IOAPIC_ENTRY: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Processor flags: enabled; the one that boots.
const ENABLED: u8 = 1;
const BOOTS: u8 = 2;
/// CPUID.1:EDX of a processor: an FPU, a local APIC. What else there is the CPU itself says.
const FEATURES: u32 = 1 | 1 << 9;
/// Types of interrupts.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// The bytes from [`ADDRESS`] on: the pointer structure, then the table. Empty if there is none.
pub(super) fn bytes(hardware: Hardware) -> Vec<u8> {
    if !hardware.ioapic {
        return Vec::new();
    }
    let entries = entries(hardware.cpus);
    let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
    let entries = entries.concat();
    let header = |checksum: u8| {
        let length = u16::try_from(entries.len()).unwrap_or(u16::MAX).saturating_add(44);
        let identity = b"VMM     VMM         ";
        // The length, OEM and product, no OEM table, the number of entries, and no extended table.
        let first = [&b"PCMP"[..], &length.to_le_bytes(), &[REVISION, checksum], identity, &[0; 6]].concat();
        [&first[..], &count.to_le_bytes(), &LAPIC.to_le_bytes(), &[0; 4], &entries].concat()
    };
    let pointer = |checksum: u8| {
        let table = ADDRESS.saturating_add(POINTER_BYTES).to_le_bytes();
        // Its length in 16 bytes; a table follows, and the 8259 pair is wired to LINT0 (virtual wire).
        [&b"_MP_"[..], &table, &[1, REVISION, checksum, 0, 0, 0, 0, 0]].concat()
    };
    [summing_to_zero(pointer), summing_to_zero(header)].concat()
}

/// The bytes with the checksum that makes their sum 0.
fn summing_to_zero(bytes: impl Fn(u8) -> Vec<u8>) -> Vec<u8> {
    bytes(bytes(0).iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte)))
}

/// The entries, in the order of their types.
fn entries(cpus: u32) -> Vec<Vec<u8>> {
    let processor = |id: u8| {
        let flags = if id == 0 { ENABLED | BOOTS } else { ENABLED };
        [&[PROCESSOR, id, LAPIC_VERSION, flags, 0, 0, 0, 0][..], &FEATURES.to_le_bytes(), &[0; 8]].concat()
    };
    let mut entries: Vec<_> = (0..u8::try_from(cpus).unwrap_or(u8::MAX)).map(processor).collect();
    entries.push([&[BUS_ENTRY, BUS], &b"ISA   "[..]].concat());
    let ioapic = [IOAPIC_ENTRY, IOAPIC, IOAPIC_VERSION, ENABLED];
    entries.push([&ioapic[..], &ioapic::ADDRESS.to_le_bytes()].concat());
    // The second byte is the type of interrupt. Polarity and trigger are the bus' own.
    let interrupt = |kind, interrupt, irq, to, pin| vec![kind, interrupt, 0, 0, BUS, irq, to, pin];
    entries.extend((0..ISA_IRQS).filter(|irq| *irq != ioapic::TIMER_PIN).map(|irq| {
        let pin = if irq == 0 { ioapic::TIMER_PIN } else { irq };
        interrupt(IO_INTERRUPT, INT, irq, IOAPIC, pin)
    }));
    entries.push(interrupt(LOCAL_INTERRUPT, EXT_INT, 0, 0, 0));
    entries.push(interrupt(LOCAL_INTERRUPT, NMI, 0, ALL, 1));
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Splits the table into its entries, each with the length that its type has, as a kernel does.
    fn walk(mut rest: &[u8]) -> Vec<&[u8]> {
        let mut entries = Vec::new();
        while let Some(kind) = rest.first() {
            let (entry, after) = rest.split_at(if *kind == PROCESSOR { 20 } else { 8 });
            entries.push(entry);
            rest = after;
        }
        entries
    }

    // Catches: a checksum, length or count by which a kernel finds no table, or loses its way in it.
    #[test]
    fn a_kernel_finds_cpus_io_apic_and_interrupts() {
        let all = bytes(Hardware { cpus: 3, ioapic: true, vmclock: false });
        let (pointer, table) = all.split_at(16);
        assert_eq!((&pointer[..4], sum(pointer)), (&b"_MP_"[..], 0));
        assert_eq!((&pointer[4..10], &pointer[11..]), (&[0x10, 0, 0x0f, 0, 1, 4][..], &[0; 5][..]));
        assert_eq!((&table[..4], table[6], sum(table)), (&b"PCMP"[..], 4, 0));
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        assert_eq!(table[36..44], [0, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
        let entries = walk(&table[44..]);
        assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), entries.len());
        let processor = |id, flags| [&[0, id, 0x14, flags, 0, 0, 0, 0, 1, 2, 0, 0][..], &[0; 8]].concat();
        assert_eq!(entries[..3], [&processor(0, 3)[..], &processor(1, 1), &processor(2, 1)]);
        assert_eq!(entries[3..5], [&b"\x01\0ISA   "[..], &[2, 0, 0x11, 1, 0, 0, 0xc0, 0xfe]]);
        // The timer is at pin 2, so that IRQ 2, the second 8259's, has none; the serial port is at pin 4.
        let io: Vec<(u8, u8)> =
            entries.iter().filter(|entry| entry[0] == 3).map(|entry| (entry[5], entry[7])).collect();
        assert_eq!((io.len(), io[0], io[1], io[3]), (15, (0, 2), (1, 1), (4, 4)));
        assert!(io.iter().all(|(irq, _)| *irq != 2));
        assert_eq!(entries[entries.len() - 2..], [&[4, 3, 0, 0, 0, 0, 0, 0][..], &[4, 1, 0, 0, 0, 0, 0xff, 1]]);
    }

    // Catches: a table that lies over the handlers of the real-mode vectors; one where there is no I/O APIC.
    #[test]
    fn the_largest_fits_below_the_handlers() {
        let most = Hardware { cpus: 255, ioapic: true, vmclock: false };
        assert!(usize::try_from(ADDRESS).unwrap() + bytes(most).len() <= 0xf_ff00);
        assert!(bytes(Hardware { ioapic: false, ..most }).is_empty());
    }
}
