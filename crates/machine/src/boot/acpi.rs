//! The ACPI tables, as few as Linux accepts: RSDP, XSDT and RSDT, FADT, FACS, a MADT with CPUs and I/O APIC, and a DSDT
//! with the power-off state and, if the guest has one, VMClock.
//!
//! They describe the PC that the machine is without them, with 8259 pair and PIT. So they are not of the
//! hardware-reduced kind, after which Linux uses neither (`acpi_generic_reduced_hw_init` in
//! `arch/x86/kernel/acpi/boot.c`). The PM1 registers, without which a FADT is refused, are in `devices/pm.rs`, beside
//! the timer. No event is ever raised, so the SCI never comes. The RSDT says what the XSDT says, for kernels that know
//! ACPI 1.0 only: seL4 follows its address even if it is 0.
//!
//! Sources: ACPI 6.5; for VMClock's device UAPI.13, "Discovery via ACPI".

use acpi_tables::{
    Aml,
    aml::{Device, Memory32Fixed, Method, Name, Package, ResourceTemplate, Return, Scope},
    facs::FACS,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, ProcessorLocalApic},
    sdt::Sdt,
    xsdt::XSDT,
};
use guest_abi::{
    ioapic,
    ports::{I8042_COMMAND, I8042_RESET, PM_TIMER, PM1_CONTROL, PM1_EVENT, RTC_CENTURY, SLEEP_TYPE_OFF},
    vmclock::REGION_BYTES,
};
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::mp_table;
use crate::mem::ram::GuestRam;

/// Guest physical address of the VMClock page, and of the RSDP. Both are in the upper part of the first megabyte, which
/// no memory map lists as RAM; the second where a PC's firmware has the RSDP, so that a guest finds it that searches.
pub const VMCLOCK: u32 = 0xd_0000;
const RSDP: u32 = 0xe_0000;
/// How much there is for the tables, from the RSDP on.
const BYTES: u32 = 0x1000;

const OEM: [u8; 6] = *b"VMM   ";
const OEM_TABLE: [u8; 8] = *b"VMM     ";
const OEM_REVISION: u32 = 1;
/// The LAPIC's address.
const LAPIC: u32 = 0xfee0_0000;
/// MADT flag: there is an 8259 pair.
const PCAT_COMPAT: u32 = 1;
/// `iapc_boot_arch`: devices of the ISA bus that no table lists; no VGA, no MSI. There is a CMOS clock.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2 | 1 << 3;
const SCI: u16 = 9;
/// An Interrupt Source Override (ACPI 6.5, 5.2.12.5): interrupt 0 of the ISA bus is another pin of the I/O APIC,
/// edge-triggered and active high as that bus is. Type, length, bus, source, pin, flags.
const TIMER_OVERRIDE: [u8; 10] = [2, 10, 0, 0, ioapic::TIMER_PIN, 0, 0, 0, 0, 0];
/// The RSDP's length.
const RSDP_BYTES: u32 = 36;
/// A table's header.
const HEADER: u32 = 36;
/// Alignment of the tables; the FACS needs it.
const ALIGN: usize = 64;

/// What the tables describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Whether there is an I/O APIC.
    pub ioapic: bool,
    /// Whether there is a VMClock page, at [`VMCLOCK`].
    pub vmclock: bool,
}

/// What a guest finds in the upper part of the first megabyte.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Provided {
    /// Guest physical address of the RSDP, if there are tables.
    pub rsdp: Option<u64>,
    /// What PC firmware has for kernels without ACPI, to be written at `mp_table::ADDRESS`; empty if there are no
    /// tables.
    pub mp_table: Vec<u8>,
    /// Where no image may be, because tables or page are there; empty if there are neither.
    pub reserved: Range<u64>,
}

/// Writes the tables of a machine with this `hardware`, if it is to have `tables`. To be called before an image is
/// loaded.
///
/// # Errors
/// If the first megabyte is not RAM.
pub fn provide(memory: &GuestRam, hardware: Hardware, tables: bool) -> Result<Provided, GuestMemoryError> {
    let start = if hardware.vmclock { VMCLOCK } else { RSDP };
    let end = if tables { RSDP + BYTES } else { VMCLOCK + REGION_BYTES };
    // Empty, as `start` is behind `end`, if there are neither.
    let reserved = u64::from(start)..u64::from(end);
    let rsdp = if tables { Some(write(memory, hardware)?) } else { None };
    let mp_table = if tables { mp_table::bytes(hardware) } else { Vec::new() };
    Ok(Provided { rsdp, mp_table, reserved })
}

/// Writes the tables, and returns the RSDP's address.
fn write(memory: &GuestRam, hardware: Hardware) -> Result<u64, GuestMemoryError> {
    // The RSDP comes first and is written last: it has the addresses of RSDT and XSDT.
    let mut tables = Tables(rsdp(0, 0));
    let dsdt = tables.add(&dsdt(hardware.vmclock));
    let facs = tables.add(&FACS::new());
    let fadt = tables.add(&fadt(dsdt, facs).finalize());
    let madt = tables.add(&madt(hardware));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    let mut rsdt = Sdt::new(*b"RSDT", HEADER, 1, OEM, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt] {
        xsdt.add_entry(u64::from(table));
        rsdt.append_slice(&table.to_le_bytes());
    }
    let xsdt = tables.add(&xsdt);
    let rsdt = tables.add(&rsdt);
    debug_assert!(u32::try_from(tables.0.len()).is_ok_and(|bytes| bytes <= BYTES), "as many as 16 vCPUs have");
    memory.write_slice(&tables.0, GuestAddress(u64::from(RSDP)))?;
    memory.write_slice(&rsdp(rsdt, xsdt), GuestAddress(u64::from(RSDP)))?;
    Ok(u64::from(RSDP))
}

/// Tables one after the other, from [`RSDP`] on.
struct Tables(Vec<u8>);

impl Tables {
    /// Appends a table, and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u32 {
        let at = self.0.len().next_multiple_of(ALIGN);
        self.0.resize(at, 0);
        self.0.extend(bytes(table));
        RSDP.saturating_add(u32::try_from(at).unwrap_or(u32::MAX))
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The root: ACPI 6.5, 5.2.5.3 "Root System Description Pointer (RSDP) Structure". The crate's own has no address of an
/// RSDT.
fn rsdp(rsdt: u32, xsdt: u32) -> Vec<u8> {
    const REVISION: u8 = 2;
    let checksum = |bytes: &[u8]| bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte));
    // What ACPI 1.0 knows of it has a checksum of its own. With that its sum is 0, and adds nothing to the whole.
    let signature = b"RSD PTR ";
    let first = [&OEM[..], &[REVISION], &rsdt.to_le_bytes()].concat();
    let first_checksum = checksum(&[&signature[..], &first].concat());
    let second = [&RSDP_BYTES.to_le_bytes()[..], &u64::from(xsdt).to_le_bytes()].concat();
    [&signature[..], &[first_checksum], &first, &second, &[checksum(&second), 0, 0, 0]].concat()
}

fn fadt(dsdt: u32, facs: u32) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_32(dsdt)
        .firmware_ctrl_32(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The CMOS clock has no alarm.
        .flag(Flags::FixRtc)
        // There are no buttons with fixed registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = SCI.into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    // C2 and C3 are not there.
    fadt.p_lvl2_lat = u16::MAX.into();
    fadt.p_lvl3_lat = u16::MAX.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.century = RTC_CENTURY;
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, I8042_COMMAND.into());
    fadt.reset_value = I8042_RESET;
    fadt
}

/// The crate's own MADT cannot have flags, and has no interrupt source overrides.
fn madt(hardware: Hardware) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", HEADER + 8, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, LAPIC);
    madt.write_u32(40, PCAT_COMPAT);
    for cpu in 0..u8::try_from(hardware.cpus).unwrap_or(u8::MAX) {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled)));
    }
    if hardware.ioapic {
        madt.append_slice(&bytes(&IoApic::new(0, ioapic::ADDRESS, 0)));
        madt.append_slice(&TIMER_OVERRIDE);
    }
    madt
}

fn dsdt(vmclock: bool) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 6, OEM, OEM_TABLE, OEM_REVISION);
    // The values of SLP_TYP in the two control registers, of which there is one, and two reserved ones.
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &0u8, &0u8, &0u8]);
    dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &off)));
    if vmclock {
        dsdt.append_slice(&vmclock_device());
    }
    dsdt
}

fn vmclock_device() -> Vec<u8> {
    let region = Memory32Fixed::new(false, VMCLOCK, REGION_BYTES);
    let resources = ResourceTemplate::new(vec![&region]);
    let names: [(&str, &dyn Aml); 4] =
        [("_HID", &"AMZNC10C"), ("_CID", &"VMCLOCK"), ("_DDN", &"VMCLOCK"), ("_CRS", &resources)];
    let names = names.map(|(name, value)| Name::new(name.into(), value));
    // Present, enabled, shown and working.
    let status = Return::new(&0x0f_u8);
    let status = Method::new("_STA".into(), 0, false, vec![&status]);
    let mut parts: Vec<&dyn Aml> = names.iter().map(|name| -> &dyn Aml { name }).collect();
    parts.push(&status);
    let device = Device::new("VCLK".into(), parts);
    bytes(&Scope::new("_SB_".into(), vec![&device]))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryBackend;

    use super::*;
    use crate::mem::ram;

    fn read(memory: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at `at`, whose checksum is right.
    fn table(memory: &GuestRam, at: u64, signature: &[u8; 4]) -> Vec<u8> {
        let len = usize::try_from(word(&read(memory, at, 8), 4)).unwrap();
        let bytes = read(memory, at, len);
        assert_eq!(&bytes[..4], signature);
        assert_eq!(sum(&bytes), 0, "{signature:?}");
        bytes
    }

    // Catches: a pointer, length or checksum by which a guest loses its way to the device.
    #[test]
    fn a_guest_finds_its_way_from_the_rsdp_to_the_device() {
        let memory = ram::allocate(2 << 20).unwrap();
        let all = Hardware { cpus: 3, ioapic: true, vmclock: true };
        let Provided { rsdp, mp_table: _, reserved } = provide(&memory, all, true).unwrap();
        let rsdp = rsdp.unwrap();
        assert_eq!(reserved, 0xd_0000..0xe_1000);
        let root = read(&memory, rsdp, 36);
        assert_eq!((&root[..8], sum(&root[..20]), sum(&root)), (&b"RSD PTR "[..], 0, 0));
        assert_eq!((root[15], word(&root, 20), &root[33..]), (2, 36, &[0; 3][..]));
        let xsdt = table(&memory, word(&root, 24), b"XSDT");
        let [fadt, madt] = [36, 44].map(|at| word(&xsdt, at));
        assert_eq!(xsdt.len(), 52);
        let rsdt = table(&memory, word(&root, 16), b"RSDT");
        assert_eq!(([36, 40].map(|at| word(&rsdt, at)), rsdt.len()), ([fadt, madt], 44));
        let fadt = table(&memory, fadt, b"FACP");
        assert_eq!((word(&fadt, 56), word(&fadt, 64), word(&fadt, 76)), (0x600, 0x604, 0x608));
        // WBINVD, C1, no fixed buttons or alarm, a reset register; not hardware-reduced.
        assert_eq!(word(&fadt, 112), 0x475);
        // A byte of I/O space at 0x64, and what to write there.
        assert_eq!(fadt[116..129], [1, 8, 0, 1, 0x64, 0, 0, 0, 0, 0, 0, 0, 0xfe]);
        assert_eq!((fadt[46], &fadt[88..93], fadt[108], fadt[109]), (9, &[4, 2, 0, 4, 0][..], 0x32, 0x0d));
        let facs = word(&fadt, 36);
        assert_eq!((facs % 64, &read(&memory, facs, 4)[..]), (0, &b"FACS"[..]));
        let dsdt = table(&memory, word(&fadt, 40), b"DSDT");
        let has = |what: &[u8]| dsdt.windows(what.len()).any(|bytes| bytes == what);
        assert!(has(b"AMZNC10C\0") && has(b"VMCLOCK\0") && has(b"VCLK"));
        // A fixed 32-bit range that is only read: tag, length, flag, base, size.
        assert!(has(&[0x86, 9, 0, 0, 0, 0, 0x0d, 0, 0, 0x10, 0, 0]));
        let madt = table(&memory, madt, b"APIC");
        assert_eq!((word(&madt, 40), madt.len()), (1, 44 + 3 * 8 + 12 + 10));
        assert_eq!(madt[60..68], [0, 8, 2, 2, 1, 0, 0, 0]);
        // An I/O APIC at 0xfec00000 from pin 0 on; interrupt 0 of bus 0 is pin 2.
        assert_eq!(madt[68..80], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        assert_eq!(madt[80..], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
        // Name _S5_, a package of four: the byte 5, three zeros.
        assert!(has(&[0x08, b'_', b'S', b'5', b'_', 0x12, 7, 4, 0x0a, 5, 0, 0, 0]));
        assert!(memory.check_range(GuestAddress(u64::from(VMCLOCK)), 4096));
    }

    // Catches: a table that describes what is not there, and memory that an image may not have although nothing is in
    // it.
    #[test]
    fn what_is_not_there_is_not_described() {
        let memory = ram::allocate(2 << 20).unwrap();
        let none = Hardware { cpus: 1, ioapic: false, vmclock: false };
        let Provided { rsdp, mp_table, reserved } = provide(&memory, none, true).unwrap();
        assert!(mp_table.is_empty());
        assert_eq!(reserved, 0xe_0000..0xe_1000);
        let xsdt = table(&memory, word(&read(&memory, rsdp.unwrap(), 36), 24), b"XSDT");
        let [fadt, madt] = [36, 44].map(|at| word(&xsdt, at));
        assert_eq!(table(&memory, madt, b"APIC").len(), 44 + 8);
        let dsdt = table(&memory, word(&table(&memory, fadt, b"FACP"), 40), b"DSDT");
        assert!(!dsdt.windows(8).any(|bytes| bytes == b"AMZNC10C"));
        let nothing = provide(&memory, none, false).unwrap();
        assert_eq!(nothing.rsdp, None);
        assert!(nothing.mp_table.is_empty() && nothing.reserved.is_empty());
        let page = provide(&memory, Hardware { vmclock: true, ..none }, false).unwrap();
        assert_eq!(page, Provided { reserved: 0xd_0000..0xd_1000, ..Provided::default() });
    }
}
