# Ring 3, for load=user: a page of code at USER_BASE, and after it CPU 0's tick ring, read-only.
# The code has no stack and calls nothing.

# The page of code: waits until the word at R13 is not R12. The kernel's handlers preserve these two. It ends with an
# exception, because INT and SYSCALL do not work from ring 3 on all hosts that emulate ring 0.
.section .rodata.user, "a"
.global user_code, user_code_end, user_code_limit
user_code:
1:  cmpq %r12, (%r13)
    je 1b
user_code_end:
    ud2
user_code_limit:

# A function of the C ABI: RDI = the value, RSI = the word's address in user mode. Interrupts are off when it is called
# and when it returns, and on in between.
.section .text.user, "ax"
.global user_run
user_run:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rdi, %r12
    movq %rsi, %r13
    movq %rsp, user_kernel_rsp(%rip)
    movabsq $USER_BASE, %rax
    pushq $USER_DATA
    pushq $0
    pushq $0x202                    # RFLAGS: IF, and the bit that is always one
    pushq $USER_CODE
    pushq %rax
    iretq

# Returns from user_run, out of the exception's handler: the exception's frame is dropped. Its gate turned interrupts
# off.
.global user_end
user_end:
    movq user_kernel_rsp(%rip), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

.section .bss.user, "aw", @nobits
.balign 4096
.global user_directory, user_table, user_page
user_directory:
    .skip 4096
user_table:
    .skip 4096
user_page:
    .skip 4096
user_kernel_rsp:
    .skip 8
