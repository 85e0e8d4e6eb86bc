//! The MSRs that the VMM emulates when the LAPICs are its own. They must be neither read from KVM nor written to it.
//! Writing a kvmclock MSR would make KVM write the guest's kvmclock page, too; and KVM may change a TSC that is
//! written, to synchronise it with other vCPUs.

use guest_abi::{
    msr::{self, IA32_TSC, IA32_TSC_ADJUST, MsrRange},
    pvclock::MSR_SYSTEM_TIME_OLD,
};
use vlapic::LocalApic;

/// All of them, as ranges that do not overlap: the TSC's, kvmclock's, KVM's other paravirtual ones, the LAPIC's.
pub fn emulated_msrs() -> impl Iterator<Item = MsrRange> {
    // kvmclock's old pair follows IA32_TSC. KVM must answer none of its paravirtual MSRs, offered to the guest or not.
    [MsrRange::new(IA32_TSC, MSR_SYSTEM_TIME_OLD), MsrRange::one(IA32_TSC_ADJUST), msr::KVM]
        .into_iter()
        .chain(LocalApic::MSRS)
}

/// Whether the VMM emulates this MSR.
#[must_use]
pub fn emulates_msr(index: u32) -> bool {
    emulated_msrs().any(|range| range.contains(index))
}

#[cfg(test)]
mod tests {
    use guest_abi::{lapic, ns_deadline, pv_eoi, pvclock};

    use super::*;

    #[test]
    fn every_interface_that_the_guest_is_offered_is_emulated() {
        let clock = [pvclock::MSR_WALL_CLOCK_OLD, MSR_SYSTEM_TIME_OLD, pvclock::MSR_WALL_CLOCK_NEW];
        let rest = [pvclock::MSR_SYSTEM_TIME_NEW, pv_eoi::MSR, ns_deadline::MSR, IA32_TSC, IA32_TSC_ADJUST];
        let lapic = [msr::IA32_APIC_BASE, msr::IA32_TSC_DEADLINE, lapic::x2apic_msr(lapic::ID)];
        for index in clock.into_iter().chain(rest).chain(lapic) {
            assert!(emulates_msr(index), "{index:#x}");
        }
    }

    // IA32_PLATFORM_ID, IA32_SPEC_CTRL, IA32_MISC_ENABLE, EFER.
    #[test]
    fn what_kvm_saves_is_not_emulated() {
        assert!([0x17, 0x48, 0x1a0, 0xc000_0080].iter().all(|index| !emulates_msr(*index)));
    }

    // One more range costs KVM a comparison at every MSR exit, and it takes 16.
    #[test]
    fn no_two_ranges_overlap_and_kvm_takes_as_many() {
        let mut ranges: Vec<MsrRange> = emulated_msrs().collect();
        ranges.sort_by_key(|range| range.first());
        assert!(ranges.windows(2).all(|pair| pair[0].last() < pair[1].first()), "{ranges:?}");
        assert!(ranges.len() <= 16);
    }
}
