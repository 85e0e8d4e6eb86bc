//! Whether a saved state is one that an APIC can be in.
//!
//! A file says anything. What passes here behaves as if a guest had brought the APIC there.

use crate::{
    Config, SOFTWARE_ENABLE, State, TimerState,
    base::{Base, Mode as BaseMode},
    errors,
    ipi::DELIVERY_STATUS,
    lvt::{self, MASKED},
    registers::{self, LvtKind},
    timer::{Armed, Mode},
    vectors::Vectors,
};

/// Why a saved state is not one that an APIC of this configuration can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A reserved bit, an impossible mode, or x2APIC mode where CPUID does not offer it.
    #[error("IA32_APIC_BASE cannot hold {0:#x} on this CPU")]
    Base(u64),
    /// IA32_APIC_BASE disables the APIC, and yet a register other than TPR is not as after reset.
    #[error("IA32_APIC_BASE {0:#x} disables an APIC that is not in its reset state")]
    Disabled(u64),
    /// A bit that the register does not have.
    #[error("{register} cannot hold {value:#x}")]
    Reserved {
        /// The register.
        register: &'static str,
        /// Its value.
        value: u64,
    },
    /// A vector below 16.
    #[error("{0} holds a vector below 16")]
    IllegalVector(&'static str),
    /// An LVT entry is unmasked although SVR disables the APIC.
    #[error("an LVT entry is unmasked while SVR {0:#x} disables the APIC")]
    Unmasked(u32),
    /// LVTT has the reserved mode, or deadline mode where CPUID does not offer it.
    #[error("LVTT {0:#x} selects a timer mode that this CPU does not have")]
    TimerMode(u32),
    /// What is armed cannot be in the mode that LVTT selects, or not without the CPUID feature.
    #[error("the timer cannot wait for {armed:?} with LVTT {lvtt:#x} on this CPU")]
    Armed {
        /// What the timer waits for.
        armed: Armed,
        /// LVTT.
        lvtt: u32,
    },
    /// An xAPIC ID in x2APIC mode, which has its own.
    #[error("an xAPIC ID of {0:#x} in x2APIC mode")]
    XApicId(u8),
    /// A count is running down from an initial count of 0.
    #[error("the timer counts down from an initial count of 0")]
    NoInitialCount,
}

impl State {
    /// Whether an APIC of this configuration can be in this state.
    pub(super) fn check(&self, config: &Config) -> Result<Base, StateError> {
        // TPR and the pins may have any value, ISR to IRR are checked as sets, and no value of `saved_at` is wrong.
        let &Self {
            saved_at,
            base,
            xapic_id,
            tpr,
            ldr,
            dfr,
            svr,
            isr,
            tmr,
            irr,
            esr,
            errors: since,
            icr,
            ref lvt,
            ref timer,
            lint_high,
        } = self;
        let checked = Base::new(base, config).ok_or(StateError::Base(base))?;
        // Disabling resets, and then only CR8 and the pins change anything. What else there is would come alive on
        // enabling.
        if checked.mode() == BaseMode::Disabled && *self != (Self { saved_at, base, tpr, lint_high, ..Self::default() })
        {
            return Err(StateError::Disabled(base));
        }
        if let Some(id) = xapic_id.filter(|_| checked.mode() == BaseMode::X2Apic) {
            return Err(StateError::XApicId(id));
        }
        let (icr_low, icr_high) = registers::split(icr);
        for (register, value, reserved) in [
            ("LDR", ldr, ldr & !registers::LDR),
            ("DFR", dfr, !dfr & !registers::DFR),
            ("SVR", svr, svr & !registers::SVR),
            ("ESR", esr, esr & !errors::ALL),
            ("the error accumulator", since, since & !errors::ALL),
            ("TDCR", timer.divide, timer.divide & !registers::TDCR),
            ("ICR", icr_low, icr_low & !(registers::ICR & !DELIVERY_STATUS)),
        ] {
            if reserved != 0 {
                let value = if register == "ICR" { registers::join(icr_low, icr_high) } else { u64::from(value) };
                return Err(StateError::Reserved { register, value });
            }
        }
        for (register, words) in [("ISR", isr), ("TMR", tmr), ("IRR", irr)] {
            if !Vectors::from_words(words).is_legal() {
                return Err(StateError::IllegalVector(register));
            }
        }
        for kind in LvtKind::ALL {
            let bits = lvt.get(kind);
            if !lvt::LvtEntry::is_valid(bits, kind) {
                return Err(StateError::Reserved { register: "an LVT entry", value: u64::from(bits) });
            }
            if svr & SOFTWARE_ENABLE == 0 && bits & MASKED == 0 {
                return Err(StateError::Unmasked(svr));
            }
        }
        timer.check(lvt.timer, config)?;
        Ok(checked)
    }
}

impl TimerState {
    pub(super) fn check(&self, lvtt: u32, config: &Config) -> Result<(), StateError> {
        let Self { armed, initial_count, divide: _ } = *self;
        let mode = Mode::of_lvtt(lvtt)
            .filter(|mode| *mode != Mode::Deadline || config.has_deadline_mode())
            .ok_or(StateError::TimerMode(lvtt))?;
        let possible = match armed {
            Armed::Disarmed => true,
            Armed::Tsc(_) => mode == Mode::Deadline && config.tsc_deadline,
            Armed::Ns(_) => mode == Mode::Deadline && config.ns_deadline,
            Armed::Count { .. } if initial_count == 0 => return Err(StateError::NoInitialCount),
            Armed::Count { .. } => mode != Mode::Deadline,
        };
        if possible { Ok(()) } else { Err(StateError::Armed { armed, lvtt }) }
    }
}
