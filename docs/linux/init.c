// SPDX-License-Identifier: MIT OR Apache-2.0
// The only program of the guest that `scripts/linux build` makes. It sleeps until an instant, again and again, and says
// how late it woke. Options are words of the kernel's command line, which Linux passes in the environment:
//
//   ticks=200 period_us=10000   how often, and from each instant to the next
//   relative=0                  1: each instant is a period after the last wake-up, not after the last instant
//   threads=1                   on how many CPUs, a thread on each
//   every=10                    every how many wake-ups it prints one
//   limit_us=0                  waking later than this is an error; 0: it never is
//   out=/dev/console            /dev/kmsg needs no serial interrupt, but printk.devkmsg=on
//
// Ends by a write to the debug-exit port, 0xf4: 0, or 1 after an error.

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define THREADS_MAX 64
#define NS_PER_S 1000000000LL

static int out = STDOUT_FILENO;
static long ticks, period_ns, relative, threads, every, limit_ns;
static _Atomic long long asleep_until_ns[THREADS_MAX]; // 0: awake
static long long worst_ns[THREADS_MAX];
static atomic_int errors;

// Each line is one write, so that those of several threads do not mix.
#define say(...) dprintf(out, "init: " __VA_ARGS__)
#define error(...) \
    do { \
        errors++; \
        say("ERROR: " __VA_ARGS__); \
    } while (0)

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * NS_PER_S + t.tv_nsec;
}

// A thread whose timer is lost cannot report it: the others do, once for each sleep.
static void check_others(long long at) {
    static _Atomic long long reported[THREADS_MAX];
    for (int cpu = 0; cpu < threads; cpu++) {
        long long due = asleep_until_ns[cpu];
        if (due && at - due > NS_PER_S && atomic_exchange(&reported[cpu], due) != due)
            error("cpu %d: still asleep %lld ms after its time\n", cpu, (at - due) / 1000000);
    }
}

static void *sleeper(void *argument) {
    int cpu = (int)(long)argument;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0) {
        error("cpu %d: there is no such CPU\n", cpu);
        return NULL;
    }
    long long before = now_ns(), due = before + period_ns;
    for (long i = 1; i <= ticks; i++) {
        struct timespec until = {due / NS_PER_S, due % NS_PER_S};
        asleep_until_ns[cpu] = due;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        asleep_until_ns[cpu] = 0;
        long long at = now_ns(), late = at - due;
        if (late > worst_ns[cpu])
            worst_ns[cpu] = late;
        if (at < before)
            error("cpu %d: the clock went back by %lld ns\n", cpu, before - at);
        if (limit_ns && late > limit_ns)
            error("cpu %d: tick %ld late %lld us\n", cpu, i, late / 1000);
        if (i % every == 0)
            say("cpu %d: tick %ld at %lld ns, late %lld us\n", cpu, i, at, late / 1000);
        check_others(at);
        before = at;
        // After a very late one, those that are missed are left out.
        due = !relative && due + period_ns > at ? due + period_ns : at + period_ns;
    }
    return NULL;
}

static void show(const char *what, const char *path) {
    char text[64] = "none\n";
    int fd = open(path, O_RDONLY);
    if (fd >= 0 && read(fd, text, sizeof text - 1) < 0)
        text[0] = '\n';
    say("%s %s", what, text);
}

static long option(const char *name, long otherwise, long least, long most) {
    const char *text = getenv(name);
    long value = text ? atol(text) : otherwise;
    return value < least ? least : value > most ? most : value;
}

int main(void) {
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    if (getenv("out"))
        out = open(getenv("out"), O_WRONLY);
    ticks = option("ticks", 200, 0, 1000000000);
    period_ns = option("period_us", 10000, 1, 1000000000) * 1000;
    relative = option("relative", 0, 0, 1);
    threads = option("threads", 1, 1, THREADS_MAX);
    every = option("every", 10, 1, 1000000000);
    limit_ns = option("limit_us", 0, 0, 1000000000) * 1000;
    show("clocksource", "/sys/devices/system/clocksource/clocksource0/current_clocksource");
    show("clockevent", "/sys/devices/system/clockevents/clockevent0/current_device");
    pthread_t handles[THREADS_MAX];
    for (long cpu = 0; cpu < threads; cpu++)
        pthread_create(&handles[cpu], NULL, sleeper, (void *)cpu);
    for (long cpu = 0; cpu < threads; cpu++)
        pthread_join(handles[cpu], NULL);
    for (int cpu = 0; cpu < threads; cpu++)
        say("cpu %d: worst late %lld us\n", cpu, worst_ns[cpu] / 1000);
    say("done, errors: %d\n", errors);
    tcdrain(out);
    // Through the kernel, which has the right to it in every emulator.
    char status = errors ? 1 : 0;
    if (pwrite(open("/dev/port", O_WRONLY), &status, 1, 0xf4) < 0)
        say("there is no /dev/port\n");
    reboot(RB_AUTOBOOT);
}
