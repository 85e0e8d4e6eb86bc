//! The machine's features by CPUID. They are read once, at boot: every CPUID is an exit.

use guest_abi::{ns_deadline, pv_eoi, pvclock, steal_time, vmclock};

/// EAX, EBX, ECX, EDX of one CPUID leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl Leaf {
    /// Whether EBX, ECX, EDX spell `signature`.
    fn is(&self, signature: &[u8; 12]) -> bool {
        let words = [self.ebx, self.ecx, self.edx];
        signature.chunks_exact(4).zip(words).all(|(text, word)| text == word.to_le_bytes())
    }
}

/// The MSRs of kvmclock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmClock {
    /// Takes the address of the time page.
    pub system_time_msr: u32,
    /// Takes the address of the wall clock.
    pub wall_clock_msr: u32,
}

impl KvmClock {
    /// Feature bit 3.
    pub const NEW: Self =
        Self { system_time_msr: pvclock::MSR_SYSTEM_TIME_NEW, wall_clock_msr: pvclock::MSR_WALL_CLOCK_NEW };
    /// Feature bit 0.
    pub const OLD: Self =
        Self { system_time_msr: pvclock::MSR_SYSTEM_TIME_OLD, wall_clock_msr: pvclock::MSR_WALL_CLOCK_OLD };
}

/// A TSC frequency in kHz, and its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TscKhz {
    /// CPUID 0x40000010: stated by the hypervisor.
    Hypervisor(u64),
    /// CPUID 0x15: crystal frequency and ratio.
    Crystal(u64),
}

/// The features that this kernel uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// CPUID.1:ECX\[21\].
    pub x2apic: bool,
    /// CPUID.1:ECX\[24\].
    pub tsc_deadline: bool,
    /// kvmclock, if the hypervisor offers it.
    pub kvmclock: Option<KvmClock>,
    /// KVM's paravirtual EOI.
    pub pv_eoi: bool,
    /// KVM's steal time.
    pub steal_time: bool,
    /// The nanosecond deadline MSR, if the hypervisor offers it.
    pub ns_msr: Option<u32>,
    /// Guest physical address of the VMClock page, if the hypervisor tells of one.
    pub vmclock: Option<u64>,
    /// The TSC frequency, if CPUID states it.
    pub tsc_khz: Option<TscKhz>,
    /// The frequency of the LAPIC timer in kHz, if CPUID states it.
    pub bus_khz: Option<u32>,
}

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const CRYSTAL_LEAF: u32 = 0x15;
/// Hypervisors put their signatures at multiples of 0x100 from here.
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const HYPERVISOR_STEP: usize = 0x100;
/// Linux tries 256 bases. KVM uses the first or, behind Hyper-V's, the second; this project's is the second. Sixteen
/// leave room and keep boot short where a signature is not found.
const HYPERVISOR_END: u32 = HYPERVISOR_BASE + 0x1000;
/// What KVM's timer counts at: one cycle a nanosecond (Linux `APIC_BUS_CYCLE_NS`).
pub const KVM_BUS_KHZ: u32 = 1_000_000;

impl Platform {
    /// Reads the features with `cpuid(leaf)`, which returns subleaf 0.
    pub fn probe(mut cpuid: impl FnMut(u32) -> Leaf) -> Self {
        let max = cpuid(0).eax;
        let ecx = cpuid(1).ecx;
        let mut found =
            Self { x2apic: ecx & ECX_X2APIC != 0, tsc_deadline: ecx & ECX_TSC_DEADLINE != 0, ..Self::default() };
        if ecx & ECX_HYPERVISOR != 0 {
            found.probe_hypervisor(&mut cpuid);
        }
        if found.tsc_khz.is_none() && max >= CRYSTAL_LEAF {
            found.tsc_khz = crystal_khz(&cpuid(CRYSTAL_LEAF)).map(TscKhz::Crystal);
        }
        found
    }

    fn probe_hypervisor(&mut self, cpuid: &mut impl FnMut(u32) -> Leaf) {
        for base in (HYPERVISOR_BASE..HYPERVISOR_END).step_by(HYPERVISOR_STEP) {
            let leaf = cpuid(base);
            if leaf.is(&pvclock::CPUID_SIGNATURE) && self.kvmclock.is_none() {
                let features = cpuid(base + (pvclock::CPUID_FEATURES_LEAF - pvclock::CPUID_LEAF)).eax;
                self.pv_eoi = features & pv_eoi::FEATURE != 0;
                self.steal_time = features & steal_time::FEATURE != 0;
                self.kvmclock = if features & pvclock::FEATURE_CLOCKSOURCE2 != 0 {
                    Some(KvmClock::NEW)
                } else {
                    (features & pvclock::FEATURE_CLOCKSOURCE != 0).then_some(KvmClock::OLD)
                };
            }
            if leaf.is(&ns_deadline::CPUID_SIGNATURE) && self.ns_msr.is_none() && self.vmclock.is_none() {
                let features = cpuid(base + (ns_deadline::CPUID_FEATURES_LEAF - ns_deadline::CPUID_LEAF));
                self.ns_msr = (features.eax & ns_deadline::FEATURE_NS_DEADLINE != 0).then_some(features.ebx);
                let page = u64::from(features.edx) << 32 | u64::from(features.ecx);
                self.vmclock = (features.eax & vmclock::FEATURE != 0).then_some(page);
            }
            // The timing leaf is in the first range, also if that is not KVM's.
            if base == HYPERVISOR_BASE && leaf.eax >= pvclock::CPUID_TIMING_LEAF {
                let timing = cpuid(pvclock::CPUID_TIMING_LEAF);
                self.tsc_khz = (timing.eax != 0).then_some(TscKhz::Hypervisor(u64::from(timing.eax)));
                self.bus_khz = (timing.ebx != 0).then_some(timing.ebx);
            }
            if self.kvmclock.is_some() && self.ns_msr.is_some() {
                break;
            }
        }
    }
}

/// CPUID 0x15: crystal Hz (ECX) × numerator (EBX) / denominator (EAX), if all three are stated.
fn crystal_khz(leaf: &Leaf) -> Option<u64> {
    let hz = (u64::from(leaf.ecx) * u64::from(leaf.ebx)).checked_div(u64::from(leaf.eax))?;
    (hz >= 1_000).then_some(hz / 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(max: u32, text: [u8; 12]) -> Leaf {
        let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
        Leaf { eax: max, ebx: word(0), ecx: word(4), edx: word(8) }
    }

    fn leaf(eax: u32, ebx: u32, ecx: u32, edx: u32) -> Leaf {
        Leaf { eax, ebx, ecx, edx }
    }

    #[test]
    fn bare_metal_has_nothing_of_a_hypervisor() {
        let p = Platform::probe(|n| if n == 1 { leaf(0, 0, ECX_X2APIC, 0) } else { Leaf::default() });
        assert_eq!(p, Platform { x2apic: true, ..Platform::default() });
    }

    #[test]
    fn this_projects_vmm_offers_everything() {
        let p = Platform::probe(|n| match n {
            1 => leaf(0, 0, ECX_HYPERVISOR | ECX_TSC_DEADLINE, 0),
            0x4000_0000 => signature(0x4000_0010, pvclock::CPUID_SIGNATURE),
            0x4000_0001 => leaf(0x69, 0, 0, 0),
            0x4000_0010 => leaf(2_600_000, 999_999, 0, 0),
            0x4000_0100 => signature(0x4000_0101, ns_deadline::CPUID_SIGNATURE),
            0x4000_0101 => leaf(3, 0x1234, 0xd_0000, 1),
            n if n > 0x4000_0101 => panic!("looked on after everything was found: {n:#x}"),
            _ => Leaf::default(),
        });
        let want = Platform {
            x2apic: false,
            tsc_deadline: true,
            kvmclock: Some(KvmClock::NEW),
            pv_eoi: true,
            steal_time: true,
            ns_msr: Some(0x1234),
            vmclock: Some(0x1_000d_0000),
            tsc_khz: Some(TscKhz::Hypervisor(2_600_000)),
            bus_khz: Some(999_999),
        };
        assert_eq!(p, want);
    }

    #[test]
    fn kvm_behind_another_signature_with_the_old_msrs() {
        let p = Platform::probe(|n| match n {
            0 => leaf(0x16, 0, 0, 0),
            1 => leaf(0, 0, ECX_HYPERVISOR, 0),
            0x15 => leaf(2, 208, 25_000_000, 0),
            0x4000_0000 => signature(0x4000_0006, *b"Microsoft Hv"),
            0x4000_0100 => signature(0x4000_0101, pvclock::CPUID_SIGNATURE),
            0x4000_0101 => leaf(1, 0, 0, 0),
            _ => Leaf::default(),
        });
        assert_eq!(p.kvmclock, Some(KvmClock::OLD));
        assert_eq!(p.tsc_khz, Some(TscKhz::Crystal(2_600_000)));
        assert_eq!((p.ns_msr, p.bus_khz, p.pv_eoi, p.steal_time), (None, None, false, false));
    }

    #[test]
    fn an_incomplete_crystal_leaf_states_no_frequency() {
        assert_eq!(crystal_khz(&leaf(2, 208, 0, 0)), None);
        assert_eq!(crystal_khz(&leaf(0, 208, 25_000_000, 0)), None);
    }
}
