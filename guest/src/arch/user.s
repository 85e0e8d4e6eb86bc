# Ring 3, for load=user: a page of code at USER_BASE, and after it CPU 0's tick ring, to be looked at.
# The code has no stack and calls nothing.

# What the page of code holds: waits until the word at R13 is not R12. The kernel's handlers keep these two. It ends with
# an exception, because INT and SYSCALL do not lead from ring 3 to ring 0 on all hosts that emulate the latter.
.section .rodata.user, "a"
.global user_code, user_code_end, user_code_limit
user_code:
1:  cmpq %r12, (%r13)
    je 1b
user_code_end:
    ud2
user_code_limit:

# As a function of the C ABI: RDI = the value, RSI = where user code finds the word. Interrupts are closed when it is
# called and when it returns, and open in between.
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

# The kernel goes on, out of the exception's handler, whose frame nobody needs. Its gate closed interrupts.
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
