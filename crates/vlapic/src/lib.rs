#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod base;
mod check;
mod delivery;
mod doors;
mod errors;
mod inbox;
mod ipi;
mod lvt;
mod registers;
mod route;
mod state;
mod timer;
mod vectors;

pub use self::base::{MOST_PHYSICAL_BITS, Mode};
pub use self::check::StateError;
pub use self::delivery::{Delivery, LocalSource};
pub use self::inbox::Inbox;
pub use self::ipi::{DeliveryMode, Destination, Ipi, Trigger};
pub use self::route::{Route, lowest_priority};
pub use self::state::{ConfigState, LvtState, SavedAt, State, TimerState};
pub use self::timer::{Armed, Deadline, LEAST_PERIOD_NS, tick_ns};
use vmtime::Now;

use self::vectors::{FIRST_LEGAL, Vectors, class, processor_priority};

/// SVR bit 8.
const SOFTWARE_ENABLE: u32 = 1 << 8;

/// What CPUID tells the guest about its APIC, and what reset needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The (x2)APIC ID. The xAPIC shows its low 8 bits.
    pub id: u32,
    /// Whether reset makes this the bootstrap processor.
    pub bsp: bool,
    /// CPUID.1:ECX.x2APIC.
    pub x2apic: bool,
    /// CPUID.1:ECX.TSC-Deadline: IA32_TSC_DEADLINE exists.
    pub tsc_deadline: bool,
    /// [`guest_abi::ns_deadline::FEATURE_NS_DEADLINE`]: the nanosecond deadline MSR exists.
    pub ns_deadline: bool,
    /// CPUID.80000008H:EAX bits 7:0, the physical address width. IA32_APIC_BASE takes no address with more bits, and
    /// never one with more than [`MOST_PHYSICAL_BITS`].
    pub physical_bits: u8,
}

impl Config {
    /// Whether LVTT has deadline mode, which either MSR needs.
    const fn has_deadline_mode(&self) -> bool {
        self.tsc_deadline || self.ns_deadline
    }
}

/// The RDMSR or WRMSR raises #GP(0); no register changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the MSR access raises #GP(0)")]
pub struct MsrFault;

/// What a write did that is not inside the APIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// A level-triggered interrupt with this vector ended: tell the I/O APICs.
    pub eoi: Option<u8>,
    /// A message that was not delivered here. Find the CPUs that it is for, the sender perhaps among them, with
    /// [`Route::addressed_by`], for [`DeliveryMode::LowestPriority`] the one of them that [`lowest_priority`] chooses,
    /// and give it to their [`LocalApic::deliver`].
    pub ipi: Option<Ipi>,
    /// IA32_APIC_BASE changed: ask [`LocalApic::mmio_base`] again.
    pub base_changed: bool,
    /// [`LocalApic::route`] gives another answer than before the access, its priority aside. [`LocalApic::init`] and
    /// [`LocalApic::reset`] can change it too.
    pub route_changed: bool,
    /// The write armed or disarmed the timer: what it waited for then. It may have been due at once, and is over.
    pub timer: Option<Armed>,
}

/// A fixed interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// The vector.
    pub vector: u8,
    /// Level-triggered: its EOI is broadcast.
    pub level: bool,
}

/// A local APIC. See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApic {
    config: Config,
    base: base::Base,
    /// What the guest wrote there, if it is not the configured one; always nothing in x2APIC mode.
    xapic_id: Option<u8>,
    tpr: u8,
    /// As the xAPIC page has it; in x2APIC mode LDR follows from the ID.
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: Vectors,
    tmr: Vectors,
    irr: Vectors,
    /// ESR as it reads.
    esr: u32,
    /// Errors since the last write of ESR.
    errors: u32,
    /// The xAPIC's two registers, or the x2APIC's one.
    icr: u64,
    lvt: lvt::Lvt,
    timer: timer::Timer,
    pins: delivery::Pins,
}

impl LocalApic {
    /// An APIC after reset: enabled by IA32_APIC_BASE in xAPIC mode, disabled by SVR.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self::from_checked(&State::reset(&config), base::Base::reset(config.bsp), config)
    }

    /// As PC firmware leaves the first CPU's APIC, in virtual wire mode (Intel, "MultiProcessor Specification", section
    /// 3.6.2.2): enabled by SVR, LINT0 passing on the 8259's interrupts, LINT1 the NMI.
    #[must_use]
    pub fn in_virtual_wire_mode(mut self) -> Self {
        self.svr |= SOFTWARE_ENABLE;
        self.lvt.write(registers::LvtKind::Lint0, lvt::EXTINT, true);
        self.lvt.write(registers::LvtKind::Lint1, lvt::NMI, true);
        self
    }

    /// What CPUID offers.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub const fn apic_base(&self) -> u64 {
        self.base.bits()
    }

    /// The guest physical address of the xAPIC page, while there is one: enabled, and not in x2APIC mode.
    #[must_use]
    pub fn mmio_base(&self) -> Option<u64> {
        (self.base.mode() == Mode::XApic).then(|| self.base.address())
    }

    /// Evaluates the timer up to `now`: what is due interrupts, unless its LVT entry is masked; then it expires
    /// silently. Software disable masks every entry, so that it needs no rule of its own.
    ///
    /// Periods that passed unnoticed count as one expiry, and the phase is kept. A `now` before an earlier one
    /// expires nothing.
    ///
    /// Says whether the timer expired and asked for its interrupt.
    pub fn advance(&mut self, now: Now) -> bool {
        let lvtt = self.lvt.timer;
        let interrupts = self.timer.expire(lvtt.timer_mode(), now) && !lvtt.masked();
        if interrupts {
            let _ = self.take(lvtt.vector(), false);
        }
        interrupts
    }

    /// The vector in the timer's LVT entry.
    #[must_use]
    pub const fn timer_vector(&self) -> u8 {
        self.lvt.timer.vector()
    }

    /// Whether LVTT selects deadline mode.
    #[must_use]
    pub fn in_deadline_mode(&self) -> bool {
        self.lvt.timer.timer_mode() == timer::Mode::Deadline
    }

    /// A guest's write moves this CPU's TSC: at one instant it read what `before` says, and now reads what `after`
    /// says.
    ///
    /// A deadline in TSC ticks is absolute, so that it is now due at another instant, perhaps at once (SDM vol. 3,
    /// "TSC-Deadline Mode": it is compared with the TSC).
    pub fn move_tsc(&mut self, before: Now, after: Now) {
        self.advance(before);
        self.timer.tsc_moved(after);
        self.advance(after);
    }

    /// The next instant at which the timer expires, also when its LVT entry is masked.
    ///
    /// One-shot counts and deadlines may follow each other as fast as the guest arms them: a VMM that waits in real
    /// time must limit how often it wakes.
    #[must_use]
    pub const fn next_deadline(&self) -> Option<Deadline> {
        self.timer.next_deadline()
    }

    /// [`next_deadline`](Self::next_deadline) if its interrupt could enter a halted CPU as things stand: the LVT entry
    /// is unmasked with a legal vector, the APIC is enabled, and the vector's class is above the processor priority's.
    #[must_use]
    pub fn next_wake(&self) -> Option<Deadline> {
        self.next_wake_above(self.ppr())
    }

    /// As [`next_wake`](Self::next_wake), were the highest interrupt in service over.
    #[must_use]
    pub fn next_wake_after_end(&self) -> Option<Deadline> {
        let mut isr = self.isr;
        if let Some(vector) = isr.highest() {
            isr.set(vector, false);
        }
        self.next_wake_above(processor_priority(self.tpr, &isr))
    }

    fn next_wake_above(&self, priority: u8) -> Option<Deadline> {
        let lvtt = self.lvt.timer;
        // Either way of disabling the APIC masks the entry.
        let delivers = !lvtt.masked() && lvtt.has_legal_vector();
        self.next_deadline().filter(|_| delivers && class(lvtt.vector()) > class(priority))
    }

    /// A fixed interrupt arrives from outside (SDM vol. 3, "Interrupt Acceptance for Fixed Interrupts").
    ///
    /// Dropped while the APIC is disabled, by IA32_APIC_BASE or by SVR. A vector below 16 is logged in ESR instead.
    pub fn accept(&mut self, interrupt: Interrupt) {
        let Interrupt { vector, level } = interrupt;
        if self.accepts() {
            let _ = self.take(vector, level);
        }
    }

    /// The vector to inject: the highest requested one, if its class is above the processor priority's.
    ///
    /// Software disable does not withhold it: "Local APIC State After It Has Been Software Disabled" says that what IRR
    /// and ISR hold stays there and is for the CPU to handle. Global disable empties both.
    #[must_use]
    pub fn pending(&self) -> Option<u8> {
        self.requested().filter(|vector| class(*vector) > class(self.ppr()))
    }

    /// Whether an interrupt is requested and the processor priority holds it back.
    #[must_use]
    pub fn blocked_by_priority(&self) -> bool {
        self.requested().is_some() && self.pending().is_none()
    }

    /// Whether an interrupt is requested and TPR alone holds it back: not one in service, whose EOI the VMM sees, while
    /// most CPUs change TPR without an exit.
    #[must_use]
    pub fn blocked_by_tpr(&self) -> bool {
        let in_service = class(self.isr.highest().unwrap_or(0));
        self.requested().map(class).is_some_and(|class_of_it| class_of_it > in_service) && self.pending().is_none()
    }

    /// The CPU took `vector`: from IRR to ISR. Nothing happens if it was not requested.
    pub fn acknowledge(&mut self, vector: u8) {
        if self.irr.contains(vector) {
            self.irr.set(vector, false);
            self.isr.set(vector, true);
        }
    }

    fn requested(&self) -> Option<u8> {
        self.irr.highest().filter(|_| self.base.mode() != Mode::Disabled)
    }

    /// Requests a vector, or logs that it is illegal, which can request the error interrupt's.
    fn take(&mut self, vector: u8, level: bool) -> Delivery {
        if vector < FIRST_LEGAL { self.log_error(errors::RECEIVE_ILLEGAL_VECTOR) } else { self.request(vector, level) }
    }

    /// Puts a legal vector into IRR.
    fn request(&mut self, vector: u8, level: bool) -> Delivery {
        self.irr.set(vector, true);
        self.tmr.set(vector, level);
        Delivery::Accepted
    }

    fn ppr(&self) -> u8 {
        processor_priority(self.tpr, &self.isr)
    }

    const fn software_enabled(&self) -> bool {
        self.svr & SOFTWARE_ENABLE != 0
    }

    /// Whether fixed interrupts are taken at all.
    fn accepts(&self) -> bool {
        self.software_enabled() && self.base.mode() != Mode::Disabled
    }
}
