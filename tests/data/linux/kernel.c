// As much of Linux as docs/linux/kvmclock_event.c needs, around a CPU whose TSC, page and MSRs are variables. The VM
// may be migrated at points, which are numbered: each call that reads or writes one of them. For
// tests/tests/linux_kernel.rs.
//
//   convert OPTION    reads lines of mul, shift and wait; prints the ticks of each
//   sweep OPTION      migrates at no point, then at each in turn; prints the MSR that was written last, and by how many
//                     ns the interrupt comes after the expiry
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t s64;
typedef s64 ktime_t;

#define BIT(n) (1u << (n))
#define BIT_ULL(n) (1ull << (n))
#define NSEC_PER_SEC 1000000000l
#define MSR_IA32_TSC_DEADLINE 0x6e0
#define __init
#define __ro_after_init
#define early_param(name, parser)
#define unlikely(x) (x)
#define READ_ONCE(x) (*(volatile __typeof__(x) *)&(x))
#define max_t(type, a, b) ((type)(a) > (type)(b) ? (type)(a) : (type)(b))
#define min_t(type, a, b) ((type)(a) < (type)(b) ? (type)(a) : (type)(b))
#define clamp_t(type, x, low, high) min_t(type, max_t(type, x, low), high)
#define DEFINE_PER_CPU(type, name) type name
#define this_cpu_read(x) (x)
#define this_cpu_write(x, value) ((x) = (value))
#define lower_32_bits(x) ((u32)(x))
#define upper_32_bits(x) ((u32)((x) >> 32))
#define ktime_sub(a, b) ((a) - (b))
#define pr_info(...) fprintf(stderr, __VA_ARGS__)
#define pr_warn(...) fprintf(stderr, __VA_ARGS__)
#define pr_warn_once pr_warn

struct pvclock_vcpu_time_info {
    u32 version;
    u64 tsc_timestamp, system_time;
    u32 tsc_to_system_mul;
    signed char tsc_shift;
};

struct clock_event_device {
    const char *name;
    ktime_t next_event;
    int (*set_next_event)(unsigned long, struct clock_event_device *);
};

static struct pvclock_vcpu_time_info page;
static u64 tsc, tsc_khz = 2000000, msr, written;
static int points, migrate_at = -1;

static u64 scale(u64 ticks) {
    ticks = page.tsc_shift < 0 ? ticks >> -page.tsc_shift : ticks << page.tsc_shift;
    return (unsigned __int128)ticks * page.tsc_to_system_mul >> 32;
}

static u64 __pvclock_read_cycles(const struct pvclock_vcpu_time_info *src, u64 at) {
    return src->system_time + scale(at - src->tsc_timestamp);
}

// From 2 GHz to 1 GHz, with kvmclock 5 ms ahead.
static void point(void) {
    if (points++ != migrate_at)
        return;
    u64 now = __pvclock_read_cycles(&page, tsc);
    page = (struct pvclock_vcpu_time_info){page.version + 2, tsc, now + 5000000, 1u << 31, 1};
}

static struct pvclock_vcpu_time_info *this_cpu_pvti(void) { return &page; }
static struct pvclock_vcpu_time_info *this_cpu_hvclock(void) { return &page; }

static unsigned pvclock_read_begin(const struct pvclock_vcpu_time_info *src) {
    point();
    return src->version & ~1u;
}

static bool pvclock_read_retry(const struct pvclock_vcpu_time_info *src, unsigned version) {
    point();
    return src->version != version;
}

static u64 rdtsc_ordered(void) {
    point();
    return tsc;
}

// CLOCK_MONOTONIC starts 77 ns later than kvmclock.
static ktime_t ktime_get(void) {
    point();
    return __pvclock_read_cycles(&page, tsc) - 77;
}

static void wrmsr(u32 number, u32 low, u32 high) {
    point();
    msr = number;
    written = (u64)high << 32 | low;
}

static u64 div_u64(u64 a, u32 b) { return a / b; }
static u64 mul_u64_u64_div_u64(u64 a, u64 b, u64 c) { return (unsigned __int128)a * b / c; }
static u64 mul_u64_u64_shr(u64 a, u64 b, unsigned shift) { return (unsigned __int128)a * b >> shift; }

static u32 hypervisor_cpuid_base(const char *signature, u32 leaves) {
    return leaves == 1 && !strcmp(signature, "NsDeadlineIf") ? 0x40000100 : 0;
}

static u32 cpuid_eax(u32 leaf) { return leaf == 0x40000101; }
static u32 cpuid_ebx(u32 leaf) { return leaf == 0x40000101 ? 0x766d6d00 : 0; }

static void clockevents_config_and_register(struct clock_event_device *evt, u32 hz, u64 least, u64 most) {
    (void)evt, (void)hz, (void)least, (void)most;
}

#include "kvmclock_event.c"

// Programs an event 10 ms ahead as Linux' core does, and returns by how much the interrupt is late.
static s64 late(struct clock_event_device *evt) {
    // The page of before, for which an event has been programmed.
    page = (struct pvclock_vcpu_time_info){page.version + 2, 1000, 5000, 1u << 31, 0};
    tsc = 4000000000;
    evt->next_event = 0;
    evt->set_next_event(0, evt);
    points = 0;
    s64 expiry = __pvclock_read_cycles(&page, tsc) - 77 + 10000000;
    evt->next_event = expiry;
    evt->set_next_event(expiry - ktime_get(), evt);
    s64 due = msr == MSR_IA32_TSC_DEADLINE ? __pvclock_read_cycles(&page, written) : written;
    return due - 77 - expiry;
}

int main(int count, char **word) {
    struct clock_event_device evt = {0};
    char option[64];
    if (count != 3 || snprintf(option, sizeof option, "%s", word[2]) < 0)
        return 2;
    parse_kvmclock_event(option);
    kvmclock_init_event();
    if (!kvmclock_event_wanted() || !kvmclock_register_event(&evt))
        return 1;
    if (!strcmp(word[1], "convert")) {
        unsigned mul;
        int shift;
        unsigned long long wait;
        while (scanf("%u %d %llu", &mul, &shift, &wait) == 3) {
            page.tsc_to_system_mul = mul;
            page.tsc_shift = shift;
            printf("%llu\n", (unsigned long long)ns_to_ticks(&page, true, wait));
        }
        return 0;
    }
    late(&evt);
    for (migrate_at = -1; migrate_at < points; migrate_at++) {
        s64 by = late(&evt);
        printf("%llx %lld\n", (unsigned long long)msr, (long long)by);
    }
    return 0;
}
