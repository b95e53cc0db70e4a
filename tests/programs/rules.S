/* Functions that need each rule of an unwind table. Each is run by `enter` (below) in a thread of its own and
   comes to a STOP; the test takes it from there. What a function is to show, its call frame information says
   with the rule as a compiler, a linker, glibc or OpenSSL writes it; the bodies do what the information
   says and nothing else. */

#include "cfi.inc"

        .text

/* enter(function, rsp): calls the function and leaves in *rsp the stack pointer, which is also rbp, that
   the function's caller has. So there is a frame of which all is known whatever lies inside. */
FUNCTION enter
        SAVE    %rbp
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        mov     %rsp, (%rsi)
        call    *%rdi
        BARE    entered
        leave
        .cfi_def_cfa %rsp, 8
        ret
END enter

/* ---- cfa = register + n ---- */

FUNCTION cfa_near
        DOWN    24
        STOP
END cfa_near

/* More than fits 16 bits. */
FUNCTION cfa_far
        DOWN    0x12348
        STOP
END cfa_far

FUNCTION cfa_in_rbp
        SAVE    %rbp
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        and     $-64, %rsp
        sub     $0x1000, %rsp
        STOP
END cfa_in_rbp

/* The loader's lazy binding has its frame in rbx, glibc's memory functions and OpenSSL's assembly in others. */
        .irp    register, rax, rdx, rcx, rbx, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
FUNCTION cfa_in_\register
        mov     %rsp, %\register
        .cfi_def_cfa_register %\register
        and     $-64, %rsp
        sub     $128, %rsp
        STOP
END cfa_in_\register
        .endr

/* The same in a frame that is not the innermost: a walk keeps rsp and rbp, not rbx. */
FUNCTION cfa_in_rbx_of_caller
        SAVE    %rbx
        mov     %rsp, %rbx
        .cfi_def_cfa_register %rbx
        and     $-64, %rsp
        call    cfa_near
        ud2
END cfa_in_rbx_of_caller

/* Behind a signal frame every register is known again. */
FUNCTION cfa_in_rbx_at_fault
        SAVE    %rbx
        mov     %rsp, %rbx
        .cfi_def_cfa_register %rbx
        and     $-64, %rsp
        ud2
END cfa_in_rbx_at_fault

/* ---- cfa = *(register + a) + b ---- */

/* OpenSSL: .cfi_cfa_expression %rsp+40,deref,+8 */
FUNCTION cfa_at_rsp
        mov     %rsp, %rax
        .cfi_def_cfa_register %rax
        sub     $128, %rsp
        and     $-64, %rsp
        mov     %rax, 40(%rsp)
        CFA_IS  5, 0x77, 40, 0x06, 0x23, 8
        xor     %eax, %eax
        STOP
END cfa_at_rsp

/* The same below the stack pointer, as in OpenSSL's epilogues. */
FUNCTION cfa_below_rsp
        mov     %rsp, %rax
        .cfi_def_cfa_register %rax
        and     $-64, %rsp
        mov     %rax, -8(%rsp)
        CFA_IS  5, 0x77, 0x78, 0x06, 0x23, 8
        xor     %eax, %eax
        STOP
END cfa_below_rsp

FUNCTION cfa_at_rbp
        mov     %rsp, %rax
        .cfi_def_cfa_register %rax
        push    %rbp
        .cfi_rel_offset %rbp, -8
        mov     %rsp, %rbp
        sub     $256, %rsp
        and     $-64, %rsp
        sub     $128, %rbp
        mov     %rax, 88(%rbp)
        CFA_IS  6, 0x76, 0xd8, 0, 0x06, 0x23, 8
        xor     %eax, %eax
        STOP
END cfa_at_rbp

FUNCTION cfa_at_rbx
        mov     %rsp, %rbx
        .cfi_def_cfa_register %rbx
        sub     $256, %rsp
        and     $-64, %rsp
        mov     %rbx, 32(%rsp)
        lea     48(%rsp), %rbx
        CFA_IS  5, 0x73, 0x70, 0x06, 0x23, 8
        STOP
END cfa_at_rbx

/* A negative b. */
FUNCTION cfa_at_rsp_minus
        lea     64(%rsp), %rax
        .cfi_def_cfa %rax, -56
        sub     $128, %rsp
        and     $-64, %rsp
        mov     %rax, 40(%rsp)
        CFA_IS  6, 0x77, 40, 0x06, 0x11, 0x48, 0x22
        xor     %eax, %eax
        STOP
END cfa_at_rsp_minus

/* ---- cfa = *(rsp + 8 * r9 + a) + b: OpenSSL's bn_mul_mont, whose frame is as long as its number ---- */

FUNCTION cfa_behind_r9_words
        mov     %rsp, %rax
        .cfi_def_cfa_register %rax
        mov     $37, %r9d
        sub     $(8 * 37 + 16), %rsp
        and     $-1024, %rsp
        mov     %rax, 8(%rsp, %r9, 8)
        CFA_IS  10, 0x77, 8, 0x79, 0, 0x38, 0x1e, 0x22, 0x06, 0x23, 8
        xor     %eax, %eax
        STOP
END cfa_behind_r9_words

/* ---- other expressions: unsupported ---- */

/* cfa = (rsp + 24) ^ 0 */
FUNCTION cfa_unsupported
        DOWN    16
        CFA_IS  4, 0x77, 24, 0x30, 0x27
        STOP
END cfa_unsupported

/* ---- the return address ---- */

/* glibc's vfork: the caller's stack pointer is the frame's own. */
FUNCTION return_in_rdi
        pop     %rdi
        .cfi_adjust_cfa_offset -8
        .cfi_register %rip, %rdi
        STOP
END return_in_rdi

/* The same with something on the stack. */
FUNCTION return_in_rdi_above
        pop     %rdi
        .cfi_adjust_cfa_offset -8
        .cfi_register %rip, %rdi
        DOWN    40
        STOP
END return_in_rdi_above

/* Behind a signal frame rdi is known, in a caller it is not. */
FUNCTION return_in_rdi_at_fault
        pop     %rdi
        .cfi_adjust_cfa_offset -8
        .cfi_register %rip, %rdi
        DOWN    40
        ud2
END return_in_rdi_at_fault

FUNCTION return_in_rbx_of_caller
        pop     %rbx
        .cfi_adjust_cfa_offset -8
        .cfi_register %rip, %rbx
        DOWN    40
        call    cfa_near
        ud2
END return_in_rbx_of_caller

FUNCTION return_elsewhere
        DOWN    40
        mov     40(%rsp), %rax
        movq    $0, 40(%rsp)
        mov     %rax, 16(%rsp)
        .cfi_offset %rip, -32
        STOP
END return_elsewhere

/* Above a saved rbp, as behind `enter` with a nesting level or a switch of stacks. */
FUNCTION return_above_rbp
        DOWN    40
        mov     40(%rsp), %rax
        movq    $0, 40(%rsp)
        mov     %rax, 16(%rsp)
        mov     %rbp, 8(%rsp)
        .cfi_offset %rip, -32
        .cfi_offset %rbp, -40
        xor     %ebp, %ebp
        STOP
END return_above_rbp

FUNCTION return_undefined
        .cfi_undefined %rip
        DOWN    8
        STOP
END return_undefined

/* ---- rbp ---- */

FUNCTION rbp_elsewhere
        DOWN    40
        mov     %rbp, 8(%rsp)
        .cfi_rel_offset %rbp, 8
        mov     $0x1234, %ebp
        STOP
END rbp_elsewhere

/* Saved where another register points than rbp: unsupported. */
FUNCTION rbp_at_rsp
        DOWN    40
        mov     %rbp, 8(%rsp)
        .cfi_escape 0x10, 6, 2, 0x77, 8
        mov     $0x1234, %ebp
        STOP
END rbp_at_rsp

/* `enter`, whose frame is in rbp, has no caller without it. */
FUNCTION rbp_undefined
        .cfi_undefined %rbp
        xor     %ebp, %ebp
        STOP
END rbp_undefined

FUNCTION rbp_in_register
        mov     %rbp, %rbx
        .cfi_register %rbp, %rbx
        xor     %ebp, %ebp
        STOP
END rbp_in_register

/* No information at all. */
        .p2align 4
        BARE    uncovered
        STOP
        .size   uncovered, . - uncovered

/* ---- signals: an invalid instruction raises SIGILL, `hlt` SIGSEGV, a division by zero SIGFPE ---- */

/* The row begins at the instruction that faults; the one before it is of another frame. */
FUNCTION fault_after_push
        SAVE    %rbp
        xor     %ebp, %ebp
        SAVE    %rbx
        ud2
END fault_after_push

/* The first byte of a function behind one whose rules fit nothing here. */
FUNCTION before_fault
        .cfi_def_cfa %rbp, 0x1000
        nop
END before_fault
        BARE    fault_at_first_byte
        .cfi_startproc
        ud2
END fault_at_first_byte

FUNCTION fault_before_other_stack
        SAVE    %rbp
        mov     $0x77, %ebp
        hlt
END fault_before_other_stack

FUNCTION fault_in_handler
        SAVE    %r12
        xor     %ecx, %ecx
        div     %ecx
END fault_in_handler

/* Handlers. */
FUNCTION on_invalid_instruction
        STOP
END on_invalid_instruction

FUNCTION on_segmentation_fault
        SAVE    %rbp
        xor     %ebp, %ebp
        STOP
END on_segmentation_fault

FUNCTION on_division
        SAVE    %rbp
        mov     $0x55, %ebp
        ud2
END on_division

/* ---- where a call returns to ---- */

/* A call that does not return ends the function; behind it another begins, whose rules fit nothing here. */
FUNCTION call_at_the_end
        DOWN    56
        call    cfa_near
END call_at_the_end
        BARE    behind_call_at_the_end
        .cfi_startproc
        .cfi_def_cfa %rbp, 0x1000
        nop
END behind_call_at_the_end

        .section .note.GNU-stack, "", @progbits
