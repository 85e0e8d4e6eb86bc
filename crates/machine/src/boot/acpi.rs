//! The smallest set of ACPI tables by which Linux finds VMClock: RSDP, XSDT, FADT, FACS, and a DSDT with that one
//! device. A machine with several vCPUs has a MADT, too, or Linux would start one of them only.
//!
//! The machine stays what it is without them: a PC with an 8259 pair and a PIT and without I/O APIC. So they are not of
//! the hardware-reduced kind, after which Linux uses neither (`acpi_generic_reduced_hw_init` in
//! `arch/x86/kernel/acpi/boot.c`). With a MADT that has no I/O APIC, Linux masks LINT0, and so the 8259 pair. So a
//! machine with one vCPU gets no MADT. The PM1 registers, without which a FADT is refused, are in `devices/pm.rs`,
//! beside the timer. No event is ever raised, so the SCI never comes.
//!
//! Sources: ACPI 6.5; for the device UAPI.13, "Discovery via ACPI".

use acpi_tables::{
    Aml,
    aml::{Device, Memory32Fixed, Method, Name, ResourceTemplate, Return, Scope},
    facs::FACS,
    fadt::{FADTBuilder, Flags},
    madt::{EnabledStatus, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use guest_abi::{
    ports::{PM_TIMER, PM1_CONTROL, PM1_EVENT},
    vmclock::REGION_BYTES,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::mem::ram::GuestRam;

/// Guest physical address of the VMClock page, and of the RSDP. Both are in the upper part of the first megabyte, which
/// no memory map lists as RAM; the second where a PC's firmware has the RSDP, so that a guest finds it that searches.
pub const VMCLOCK: u32 = 0xd_0000;
const RSDP: u32 = 0xe_0000;
/// The end of what is used from [`VMCLOCK`] on: no image may be there.
pub(super) const END: u32 = RSDP + 0x1000;

const OEM: [u8; 6] = *b"VMM   ";
const OEM_TABLE: [u8; 8] = *b"VMM     ";
const OEM_REVISION: u32 = 1;
/// The LAPIC's address.
const LAPIC: u32 = 0xfee0_0000;
/// MADT flag: there is an 8259 pair.
const PCAT_COMPAT: u32 = 1;
/// `iapc_boot_arch`: devices of the ISA bus that no table lists; no VGA, no MSI, no CMOS clock.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 5;
const SCI: u16 = 9;
/// A table's header.
const HEADER: u32 = 36;
/// Alignment of the tables; the FACS needs it.
const ALIGN: usize = 64;

/// Writes the tables of a machine with `cpus` vCPUs and a VMClock page at [`VMCLOCK`], and returns the RSDP's address.
/// To be called before an image is loaded.
///
/// # Errors
/// If the first megabyte is not RAM.
pub fn write(memory: &GuestRam, cpus: u32) -> Result<u64, GuestMemoryError> {
    let mut tables = Tables::default();
    // The RSDP comes first and is written last: it has the XSDT's address.
    tables.add(&Rsdp::new(OEM, 0));
    let dsdt = tables.add(&dsdt());
    let facs = tables.add(&FACS::new());
    let fadt = tables.add(&fadt(dsdt, facs).finalize());
    let madt = (cpus > 1).then(|| tables.add(&madt(cpus)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in std::iter::once(fadt).chain(madt) {
        xsdt.add_entry(u64::from(table));
    }
    let xsdt = tables.add(&xsdt);
    debug_assert!(tables.0.len() <= 0x1000, "as many as 16 vCPUs have");
    memory.write_slice(&tables.0, GuestAddress(u64::from(RSDP)))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM, u64::from(xsdt))), GuestAddress(u64::from(RSDP)))?;
    Ok(u64::from(RSDP))
}

/// Tables one after the other, from [`RSDP`] on.
#[derive(Default)]
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

fn fadt(dsdt: u32, facs: u32) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_32(dsdt)
        .firmware_ctrl_32(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The alarm of a CMOS clock, which there is not, has no fixed registers either.
        .flag(Flags::FixRtc)
        // There are no buttons with fixed registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
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
    fadt
}

/// The crate's own MADT cannot have flags.
fn madt(cpus: u32) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", HEADER + 8, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, LAPIC);
    madt.write_u32(40, PCAT_COMPAT);
    for cpu in 0..u8::try_from(cpus).unwrap_or(u8::MAX) {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled)));
    }
    madt
}

fn dsdt() -> Sdt {
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
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&bytes(&Scope::new("_SB_".into(), vec![&device])));
    dsdt
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
        let rsdp = write(&memory, 3).unwrap();
        let root = read(&memory, rsdp, 36);
        assert_eq!((&root[..8], sum(&root[..20]), sum(&root)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&memory, word(&root, 24), b"XSDT");
        let [fadt, madt] = [36, 44].map(|at| word(&xsdt, at));
        assert_eq!(xsdt.len(), 52);
        let fadt = table(&memory, fadt, b"FACP");
        assert_eq!((word(&fadt, 56), word(&fadt, 64), word(&fadt, 76)), (0x600, 0x604, 0x608));
        // WBINVD, C1, no fixed buttons or alarm; not hardware-reduced.
        assert_eq!(word(&fadt, 112), 0x75);
        assert_eq!((fadt[46], &fadt[88..93], fadt[109]), (9, &[4, 2, 0, 4, 0][..], 0x2d));
        let facs = word(&fadt, 36);
        assert_eq!((facs % 64, &read(&memory, facs, 4)[..]), (0, &b"FACS"[..]));
        let dsdt = table(&memory, word(&fadt, 40), b"DSDT");
        let has = |what: &[u8]| dsdt.windows(what.len()).any(|bytes| bytes == what);
        assert!(has(b"AMZNC10C\0") && has(b"VMCLOCK\0") && has(b"VCLK"));
        // A fixed 32-bit range that is only read: tag, length, flag, base, size.
        assert!(has(&[0x86, 9, 0, 0, 0, 0, 0x0d, 0, 0, 0x10, 0, 0]));
        let madt = table(&memory, madt, b"APIC");
        assert_eq!((word(&madt, 40), madt.len()), (1, 44 + 3 * 8));
        assert_eq!(madt[60..], [0, 8, 2, 2, 1, 0, 0, 0]);
        assert!(memory.check_range(GuestAddress(u64::from(VMCLOCK)), 4096));
        write(&memory, 1).unwrap();
        let root = read(&memory, rsdp, 36);
        assert_eq!(table(&memory, word(&root, 24), b"XSDT").len(), 44, "one vCPU is found without a MADT");
    }
}
