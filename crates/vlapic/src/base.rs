//! IA32_APIC_BASE: where the page is, and which door is open.

use crate::{Config, MsrFault};

/// Bit 8: this is the bootstrap processor.
const BSP: u64 = 1 << 8;
/// Bit 10: x2APIC mode.
const EXTD: u64 = 1 << 10;
/// Bit 11: global enable.
const EN: u64 = 1 << 11;
/// Bits 51:12, the page's address, as far as any x86-64 processor has physical address bits.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// As many physical address bits as the architecture allows.
pub const MOST_PHYSICAL_BITS: u8 = 52;
/// Where the page is after reset.
const RESET_ADDRESS: u64 = 0xfee0_0000;

/// Which registers a guest can reach (SDM vol. 3, "x2APIC State Transitions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// None: the CPU is as if it had no local APIC.
    Disabled,
    /// The memory-mapped ones.
    XApic,
    /// The MSRs.
    X2Apic,
}

/// The MSR's value, of which the mode is always a valid one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Base(u64);

impl Base {
    /// The value after reset: enabled, xAPIC mode (SDM vol. 3, "Local APIC Status and Location").
    pub(super) const fn reset(bsp: bool) -> Self {
        Self(RESET_ADDRESS | EN | if bsp { BSP } else { 0 })
    }

    /// A value that the MSR can hold, or nothing: no reserved bit, not EXTD without EN, EXTD only with x2APIC.
    pub(super) fn new(value: u64, config: &Config) -> Option<Self> {
        // "Relocating the Local APIC Registers": bits from the physical address width up are reserved.
        let beyond = value.checked_shr(u32::from(config.physical_bits)).is_some_and(|above| above != 0);
        let reserved = beyond || value & !(BSP | EXTD | EN | ADDRESS) != 0;
        let extended = value & EXTD != 0;
        if reserved || (extended && (value & EN == 0 || !config.x2apic)) { None } else { Some(Self(value)) }
    }

    pub(super) const fn bits(self) -> u64 {
        self.0
    }

    pub(super) const fn mode(self) -> Mode {
        match (self.0 & EN != 0, self.0 & EXTD != 0) {
            (false, _) => Mode::Disabled,
            (true, false) => Mode::XApic,
            (true, true) => Mode::X2Apic,
        }
    }

    /// The guest physical address of the page.
    pub(super) const fn address(self) -> u64 {
        self.0 & ADDRESS
    }

    /// The value after a WRMSR of `value` (SDM vol. 3, "x2APIC State Transitions").
    ///
    /// # Errors
    /// [`MsrFault`] for a value that the MSR cannot hold, and for the two transitions that must go through another
    /// state: x2APIC to xAPIC, and disabled to x2APIC.
    pub(super) fn write(self, value: u64, config: &Config) -> Result<Self, MsrFault> {
        let new = Self::new(value, config).ok_or(MsrFault)?;
        match (self.mode(), new.mode()) {
            (Mode::X2Apic, Mode::XApic) | (Mode::Disabled, Mode::X2Apic) => Err(MsrFault),
            _ => Ok(new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        id: 0,
        bsp: true,
        x2apic: true,
        tsc_deadline: true,
        ns_deadline: true,
        physical_bits: MOST_PHYSICAL_BITS,
    };

    /// SDM vol. 3, "x2APIC State Transitions": from xAPIC to x2APIC or disabled; from x2APIC to disabled only; from
    /// disabled to xAPIC only; EXTD without EN is invalid.
    #[test]
    fn transitions_follow_the_state_diagram() {
        let (disabled, xapic, x2apic, invalid) = (0, EN, EN | EXTD, EXTD);
        for from in [disabled, xapic, x2apic] {
            for to in [disabled, xapic, x2apic, invalid] {
                let legal = match from {
                    0 => [disabled, xapic].contains(&to),
                    EN => [disabled, xapic, x2apic].contains(&to),
                    _ => [disabled, x2apic].contains(&to),
                };
                assert_eq!(Base(from).write(to, &CONFIG).is_ok(), legal, "{from:#x} -> {to:#x}");
            }
        }
        assert_eq!(Base(xapic).write(x2apic, &Config { x2apic: false, ..CONFIG }), Err(MsrFault));
    }

    #[test]
    fn reserved_bits_fault_and_the_address_moves() {
        let base = Base::reset(true);
        assert_eq!(base.bits(), 0xfee0_0900);
        for bit in [0, 7, 9, 52, 63] {
            assert_eq!(base.write(base.bits() | 1 << bit, &CONFIG), Err(MsrFault), "bit {bit}");
        }
        for physical_bits in [36, 40, 46, MOST_PHYSICAL_BITS] {
            let config = Config { physical_bits, ..CONFIG };
            let highest = EN | 1 << (physical_bits - 1);
            assert_eq!(base.write(highest, &config).map(Base::address), Ok(highest & ADDRESS));
            assert_eq!(base.write(EN | 1 << physical_bits, &config), Err(MsrFault), "{physical_bits}");
        }
    }
}
