# The IDT and its entry points. The stubs stand at 0x100000, 16 bytes apart (link.ld checks the address), so that the
# IDT's split addresses are constants. TIMER_VECTOR and SPURIOUS_VECTOR come from boot.rs.

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
timer_stub:
    jmp timer_common
    .balign 16
spurious_stub:
    iretq                           # a spurious interrupt gets no EOI (Intel SDM vol. 3, "Spurious Interrupt")

# The CPU aligned the stack and pushed five words; nine more leave it aligned for the call.
timer_common:
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
    call timer_entry
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

.section .rodata.idt, "a"
.balign 16
.global idt, idt_end
idt:
.set vector, 0
.rept 32
    .if (vector == 2) | (vector == 8) | (vector == 18)
    gate vector, 3
    .else
    gate vector, 2
    .endif
    .set vector, vector + 1
.endr
    .fill 16 * (TIMER_VECTOR - 32), 1, 0
    gate 32, 1
    .fill 16 * (SPURIOUS_VECTOR - TIMER_VECTOR - 1), 1, 0
    gate 33, 1
idt_end:
