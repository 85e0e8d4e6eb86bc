//! The local APIC's doors (page, MSRs, CR8), its messages and its saved state, with time as an input.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    vmm_fuzz::lapic_doors(data);
});
