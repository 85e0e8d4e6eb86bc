# The IDT and its entry points. The stubs are at 0x100000, 16 bytes apart (link.ld checks the address), so that the
# IDT's split addresses are constants. The vectors come from boot.rs.
#
# Interrupts save no caller-saved register. They are on in a few assembly blocks only (cpu.rs, load.rs), which declare
# such registers as clobbered: so a handler runs like a function that the block calls. The direction flag is clear
# there.

.section .text.vectors, "ax"
.global exception_stubs
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if (vector == 8) | ((vector >= 10) & (vector <= 14)) | (vector == 17) | (vector == 21) | (vector == 29) | (vector == 30)
    .else
    pushq $0                        # where the CPU pushes no error code
    .endif
    pushq $vector
    jmp exception_common
    .set vector, vector + 1
.endr
    .balign 16
spurious_stub:                      # 32
    iretq                           # a spurious interrupt gets no EOI (Intel SDM vol. 3, "Spurious Interrupt")

# The CPU aligned the stack and pushed five words; one more leaves it aligned for the call.
.macro interrupt name, entry
    .balign 16
\name:
    pushq %rax
    call \entry
    popq %rax
    iretq
.endm

interrupt smp_timer_stub, smp_timer_entry   # 33
interrupt ipi_stub, ipi_entry       # 34
interrupt wake_stub, wake_entry     # 35

    .balign 16
# The clock is read first of all: the page's version, then the TSC. The handler checks the version again.
timer_stub:                         # 36, and 37
    movl TIME_PAGE(%rip), %edi
2:  rdtsc
    .pushsection .trap_sites, "a", @progbits
    .quad 2b
    .long RDTSC_SITE
    .long 0
    .popsection
    movl %eax, %esi
    pushq %rax
    call timer_entry
    popq %rax
    iretq

# Never returns. The order is that of `arch::trap::Frame`, last field first.
exception_common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rbp
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi
    call exception_entry
    ud2

# An interrupt gate: offset (low half 16 * stub, high half 0x10), code segment, IST, present, type 14.
.macro gate stub, ist
    .word 16 * \stub, 0x08
    .byte \ist, 0x8e
    .word 0x10
    .quad 0
.endm

.macro exception_gates
.set vector, 0
.rept 32
    .if (vector == 2) | (vector == 8) | (vector == 18)
    gate vector, 3
    .else
    gate vector, 2
    .endif
    .set vector, vector + 1
.endr
.endm

.section .rodata.idt, "a"
.balign 16
.global idt, idt_end
idt:
    exception_gates
    .fill 16 * (TIMER_VECTOR - 32), 1, 0
    gate 36, 1
    .fill 16 * (SPURIOUS_VECTOR - TIMER_VECTOR - 1), 1, 0
    gate 32, 1
idt_end:

# The IDT of scenario smp. A separate one, so that the tick of the other scenarios needs no check for the scenario.
.balign 16
.global smp_idt, smp_idt_end
smp_idt:
    exception_gates
    .fill 16 * (TIMER_VECTOR - 32), 1, 0
    gate 33, 1
    .fill 16 * (IPI_VECTOR - TIMER_VECTOR - 1), 1, 0
    gate 34, 1
    .fill 16 * (WAKE_VECTOR - IPI_VECTOR - 1), 1, 0
    gate 35, 1
    .fill 16 * (SPURIOUS_VECTOR - WAKE_VECTOR - 1), 1, 0
    gate 32, 1
smp_idt_end:
