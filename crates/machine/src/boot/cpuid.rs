//! The guest's CPUID leaves.
//!
//! They begin as what this host's KVM supports. Everything that `vmm` would have to emulate and does not (KVM's
//! asynchronous page faults, steal time, paravirtual IPIs, …) is removed. Then what `vmm` does provide is added: the
//! local APIC's features, kvmclock, the nanosecond deadline, and the frequencies.
//!
//! The frequencies are those at boot, and stay so after a migration: CPUID does not change under a running guest. That
//! is why a guest that reads its TSC frequency once goes wrong. The new frequency is in the pvclock page only.

use guest_abi::{ns_deadline, pv_eoi, pvclock, steal_time, vmclock};
use vmtime::Khz;

use crate::x86::Leaf;

/// The features that depend on how this VM is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// x2APIC mode.
    pub x2apic: bool,
    /// The LAPIC timer's TSC-deadline mode.
    pub tsc_deadline: bool,
    /// The nanosecond deadline MSR.
    pub ns_deadline: bool,
    /// Paravirtual EOI.
    pub pv_eoi: bool,
    /// Steal time.
    pub steal_time: bool,
    /// The VMClock page.
    pub vmclock: bool,
    /// IA32_TSC_ADJUST; needs a TSC whose offset can be changed.
    pub tsc_adjust: bool,
    /// The TSC frequency at boot.
    pub tsc_khz: Khz,
    /// Number of vCPUs.
    pub cpus: u32,
}

/// Leaf 1 ECX.
const ECX_MONITOR: u32 = 1 << 3;
const ECX_VMX: u32 = 1 << 5;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX.
const EDX_APIC: u32 = 1 << 9;
/// Leaf 7 EBX.
const EBX_TSC_ADJUST: u32 = 1 << 1;
/// Leaf 0x80000001 ECX: SVM; EDX: RDTSCP, which trap sites do not cover.
const EXT_ECX_SVM: u32 = 1 << 2;
const EXT_EDX_RDTSCP: u32 = 1 << 27;
/// Leaf 6 EAX bit 2: the LAPIC timer runs in deep C-states.
const EAX_ARAT: u32 = 1 << 2;
/// Leaf 0x80000007 EDX bit 8: the TSC's rate does not change (while the guest stays on one host).
const EDX_INVARIANT_TSC: u32 = 1 << 8;
/// The LAPIC timer's bus frequency: 1 GHz, so that one cycle is one nanosecond of VM time.
const BUS_KHZ: u32 = 1_000_000;
/// The last basic leaf that [`stated`] adds.
const MAX_BASIC_LEAF: u32 = 0x16;

/// The leaves that vCPU number `apic_id` sees.
#[must_use]
pub fn leaves(supported: &[Leaf], offer: &Offer, apic_id: u32) -> Vec<Leaf> {
    let mut leaves: Vec<Leaf> = supported
        .iter()
        .copied()
        // Hypervisor, frequency and topology leaves are replaced by ours in `stated`; leaf 0xa (performance counters)
        // and 0x12 (SGX) would offer features whose state we do not save.
        .filter(|leaf| !matches!(leaf.function, 0x4000_0000..=0x4fff_ffff | 0xa | 0xb | 0x12 | 0x15 | 0x16 | 0x1f))
        .collect();
    for leaf in &mut leaves {
        edit(leaf, offer, apic_id);
    }
    leaves.extend(stated(offer, apic_id));
    leaves
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

fn edit(leaf: &mut Leaf, offer: &Offer, apic_id: u32) {
    match leaf.function {
        0 => leaf.eax = leaf.eax.max(MAX_BASIC_LEAF),
        1 => {
            set(&mut leaf.ecx, ECX_MONITOR | ECX_VMX, false);
            set(&mut leaf.ecx, ECX_X2APIC, offer.x2apic);
            set(&mut leaf.ecx, ECX_TSC_DEADLINE, offer.tsc_deadline);
            set(&mut leaf.ecx, ECX_HYPERVISOR, true);
            set(&mut leaf.edx, EDX_APIC, true);
            // Bits 31:24 initial APIC id, 23:16 logical processors.
            leaf.ebx = (leaf.ebx & 0xffff) | (apic_id & 0xff) << 24 | (offer.cpus & 0xff) << 16;
        }
        6 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (EAX_ARAT, 0, 0, 0),
        7 if leaf.index == 0 => set(&mut leaf.ebx, EBX_TSC_ADJUST, offer.tsc_adjust),
        0x8000_0001 => {
            set(&mut leaf.ecx, EXT_ECX_SVM, false);
            set(&mut leaf.edx, EXT_EDX_RDTSCP, false);
        }
        0x8000_0007 => set(&mut leaf.edx, EDX_INVARIANT_TSC, true),
        _ => {}
    }
}

/// The physical address width in `leaves`, in bits; 36 if there is no such leaf (SDM vol. 2, "CPUID").
#[must_use]
pub fn physical_bits(leaves: &[Leaf]) -> u8 {
    let leaf = leaves.iter().find(|leaf| leaf.function == 0x8000_0008);
    leaf.map_or(36, |leaf| leaf.eax.to_le_bytes()[0])
}

/// Whether `leaves` offer IA32_TSC_ADJUST.
#[must_use]
pub fn has_tsc_adjust(leaves: &[Leaf]) -> bool {
    leaves.iter().any(|leaf| leaf.function == 7 && leaf.index == 0 && leaf.ebx & EBX_TSC_ADJUST != 0)
}

/// Whether `leaves` offer KVM's steal time. Those of a guest that an older build booted do not.
#[must_use]
pub fn has_steal_time(leaves: &[Leaf]) -> bool {
    let features = leaves.iter().find(|leaf| leaf.function == pvclock::CPUID_FEATURES_LEAF);
    features.is_some_and(|leaf| leaf.eax & steal_time::FEATURE != 0)
}

/// Guest physical address of the VMClock page that `leaves` tell of, if they do.
#[must_use]
pub fn vmclock_address(leaves: &[Leaf]) -> Option<u64> {
    let features = leaves.iter().find(|leaf| leaf.function == ns_deadline::CPUID_FEATURES_LEAF)?;
    (features.eax & vmclock::FEATURE != 0).then(|| u64::from(features.edx) << 32 | u64::from(features.ecx))
}

/// Checks that the leaves of all vCPUs tell of the same VMClock page, at [`super::acpi::VMCLOCK`], or of none.
///
/// # Errors
/// The reason why there cannot be such a page.
pub fn check_vmclock(cpus: &[Vec<Leaf>]) -> Result<(), String> {
    let mut told = cpus.iter().map(|leaves| vmclock_address(leaves));
    let first = told.next().flatten();
    if let Some(other) = told.find(|other| *other != first) {
        return Err(format!("the CPUID of its vCPUs tells of different VMClock pages: {first:x?} and {other:x?}"));
    }
    match first {
        Some(address) if address != u64::from(super::acpi::VMCLOCK) => Err(format!(
            "CPUID tells of a VMClock page at {address:#x}, and it can only be at {:#x}",
            super::acpi::VMCLOCK
        )),
        _ => Ok(()),
    }
}

/// The leaves that `vmm` itself provides.
fn stated(offer: &Offer, apic_id: u32) -> Vec<Leaf> {
    let plain = |function, eax, ebx, ecx, edx| Leaf { function, index: 0, indexed: false, eax, ebx, ecx, edx };
    let signed = |function, last, signature: [u8; 12]| {
        let mut words = signature.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
        let mut word = || words.next().unwrap_or(0);
        plain(function, last, word(), word(), word())
    };
    let mut features =
        pvclock::FEATURE_CLOCKSOURCE | pvclock::FEATURE_CLOCKSOURCE2 | pvclock::FEATURE_CLOCKSOURCE_STABLE;
    set(&mut features, pv_eoi::FEATURE, offer.pv_eoi);
    set(&mut features, steal_time::FEATURE, offer.steal_time);
    let khz = offer.tsc_khz.get();
    let mhz = khz / 1000;
    let mut leaves = vec![
        // Extended topology: one thread per core, `cpus` cores.
        Leaf { function: 0xb, index: 0, indexed: true, eax: 0, ebx: 1, ecx: 0x100, edx: apic_id },
        Leaf { function: 0xb, index: 1, indexed: true, eax: 8, ebx: offer.cpus, ecx: 0x201, edx: apic_id },
        // TSC Hz = ECX * EBX / EAX. ECX, the crystal's frequency, is that of the LAPIC timer: Linux assumes so.
        plain(0x15, 1_000_000, khz, 1_000_000_000, 0),
        plain(0x16, mhz, mhz, 100, 0),
        signed(pvclock::CPUID_LEAF, pvclock::CPUID_TIMING_LEAF, pvclock::CPUID_SIGNATURE),
        plain(pvclock::CPUID_FEATURES_LEAF, features, 0, 0, 0),
        plain(pvclock::CPUID_TIMING_LEAF, khz, BUS_KHZ, 0, 0),
    ];
    if offer.ns_deadline || offer.vmclock {
        let (mut features, mut msr, mut page) = (0, 0, 0);
        if offer.ns_deadline {
            (features, msr) = (ns_deadline::FEATURE_NS_DEADLINE, ns_deadline::MSR);
        }
        if offer.vmclock {
            (features, page) = (features | vmclock::FEATURE, super::acpi::VMCLOCK);
        }
        leaves.push(signed(ns_deadline::CPUID_LEAF, ns_deadline::CPUID_FEATURES_LEAF, ns_deadline::CPUID_SIGNATURE));
        leaves.push(plain(ns_deadline::CPUID_FEATURES_LEAF, features, msr, page, 0));
    }
    leaves
}

/// Reduces a host's leaves (`has`) to the bits that [`missing`] compares.
#[must_use]
pub fn compared(has: &[Leaf]) -> Vec<Leaf> {
    let only = |leaf: &Leaf| {
        let mask = |register| super::cpuid_names::host_feature_mask(leaf.function, leaf.index, register);
        let (eax, ebx) = (leaf.eax & mask("EAX"), leaf.ebx & mask("EBX"));
        Leaf { eax, ebx, ecx: leaf.ecx & mask("ECX"), edx: leaf.edx & mask("EDX"), ..*leaf }
    };
    has.iter().map(only).filter(|leaf| leaf.eax | leaf.ebx | leaf.ecx | leaf.edx != 0).collect()
}

/// Names the features that the guest saw (`saw`) and this host (`has`) lacks.
///
/// Only leaves made of feature bits are compared, and only bits that come from the host.
#[must_use]
pub fn missing(saw: &[Leaf], has: &[Leaf]) -> Vec<String> {
    let mut names = Vec::new();
    for leaf in saw {
        let here = has.iter().find(|l| l.function == leaf.function && l.index == leaf.index);
        let (eax, ebx, ecx, edx) = here.map_or((0, 0, 0, 0), |l| (l.eax, l.ebx, l.ecx, l.edx));
        for (register, saw, has) in
            [("EAX", leaf.eax, eax), ("EBX", leaf.ebx, ebx), ("ECX", leaf.ecx, ecx), ("EDX", leaf.edx, edx)]
        {
            let compared = super::cpuid_names::host_feature_mask(leaf.function, leaf.index, register);
            let lacking = saw & !has & compared;
            names.extend(
                (0..32)
                    .filter(|bit| lacking & 1 << bit != 0)
                    .map(|bit| super::cpuid_names::name(leaf.function, leaf.index, register, bit)),
            );
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> Offer {
        Offer {
            x2apic: true,
            tsc_deadline: true,
            ns_deadline: true,
            pv_eoi: true,
            steal_time: true,
            vmclock: false,
            tsc_adjust: false,
            tsc_khz: Khz::new(2_600_000).unwrap(),
            cpus: 1,
        }
    }

    fn plain(function: u32) -> Leaf {
        Leaf { function, index: 0, indexed: false, eax: 0xffff_ffff, ebx: !0, ecx: !0, edx: !0 }
    }

    fn find(leaves: &[Leaf], function: u32) -> Leaf {
        *leaves.iter().find(|l| l.function == function).unwrap()
    }

    #[test]
    fn offers_no_paravirtual_feature_that_we_do_not_emulate() {
        let leaves = leaves(&[plain(1), plain(0x4000_0000), plain(0x4000_0001)], &offer(), 0);
        assert_eq!(find(&leaves, 0x4000_0001).eax, 1 << 0 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 24);
        assert_eq!(leaves.iter().filter(|l| l.function == 0x4000_0001).count(), 1);
    }

    #[test]
    fn states_one_frequency_in_every_leaf() {
        let leaves = leaves(&[], &offer(), 0);
        let crystal = find(&leaves, 0x15);
        assert_eq!(u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax), 2_600_000_000);
        assert_eq!(find(&leaves, 0x4000_0010).eax, 2_600_000);
        assert_eq!(find(&leaves, 0x16).eax, 2600);
    }

    #[test]
    fn withheld_features_are_off_even_if_the_host_has_them() {
        let off = Offer {
            x2apic: false,
            tsc_deadline: false,
            ns_deadline: false,
            pv_eoi: false,
            steal_time: false,
            ..offer()
        };
        let leaves = leaves(&[plain(1), plain(7)], &off, 0);
        assert_eq!(find(&leaves, 1).ecx & (1 << 21 | 1 << 24), 0);
        assert_eq!(find(&leaves, 7).ebx & 2, 0);
        assert_eq!(find(&leaves, 0x4000_0001).eax & (1 << 5 | 1 << 6), 0);
        assert!(!has_steal_time(&leaves));
        assert_eq!(vmclock_address(&leaves), None);
        assert!(leaves.iter().all(|l| l.function != ns_deadline::CPUID_LEAF));
    }

    // Catches: a VMClock page that a guest of KVM's LAPIC does not find, or one that is told of and not there.
    #[test]
    fn vmclock_is_found_with_and_without_the_nanosecond_deadline() {
        for ns_deadline in [false, true] {
            for vmclock in [false, true] {
                let leaves = leaves(&[], &Offer { ns_deadline, vmclock, ..offer() }, 0);
                assert_eq!(vmclock_address(&leaves), vmclock.then_some(0xd_0000));
                let features = leaves.iter().find(|leaf| leaf.function == ns_deadline::CPUID_FEATURES_LEAF);
                let has_msr = features.is_some_and(|leaf| leaf.eax & 1 != 0 && leaf.ebx == ns_deadline::MSR);
                assert_eq!((features.is_some(), has_msr), (ns_deadline || vmclock, ns_deadline));
            }
        }
    }

    // Catches: a page that a snapshot puts where no RAM is, or where another vCPU does not look.
    #[test]
    fn a_vmclock_page_is_where_this_vmm_puts_it_or_nowhere() {
        let with = |vmclock| leaves(&[], &Offer { vmclock, ..offer() }, 0);
        assert_eq!(check_vmclock(&[with(false), with(false)]), Ok(()));
        assert_eq!(check_vmclock(&[with(true), with(true)]), Ok(()));
        assert!(check_vmclock(&[with(true), with(false)]).unwrap_err().contains("different VMClock pages"));
        let mut moved = with(true);
        moved.iter_mut().filter(|leaf| leaf.function == ns_deadline::CPUID_FEATURES_LEAF).for_each(|leaf| leaf.edx = 1);
        assert!(check_vmclock(&[moved]).unwrap_err().contains("at 0x1000d0000, and it can only be at 0xd0000"));
    }

    #[test]
    fn a_missing_feature_is_named() {
        let avx = Leaf { ecx: 1 << 28, eax: 0, ebx: 0, edx: 0, ..plain(1) };
        let none = Leaf { ecx: 0, ..avx };
        assert_eq!(missing(&[avx], &[none]), ["avx (CPUID.1:ECX[28])"]);
        assert!(missing(&[avx], &[avx]).is_empty());
        // Features that the VMM emulates need no support of the host.
        let x2apic = Leaf { ecx: 1 << 21 | 1 << 24 | 1 << 31, ..none };
        assert!(missing(&[x2apic], &[none]).is_empty());
    }
}
