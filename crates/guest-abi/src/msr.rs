//! Numbers of x86 model-specific registers (SDM vol. 4, "Model-Specific Registers (MSRs)").
//!
//! KVM's own are with their layouts: [`crate::pvclock`], [`crate::pv_eoi`]. So is [`crate::ns_deadline::MSR`].

/// IA32_TIME_STAMP_COUNTER.
pub const IA32_TSC: u32 = 0x10;
/// IA32_APIC_BASE.
pub const IA32_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_ADJUST.
pub const IA32_TSC_ADJUST: u32 = 0x3b;
/// IA32_TSC_DEADLINE.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_XSS: the supervisor components that XSAVES and XRSTORS manage.
pub const IA32_XSS: u32 = 0xda0;
/// IA32_STAR: the segments that SYSCALL and SYSRET load.
pub const IA32_STAR: u32 = 0xc000_0081;
/// IA32_LSTAR: where SYSCALL goes in 64-bit mode.
pub const IA32_LSTAR: u32 = 0xc000_0082;
/// IA32_FMASK: the flags that SYSCALL clears.
pub const IA32_FMASK: u32 = 0xc000_0084;
/// The x2APIC's registers. [`crate::lapic::x2apic_msr`] says which is which.
pub const X2APIC: MsrRange = MsrRange::new(0x800, 0x8ff);
/// KVM's paravirtual interfaces (Linux `Documentation/virt/kvm/x86/msr.rst`: the range that is reserved for them).
pub const KVM: MsrRange = MsrRange::new(0x4b56_4d00, 0x4b56_4dff);
/// Hyper-V's synthetic MSRs.
pub const HYPER_V: MsrRange = MsrRange::new(0x4000_0000, 0x4000_ffff);

/// MSRs with adjacent numbers, one at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrRange {
    first: u32,
    last: u32,
}

impl MsrRange {
    /// From `first` to `last`, both included.
    #[must_use]
    pub const fn new(first: u32, last: u32) -> Self {
        assert!(first <= last);
        Self { first, last }
    }

    /// One MSR.
    #[must_use]
    pub const fn one(index: u32) -> Self {
        Self::new(index, index)
    }

    /// The lowest number.
    #[must_use]
    pub const fn first(self) -> u32 {
        self.first
    }

    /// The highest number.
    #[must_use]
    pub const fn last(self) -> u32 {
        self.last
    }

    /// How many there are.
    #[must_use]
    pub const fn count(self) -> u32 {
        (self.last - self.first).saturating_add(1)
    }

    /// Whether `index` is one of them.
    #[must_use]
    pub const fn contains(self, index: u32) -> bool {
        self.first <= index && index <= self.last
    }
}
