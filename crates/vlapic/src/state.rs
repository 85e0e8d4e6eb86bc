//! What is saved, apart from what runs.
//!
//! Both conversions name every field of both sides, so that a new one does not compile before it is decided what a
//! restored guest sees of it. PPR, TMCCT, the version and the IDs follow from other fields or from the
//! configuration and are not here.

use vmtime::{GuestTsc, Now, TscAdjust, VmTime};

use crate::{
    Config, LocalApic, StateError,
    base::Base,
    delivery::Pins,
    lvt::{Lvt, MASKED},
    registers::{LvtKind, WORDS},
    timer::{Armed, Timer},
    vectors::Vectors,
};

/// When a local APIC was saved, on the clocks that the guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SavedAt {
    /// The CPU's TSC.
    pub tsc: GuestTsc,
    /// VM time.
    pub vm: VmTime,
}

impl SavedAt {
    /// The same instant for a CPU with this `adjust`.
    #[must_use]
    pub const fn now(self, adjust: TscAdjust) -> Now {
        let Self { tsc, vm } = self;
        Now { tsc, base: adjust.to_base(tsc), vm }
    }
}

/// A saved local APIC. Register values are as a guest reads them, except where a field says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct State {
    /// When it was saved. The APIC itself does not need it, as its deadlines are absolute. A VMM needs it to adjust
    /// them for another TSC frequency, or to show how much time is left.
    pub saved_at: SavedAt,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// The xAPIC ID, if the guest wrote one. A state from before it could has none.
    #[cfg_attr(feature = "serde", serde(default))]
    pub xapic_id: Option<u8>,
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
    /// Whether the LINT0 and LINT1 pins are high. A state from before they existed has them low.
    #[cfg_attr(feature = "serde", serde(default))]
    pub lint_high: [bool; 2],
}

/// A saved local vector table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct TimerState {
    /// What it waits for: always an absolute instant.
    pub armed: Armed,
    /// TMICT.
    pub initial_count: u32,
    /// TDCR.
    pub divide: u32,
}

/// A saved [`Config`]. The physical address width is not in it: CPUID is saved too, and says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct ConfigState {
    /// See [`Config::id`].
    pub id: u32,
    /// See [`Config::bsp`].
    pub bsp: bool,
    /// See [`Config::x2apic`].
    pub x2apic: bool,
    /// See [`Config::tsc_deadline`].
    pub tsc_deadline: bool,
    /// See [`Config::ns_deadline`].
    pub ns_deadline: bool,
}

impl Config {
    /// The configuration to save.
    #[must_use]
    pub const fn state(&self) -> ConfigState {
        let Self { id, bsp, x2apic, tsc_deadline, ns_deadline, physical_bits: _ } = *self;
        ConfigState { id, bsp, x2apic, tsc_deadline, ns_deadline }
    }

    /// A saved configuration, on a CPU with this physical address width.
    #[must_use]
    pub const fn from_state(state: ConfigState, physical_bits: u8) -> Self {
        let ConfigState { id, bsp, x2apic, tsc_deadline, ns_deadline } = state;
        Self { id, bsp, x2apic, tsc_deadline, ns_deadline, physical_bits }
    }
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
            saved_at: SavedAt::default(),
            base: Base::reset(false).bits(),
            xapic_id: None,
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
            lint_high: [false; 2],
        }
    }
}

impl State {
    /// The state after reset.
    #[must_use]
    pub fn reset(config: &Config) -> Self {
        Self { base: Base::reset(config.bsp).bits(), ..Self::default() }
    }
}

impl LvtState {
    pub(super) const fn get(&self, kind: LvtKind) -> u32 {
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

impl LocalApic {
    /// The state to save, at `now`. Evaluates nothing: a deadline that is already due stays armed, and fires after the
    /// restore when the APIC is first told the time. But the state does not say whether the TSC has wrapped since it
    /// was armed: [`advance`](Self::advance) to `now` first where that can be.
    #[must_use]
    pub fn state(&self, now: Now) -> State {
        // The configuration is saved with the machine.
        let Self {
            config: _,
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
            errors,
            icr,
            lvt,
            timer,
            pins: Pins { lint0: lint0_high, lint1: lint1_high },
        } = *self;
        let Lvt { timer: lvtt, thermal, performance, lint0, lint1, error } = lvt;
        let Now { tsc, base: _, vm } = now;
        State {
            saved_at: SavedAt { tsc, vm },
            base: base.bits(),
            xapic_id,
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
            timer: timer.state(),
            lint_high: [lint0_high, lint1_high],
        }
    }

    /// An APIC in a saved state, at `now`.
    ///
    /// # Errors
    /// [`StateError`] for a state that no APIC of this configuration can be in.
    pub fn from_state(state: &State, config: Config, now: Now) -> Result<Self, StateError> {
        let base = state.check(&config)?;
        let mut apic = Self::from_checked(state, base, config);
        apic.timer.arm(state.timer.armed, now);
        Ok(apic)
    }

    /// What the timer waits for.
    #[must_use]
    pub const fn armed(&self) -> Armed {
        self.timer.armed()
    }

    /// Makes the timer wait for `armed` from `now` on: a clock went on from another value, or at another rate.
    ///
    /// # Errors
    /// [`StateError`] for what an APIC of this configuration and in its mode cannot wait for.
    pub fn rearm(&mut self, armed: Armed, now: Now) -> Result<(), StateError> {
        let state = TimerState { armed, ..self.timer.state() };
        state.check(self.lvt.timer.bits(), &self.config)?;
        self.timer.arm(armed, now);
        Ok(())
    }

    /// All of `state` but what the timer waits for.
    pub(super) fn from_checked(state: &State, base: Base, config: Config) -> Self {
        let State {
            saved_at: _,
            base: _,
            xapic_id,
            tpr,
            ldr,
            dfr,
            svr,
            isr,
            tmr,
            irr,
            esr,
            errors,
            icr,
            lvt,
            timer,
            lint_high: [lint0, lint1],
        } = *state;
        let TimerState { armed: _, initial_count, divide } = timer;
        Self {
            config,
            base,
            xapic_id,
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
            timer: Timer::idle(initial_count, divide),
            pins: Pins { lint0, lint1 },
        }
    }
}
