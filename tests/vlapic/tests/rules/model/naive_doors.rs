//! The naive APIC's interfaces: for each kind of access, a list of the registers that allow it.

use vmtime::Now;

use super::{naive::Naive, router::Message};
use vlapic::Mode;

/// The effect of a write outside the APIC.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) eoi: Option<u8>,
    pub(super) message: Option<Message>,
}

const NS_DEADLINE: u32 = guest_abi::ns_deadline::MSR;

/// Registers that answer through the page, and through the MSRs.
pub(super) fn readable(number: u32, x2apic: bool) -> bool {
    match number {
        0x02 | 0x03 | 0x08 | 0x0a | 0x0d | 0x0f..=0x28 | 0x30 | 0x32..=0x39 | 0x3e => true,
        0x0e | 0x31 => !x2apic,
        _ => false,
    }
}

/// The bits that a WRMSR may set, if the register can be written.
fn msr_bits(number: u32) -> Option<u64> {
    Some(match number {
        0x08 | 0x3f => 0xff,
        0x0b | 0x28 => 0,
        0x0f => 0x3ff,
        0x30 => 0xffff_ffff_000c_dfff,
        0x32 => 0x7_10ff,
        0x33 | 0x34 => 0x1_17ff,
        0x35 | 0x36 => 0x1_f7ff,
        0x37 => 0x1_10ff,
        0x38 => 0xffff_ffff,
        0x3e => 0xb,
        _ => return None,
    })
}

impl Naive {
    fn look(&self, number: u32, now: Now) -> u64 {
        let x2apic = self.mode() == Mode::X2Apic;
        let word = |set: &[bool], index: u32| {
            let first = usize::try_from(index).unwrap() * 32;
            (0..32).map(|bit| u32::from(set[first + bit]) << bit).sum()
        };
        u64::from(match number {
            0x02 if x2apic => self.id(),
            0x03 => 0x5_0014,
            0x0a => self.ppr(),
            0x0d => self.ldr(),
            0x10..=0x17 => word(&self.isr, number - 0x10),
            0x18..=0x1f => word(&self.tmr, number - 0x18),
            0x20..=0x27 => word(&self.irr, number - 0x20),
            0x30 if x2apic => return u64::from(self.page[0x30]) | u64::from(self.page[0x31]) << 32,
            0x38 => self.timer.initial,
            0x39 => self.timer.current(now),
            0x3e => self.timer.divide,
            _ => self.page[usize::try_from(number).unwrap()],
        })
    }

    pub(super) fn page_read(&mut self, offset: u64, len: usize, now: Now) -> Vec<u8> {
        self.advance(now);
        let aligned = len == 4 && offset.is_multiple_of(16) && offset < 0x1000;
        if !aligned || self.mode() != Mode::XApic {
            return vec![0; len];
        }
        let number = u32::try_from(offset / 16).unwrap();
        if readable(number, false) {
            return self.look(number, now).to_le_bytes()[..4].to_vec();
        }
        if number != 0x0b {
            let _ = self.error(0x80);
        }
        vec![0; len]
    }

    pub(super) fn page_write(&mut self, offset: u64, data: &[u8], now: Now) -> Outcome {
        self.advance(now);
        let mut outcome = Outcome::default();
        if let Ok(bytes) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(16)
            && offset < 0x1000
            && self.mode() == Mode::XApic
        {
            let number = u32::try_from(offset / 16).unwrap();
            let value = u32::from_le_bytes(bytes);
            match number {
                0x02 | 0x0d | 0x31 => self.page[usize::try_from(number).unwrap()] = value & 0xff00_0000,
                0x0e => self.page[0x0e] = value | 0x0fff_ffff,
                0x3f => drop(self.error(0x80)),
                0x32 => self.page_write_lvtt(value & 0x7_10ff),
                _ => match msr_bits(number) {
                    Some(bits) => {
                        let high = self.page[0x31];
                        self.change(
                            number,
                            value & u32::try_from(bits & 0xffff_ffff).unwrap(),
                            high,
                            now,
                            &mut outcome,
                        );
                    }
                    None if readable(number, false) => {}
                    None => drop(self.error(0x80)),
                },
            }
        }
        self.advance(now);
        outcome
    }

    /// Reserved modes have no effect.
    fn page_write_lvtt(&mut self, value: u32) {
        let deadline = self.config.tsc_deadline || self.config.ns_deadline;
        let mode = match value >> 17 & 3 {
            3 if deadline => self.page[0x32] >> 17 & 3,
            mode if deadline => mode,
            mode => mode & 1,
        };
        self.change_lvt(0x32, value & 0x1_10ff | mode << 17);
    }

    pub(super) fn rdmsr(&mut self, index: u32, now: Now) -> Result<u64, ()> {
        self.advance(now);
        match index {
            0x1b => Ok(self.base),
            0x6e0 if self.config.tsc_deadline => Ok(self.timer.read_deadline(true)),
            NS_DEADLINE if self.config.ns_deadline => Ok(self.timer.read_deadline(false)),
            0x800..=0x8ff if self.mode() == Mode::X2Apic && readable(index - 0x800, true) => {
                Ok(self.look(index - 0x800, now))
            }
            _ => Err(()),
        }
    }

    pub(super) fn wrmsr(&mut self, index: u32, value: u64, now: Now) -> Result<Outcome, ()> {
        self.advance(now);
        let lvtt = self.page[0x32];
        let mut outcome = Outcome::default();
        match index {
            0x1b => self.write_base(value)?,
            0x6e0 if self.config.tsc_deadline => self.timer.write_deadline(lvtt, true, value, now),
            NS_DEADLINE if self.config.ns_deadline => self.timer.write_deadline(lvtt, false, value, now),
            0x800..=0x8ff if self.mode() == Mode::X2Apic => {
                let number = index - 0x800;
                let bits = msr_bits(number).ok_or(())?;
                let deadline = self.config.tsc_deadline || self.config.ns_deadline;
                let mode = value >> 17 & 3;
                if value & !bits != 0 || (number == 0x32 && (mode == 3 || (mode == 2 && !deadline))) {
                    return Err(());
                }
                let [low, high] = [value & 0xffff_ffff, value >> 32].map(|half| u32::try_from(half).unwrap());
                self.change(number, low, high, now, &mut outcome);
            }
            _ => return Err(()),
        }
        self.advance(now);
        Ok(outcome)
    }

    fn change(&mut self, number: u32, value: u32, high: u32, now: Now, outcome: &mut Outcome) {
        let x2apic = self.mode() == Mode::X2Apic;
        match number {
            0x0b => outcome.eoi = self.end_of_interrupt(),
            0x0f => {
                self.page[0x0f] = value;
                for lvt in 0x32..=0x37 {
                    self.page[lvt] |= if value & 0x100 == 0 { 0x1_0000 } else { 0 };
                }
            }
            0x28 => self.page[0x28] = std::mem::take(&mut self.logged),
            0x30 => {
                (self.page[0x30], self.page[0x31]) = (value & !0x1000, high);
                outcome.message = Some(Message { command: value, to: if x2apic { high } else { high >> 24 }, x2apic });
            }
            0x32..=0x37 => self.change_lvt(usize::try_from(number).unwrap(), value),
            0x38 => self.timer.write_initial(self.page[0x32], value, now),
            0x3e => self.timer.write_divide(value, now),
            // Fixed, edge, to itself.
            0x3f => outcome.message = Some(Message { command: 0x4_4000 | value, to: 0, x2apic }),
            _ => self.page[usize::try_from(number).unwrap()] = value,
        }
    }

    fn change_lvt(&mut self, number: usize, value: u32) {
        let before = self.page[number];
        let mut value = value & !0x5000;
        if !self.enabled() {
            value |= 0x1_0000;
        }
        // Remote IRR stays where it means something: LINT0, fixed, level.
        if number == 0x35 && value & 0x8700 == 0x8000 {
            value |= before & 0x4000;
        }
        self.page[number] = value;
        if number == 0x32 {
            self.timer.write_lvtt(before, value);
        } else {
            let _ = self.sample();
        }
    }
}
