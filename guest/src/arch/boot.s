# PVH entry: 32-bit protected mode, paging off, flat segments, EBX = physical address of hvm_start_info
# (Xen docs/misc/pvh.pandoc). All tables below are written by the assembler: building them at run time would cost
# hundreds of instructions, and some hosts emulate every one.

.section .note.Xen, "a", @note
    .long 4                         # length of the name
    .long 8                         # length of the address: QEMU and linux-loader read eight bytes from an ELF64
    .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .boot32, "ax"
.code32
.global pvh_entry
pvh_entry:
    cli
    cld
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
    ljmpl $0x08, $long_mode

.section .text.boot, "ax"
.code64
long_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $0x18, %eax
    ltr %ax
    lidt idt_pointer
    movl $boot_stack_top, %esp
    movl %ebx, %edi
    xorl %ebp, %ebp
    call boot_entry
    ud2

# Four gigabytes, identity-mapped in 2 MiB pages. Accessed and dirty are set beforehand, so that the walker never
# writes; the page with the local APIC is uncached.
.section .data.page_tables, "aw"
.balign 4096
pml4:
    .quad pdpt + 0x23
    .fill 511, 8, 0
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
    .word 103, tss_bits_0_15        # 0x18: TSS; LTR marks it busy, so this is not read-only
    .byte tss_bits_16_23, 0x89, 0, tss_bits_24_31
    .quad 0
gdt_end:
.balign 8
tss:
.global tss
    .long 0
    .quad boot_stack_top, 0, 0      # RSP0..2
    .quad 0
    .quad timer_stack_top           # IST1: timer and spurious interrupts
    .quad exception_stack_top       # IST2: exceptions, which may come in the timer handler
    .quad critical_stack_top        # IST3: NMI, double fault, machine check, which may come in those
    .quad 0, 0, 0, 0
    .quad 0
    .word 0, 104                    # no I/O map
.balign 8
    .word 0, 0, 0                   # aligns the pointer's address field
idt_pointer:
    .word idt_end - idt - 1
    .quad idt
.balign 8
    .word 0
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

.section .bss.stacks, "aw", @nobits
.balign 16
    .skip 0x4000
boot_stack_top:
    .skip 0x4000
timer_stack_top:
    .skip 0x4000
exception_stack_top:
    .skip 0x4000
critical_stack_top:
