// SPDX-License-Identifier: GPL-2.0-only
/*
 * Local APIC timer deadlines in kvmclock time, for KVM guests that migrate.
 *
 * The lapic-deadline clock event converts nanoseconds to TSC ticks with the
 * frequency that the TSC had at boot. If the VM is migrated to a host with
 * another TSC frequency and without TSC scaling, all its waits are then wrong
 * by the ratio. The host does tell the guest of the new frequency, in the
 * kvmclock page of each CPU. These clock events use it:
 *
 * - kvm-tsc-deadline converts the expiry to a TSC value with the page;
 * - kvm-ns-deadline writes the expiry, in kvmclock nanoseconds, to an MSR of the
 *   host, which has to do the conversion.
 *
 * The timer, its LVT entry and its interrupt are those of lapic-deadline. Only
 * what is written when the next event is programmed differs.
 *
 *   kvmclock_event=split|mult|exact[,recheck]   kvm-tsc-deadline
 *   kvmclock_event=recheck                      the same as exact,recheck
 *   kvmclock_event=ns                           kvm-ns-deadline
 *
 * Without the option, nothing of this file is used.
 */
#define pr_fmt(fmt) "kvm-clock: " fmt

#include <linux/clockchips.h>
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/math64.h>
#include <linux/percpu.h>
#include <linux/string.h>
#include <linux/timekeeping.h>

#include <asm/pvclock.h>
#include <asm/kvmclock.h>
#include <asm/kvm_para.h>
#include <asm/msr.h>
#include <asm/tsc.h>

/* Linux has renamed it. */
#if __has_include(<asm/cpuid/api.h>)
#include <asm/cpuid/api.h>
#else
#include <asm/processor.h>
#define cpuid_base_hypervisor hypervisor_cpuid_base
#endif

/* The paravirtual interface of kvm-ns-deadline. */
#define NS_DEADLINE_SIGNATURE	"NsDeadlineIf"
#define NS_DEADLINE_FEATURES	1	/* leaf, from the signature's */
#define NS_DEADLINE_FEATURE	BIT(0)	/* EAX; EBX is the MSR's number */

/*
 * The longest wait, 275 s: SPLIT shifts it left by what is left of 64 bits. The
 * core programs the rest when it wakes.
 */
#define WAIT_BITS		38
#define WAIT_MAX_NS		(BIT_ULL(WAIT_BITS) - 1)
/* Of a tsc_shift: a TSC between 15 kHz and 65 THz. */
#define SHIFT_MAX		15

enum kvmclock_event {
	EVENT_NATIVE,
	EVENT_SPLIT,	/* shift, divide, shift again: rounds down */
	EVENT_MULT,	/* multiply by a reciprocal: rounds down */
	EVENT_EXACT,	/* multiply, divide, round up: never early */
	EVENT_NS,	/* the host converts */
};

static enum kvmclock_event event __ro_after_init;
static bool recheck __ro_after_init;
static u32 ns_deadline_msr __ro_after_init;

/* Of the page that was in use when the CPU's last event was programmed. */
struct last_page {
	unsigned int version;
	/* 2^63 / tsc_to_system_mul */
	u64 reciprocal;
};

/* No page that can be read has an odd version. */
static DEFINE_PER_CPU(struct last_page, last_page) = { .version = 1 };

static int __init parse_kvmclock_event(char *arg)
{
	char *word;

	while ((word = strsep(&arg, ","))) {
		if (!strcmp(word, "split"))
			event = EVENT_SPLIT;
		else if (!strcmp(word, "mult"))
			event = EVENT_MULT;
		else if (!strcmp(word, "exact"))
			event = EVENT_EXACT;
		else if (!strcmp(word, "ns"))
			event = EVENT_NS;
		else if (!strcmp(word, "recheck"))
			recheck = true;
		else
			pr_warn("kvmclock_event=%s is unknown\n", word);
	}
	/* On its own: with the best conversion. */
	if (recheck && event == EVENT_NATIVE)
		event = EVENT_EXACT;
	return 0;
}
early_param("kvmclock_event", parse_kvmclock_event);

bool __init kvmclock_event_wanted(void)
{
	return event != EVENT_NATIVE;
}

static u64 split(u64 wait, u32 mul, int shift)
{
	u64 ticks = div_u64(wait << (64 - WAIT_BITS), mul);
	int rest = 32 - (64 - WAIT_BITS) - shift;

	return rest < 0 ? ticks >> -rest : ticks << rest;
}

static u64 exact(u64 wait, u32 mul, int shift)
{
	u64 scaled = mul_u64_u64_div_u64(wait, BIT_ULL(32), mul);

	/* Is there a remainder? It is less than 2^32. */
	if (scaled * mul != wait << 32)
		scaled++;
	if (shift < 0)
		return scaled << -shift;
	return (scaled + BIT_ULL(shift) - 1) >> shift;
}

/*
 * TSC ticks in which kvmclock advances by @wait ns. Until the caller has checked
 * the version, mul and shift may be of different pages.
 */
static u64 ns_to_ticks(const struct pvclock_vcpu_time_info *src, bool new_page,
		       u64 wait)
{
	u32 mul = READ_ONCE(src->tsc_to_system_mul);
	int shift = READ_ONCE(src->tsc_shift);

	/* No host has such a page. Look again in what was 1 ms at boot. */
	if (unlikely(!(mul >> 31) || abs(shift) > SHIFT_MAX))
		return tsc_khz;

	switch (event) {
	case EVENT_SPLIT:
		return split(wait, mul, shift);
	case EVENT_MULT:
		if (new_page)
			this_cpu_write(last_page.reciprocal, div_u64(BIT_ULL(63), mul));
		return mul_u64_u64_shr(wait, this_cpu_read(last_page.reciprocal),
				       31 + shift);
	default:
		return exact(wait, mul, shift);
	}
}

/*
 * CLOCK_MONOTONIC and kvmclock both count nanoseconds, but they start at
 * different instants, and NTP slews only one of them. So what is converted is
 * the distance to the expiry, @wait. It is counted from now, and not from the
 * instant that the page is of: that may be long ago.
 *
 * The core has read the clock before. If the page is another one than for the
 * last event, the host may have let the clock jump ahead since, and the distance
 * is taken again, under the version that the deadline is computed with.
 */
static int kvmclock_next_event(unsigned long wait, struct clock_event_device *evt)
{
	const struct pvclock_vcpu_time_info *src = this_cpu_pvti();
	unsigned int version;
	u64 deadline, tsc;
	bool new_page;

	do {
		do {
			version = pvclock_read_begin(src);
			new_page = version != this_cpu_read(last_page.version);
			if (unlikely(new_page))
				wait = clamp_t(s64, ktime_sub(evt->next_event, ktime_get()),
					       0, WAIT_MAX_NS);
			tsc = rdtsc_ordered();
			if (event == EVENT_NS)
				deadline = __pvclock_read_cycles(src, tsc) + wait;
			else
				deadline = tsc + ns_to_ticks(src, new_page, wait);
		} while (pvclock_read_retry(src, version));
		this_cpu_write(last_page.version, version);

		if (event == EVENT_NS)
			wrmsr(ns_deadline_msr, lower_32_bits(deadline),
			      upper_32_bits(deadline));
		else
			wrmsr(MSR_IA32_TSC_DEADLINE, lower_32_bits(deadline),
			      upper_32_bits(deadline));
		/*
		 * If the VM was migrated between the version's check and the
		 * write, the deadline was in the ticks of the host before.
		 */
	} while (recheck && pvclock_read_retry(src, version));
	return 0;
}

static bool __init find_ns_deadline(void)
{
	u32 base = cpuid_base_hypervisor(NS_DEADLINE_SIGNATURE,
					 NS_DEADLINE_FEATURES);

	if (!base || !(cpuid_eax(base + NS_DEADLINE_FEATURES) & NS_DEADLINE_FEATURE))
		return false;
	ns_deadline_msr = cpuid_ebx(base + NS_DEADLINE_FEATURES);
	return true;
}

/* On the boot CPU, before the clock events of any CPU are set up. */
void __init kvmclock_init_event(void)
{
	static const char * const names[] = { "", "split", "mult", "exact", "ns" };

	if (event == EVENT_NS && !find_ns_deadline()) {
		pr_warn("kvmclock_event=ns: the host has no MSR for it\n");
		event = EVENT_NATIVE;
	}
	if (event != EVENT_NATIVE)
		pr_info("clock events are programmed in kvmclock time: %s%s\n",
			names[event], recheck ? ", recheck" : "");
}

/* Registers this CPU's local APIC timer in place of lapic-deadline, if asked. */
bool kvmclock_register_event(struct clock_event_device *evt)
{
	if (event == EVENT_NATIVE)
		return false;
	if (!this_cpu_hvclock()) {
		pr_warn_once("kvmclock_event: there is no kvmclock\n");
		return false;
	}
	evt->name = event == EVENT_NS ? "kvm-ns-deadline" : "kvm-tsc-deadline";
	evt->set_next_event = kvmclock_next_event;
	clockevents_config_and_register(evt, NSEC_PER_SEC, 1, WAIT_MAX_NS);
	return true;
}
