//! KVM's own kvmclock: the ioctls, and the page that the guest reads.

use std::time::Duration;

use guest_abi::{
    msr::IA32_TSC,
    pvclock::{FLAG_GUEST_STOPPED, TIME_INFO_BYTES, TimeInfo},
};
use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, kvm_clock_data};
use vmtime::{GuestTsc, PageClock, Scale, VmTime};

use super::{
    Check, Context,
    answer::{Found, Verdict, conforms, said},
    rig::{PORT, Rig, guest_code, tsc_loop},
};
use crate::{
    host::{os_clocks::OsClocks, tsc::read_tsc},
    kvm::{Error, state},
};

pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "clock-get-tsc",
        rule: "with the flag KVM_CLOCK_HOST_TSC, host_tsc is the host's TSC at that instant (api.rst, KVM_GET_CLOCK)",
        kernel: "get_kvmclock (x86.c)",
        run: |cx| within(cx, "KVM_GET_CLOCK, for host_tsc", KVM_CLOCK_HOST_TSC, read_tsc, |data| data.host_tsc),
    },
    Check {
        id: "clock-get-realtime",
        rule: "with the flag KVM_CLOCK_REALTIME, realtime is CLOCK_REALTIME at that instant (api.rst, KVM_GET_CLOCK)",
        kernel: "get_kvmclock, kvm_get_walltime_and_clockread (x86.c)",
        run: |cx| {
            within(cx, "KVM_GET_CLOCK, for realtime", KVM_CLOCK_REALTIME, OsClocks::LINUX.real_ns, |data| data.realtime)
        },
    },
    Check {
        id: "clock-set",
        rule: "KVM_SET_CLOCK sets the clock (api.rst)",
        kernel: "kvm_vm_ioctl_set_clock (x86.c)",
        run: |cx| set(cx, false),
    },
    Check {
        id: "clock-set-realtime",
        rule: "KVM_SET_CLOCK with KVM_CLOCK_REALTIME adds the time since `realtime` (api.rst, KVM_SET_CLOCK)",
        kernel: "kvm_vm_ioctl_set_clock (x86.c)",
        run: |cx| set(cx, true),
    },
    Check {
        id: "clock-page",
        rule: "KVM_GET_CLOCK returns kvmclock as the guest sees it (api.rst): its page at the guest's TSC of that instant",
        kernel: "get_kvmclock converts in one step, kvm_guest_time_update and the guest in two (x86.c)",
        run: page,
    },
    Check {
        id: "clock-stopped",
        rule: "KVM_KVMCLOCK_CTRL sets PVCLOCK_GUEST_STOPPED in the page (api.rst); EINVAL before the guest has one",
        kernel: "kvm_set_guest_paused, kvm_setup_guest_pvclock (x86.c)",
        run: stopped,
    },
    Check {
        id: "clock-guest",
        rule: "KVM_GET_CLOCK_GUEST returns the guest's page, and KVM_SET_CLOCK_GUEST of it changes no reading (proposed: api.rst)",
        kernel: "kvm_vcpu_ioctl_get_clock_guest, kvm_vcpu_ioctl_set_clock_guest (x86.c)",
        run: clock_guest,
    },
];

/// Where the guest registers its page.
const PAGE: u64 = 0xc000;

/// Registers a kvmclock page, then exits in a loop.
fn page_code() -> &'static [u8] {
    guest_code!("mov ecx, 0x4b564d01", "mov eax, 0xc001", "xor edx, edx", "wrmsr", "2: out 0x80, al", "jmp 2b",)
}

fn flags(data: &kvm_clock_data) -> String {
    let names =
        [(KVM_CLOCK_TSC_STABLE, "TSC_STABLE"), (KVM_CLOCK_REALTIME, "REALTIME"), (KVM_CLOCK_HOST_TSC, "HOST_TSC")];
    let set: Vec<&str> = names.iter().filter(|(bit, _)| data.flags & bit != 0).map(|(_, name)| *name).collect();
    if set.is_empty() { "ok, no flags".to_owned() } else { format!("ok, {}", set.join(" | ")) }
}

/// Whether the `value` of KVM_GET_CLOCK that `flag` announces lies between readings of `now` before and after the call.
fn within(
    cx: &Context,
    asked: &str,
    flag: u32,
    now: fn() -> u64,
    value: fn(&kvm_clock_data) -> u64,
) -> Result<Found, Error> {
    let rig = match registered(cx, asked)? {
        Ok(rig) => rig,
        Err(found) => return Ok(found),
    };
    let before = now();
    let data = rig.vm.clock_data()?;
    let after = now();
    if data.flags & flag == 0 {
        return Ok(Found::not_offered(asked, flags(&data)));
    }
    let within = (before..=after).contains(&value(&data));
    let measured = if within { "within the call" } else { "not within the call" };
    Ok(Found::new(asked, flags(&data), measured, conforms(within)))
}

/// Sets the clock, with CLOCK_REALTIME of five seconds ago or without, and reads it.
fn set(cx: &Context, realtime: bool) -> Result<Found, Error> {
    const TO_NS: u64 = 1_000_000_000_000;
    const AGO_NS: u64 = 5_000_000_000;
    // CLOCK_REALTIME and kvmclock may be slewed apart; this is far more than that in the time of two calls.
    const SLACK_NS: u64 = 1_000_000;
    let rig = Rig::new(cx, tsc_loop())?;
    // Before the wall clock is read: what passes between the two counts as elapsed.
    let begin = read_tsc();
    let mut data = kvm_clock_data { clock: TO_NS, ..Default::default() };
    let mut asked = "KVM_SET_CLOCK of 1000 s".to_owned();
    let mut expected = TO_NS;
    if realtime {
        data.flags = KVM_CLOCK_REALTIME;
        data.realtime = (OsClocks::LINUX.real_ns)().saturating_sub(AGO_NS);
        asked.push_str(" with KVM_CLOCK_REALTIME of 5 s ago");
        expected += AGO_NS;
    }
    let answer = rig.vm.set_clock_data(&data);
    if answer.is_err() {
        return Ok(Found::not_offered(asked, said(&answer)));
    }
    let read = rig.vm.clock_data()?.clock;
    let elapsed_ns = read_tsc().saturating_sub(begin).saturating_mul(1_000_000) / u64::from(cx.khz.max(1));
    let within = (expected - SLACK_NS..=expected.saturating_add(elapsed_ns) + SLACK_NS).contains(&read);
    let seconds = Duration::from_nanos(read).as_secs_f64();
    Ok(Found::new(asked, "ok", format!("{seconds:.1} s"), conforms(within)))
}

/// A rig whose guest has registered its page; otherwise what was found instead.
fn registered(cx: &Context, asked: &str) -> Result<Result<Rig, Found>, Error> {
    if !cx.host.has_kernel_lapic() {
        return Ok(Err(Found::not_offered(asked, "KVM's own LAPIC, with which it has a kvmclock, is not offered")));
    }
    let mut rig = Rig::in_kernel(cx, page_code())?;
    // Twice: KVM writes the page at the entry after the guest has registered it.
    for _ in 0..2 {
        let exit = rig.run()?;
        if !rig.is_out(exit, PORT) {
            return Ok(Err(Found::new(
                asked,
                rig.describe(exit),
                "the guest did not register a page",
                Verdict::Failed,
            )));
        }
    }
    Ok(Ok(rig))
}

fn read_page(rig: &Rig) -> Result<TimeInfo, Error> {
    Ok(TimeInfo::from_bytes(&rig.read::<TIME_INFO_BYTES>(PAGE)?))
}

/// The page's line of VM time; none for a scale that no frequency has.
fn line(info: &TimeInfo) -> Option<PageClock> {
    let scale = Scale::new(info.tsc_to_system_mul, info.tsc_shift).ok()?;
    Some(PageClock { tsc_timestamp: GuestTsc(info.tsc_timestamp), system_time: VmTime(info.system_time), scale })
}

/// What the page shows minus KVM_GET_CLOCK, in nanoseconds.
fn page(cx: &Context) -> Result<Found, Error> {
    let asked = "KVM_GET_CLOCK, and the page at that host_tsc";
    let mut rig = match registered(cx, asked)? {
        Ok(rig) => rig,
        Err(found) => return Ok(found),
    };
    let data = rig.vm.clock_data()?;
    if data.flags & KVM_CLOCK_HOST_TSC == 0 {
        return Ok(Found::not_offered(asked, flags(&data)));
    }
    // The guest's TSC at `host_tsc`: KVM's own offset, which is that of the TSC that it reports.
    let Some(offset) = guest_minus_host(&mut rig)? else {
        return Ok(Found::new(asked, flags(&data), "the guest's TSC offset cannot be read", Verdict::Failed));
    };
    let info = read_page(&rig)?;
    let Some(line) = line(&info) else {
        return Ok(Found::new(
            asked,
            flags(&data),
            format!("a page that no frequency has: {info:?}"),
            Verdict::Differs,
        ));
    };
    let shown = line.vm_time(GuestTsc(data.host_tsc.wrapping_add(offset))).0;
    let difference = shown.wrapping_sub(data.clock).cast_signed();
    Ok(Found::new(
        asked,
        flags(&data),
        format!("the page shows {difference} ns more"),
        conforms(difference.unsigned_abs() <= 1),
    ))
}

/// Guest TSC minus host TSC, from KVM_VCPU_TSC_OFFSET where KVM has it.
fn guest_minus_host(rig: &mut Rig) -> Result<Option<u64>, Error> {
    match rig.vcpu.tsc_attribute::<u64>(crate::kvm::tsc::TSC_OFFSET) {
        Ok(offset) => {
            // An offset that KVM reports but does not apply: then guests have the host's TSC.
            let (before, guest, after) = (read_tsc(), state::read_msr(&rig.vcpu.fd, IA32_TSC)?, read_tsc());
            Ok((before..=after).contains(&guest.wrapping_sub(offset)).then_some(offset))
        }
        Err(_) => Ok(None),
    }
}

fn stopped(cx: &Context) -> Result<Found, Error> {
    let asked = "KVM_KVMCLOCK_CTRL before and after the guest has registered a page";
    let early = Rig::new(cx, tsc_loop())?.vcpu.mark_kvmclock_stopped();
    let mut rig = match registered(cx, asked)? {
        Ok(rig) => rig,
        Err(found) => return Ok(found),
    };
    let late = rig.vcpu.mark_kvmclock_stopped();
    rig.run()?;
    let set = read_page(&rig)?.flags & FLAG_GUEST_STOPPED != 0;
    let answer = format!("{}, {}", said(&early), said(&late));
    let measured = if set { "the flag is set" } else { "the flag is not set" };
    Ok(Found::new(asked, answer, measured, conforms(early.is_err() && late.is_ok() && set)))
}

fn clock_guest(cx: &Context) -> Result<Found, Error> {
    let asked = "KVM_GET_CLOCK_GUEST, then KVM_SET_CLOCK_GUEST of the same";
    let mut rig = match registered(cx, asked)? {
        Ok(rig) => rig,
        Err(found) => return Ok(found),
    };
    let before = read_page(&rig)?;
    let answer = rig.vcpu.clock_guest();
    let Ok(bytes) = answer else { return Ok(Found::not_offered(asked, said(&answer))) };
    let told = TimeInfo::from_bytes(&bytes);
    let set = rig.vcpu.set_clock_guest(&bytes);
    rig.run()?;
    let after = read_page(&rig)?;
    let Some(((before, told), after)) = line(&before).zip(line(&told)).zip(line(&after)) else {
        return Ok(Found::new(asked, said(&set), "a page that no frequency has", Verdict::Differs));
    };
    let at = before.tsc_timestamp.0.max(told.tsc_timestamp.0).max(after.tsc_timestamp.0);
    let shows = |page: PageClock| page.vm_time(GuestTsc(at)).0;
    let apart = |page: PageClock| shows(page).wrapping_sub(shows(before)).cast_signed();
    let measured = format!("GET {} ns from the page, the page after SET {} ns", apart(told), apart(after));
    let exact = set.is_ok() && apart(told).unsigned_abs() <= 1 && apart(after).unsigned_abs() <= 1;
    Ok(Found::new(asked, said(&set), measured, conforms(exact)))
}
