# The IDT and its entry points. The stubs stand at 0x100000, 16 bytes apart (link.ld checks the address), so that the
# IDT's split addresses are constants. The vectors come from boot.rs.

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
timer_stub:                         # 32
    jmp timer_common
    .balign 16
spurious_stub:                      # 33
    iretq                           # a spurious interrupt gets no EOI (Intel SDM vol. 3, "Spurious Interrupt")
    .balign 16
smp_timer_stub:                     # 34
    jmp smp_timer_common
    .balign 16
ipi_stub:                           # 35
    jmp ipi_common
    .balign 16
wake_stub:                          # 36
    jmp wake_common

# The CPU aligned the stack and pushed five words; nine more leave it aligned for the call.
.macro interrupt name, entry
\name:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    cld
    call \entry
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    iretq
.endm

interrupt timer_common, timer_entry
interrupt smp_timer_common, smp_timer_entry
interrupt ipi_common, ipi_entry
interrupt wake_common, wake_entry

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
    gate 32, 1
    .fill 16 * (SPURIOUS_VECTOR - TIMER_VECTOR - 1), 1, 0
    gate 33, 1
idt_end:

# For scenario smp, apart: the tick of the others shall not ask which of the two this is.
.balign 16
.global smp_idt, smp_idt_end
smp_idt:
    exception_gates
    .fill 16 * (TIMER_VECTOR - 32), 1, 0
    gate 34, 1
    .fill 16 * (IPI_VECTOR - TIMER_VECTOR - 1), 1, 0
    gate 35, 1
    .fill 16 * (WAKE_VECTOR - IPI_VECTOR - 1), 1, 0
    gate 36, 1
    .fill 16 * (SPURIOUS_VECTOR - WAKE_VECTOR - 1), 1, 0
    gate 33, 1
smp_idt_end:
