//! The naive local APIC: a page of registers as numbers, and sets of vectors as lists of booleans.

use vmtime::Now;

use super::clockwork::Clockwork;
use vlapic::{Config, Deadline, Delivery, LocalSource, Mode, Route};

#[derive(Clone, Debug)]
pub(super) struct Naive {
    pub(super) config: Config,
    pub(super) base: u64,
    /// Registers by number: those that hold the value written.
    pub(super) page: [u32; 0x40],
    pub(super) irr: Vec<bool>,
    pub(super) isr: Vec<bool>,
    pub(super) tmr: Vec<bool>,
    pub(super) logged: u32,
    pub(super) pins: [bool; 2],
    pub(super) timer: Clockwork,
}

fn highest(set: &[bool]) -> Option<usize> {
    set.iter().rposition(|member| *member)
}

impl Naive {
    pub(super) fn new(config: Config) -> Self {
        let mut naive = Self {
            config,
            base: 0xfee0_0800 | if config.bsp { 0x100 } else { 0 },
            page: [0; 0x40],
            irr: vec![],
            isr: vec![],
            tmr: vec![],
            logged: 0,
            pins: [false; 2],
            timer: Clockwork::default(),
        };
        naive.clear();
        naive.page[2] = config.id << 24;
        naive
    }

    /// "Local APIC State After Power-Up or Reset", without the ID.
    fn clear(&mut self) {
        let id = self.page[2];
        self.page = [0; 0x40];
        self.page[2] = id;
        self.page[0xe] = 0xffff_ffff;
        self.page[0xf] = 0xff;
        for lvt in 0x32..=0x37 {
            self.page[lvt] = 0x1_0000;
        }
        for set in [&mut self.irr, &mut self.isr, &mut self.tmr] {
            *set = vec![false; 256];
        }
        self.logged = 0;
        self.timer = Clockwork::default();
    }

    pub(super) fn init(&mut self) {
        self.clear();
    }

    pub(super) fn reset(&mut self) {
        *self = Self { pins: self.pins, ..Self::new(self.config) };
    }

    pub(super) fn mode(&self) -> Mode {
        match self.base >> 10 & 3 {
            2 => Mode::XApic,
            3 => Mode::X2Apic,
            _ => Mode::Disabled,
        }
    }

    pub(super) fn enabled(&self) -> bool {
        self.mode() != Mode::Disabled && self.page[0xf] & 0x100 != 0
    }

    pub(super) fn write_base(&mut self, value: u64) -> Result<(), ()> {
        let ok = match (self.base >> 10 & 3, value >> 10 & 3) {
            (_, 1) => false,
            (_, 3) if !self.config.x2apic => false,
            (2 | 3, 3) | (0 | 2, 2) | (_, 0) => true,
            _ => false,
        };
        if !ok || value >> 52 != 0 || value & 0x2ff != 0 {
            return Err(());
        }
        let before = self.mode();
        self.base = value;
        match (before, self.mode()) {
            (Mode::XApic | Mode::X2Apic, Mode::Disabled) => {
                self.clear();
                self.page[2] = self.config.id << 24;
            }
            (Mode::XApic, Mode::X2Apic) => (self.page[0x31], self.page[2]) = (0, self.config.id << 24),
            _ => {}
        }
        Ok(())
    }

    /// "Interrupt Acceptance for Fixed Interrupts"; what is illegal goes to "Error Handling".
    pub(super) fn request(&mut self, vector: u32, level: bool) -> Delivery {
        let Some(vector) = usize::try_from(vector & 0xff).ok().filter(|vector| *vector >= 16) else {
            return self.error(0x40);
        };
        self.irr[vector] = true;
        self.tmr[vector] = level;
        Delivery::Accepted
    }

    pub(super) fn error(&mut self, bit: u32) -> Delivery {
        let first = self.logged == 0;
        self.logged |= bit;
        if first { self.error_entry() } else { Delivery::None }
    }

    fn error_entry(&mut self) -> Delivery {
        let entry = self.page[0x37];
        if entry & 0x1_0000 != 0 {
            Delivery::None
        } else if entry & 0xff < 16 {
            self.logged |= 0x40;
            Delivery::None
        } else {
            self.request(entry, false)
        }
    }

    pub(super) fn advance(&mut self, now: Now) {
        let lvtt = self.page[0x32];
        if self.timer.expire(lvtt, now) && lvtt & 0x1_0000 == 0 {
            let _ = self.request(lvtt, false);
        }
    }

    pub(super) fn local(&mut self, source: LocalSource, high: bool) -> Delivery {
        let (number, pin) = match source {
            LocalSource::Lint0 => (0x35, Some(0)),
            LocalSource::Lint1 => (0x36, Some(1)),
            LocalSource::Thermal => (0x33, None),
            LocalSource::Performance => (0x34, None),
            LocalSource::Error => return if high { self.error_entry() } else { Delivery::None },
        };
        let entry = self.page[number];
        let low_active = entry >> 13 & 1 == 1;
        let was = pin.is_some_and(|pin| self.pins[pin] != low_active);
        let is = pin.map_or(high, |_| high != low_active);
        if let Some(pin) = pin {
            let wire = std::mem::replace(&mut self.pins[pin], high);
            if self.mode() == Mode::Disabled {
                return match pin {
                    0 if high => Delivery::ExtInt,
                    1 if high && !wire => Delivery::Nmi,
                    _ => Delivery::None,
                };
            }
        }
        if entry & 0x1_0000 != 0 {
            return Delivery::None;
        }
        let delivery = match (entry >> 8 & 7, pin) {
            (0, Some(0)) if entry >> 15 & 1 == 1 => return self.sample(),
            (7, Some(_)) if is => Delivery::ExtInt,
            _ if !is || was => Delivery::None,
            (0, _) => self.request(entry, false),
            (2, _) => Delivery::Smi,
            (4, _) => Delivery::Nmi,
            (5, Some(_)) => Delivery::Init,
            _ => Delivery::None,
        };
        if number == 0x34 && delivery != Delivery::None {
            self.page[number] |= 0x1_0000;
        }
        delivery
    }

    /// LINT0, level-triggered: unmasked, fixed, level, no remote IRR, active.
    pub(super) fn sample(&mut self) -> Delivery {
        let entry = self.page[0x35];
        let active = self.pins[0] != (entry >> 13 & 1 == 1);
        if !active || entry & 0x1_c700 != 0x8000 {
            return Delivery::None;
        }
        if entry & 0xff >= 16 {
            self.page[0x35] |= 0x4000;
        }
        self.request(entry, true)
    }

    pub(super) fn external_interrupt(&self) -> bool {
        if self.mode() == Mode::Disabled {
            return self.pins[0];
        }
        [0, 1].into_iter().any(|pin| {
            let entry = self.page[0x35 + pin];
            entry & 0x1_0700 == 0x700 && self.pins[pin] != (entry >> 13 & 1 == 1)
        })
    }

    pub(super) fn acknowledge(&mut self, vector: u8) {
        let vector = usize::from(vector);
        if self.irr[vector] {
            (self.irr[vector], self.isr[vector]) = (false, true);
        }
    }

    pub(super) fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = highest(&self.isr)?;
        self.isr[vector] = false;
        if !self.tmr[vector] {
            return None;
        }
        let vector = u8::try_from(vector).unwrap();
        if self.page[0x35] & 0xff == u32::from(vector) {
            self.page[0x35] &= !0x4000;
            let _ = self.sample();
        }
        Some(vector)
    }

    /// "Task and Processor Priorities".
    pub(super) fn ppr(&self) -> u32 {
        let (tpr, isrv) = (self.page[8], u32::try_from(highest(&self.isr).unwrap_or(0)).unwrap());
        if tpr >> 4 < isrv >> 4 { isrv >> 4 << 4 } else { tpr }
    }

    /// "Lowest Priority Delivery Mode".
    fn apr(&self) -> u32 {
        let tpr = self.page[8];
        let [isrv, irrv] = [&self.isr, &self.irr].map(|set| u32::try_from(highest(set).unwrap_or(0)).unwrap());
        if tpr >> 4 >= irrv >> 4 && tpr >> 4 > isrv >> 4 {
            tpr
        } else {
            [tpr, isrv, irrv].into_iter().map(|priority| priority >> 4).max().unwrap() << 4
        }
    }

    pub(super) fn waiting(&self) -> Option<u8> {
        if self.mode() == Mode::Disabled {
            return None;
        }
        highest(&self.irr).map(|vector| u8::try_from(vector).unwrap())
    }

    pub(super) fn pending(&self) -> Option<u8> {
        self.waiting().filter(|vector| u32::from(*vector) >> 4 > self.ppr() >> 4)
    }

    /// It would be pending if TPR were 0.
    pub(super) fn blocked_by_tpr(&self) -> bool {
        let in_service = highest(&self.isr).map_or(0, |vector| vector >> 4);
        self.pending().is_none() && self.waiting().is_some_and(|vector| usize::from(vector) >> 4 > in_service)
    }

    pub(super) fn next_wake(&self) -> Option<Deadline> {
        let lvtt = self.page[0x32];
        let enters = lvtt & 0x1_0000 == 0 && lvtt & 0xff >= 16 && lvtt >> 4 & 0xf > self.ppr() >> 4;
        if enters { self.timer.next() } else { None }
    }

    pub(super) fn id(&self) -> u32 {
        if self.mode() == Mode::X2Apic { self.config.id } else { self.page[2] >> 24 }
    }

    pub(super) fn ldr(&self) -> u32 {
        let id = self.config.id;
        if self.mode() == Mode::X2Apic { id / 16 * 0x1_0000 + (1 << (id % 16)) } else { self.page[0xd] }
    }

    pub(super) fn route(&self) -> Route {
        Route {
            id: self.id(),
            mode: self.mode(),
            ldr: self.ldr(),
            dfr: self.page[0xe],
            enabled: self.page[0xf] & 0x100 != 0,
            priority: u8::try_from(self.apr()).unwrap(),
        }
    }
}
