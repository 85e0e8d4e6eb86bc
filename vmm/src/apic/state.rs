//! What is saved, apart from what runs.
//!
//! Both conversions name every field of both sides, so that a new one does not compile until somebody decides what a
//! restored guest shall see of it. PPR, TMCCT, the version and the IDs follow from other fields or from the
//! configuration and are not here.

use serde::{Deserialize, Serialize};

use super::base::{Base, Mode as BaseMode};
use super::ipi::DELIVERY_STATUS;
use super::lvt::{self, Lvt, MASKED};
use super::registers::{self, LvtKind, WORDS};
use super::timer::{Armed, Mode, Timer};
use super::vectors::Vectors;
use super::{Config, LocalApic, SOFTWARE_ENABLE, errors};
use crate::time::Now;

/// A saved local APIC. Register values are as a guest reads them, except where a field says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// When it was saved. The APIC itself does not need it, its deadlines being absolute; whoever adjusts them for
    /// another TSC frequency, or shows how much time is left, does.
    pub saved_at: Now,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// TPR.
    pub tpr: u8,
    /// LDR as written in xAPIC mode. The x2APIC's follows from the ID.
    pub ldr: u32,
    /// DFR.
    pub dfr: u32,
    /// SVR.
    pub svr: u32,
    /// ISR.
    pub isr: [u32; WORDS],
    /// TMR.
    pub tmr: [u32; WORDS],
    /// IRR.
    pub irr: [u32; WORDS],
    /// ESR as it reads.
    pub esr: u32,
    /// Errors since the last write of ESR, which the next one will show.
    pub errors: u32,
    /// ICR: bits 63:32 are the xAPIC's upper register.
    pub icr: u64,
    /// The local vector table.
    pub lvt: LvtState,
    /// The timer.
    pub timer: TimerState,
}

/// A saved local vector table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LvtState {
    /// LVTT.
    pub timer: u32,
    /// Thermal monitor.
    pub thermal: u32,
    /// Performance counters.
    pub performance: u32,
    /// LINT0.
    pub lint0: u32,
    /// LINT1.
    pub lint1: u32,
    /// Error.
    pub error: u32,
}

/// A saved timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimerState {
    /// What it waits for: always an absolute instant.
    pub armed: Armed,
    /// TMICT.
    pub initial_count: u32,
    /// TDCR.
    pub divide: u32,
}

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
    /// A count is running down from an initial count of 0.
    #[error("the timer counts down from an initial count of 0")]
    NoInitialCount,
}

impl Default for LvtState {
    fn default() -> Self {
        Self { timer: MASKED, thermal: MASKED, performance: MASKED, lint0: MASKED, lint1: MASKED, error: MASKED }
    }
}

/// The state of a CPU that is not the bootstrap processor, after reset (SDM vol. 3, "Local APIC State After Power-Up
/// or Reset").
impl Default for State {
    fn default() -> Self {
        Self {
            saved_at: Now::default(),
            base: Base::reset(false).bits(),
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; WORDS],
            tmr: [0; WORDS],
            irr: [0; WORDS],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: LvtState::default(),
            timer: TimerState::default(),
        }
    }
}

impl State {
    /// The state after reset.
    #[must_use]
    pub fn reset(config: &Config) -> Self {
        Self { base: Base::reset(config.bsp).bits(), ..Self::default() }
    }

    /// Whether an APIC of this configuration can be in this state.
    fn check(&self, config: &Config) -> Result<Base, StateError> {
        // TPR may have any value, ISR to IRR are checked as sets, and no value of `saved_at` is wrong.
        let Self { saved_at: _, base, tpr: _, ldr, dfr, svr, isr, tmr, irr, esr, errors: since, icr, lvt, timer } =
            self;
        let checked = Base::new(*base, config.x2apic).ok_or(StateError::Base(*base))?;
        // Disabling resets, and then only CR8 reaches a register. Anything else would come alive on enabling.
        if checked.mode() == BaseMode::Disabled
            && *self != (Self { saved_at: self.saved_at, base: *base, tpr: self.tpr, ..Self::default() })
        {
            return Err(StateError::Disabled(*base));
        }
        let (icr_low, icr_high) = registers::split(*icr);
        for (register, value, reserved) in [
            ("LDR", *ldr, *ldr & !registers::LDR),
            ("DFR", *dfr, !*dfr & !registers::DFR),
            ("SVR", *svr, *svr & !registers::SVR),
            ("ESR", *esr, *esr & !errors::ALL),
            ("the error accumulator", *since, *since & !errors::ALL),
            ("TDCR", timer.divide, timer.divide & !registers::TDCR),
            ("ICR", icr_low, icr_low & !(registers::ICR & !DELIVERY_STATUS)),
        ] {
            if reserved != 0 {
                let value = if register == "ICR" { registers::join(icr_low, icr_high) } else { u64::from(value) };
                return Err(StateError::Reserved { register, value });
            }
        }
        for (register, words) in [("ISR", isr), ("TMR", tmr), ("IRR", irr)] {
            if !Vectors::from_words(*words).is_legal() {
                return Err(StateError::IllegalVector(register));
            }
        }
        for kind in LvtKind::ALL {
            let bits = lvt.get(kind);
            if !lvt::Entry::is_valid(bits, kind) {
                return Err(StateError::Reserved { register: "an LVT entry", value: u64::from(bits) });
            }
            if svr & SOFTWARE_ENABLE == 0 && bits & MASKED == 0 {
                return Err(StateError::Unmasked(*svr));
            }
        }
        timer.check(lvt.timer, config)?;
        Ok(checked)
    }
}

impl LvtState {
    const fn get(&self, kind: LvtKind) -> u32 {
        let Self { timer, thermal, performance, lint0, lint1, error } = *self;
        match kind {
            LvtKind::Timer => timer,
            LvtKind::Thermal => thermal,
            LvtKind::Performance => performance,
            LvtKind::Lint0 => lint0,
            LvtKind::Lint1 => lint1,
            LvtKind::Error => error,
        }
    }
}

impl TimerState {
    fn check(&self, lvtt: u32, config: &Config) -> Result<(), StateError> {
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

impl LocalApic {
    /// The state to save, at `now`. Evaluates nothing: a deadline that is already due stays armed, and fires after the
    /// restore when the APIC is first told the time.
    #[must_use]
    pub fn state(&self, now: Now) -> State {
        let Self { config: _, base, tpr, ldr, dfr, svr, isr, tmr, irr, esr, errors, icr, lvt, timer } = *self;
        let Lvt { timer: lvtt, thermal, performance, lint0, lint1, error } = lvt;
        let Timer { armed, initial_count, divide } = timer;
        State {
            saved_at: now,
            base: base.bits(),
            tpr,
            ldr,
            dfr,
            svr,
            isr: isr.words(),
            tmr: tmr.words(),
            irr: irr.words(),
            esr,
            errors,
            icr,
            lvt: LvtState {
                timer: lvtt.bits(),
                thermal: thermal.bits(),
                performance: performance.bits(),
                lint0: lint0.bits(),
                lint1: lint1.bits(),
                error: error.bits(),
            },
            timer: TimerState { armed, initial_count, divide },
        }
    }

    /// An APIC in a saved state.
    ///
    /// # Errors
    /// [`StateError`] for a state that no APIC of this configuration can be in.
    pub fn from_state(state: &State, config: Config) -> Result<Self, StateError> {
        let base = state.check(&config)?;
        Ok(Self::from_checked(state, base, config))
    }

    pub(super) fn from_checked(state: &State, base: Base, config: Config) -> Self {
        let State { saved_at: _, base: _, tpr, ldr, dfr, svr, isr, tmr, irr, esr, errors, icr, lvt, timer } = *state;
        let TimerState { armed, initial_count, divide } = timer;
        Self {
            config,
            base,
            tpr,
            ldr,
            dfr,
            svr,
            isr: Vectors::from_words(isr),
            tmr: Vectors::from_words(tmr),
            irr: Vectors::from_words(irr),
            esr,
            errors,
            icr,
            lvt: Lvt::new(|kind| lvt.get(kind)),
            timer: Timer { armed, initial_count, divide },
        }
    }
}
