//! The three doors: the xAPIC page, the MSRs and CR8.

use guest_abi::{
    lapic::REGISTER_STRIDE,
    msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE, MsrRange, X2APIC},
    ns_deadline,
};
use vmtime::Now;

use crate::{
    Armed, Effects, Ipi, LocalApic, MsrFault, SOFTWARE_ENABLE,
    base::Mode,
    errors,
    ipi::DELIVERY_STATUS,
    registers::{self, Door, LvtKind, Register},
    route::x2apic_ldr,
    timer::{self, Mode as TimerMode},
    vectors::low_byte,
};

/// Size of the xAPIC's page.
const PAGE_BYTES: u32 = 0x1000;
/// An integrated APIC with LVT entries 0 to 5 and without suppress-EOI-broadcast (SDM vol. 3, "Local APIC Version
/// Register").
const VERSION: u32 = 0x0005_0014;

/// The number of the register at an offset in the page, if one can start there.
fn page_register(offset: u64) -> Option<u32> {
    let offset = u32::try_from(offset).ok().filter(|offset| *offset < PAGE_BYTES)?;
    offset.is_multiple_of(REGISTER_STRIDE).then_some(offset / REGISTER_STRIDE)
}

impl LocalApic {
    /// The MSRs that [`msr_read`](Self::msr_read) and [`msr_write`](Self::msr_write) are for.
    pub const MSRS: [MsrRange; 4] =
        [MsrRange::one(IA32_APIC_BASE), MsrRange::one(IA32_TSC_DEADLINE), X2APIC, MsrRange::one(ns_deadline::MSR)];

    /// A guest reads `data.len()` bytes at `offset` in the page.
    ///
    /// Registers answer 4-byte reads at their own offset. SDM vol. 3, "Local APIC Register Address Map", leaves others
    /// undefined: they, and reads while the page is not there, give zeros.
    pub fn mmio_read(&mut self, offset: u64, data: &mut [u8], now: Now) {
        self.advance(now);
        data.fill(0);
        let Ok(bytes) = <&mut [u8; 4]>::try_from(data) else { return };
        let Some(number) = page_register(offset).filter(|_| self.base.mode() == Mode::XApic) else { return };
        match registers::find(number).map(|(entry, word)| (entry.register, word, entry.xapic)) {
            Some((register, word, rights)) if rights.readable() => {
                *bytes = registers::split(self.read(register, word, Door::XApic, now)).0.to_le_bytes();
            }
            Some((_, _, rights)) if rights.writable() => {}
            _ => {
                let _ = self.log_error(errors::ILLEGAL_REGISTER);
            }
        }
    }

    /// A guest writes `data` at `offset` in the page. Other than 4 bytes at a register's own offset are ignored.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8], now: Now) -> Effects {
        self.timed(now, |apic| {
            let Ok(bytes) = <[u8; 4]>::try_from(data) else { return Ok(Effects::default()) };
            let Some(number) = page_register(offset).filter(|_| apic.base.mode() == Mode::XApic) else {
                return Ok(Effects::default());
            };
            match registers::find(number) {
                Some((entry, _)) if entry.xapic.writable() => {
                    let value = u64::from(u32::from_le_bytes(bytes)) & entry.defined();
                    return apic.write(entry.register, value, Door::XApic, now);
                }
                Some((entry, _)) if entry.xapic.readable() => {}
                _ => {
                    let _ = apic.log_error(errors::ILLEGAL_REGISTER);
                }
            }
            Ok(Effects::default())
        })
        // Nothing behind this door faults.
        .unwrap_or_default()
    }

    /// Whether an MSR is one of [`MSRS`](Self::MSRS).
    #[must_use]
    pub fn owns_msr(index: u32) -> bool {
        Self::MSRS.iter().any(|range| range.contains(index))
    }

    /// A guest executes RDMSR.
    ///
    /// # Errors
    /// [`MsrFault`] for an MSR that does not exist, in this mode or at all, or that is write-only.
    pub fn msr_read(&mut self, index: u32, now: Now) -> Result<u64, MsrFault> {
        self.advance(now);
        match index {
            IA32_APIC_BASE => Ok(self.base.bits()),
            IA32_TSC_DEADLINE if self.config.tsc_deadline => Ok(self.timer.tsc_deadline()),
            ns_deadline::MSR if self.config.ns_deadline => Ok(self.timer.ns_deadline()),
            _ => {
                let (entry, word) = self.x2apic_register(index)?;
                if entry.x2apic.readable() {
                    Ok(self.read(entry.register, word, Door::X2Apic, now))
                } else {
                    Err(MsrFault)
                }
            }
        }
    }

    /// A guest executes WRMSR.
    ///
    /// # Errors
    /// [`MsrFault`] for an MSR that does not exist, in this mode or at all, or that is read-only, and for a value with
    /// a reserved bit or a reserved meaning.
    pub fn msr_write(&mut self, index: u32, value: u64, now: Now) -> Result<Effects, MsrFault> {
        self.timed(now, |apic| {
            let mode = apic.lvt.timer.timer_mode();
            let timer = match index {
                IA32_APIC_BASE => return apic.write_base(value),
                IA32_TSC_DEADLINE if apic.config.tsc_deadline => apic.timer.write_tsc_deadline(mode, value, now),
                ns_deadline::MSR if apic.config.ns_deadline => apic.timer.write_ns_deadline(mode, value, now),
                _ => {
                    let (entry, _) = apic.x2apic_register(index)?;
                    if !entry.x2apic.writable() || value & !entry.defined() != 0 {
                        return Err(MsrFault);
                    }
                    return apic.write(entry.register, value, Door::X2Apic, now);
                }
            };
            Ok(Effects { timer, ..Effects::default() })
        })
    }

    /// CR8: the class of TPR.
    #[must_use]
    pub const fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// A guest executes MOV to CR8 with bits 3:0 of `cr8`. SDM vol. 3, "Interaction of Task Priorities between CR8 and
    /// APIC": TPR's sub-class becomes 0. So this is not for copying back a CR8 that did not change.
    pub const fn set_cr8(&mut self, cr8: u8) {
        self.tpr = cr8 << 4;
    }

    /// Runs a write between two evaluations of the timer.
    fn timed(
        &mut self,
        now: Now,
        write: impl FnOnce(&mut Self) -> Result<Effects, MsrFault>,
    ) -> Result<Effects, MsrFault> {
        let address = self.address();
        self.advance(now);
        let effects = write(self)?;
        self.advance(now);
        Ok(Effects { route_changed: address != self.address(), ..effects })
    }

    fn x2apic_register(&self, index: u32) -> Result<(&'static registers::RegisterEntry, usize), MsrFault> {
        let number = index.checked_sub(X2APIC.first()).filter(|_| self.base.mode() == Mode::X2Apic);
        number.and_then(registers::find).ok_or(MsrFault)
    }

    /// SDM vol. 3, "Disabling the Local APIC": registers may be lost when it is, and x2APIC mode loses them. Here both
    /// modes do, so that enabling finds the state after reset.
    fn write_base(&mut self, value: u64) -> Result<Effects, MsrFault> {
        let old = self.base;
        let new = old.write(value, &self.config)?;
        let mut timer = None;
        match (old.mode(), new.mode()) {
            (Mode::XApic | Mode::X2Apic, Mode::Disabled) => {
                self.restart(new, None);
                timer = Some(Armed::Disarmed);
            }
            // "State Changes From xAPIC Mode to x2APIC Mode": neither the xAPIC ID that software wrote nor the upper
            // half of ICR is preserved.
            (Mode::XApic, Mode::X2Apic) => {
                self.xapic_id = None;
                self.icr &= u64::from(u32::MAX);
            }
            _ => {}
        }
        self.base = new;
        Ok(Effects { base_changed: old != new, timer, ..Effects::default() })
    }

    fn read(&self, register: Register, word: usize, door: Door, now: Now) -> u64 {
        u64::from(match (register, door) {
            (Register::Icr, _) => return self.icr,
            (Register::IcrHigh, _) => registers::split(self.icr).1,
            (Register::Id, Door::XApic) => self.visible_id() << 24,
            (Register::Id, Door::X2Apic) => self.config.id,
            (Register::Ldr, Door::XApic) => self.ldr,
            (Register::Ldr, Door::X2Apic) => x2apic_ldr(self.config.id),
            (Register::Version, _) => VERSION,
            (Register::Tpr, _) => u32::from(self.tpr),
            (Register::Ppr, _) => u32::from(self.ppr()),
            (Register::Dfr, _) => self.dfr,
            (Register::Svr, _) => self.svr,
            (Register::Isr, _) => self.isr.word(word),
            (Register::Tmr, _) => self.tmr.word(word),
            (Register::Irr, _) => self.irr.word(word),
            (Register::Esr, _) => self.esr,
            (Register::Lvt(kind), _) => self.lvt.get(kind).bits(),
            (Register::Tmict, _) => self.timer.initial_count,
            (Register::Tmcct, _) => self.timer.current_count(now),
            (Register::Tdcr, _) => self.timer.divide,
            // Write-only: the table lets no read through.
            (Register::Eoi | Register::SelfIpi, _) => 0,
        })
    }

    /// Writes `value`, which has no reserved bit, to a register that `door` may write.
    fn write(&mut self, register: Register, value: u64, door: Door, now: Now) -> Result<Effects, MsrFault> {
        let (low, high) = registers::split(value);
        let mut effects = Effects::default();
        match (register, door) {
            (Register::Tpr, _) => self.tpr = low_byte(low),
            (Register::Eoi, _) => effects.eoi = self.end_of_interrupt(),
            (Register::Ldr, _) => self.ldr = low,
            (Register::Dfr, _) => self.dfr = low | !registers::DFR,
            (Register::Svr, _) => {
                self.svr = low;
                if low & SOFTWARE_ENABLE == 0 {
                    self.lvt.mask_all();
                }
            }
            (Register::Esr, _) => self.latch_errors(),
            (Register::Icr, _) => {
                let destination = if door == Door::XApic { registers::split(self.icr).1 } else { high };
                self.icr = registers::join(low & !DELIVERY_STATUS, destination);
                effects.ipi = Ipi::decode(self.icr, door).and_then(|ipi| self.send(ipi));
            }
            (Register::IcrHigh, _) => self.icr = registers::join(registers::split(self.icr).0, low),
            (Register::SelfIpi, _) => effects.ipi = self.send(Ipi::to_self(low)),
            (Register::Lvt(LvtKind::Timer), _) => effects.timer = self.write_lvtt(low, door, now)?,
            (Register::Lvt(kind), _) => {
                self.lvt.write(kind, low, self.software_enabled());
                let _ = self.sample_lint0();
            }
            (Register::Tmict, _) => {
                effects.timer = self.timer.write_initial_count(self.lvt.timer.timer_mode(), low, now);
            }
            (Register::Tdcr, _) => effects.timer = self.timer.write_divide(low, now),
            (Register::Id, _) => self.write_xapic_id(low),
            // Read-only: the table lets no write through.
            (
                Register::Version | Register::Ppr | Register::Isr | Register::Tmr | Register::Irr | Register::Tmcct,
                _,
            ) => {}
        }
        Ok(effects)
    }

    /// A write of LVTT.
    ///
    /// Mode bit 18 is reserved without deadlines, and 11b always: so #GP through the MSR, as for any reserved bit, and
    /// no effect through the page. There a lone bit 18 is dropped as a bit, and 11b, of which no one bit is the
    /// reserved one, leaves the mode as it was.
    fn write_lvtt(&mut self, value: u32, door: Door, now: Now) -> Result<Option<Armed>, MsrFault> {
        let from = self.lvt.timer.timer_mode();
        let reserved = if self.config.has_deadline_mode() { 0 } else { timer::LVTT_DEADLINE };
        let value = match (door, TimerMode::of_lvtt(value)) {
            (Door::X2Apic, None) => return Err(MsrFault),
            (Door::X2Apic, _) if value & reserved != 0 => return Err(MsrFault),
            (Door::XApic, None) if reserved == 0 => {
                value & !timer::LVTT_MODE | self.lvt.timer.bits() & timer::LVTT_MODE
            }
            (Door::XApic | Door::X2Apic, _) => value & !reserved,
        };
        self.lvt.write(LvtKind::Timer, value, self.software_enabled());
        Ok(self.timer.change_mode(from, self.lvt.timer.timer_mode(), now))
    }
}
