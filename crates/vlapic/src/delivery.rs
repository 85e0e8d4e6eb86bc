//! What comes from outside: messages, LINT pins and other local sources, INIT and reset.
//!
//! Vectors stay in the APIC. The rest is for the CPU, and is returned to the VMM as a [`Delivery`].

use crate::{
    DeliveryMode, Ipi, LocalApic, State, Trigger,
    base::{Base, Mode},
    lvt::Deliver,
    registers::LvtKind,
    vectors::Vectors,
};

/// What a message or a local source asks of the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Delivery {
    /// Nothing.
    None,
    /// A vector was requested: look at [`LocalApic::pending`].
    Accepted,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT: [`LocalApic::init`] is due. The bootstrap processor restarts at the reset vector, another CPU waits for a
    /// start-up IPI.
    Init,
    /// A start-up IPI. A CPU that does not wait for one ignores it.
    StartUp {
        /// The number of the 4 KiB page to start at.
        vector: u8,
    },
    /// The interrupt of an 8259, which must be asked for the vector.
    ExtInt,
    /// A system management interrupt.
    Smi,
}

/// What interrupts through the local vector table, other than the timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalSource {
    /// The LINT0 pin, where PCs have the 8259.
    Lint0,
    /// The LINT1 pin, where PCs have NMI.
    Lint1,
    /// The thermal sensor.
    Thermal,
    /// A performance counter overflowed.
    Performance,
    /// The APIC's own error interrupt, without an error.
    Error,
}

/// Which of the two pins are high.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pins {
    pub(super) lint0: bool,
    pub(super) lint1: bool,
}

impl LocalApic {
    /// A message arrives that is for this CPU: [`addressed_by`](Self::addressed_by) says so, or it was the choice of
    /// [`lowest_priority`](crate::lowest_priority).
    ///
    /// An APIC that SVR disables still "responds normally to INIT, NMI, SMI, and SIPI messages" (SDM vol. 3, "Local
    /// APIC State After It Has Been Software Disabled"). One that IA32_APIC_BASE disables does not listen at all: the
    /// CPU is "functionally equivalent to a processor without an on-chip APIC" ("Enabling or Disabling the Local
    /// APIC"). INIT level de-assert is "not supported in the Pentium 4 and Intel Xeon processors" and does nothing.
    pub fn deliver(&mut self, ipi: &Ipi) -> Delivery {
        let level = ipi.trigger == Trigger::Level;
        if self.base.mode() == Mode::Disabled || (level && !ipi.assert) {
            return Delivery::None;
        }
        match ipi.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if self.accepts() => self.take(ipi.vector, level),
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => Delivery::None,
            DeliveryMode::Smi => Delivery::Smi,
            DeliveryMode::Nmi => Delivery::Nmi,
            DeliveryMode::Init => Delivery::Init,
            DeliveryMode::StartUp => Delivery::StartUp { vector: ipi.vector },
        }
    }

    /// A local source interrupts (SDM vol. 3, "Local Vector Table").
    ///
    /// For a LINT pin, `high` is its level from now on; the entry's polarity says which level is the active one, and
    /// the pins are low after power-up. The other sources interrupt when `high` is true, and otherwise nothing happens.
    ///
    /// Masked entries lose what they do not let through, a level-triggered pin excepted: it interrupts when its entry
    /// is unmasked while it is active, and again after each EOI until it is not. That, and
    /// [`external_interrupt`](Self::external_interrupt), can follow a register write too.
    pub fn local(&mut self, source: LocalSource, high: bool) -> Delivery {
        match source {
            LocalSource::Lint0 => {
                let was = core::mem::replace(&mut self.pins.lint0, high);
                self.pin(LvtKind::Lint0, was, high)
            }
            LocalSource::Lint1 => {
                let was = core::mem::replace(&mut self.pins.lint1, high);
                self.pin(LvtKind::Lint1, was, high)
            }
            LocalSource::Thermal | LocalSource::Performance | LocalSource::Error if !high => Delivery::None,
            LocalSource::Thermal => self.event(LvtKind::Thermal),
            LocalSource::Performance => {
                let delivery = self.event(LvtKind::Performance);
                // "When the local APIC handles a performance-monitoring counters interrupt, it automatically sets the
                // mask flag in the LVT performance counter register."
                if delivery != Delivery::None {
                    self.lvt.mask(LvtKind::Performance);
                }
                delivery
            }
            LocalSource::Error => self.raise_error(),
        }
    }

    /// Whether the 8259's interrupt reaches the CPU: a LINT pin is active and its entry is in ExtINT mode, which is
    /// always level-sensitive, or there is no APIC between the pin and the CPU.
    #[must_use]
    pub fn external_interrupt(&self) -> bool {
        let through = |kind, high| {
            let entry = self.lvt.get(kind);
            !entry.masked() && entry.deliver() == Some(Deliver::ExtInt) && entry.active(high)
        };
        match self.base.mode() {
            Mode::Disabled => self.pins.lint0,
            Mode::XApic | Mode::X2Apic => {
                through(LvtKind::Lint0, self.pins.lint0) || through(LvtKind::Lint1, self.pins.lint1)
            }
        }
    }

    /// The level of LINT0, as it was told last.
    #[must_use]
    pub const fn lint0(&self) -> bool {
        self.pins.lint0
    }

    /// Whether LINT0 does anything when it rises: its entry is not masked, or the APIC is disabled.
    #[must_use]
    pub fn heeds_lint0(&self) -> bool {
        self.base.mode() == Mode::Disabled || !self.lvt.get(LvtKind::Lint0).masked()
    }

    fn pin(&mut self, kind: LvtKind, was: bool, high: bool) -> Delivery {
        let entry = self.lvt.get(kind);
        if self.base.mode() == Mode::Disabled {
            // "Enabling or Disabling the Local APIC": the pins are then the CPU's INTR and NMI.
            return match (kind, was, high) {
                (LvtKind::Lint0, _, true) => Delivery::ExtInt,
                (LvtKind::Lint1, false, true) => Delivery::Nmi,
                _ => Delivery::None,
            };
        }
        if kind.has_remote_irr() && entry.level_fixed() {
            return self.sample_lint0();
        }
        let (was, active) = (entry.active(was), entry.active(high));
        match entry.deliver() {
            Some(Deliver::ExtInt) if active && !entry.masked() => Delivery::ExtInt,
            Some(Deliver::ExtInt) => Delivery::None,
            _ if active && !was => self.event(kind),
            _ => Delivery::None,
        }
    }

    /// An edge at an entry.
    fn event(&mut self, kind: LvtKind) -> Delivery {
        let entry = self.lvt.get(kind);
        let on_pin = matches!(kind, LvtKind::Lint0 | LvtKind::Lint1);
        match entry.deliver() {
            _ if entry.masked() => Delivery::None,
            Some(Deliver::Fixed) => self.take(entry.vector(), false),
            Some(Deliver::Smi) => Delivery::Smi,
            Some(Deliver::Nmi) => Delivery::Nmi,
            // "Not supported for the LVT thermal monitor register, or the LVT performance counter register", as ExtINT.
            Some(Deliver::Init) if on_pin => Delivery::Init,
            Some(Deliver::Init | Deliver::ExtInt) | None => Delivery::None,
        }
    }

    /// Requests LINT0's vector if the pin asks for it by its level: it is active, and no EOI is awaited.
    pub(super) fn sample_lint0(&mut self) -> Delivery {
        let entry = self.lvt.lint0;
        if entry.masked() || !entry.level_fixed() || entry.remote_irr() || !entry.active(self.pins.lint0) {
            return Delivery::None;
        }
        self.lvt.set_remote_irr(entry.has_legal_vector());
        self.take(entry.vector(), true)
    }

    /// The highest interrupt in service ends; the answer is its vector if it is level-triggered.
    pub(super) fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.isr.highest()?;
        self.isr.set(vector, false);
        let level = self.tmr.contains(vector);
        if level && self.lvt.lint0.vector() == vector {
            self.lvt.set_remote_irr(false);
            let _ = self.sample_lint0();
        }
        Some(vector).filter(|_| level)
    }

    /// The vector in service whose end nothing waits for, so that it changes nothing but ISR: no other is in service,
    /// none is requested, and it is not level-triggered.
    #[must_use]
    pub fn silent_end(&self) -> Option<u8> {
        let vector = self.isr.highest().filter(|vector| !self.tmr.contains(*vector))?;
        let mut others = self.isr;
        others.set(vector, false);
        (others == Vectors::default() && self.irr == Vectors::default()).then_some(vector)
    }

    /// The guest has ended the interrupt `vector` without a write, as [`silent_end`](Self::silent_end) allowed when it
    /// was last asked. Nothing happens if that is not the highest in service.
    pub fn end_silently(&mut self, vector: u8) {
        if self.isr.highest() == Some(vector) {
            let _ = self.end_of_interrupt();
        }
    }

    /// The CPU receives INIT. "The state of the local APIC following an INIT reset is the same as it is after a
    /// power-up or hardware reset, except that the APIC ID and arbitration ID registers are not affected" (SDM vol. 3,
    /// "Local APIC State After It Receives an INIT Reset"); and IA32_APIC_BASE stays, with the mode ("x2APIC State
    /// Transitions").
    pub fn init(&mut self) {
        self.restart(self.base, self.xapic_id);
    }

    /// Power-up or reset: xAPIC mode at the default address (SDM vol. 3, "Local APIC State After Power-Up or Reset").
    pub fn reset(&mut self) {
        self.restart(Base::reset(self.config.bsp), None);
    }

    /// Every register as after reset. The level of the pins is not the APIC's to change.
    pub(super) fn restart(&mut self, base: Base, xapic_id: Option<u8>) {
        let Pins { lint0, lint1 } = self.pins;
        let state = State { xapic_id, lint_high: [lint0, lint1], ..State::default() };
        *self = Self::from_checked(&state, base, self.config);
    }
}
