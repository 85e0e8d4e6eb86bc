//! The formulas, and what each comes to.

use vmtime::Khz;

use super::rates::{self, MultShift};
use crate::study::{
    exact::{drift_ps, nearest},
    rebase::format::Format,
};

/// Parts per million by which KVM lets a guest's frequency differ from the host's without scaling
/// (`tsc_tolerance_ppm`).
const TOLERANCE_PPM: i128 = 250;

/// A formula: its name, what is compared, and where it is from.
#[derive(Clone, Copy, Debug)]
pub struct Formula {
    /// The name on the command line.
    pub name: &'static str,
    /// The clock, and what it is compared with.
    pub what: &'static str,
    /// Where the formula stands.
    pub source: &'static str,
    pub(super) drift: fn(&Case) -> i128,
}

/// What a formula is evaluated for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) over_ns: u64,
    pub(super) khz: Khz,
    pub(super) host: Khz,
}

/// All formulas.
pub const FORMULAS: [Formula; 11] = [
    Formula {
        name: "page",
        what: "kvmclock page, against the TSC's frequency",
        source: "Linux arch/x86/kvm/x86.c, kvm_get_time_scale",
        drift: page,
    },
    Formula {
        name: "khz-deadline",
        what: "timer armed with ns * kHz / 10^6 ticks, by the page; negative: it fires early",
        source: "any VMM or guest that arms its timers by a frequency in kHz",
        drift: page,
    },
    Formula {
        name: "cyc2ns",
        what: "Linux sched_clock on the TSC, against its frequency",
        source: "Linux arch/x86/kernel/tsc.c, __set_cyc2ns_scale",
        drift: |case| mult_shift(case, rates::cyc2ns(case.khz)),
    },
    Formula {
        name: "raw",
        what: "Linux CLOCK_MONOTONIC_RAW on the TSC, against its frequency",
        source: "Linux kernel/time/clocksource.c, __clocksource_update_freq_scale",
        drift: |case| mult_shift(case, rates::clocksource(case.khz)),
    },
    Formula {
        name: "masterclock",
        what: "CLOCK_MONOTONIC_RAW less the page: the step, if KVM makes a new base from it after so long",
        source: "Linux arch/x86/kvm/x86.c, pvclock_update_vm_gtod_copy",
        drift: |case| mult_shift(case, rates::clocksource(case.khz)) - page(case),
    },
    Formula {
        name: "khz",
        what: "anything that knows the TSC's frequency in kHz, if that is half a kHz too high",
        source: "KVM_SET_TSC_KHZ, CPUID 0x40000010, Linux tsc_khz",
        drift: half_khz,
    },
    Formula {
        name: "tolerance",
        what: "guest that trusts its frequency, on a host whose TSC is 250 ppm slower and is not scaled",
        source: "Linux arch/x86/kvm/x86.c, tsc_tolerance_ppm",
        drift: |case| -nearest(i128::from(case.over_ns) * TOLERANCE_PPM, 1000),
    },
    Formula {
        name: "svm-ratio",
        what: "TSC scaled with 32 fraction bits (AMD), against the frequency that was asked for",
        source: "Linux arch/x86/kvm/svm/svm.c, tsc_scaling_ratio_frac_bits",
        drift: |case| ratio(case, 32),
    },
    Formula {
        name: "vmx-ratio",
        what: "TSC scaled with 48 fraction bits (Intel), against the frequency that was asked for",
        source: "Linux arch/x86/kvm/vmx/vmx.c, tsc_scaling_ratio_frac_bits",
        drift: |case| ratio(case, 48),
    },
    Formula {
        name: "scaled-page",
        what: "KVM's page for a scaled TSC (Intel), whose frequency KVM cuts to whole kHz, against the frequency that was \
               asked for",
        source: "Linux arch/x86/kvm/x86.c, kvm_guest_time_update, in kHz",
        drift: scaled_page,
    },
    Formula {
        name: "vmclock",
        what: "VMClock, whose period has 64 bits, against the TSC's frequency",
        source: "Linux include/uapi/linux/vmclock-abi.h, counter_period_frac_sec",
        drift: vmclock,
    },
];

/// Drift of a page for a TSC of `khz` that has `hz`.
fn page_at(over_ns: u64, khz: Khz, hz: u64) -> i128 {
    let format = Format::of_kvm(khz);
    drift_ps(over_ns, hz, format.tick(), format.line_bits())
}

fn page(case: &Case) -> i128 {
    page_at(case.over_ns, case.khz, hz(case.khz))
}

fn hz(khz: Khz) -> u64 {
    u64::from(khz.get()) * 1000
}

/// A clock whose multiplier is for nanoseconds.
fn mult_shift(case: &Case, MultShift { mult, shift }: MultShift) -> i128 {
    drift_ps(case.over_ns, hz(case.khz), u128::from(mult), shift)
}

/// The truth is half a kHz below what is known: 1 / 2,000 of a kHz in `khz` kHz.
fn half_khz(case: &Case) -> i128 {
    -nearest(i128::from(case.over_ns) * 500, i128::from(case.khz.get()))
}

/// A scaled TSC: `−over · dropped / (guest · 2^bits)`.
fn ratio(case: &Case, bits: u32) -> i128 {
    if case.khz == case.host {
        return 0; // Not scaled.
    }
    let (_, dropped) = rates::tsc_ratio(case.khz, case.host, bits);
    let dropped = i128::try_from(dropped).unwrap_or(i128::MAX); // below 2²⁷
    -nearest(i128::from(case.over_ns) * 1000 * dropped, i128::from(case.khz.get()) << bits)
}

/// KVM multiplies the host's kHz by the ratio and drops the fraction: where the ratio was rounded down, that is a kHz.
/// The page is made for that frequency, and then counts ticks of the scaled TSC.
fn scaled_page(case: &Case) -> i128 {
    const BITS: u32 = 48;
    if case.khz == case.host {
        return page(case);
    }
    let (ratio, dropped) = rates::tsc_ratio(case.khz, case.host, BITS);
    let cut = (u128::from(case.host.get()) * ratio) >> BITS;
    // At most the guest's own frequency, and at most 1 kHz less.
    let Ok(cut) = Khz::new(u64::try_from(cut).unwrap_or(u64::MAX)) else { return 0 };
    let page = page_at(case.over_ns, cut, hz(case.khz));
    // (1 + page) · (1 − dropped) − 1: the last term is below a picosecond in a century.
    let dropped = i128::try_from(dropped).unwrap_or(i128::MAX);
    let slow = nearest((i128::from(case.over_ns) * 1000 + page) * dropped, i128::from(case.khz.get()) << BITS);
    page - slow
}

/// `−over · dropped / 2^(64 + shift)`: with a period short by `dropped / hz` units, and `hz` ticks a second.
fn vmclock(case: &Case) -> i128 {
    let (shift, dropped) = rates::vmclock(hz(case.khz));
    // Below 2⁷² · 2³⁷; the divisor is at least 2⁸⁷, but 2^(64 + 36) fits too.
    -nearest(i128::from(case.over_ns) * 1000 * i128::try_from(dropped).unwrap_or(i128::MAX), 1 << (64 + shift))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn khz(khz: u64) -> Khz {
        Khz::new(khz).unwrap()
    }

    proptest! {
        // Catches: a drift that is not what the page's own arithmetic reads after the time: it rounds down once, to
        // a nanosecond.
        #[test]
        fn the_pages_drift_is_what_it_reads(frequency in 1_000_000_u64..6_000_000, days in 1_u32..1000) {
            let case = Case { over_ns: u64::from(days) * 86_400_000_000_000, khz: khz(frequency), host: khz(frequency) };
            let ticks = u64::from(days) * 86_400 * frequency * 1000;
            let read = i128::try_from(vmtime::Scale::from_khz(khz(frequency)).ns(ticks)).unwrap();
            prop_assert!((0..=1000).contains(&(page(&case) - 1000 * (read - i128::from(case.over_ns)))));
        }
    }
}
