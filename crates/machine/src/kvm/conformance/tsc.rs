//! The guest's TSC: offset, frequency, writes.

use guest_abi::msr::{IA32_TSC, IA32_TSC_ADJUST};

use super::{
    Check, Context,
    answer::{Found, Verdict, conforms, said},
    rig::{DATA, PORT, Rig, guest_code, tsc_loop},
};
use crate::{
    host::tsc::read_tsc,
    kvm::{
        Error,
        probe::{self, Reading},
        state,
        tsc::{TSC_OFFSET, TSC_SCALE},
    },
};

pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "tsc-start",
        rule: "none: where the TSC of a new vCPU starts is not documented",
        kernel: "kvm_arch_vcpu_postcreate, kvm_synchronize_tsc (x86.c)",
        run: start,
    },
    Check {
        id: "tsc-offset",
        rule: "guest TSC = host TSC + offset (Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET)",
        kernel: "kvm_arch_tsc_set_attr (x86.c)",
        run: offset,
    },
    Check {
        id: "tsc-offset-read",
        rule: "the offset that was set (devices/vcpu.rst, KVM_VCPU_TSC_OFFSET)",
        kernel: "kvm_arch_tsc_get_attr (x86.c)",
        run: offset_read,
    },
    Check {
        id: "tsc-scale-up",
        rule: "a call that succeeds sets the frequency of the guest's TSC (api.rst, KVM_SET_TSC_KHZ)",
        kernel: "kvm_set_tsc_khz, set_tsc_khz (x86.c); catching up: kvm_guest_time_update",
        run: |cx| scale(cx, cx.khz.saturating_mul(2)),
    },
    Check {
        id: "tsc-scale-down",
        rule: "a call that succeeds sets the frequency of the guest's TSC (api.rst, KVM_SET_TSC_KHZ)",
        kernel: "kvm_set_tsc_khz, set_tsc_khz (x86.c)",
        run: |cx| scale(cx, cx.khz / 2),
    },
    Check {
        id: "tsc-khz-read",
        rule: "KVM_GET_TSC_KHZ returns the frequency of the guest's TSC (api.rst), which a refused request does not change",
        kernel: "kvm_set_tsc_khz sets virtual_tsc_khz before it can fail (x86.c)",
        run: khz_read,
    },
    Check {
        id: "tsc-scale-ratio",
        rule: "guest TSC = (host TSC · ratio >> fraction bits) + offset (proposed: devices/vcpu.rst, KVM_VCPU_TSC_SCALE)",
        kernel: "kvm_arch_tsc_get_attr (x86.c)",
        run: scale_ratio,
    },
    Check {
        id: "tsc-write-near",
        rule: "none: KVM may take a TSC that is written for an attempt to synchronise it with another vCPU's",
        kernel: "kvm_synchronize_tsc: within a second of what is expected, the write has no effect (x86.c)",
        run: |cx| host_write(cx, 500),
    },
    Check {
        id: "tsc-write-far",
        rule: "KVM_SET_MSRS of IA32_TSC sets the guest's TSC (SDM vol. 4, IA32_TIME_STAMP_COUNTER)",
        kernel: "kvm_synchronize_tsc (x86.c)",
        run: |cx| retried(cx, |cx| host_write(cx, 10_000)),
    },
    Check {
        id: "tsc-guest-write",
        rule: "WRMSR IA32_TSC sets the TSC, and adds as much to IA32_TSC_ADJUST (SDM vol. 3, \"Time-Stamp Counter Adjustment\")",
        kernel: "kvm_set_msr_common, adjust_tsc_offset_guest (x86.c)",
        run: |cx| retried(cx, guest_write),
    },
    Check {
        id: "tsc-adjust-guest",
        rule: "WRMSR IA32_TSC_ADJUST adds the difference to the TSC (SDM vol. 3, \"Time-Stamp Counter Adjustment\")",
        kernel: "kvm_set_msr_common, adjust_tsc_offset_guest (x86.c)",
        run: |cx| retried(cx, guest_adjust),
    },
    Check {
        id: "tsc-adjust-host",
        rule: "KVM_SET_MSRS of IA32_TSC_ADJUST leaves the TSC alone (tools/testing/selftests/kvm/x86/tsc_msrs_test.c)",
        kernel: "kvm_set_msr_common (x86.c)",
        run: host_adjust,
    },
];

/// 2^44 ticks: more than an hour at 4 GHz, which no host's TSC passes within a check.
const OFFSET: u64 = probe::PROBE_OFFSET;

fn not_read(asked: impl Into<String>) -> Found {
    Found::new(asked, "ok", "the guest did not read its TSC", Verdict::Failed)
}

/// Makes a check up to three times, until its verdict is not "differs": a busy host may stop the thread between two
/// readings for longer than [`same`] allows.
fn retried(cx: &Context, check: impl Fn(&Context) -> Result<Found, Error>) -> Result<Found, Error> {
    let mut found = check(cx)?;
    for _ in 0..2 {
        if found.verdict != Verdict::Differs {
            break;
        }
        found = check(cx)?;
    }
    Ok(found)
}

/// Host ticks in `ms` milliseconds.
fn ticks(cx: &Context, ms: u64) -> u64 {
    u64::from(cx.khz).saturating_mul(ms)
}

/// A difference of TSC values in milliseconds, for people.
fn in_ms(cx: &Context, ticks: u64) -> String {
    // As a signed number: a TSC can be behind another.
    let ticks = ticks.cast_signed();
    let us = i128::from(ticks) * 1000 / i128::from(cx.khz.max(1));
    #[allow(clippy::cast_precision_loss, reason = "for people")]
    let ms = us as f64 / 1000.0;
    format!("{ms:.3} ms")
}

/// Guest TSC minus host TSC.
fn ahead(reading: Reading) -> u64 {
    reading.guest.wrapping_sub(reading.after)
}

/// Whether two differences are the same, to 20 ms: an entry takes microseconds, on an emulated host milliseconds, and
/// what is told apart here are half a second and more.
fn same(cx: &Context, a: u64, b: u64) -> bool {
    a.wrapping_sub(b).cast_signed().unsigned_abs() < ticks(cx, 20)
}

fn start(cx: &Context) -> Result<Found, Error> {
    let asked = "RDTSC in a new vCPU";
    let mut rig = Rig::new(cx, tsc_loop())?;
    let Some(reading) = rig.read_tsc()? else { return Ok(not_read(asked)) };
    let measured = if same(cx, ahead(reading), 0) {
        "starts as the host's TSC".to_owned()
    } else if reading.guest < ticks(cx, 2_000) {
        "starts near 0".to_owned()
    } else {
        format!("starts as the host's TSC plus {}", in_ms(cx, ahead(reading)))
    };
    Ok(Found::new(asked, "nothing", measured, Verdict::Noted))
}

fn offset(cx: &Context) -> Result<Found, Error> {
    let asked = "an offset of 2^44";
    let mut rig = Rig::new(cx, tsc_loop())?;
    let answer = rig.vcpu.set_tsc_offset(OFFSET);
    if answer.is_err() {
        return Ok(Found::not_offered(asked, said(&answer)));
    }
    let Some(reading) = rig.read_tsc()? else { return Ok(not_read(asked)) };
    let Reading { before, guest, after } = reading;
    let works = (before..=after).contains(&guest.wrapping_sub(OFFSET));
    let measured = if works {
        "guest TSC = host TSC + 2^44".to_owned()
    } else if same(cx, ahead(reading), 0) {
        "no effect: guest TSC = host TSC".to_owned()
    } else {
        format!("guest TSC = host TSC + {}", in_ms(cx, ahead(reading)))
    };
    Ok(Found::new(asked, "ok", measured, conforms(works)))
}

fn offset_read(cx: &Context) -> Result<Found, Error> {
    let asked = "an offset of 2^44, then the offset";
    let rig = Rig::new(cx, tsc_loop())?;
    let answer = rig.vcpu.set_tsc_offset(OFFSET).and_then(|()| rig.vcpu.tsc_attribute::<u64>(TSC_OFFSET));
    Ok(match answer {
        Ok(offset) if offset == OFFSET => Found::new(asked, "ok", "2^44", Verdict::Conforms),
        Ok(offset) => Found::new(asked, "ok", format!("{offset:#x}"), Verdict::Differs),
        Err(_) => Found::not_offered(asked, said(&answer)),
    })
}

fn scale(cx: &Context, khz: u32) -> Result<Found, Error> {
    let asked = format!("{khz} kHz on a host of {}", cx.khz);
    let rate = probe::tsc_rate(cx.host, cx.supported, cx.khz, khz)?;
    let control = if rate.control { "with KVM_CAP_TSC_CONTROL" } else { "without KVM_CAP_TSC_CONTROL" };
    let answer = format!("{}, {control}", if rate.accepted { "ok" } else { "error" });
    let (what, verdict) = match rate.verdict(khz) {
        probe::Verdict::Scales => ("scales", Verdict::Conforms),
        probe::Verdict::CatchesUp => ("set forward at entries, not scaled", Verdict::Noted),
        probe::Verdict::No if !rate.accepted && !rate.control => ("not scaled", Verdict::NotOffered),
        probe::Verdict::No => ("not scaled", Verdict::Differs),
    };
    Ok(Found::new(asked, answer, format!("{} kHz: {what}", rate.measured_khz), verdict))
}

fn khz_read(cx: &Context) -> Result<Found, Error> {
    let khz = cx.khz / 2;
    let rig = Rig::new(cx, tsc_loop())?;
    let before = rig.vcpu.tsc_khz()?;
    let answer = rig.vcpu.set_tsc_khz(khz);
    let after = rig.vcpu.tsc_khz()?;
    let expected = if answer.is_ok() { khz } else { before };
    let asked = format!("{khz} kHz, then the frequency, which was {before}");
    Ok(Found::new(asked, said(&answer), format!("{after} kHz"), conforms(after == expected)))
}

fn scale_ratio(cx: &Context) -> Result<Found, Error> {
    let khz = cx.khz / 2;
    let asked = format!("the ratio at {khz} kHz on a host of {}", cx.khz);
    let mut rig = Rig::new(cx, tsc_loop())?;
    let answer = rig
        .vcpu
        .set_tsc_khz(khz)
        .and_then(|()| rig.vcpu.set_tsc_offset(0))
        .and_then(|()| rig.vcpu.tsc_attribute::<[u64; 2]>(TSC_SCALE));
    let Ok([ratio, bits]) = answer else { return Ok(Found::not_offered(asked, said(&answer))) };
    let Some(Reading { before, guest, after }) = rig.read_tsc()? else {
        return Ok(not_read(asked));
    };
    let scaled =
        |host: u64| (u128::from(host) * u128::from(ratio)).checked_shr(u32::try_from(bits).unwrap_or(u32::MAX));
    let within =
        scaled(before).zip(scaled(after)).is_some_and(|(least, most)| (least..=most).contains(&u128::from(guest)));
    Ok(Found::new(asked, "ok", format!("{ratio:#x} with {bits} fraction bits"), conforms(within)))
}

/// KVM_SET_MSRS of IA32_TSC twice: a first value, then what the TSC has reached plus `ms` milliseconds.
fn host_write(cx: &Context, ms: u64) -> Result<Found, Error> {
    let asked = format!("KVM_SET_MSRS of IA32_TSC, {ms} ms ahead of the guest's TSC");
    let mut rig = Rig::new(cx, tsc_loop())?;
    state::write_msr(&rig.vcpu.fd, IA32_TSC, OFFSET)?;
    let Some(first) = rig.read_tsc()? else { return Ok(not_read(asked)) };
    let target = ahead(first).wrapping_add(ticks(cx, ms));
    let now = read_tsc();
    let answer = state::write_msr(&rig.vcpu.fd, IA32_TSC, now.wrapping_add(target));
    let Some(second) = rig.read_tsc()? else {
        return Ok(not_read(asked));
    };
    let moved = ahead(second).wrapping_sub(ahead(first));
    let (measured, verdict) = if same(cx, moved, ticks(cx, ms)) {
        (format!("the guest's TSC moved by {ms} ms"), Verdict::Conforms)
    } else if same(cx, moved, 0) {
        ("the guest's TSC did not move".to_owned(), Verdict::Differs)
    } else {
        (format!("the guest's TSC moved by {}", in_ms(cx, moved)), Verdict::Differs)
    };
    // Within a second both are what KVM may do.
    let verdict = if ms < 1000 { Verdict::Noted } else { verdict };
    Ok(Found::new(asked, said(&answer), measured, verdict))
}

/// RDTSC, exit; WRMSR of the MSR and value that the VMM has put into memory, RDTSC, exit; RDMSR IA32_TSC_ADJUST, exit.
fn guest_write_code() -> &'static [u8] {
    guest_code!(
        "rdtsc",
        "mov dword ptr [0x2000], eax",
        "mov dword ptr [0x2004], edx",
        "out 0x80, al",
        "mov ecx, dword ptr [0x2010]",
        "mov eax, dword ptr [0x2008]",
        "mov edx, dword ptr [0x200c]",
        "wrmsr",
        "rdtsc",
        "mov dword ptr [0x2000], eax",
        "mov dword ptr [0x2004], edx",
        "out 0x81, al",
        "mov ecx, 0x3b",
        "rdmsr",
        "mov dword ptr [0x2018], eax",
        "mov dword ptr [0x201c], edx",
        "out 0x82, al",
        "hlt",
    )
}

/// The guest reads its TSC and writes `value` of that to MSR `index`. Returns by how much its TSC moved, and its
/// IA32_TSC_ADJUST after that; or, if the guest did not get there, how it exited instead.
fn guest_writes(cx: &Context, index: u32, value: impl Fn(u64) -> u64) -> Result<Result<(u64, u64), String>, Error> {
    let mut rig = Rig::in_kernel(cx, guest_write_code())?;
    rig.write(DATA + 0x10, &index.to_le_bytes())?;
    // Guest TSC minus host TSC at the exit.
    let at = |port: u16, rig: &mut Rig| -> Result<Result<u64, String>, Error> {
        let exit = rig.run()?;
        let host = read_tsc();
        if !rig.is_out(exit, port) {
            return Ok(Err(rig.describe(exit)));
        }
        Ok(Ok(rig.read_u64(DATA)?.wrapping_sub(host)))
    };
    let before = match at(PORT, &mut rig)? {
        Ok(ahead) => ahead,
        Err(exit) => return Ok(Err(exit)),
    };
    let tsc = rig.read_u64(DATA)?;
    rig.write(DATA + 8, &value(tsc).to_le_bytes())?;
    let after = match at(PORT + 1, &mut rig)? {
        Ok(ahead) => ahead,
        Err(exit) => return Ok(Err(exit)),
    };
    if let Err(exit) = at(PORT + 2, &mut rig)? {
        return Ok(Err(exit));
    }
    Ok(Ok((after.wrapping_sub(before), rig.read_u64(DATA + 0x18)?)))
}

const NEEDS_LAPIC: &str = "KVM's own LAPIC, with which the guest's TSC MSRs do not exit, is not offered";

/// Ten seconds: KVM does not take it for a synchronisation.
const FAR_MS: u64 = 10_000;

fn guest_writes_far(cx: &Context, asked: &str, index: u32, value: impl Fn(u64) -> u64) -> Result<Found, Error> {
    if !cx.host.has_kernel_lapic() {
        return Ok(Found::not_offered(asked, NEEDS_LAPIC));
    }
    let far = ticks(cx, FAR_MS);
    Ok(match guest_writes(cx, index, value)? {
        Ok((moved, adjust)) => {
            let measured = format!("TSC moved by {}, IA32_TSC_ADJUST is {}", in_ms(cx, moved), in_ms(cx, adjust));
            Found::new(asked, "no exit", measured, conforms(same(cx, moved, far) && same(cx, adjust, far)))
        }
        Err(exit) => Found::new(asked, exit, "nothing", Verdict::Differs),
    })
}

fn guest_write(cx: &Context) -> Result<Found, Error> {
    let far = ticks(cx, FAR_MS);
    guest_writes_far(cx, "the guest's WRMSR IA32_TSC, 10 s ahead", IA32_TSC, |tsc| tsc.wrapping_add(far))
}

fn guest_adjust(cx: &Context) -> Result<Found, Error> {
    let far = ticks(cx, FAR_MS);
    guest_writes_far(cx, "the guest's WRMSR IA32_TSC_ADJUST of 10 s", IA32_TSC_ADJUST, |_| far)
}

fn host_adjust(cx: &Context) -> Result<Found, Error> {
    let asked = "KVM_SET_MSRS of IA32_TSC_ADJUST, 10 s";
    let far = ticks(cx, FAR_MS);
    let mut rig = Rig::new(cx, tsc_loop())?;
    let Some(first) = rig.read_tsc()? else { return Ok(not_read(asked)) };
    let answer = state::write_msr(&rig.vcpu.fd, IA32_TSC_ADJUST, far);
    if answer.is_err() {
        return Ok(Found::not_offered(asked, said(&answer)));
    }
    let read = state::read_msr(&rig.vcpu.fd, IA32_TSC_ADJUST)?;
    let Some(second) = rig.read_tsc()? else { return Ok(not_read(asked)) };
    let moved = ahead(second).wrapping_sub(ahead(first));
    let measured = format!("TSC moved by {}, IA32_TSC_ADJUST is {}", in_ms(cx, moved), in_ms(cx, read));
    Ok(Found::new(asked, said(&answer), measured, conforms(same(cx, moved, 0) && read == far)))
}
