# PVH entry: 32-bit protected mode, paging off, flat segments, EBX = physical address of hvm_start_info
# (Xen docs/misc/pvh.pandoc). All tables below are written by the assembler: building them at run time would cost
# hundreds of instructions, and some hosts emulate every one.

.section .note.Xen, "a", @note
    .long 4                         # length of the name
    .long 8                         # length of the address: QEMU and linux-loader read eight bytes from an ELF64
    .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

# From 32-bit code with flat segments to 64-bit code at \to. EBX is preserved.
.macro enter_long_mode to
    movl $0x20, %eax                # CR4.PAE and nothing else: with OSFXSR clear an SSE instruction would fault
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          # EFER.LME
    xorl %edx, %edx
    movl $0x100, %eax
    wrmsr
    movl $0x80000011, %eax          # CR0.PG, ET, PE
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmpl $0x08, $\to
.endm

.macro load_data_segments
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
.endm

.section .boot32, "ax"
.code32
.global pvh_entry
pvh_entry:
    cli
    cld
    enter_long_mode long_mode

# Entered from the trampoline, which has loaded the GDT. The other segments still have the limits of real mode.
ap_protected:
    load_data_segments
    enter_long_mode ap_long_mode

.section .text.boot, "ax"
.code64
long_mode:
    load_data_segments
    movl $TSS_SELECTOR, %eax
    ltr %ax
    lidt idt_pointer
    movl $stacks + 0x4000, %esp
    movl %ebx, %edi
    xorl %ebp, %ebp
    call boot_entry
    ud2

# CPUs are numbered in the order in which they get here. The number selects TSS and stacks.
ap_long_mode:
    load_data_segments
    movl $1, %edi
    lock xaddl %edi, cpus_come(%rip)
    cmpl $MAX_CPUS, %edi
    jae 1f
    movl %edi, %eax
    shll $4, %eax
    addl $TSS_SELECTOR, %eax
    ltr %ax
    lidt smp_idt_pointer
    movl %edi, %eax
    shll $16, %eax
    leal stacks + 0x4000(%eax), %esp
    xorl %ebp, %ebp
    call ap_entry
    ud2
1:  cli                             # more than MAX_CPUS: this one sleeps until an NMI, for which it has no stack
    hlt
    jmp 1b

# Startup IPIs enter this in real mode: it is copied to the page that the IPI names. CS is that page; no other register
# is known.
.section .rodata.ap_trampoline, "a"
.global ap_trampoline, ap_trampoline_end
.code16
ap_trampoline:
    cli
    cld
    lgdtl %cs:(ap_gdt_pointer - ap_trampoline)
    movl $0x11, %eax                # CR0.ET, PE; and INIT leaves the caches off
    movl %eax, %cr0
    ljmpl $0x18, $ap_protected
.balign 4
    .word 0
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_trampoline_end:
.code64

# Four gigabytes, identity-mapped in 2 MiB pages. Accessed and dirty are set beforehand, so that the walker never
# writes; the page with the local APIC is uncached.
.section .data.page_tables, "aw"
.balign 4096
pml4:
    .quad pdpt + 0x27               # user mode too: the entries below restrict it
    .fill 511, 8, 0
.global pdpt
pdpt:
    .quad page_directories + 0x0023, page_directories + 0x1023, page_directories + 0x2023, page_directories + 0x3023
    .fill 508, 8, 0
page_directories:
.set page, 0
.rept 2048
    .if page == (0xfee00000 >> 21)
    .quad (page << 21) + 0xfb
    .else
    .quad (page << 21) + 0xe3
    .endif
    .set page, page + 1
.endr

.section .data.descriptors, "aw"
.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08: 64-bit code
    .quad 0x00cf93000000ffff        # 0x10: data
    .quad 0x00cf9b000000ffff        # 0x18: 32-bit code
.set cpu, 0
.rept MAX_CPUS
    .word 103, tss_bits_0_15 + 0x80 * cpu   # TSS_SELECTOR + 16 * cpu; LTR marks it busy, so this is not read-only
    .byte tss_bits_16_23, 0x89, 0, tss_bits_24_31
    .quad 0
    .set cpu, cpu + 1
.endr
.set USER_CODE, . - gdt + 3
    .quad 0x00affb000000ffff        # user mode's 64-bit code
.set USER_DATA, . - gdt + 3
    .quad 0x00cff3000000ffff        # and data
.global USER_CODE, USER_DATA
gdt_end:
# Aligned so that the addresses of the TSSs differ only in the lowest 16 bits.
.balign 0x80 * MAX_CPUS
.global tss
tss:
.set cpu, 0
.rept MAX_CPUS
    .balign 0x80
    .long 0
    .quad stacks + 0x10000 * cpu + 0x4000, 0, 0   # RSP0..2
    .quad 0
    .quad stacks + 0x10000 * cpu + 0x8000   # IST1: timer, IPIs and spurious interrupts
    .quad stacks + 0x10000 * cpu + 0xc000   # IST2: exceptions, which may come in those handlers
    .quad stacks + 0x10000 * cpu + 0x10000  # IST3: NMI, double fault, machine check, which may come in those
    .quad 0, 0, 0, 0
    .quad 0
    .word 0, 104                    # no I/O map
    .set cpu, cpu + 1
.endr
.balign 8
    .word 0, 0, 0                   # aligns the pointer's address field
idt_pointer:
    .word idt_end - idt - 1
    .quad idt
.balign 8
    .word 0, 0, 0
.global smp_idt_pointer
smp_idt_pointer:
    .word smp_idt_end - smp_idt - 1
    .quad smp_idt
.balign 8
    .word 0
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
.balign 4
cpus_come:
    .long 1

# Four stacks a CPU, of 16 KiB: first code, then the three of the TSS.
.section .bss.stacks, "aw", @nobits
.balign 16
stacks:
    .skip 0x10000 * MAX_CPUS
