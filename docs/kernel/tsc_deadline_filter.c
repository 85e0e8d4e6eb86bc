// SPDX-License-Identifier: GPL-2.0
/*
 * Does WRMSR IA32_TSC_DEADLINE exit to user space when the VMM has asked for it?
 *
 * The VM has no in-kernel LAPIC, and an MSR filter that denies 0x6e0. The guest writes the MSR and halts. Documented is
 * KVM_EXIT_X86_WRMSR with reason KVM_MSR_EXIT_REASON_FILTER. If KVM_EXIT_HLT comes instead, KVM has swallowed the
 * write: a VMM that emulates the local APIC does not learn of the deadline.
 *
 * Build and run: cc -O2 -Wall -o tsc_deadline_filter tsc_deadline_filter.c && ./tsc_deadline_filter
 * Output: KTAP. Exit status: 0 passed, 1 failed, 4 skipped (no KVM, or no MSR filter).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define IA32_TSC_DEADLINE 0x6e0
#define GUEST_CODE 0x1000
#define CPUID_1_ECX_TSC_DEADLINE (1u << 24)

/* 16-bit code: mov ecx, 0x6e0; mov eax, 1; xor edx, edx; wrmsr; hlt. */
static const uint8_t code[] = {
	0x66, 0xb9, 0xe0, 0x06, 0x00, 0x00,
	0x66, 0xb8, 0x01, 0x00, 0x00, 0x00,
	0x66, 0x31, 0xd2,
	0x0f, 0x30,
	0xf4,
};

static void skip(const char *what)
{
	printf("ok 1 tsc_deadline_filter # SKIP %s: %s\n", what, strerror(errno));
	exit(4);
}

static int needed(int result, const char *what)
{
	if (result < 0)
		skip(what);
	return result;
}

static int checked(int result, const char *what)
{
	if (result < 0) {
		printf("# %s: %s\nnot ok 1 tsc_deadline_filter\n", what, strerror(errno));
		exit(1);
	}
	return result;
}

static int verdict(int passed, const char *format, ...)
{
	va_list arguments;

	printf("# ");
	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf("\n%s 1 tsc_deadline_filter\n", passed ? "ok" : "not ok");
	return !passed;
}

static void allow_user_space_msrs(int vm)
{
	static uint8_t denied; /* A bit of 0 denies. */
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_X86_USER_SPACE_MSR,
		.args[0] = KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER,
	};
	struct kvm_msr_filter filter = {
		.flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
		.ranges[0] = {
			.flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE,
			.base = IA32_TSC_DEADLINE,
			.nmsrs = 1,
			.bitmap = &denied,
		},
	};

	needed(ioctl(vm, KVM_ENABLE_CAP, &cap), "KVM_CAP_X86_USER_SPACE_MSR");
	needed(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), "KVM_X86_SET_MSR_FILTER");
}

/* The guest's CPUID: what KVM supports, with the TSC-deadline timer. */
static void set_cpuid(int kvm, int vcpu)
{
	const unsigned int most = 256;
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + most * sizeof(cpuid->entries[0]));

	if (!cpuid)
		skip("calloc");
	cpuid->nent = most;
	checked(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
	for (unsigned int i = 0; i < cpuid->nent; i++)
		if (cpuid->entries[i].function == 1)
			cpuid->entries[i].ecx |= CPUID_1_ECX_TSC_DEADLINE;
	checked(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
	free(cpuid);
}

static void enter_at_code(int vcpu)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = GUEST_CODE, .rflags = 2 };

	checked(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	checked(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	checked(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

int main(void)
{
	int kvm, vm, vcpu;
	size_t run_bytes;
	struct kvm_run *run;
	uint8_t *memory;
	struct kvm_userspace_memory_region region = { .memory_size = 0x4000 };

	printf("KTAP version 1\n1..1\n");
	kvm = needed(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	allow_user_space_msrs(vm);
	/* For CPUs that run real mode with help of memory that KVM is given. */
	checked(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");

	memory = mmap(NULL, region.memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		skip("mmap");
	memcpy(memory + GUEST_CODE, code, sizeof(code));
	region.userspace_addr = (uintptr_t)memory;
	checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");

	vcpu = checked(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	set_cpuid(kvm, vcpu);
	enter_at_code(vcpu);
	run_bytes = checked(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		skip("mmap of kvm_run");

	checked(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
	switch (run->exit_reason) {
	case KVM_EXIT_X86_WRMSR:
		return verdict(run->msr.index == IA32_TSC_DEADLINE && run->msr.reason == KVM_MSR_EXIT_REASON_FILTER,
			       "WRMSR %#x exits with reason %#x", run->msr.index, (unsigned int)run->msr.reason);
	case KVM_EXIT_HLT:
		return verdict(0, "no exit: KVM executed WRMSR IA32_TSC_DEADLINE, and the guest went on to HLT");
	default:
		return verdict(0, "exit reason %u", run->exit_reason);
	}
}
