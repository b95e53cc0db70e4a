/* Functions that are followed instruction by instruction from their STOP on. The rules of a prologue, of an
   epilogue and of what the linker and glibc add change with each; most are called by the function that stops. */

#include "cfi.inc"

        .text

        .macro FOLLOWED name
FUNCTION follow_\name
        DOWN    8
        STOP
        call    \name
        UP      8
        ret
END follow_\name
FUNCTION \name
        .endm

FOLLOWED saving
        SAVE    %r15
        SAVE    %r14
        SAVE    %r13
        SAVE    %r12
        SAVE    %rbp
        SAVE    %rbx
        DOWN    0x18
        mov     $1, %ebp
        call    nothing
        UP      0x18
        RESTORE %rbx
        RESTORE %rbp
        RESTORE %r12
        RESTORE %r13
        RESTORE %r14
        RESTORE %r15
        ret
END saving

FUNCTION nothing
        ret
END nothing

FOLLOWED with_frame_pointer
        SAVE    %rbp
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        push    %r15
        push    %r14
        .cfi_offset %r15, -24
        .cfi_offset %r14, -32
        sub     $0x1020, %rsp
        call    nothing
        lea     -16(%rbp), %rsp
        pop     %r14
        pop     %r15
        pop     %rbp
        .cfi_def_cfa %rsp, 8
        ret
END with_frame_pointer

FOLLOWED with_leave
        SAVE    %rbp
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        sub     $32, %rsp
        leave
        .cfi_def_cfa %rsp, 8
        ret
END with_leave

/* Arguments on the stack: longer than what one entry of a table folds. */
FOLLOWED pushing_arguments
        .rept   6
        PUSH_VALUE $0x12345678
        .endr
        .rept   12
        PUSH_VALUE %rax
        .endr
        call    nothing
        UP      144
        ret
END pushing_arguments

/* An epilogue in the middle, as of an early return; its rows are put back for what follows. */
FOLLOWED remembering
        SAVE    %rbx
        .cfi_remember_state
        SAVE    %r12
        .cfi_remember_state
        SAVE    %rbp
        mov     $3, %ebp
        DOWN    40
        .cfi_remember_state
        jmp     1f
        UP      40
        .cfi_def_cfa %rbp, 0x1000
        ret
1:      .cfi_restore_state
        nop
        UP      40
        nop
        pop     %rbp
        .cfi_restore_state
        nop
        pop     %r12
        .cfi_restore_state
        nop
        RESTORE %rbx
        ret
END remembering

FOLLOWED tail_calling
        SAVE    %rbx
        DOWN    16
        call    nothing
        UP      16
        RESTORE %rbx
        jmp     tail_called
END tail_calling

FUNCTION tail_called
        SAVE    %rbp
        xor     %ebp, %ebp
        RESTORE %rbp
        ret
END tail_called

/* Compilers put what is hardly run elsewhere, with information of its own that begins in the middle. */
FOLLOWED hot
        SAVE    %rbp
        mov     $0x55, %ebp
        SAVE    %rbx
        DOWN    8
        jmp     cold
        BARE    hot_again
        UP      8
        RESTORE %rbx
        RESTORE %rbp
        ret
END hot
        .section .text.unlikely, "ax", @progbits
        BARE    cold
        .cfi_startproc
        .cfi_def_cfa_offset 32
        .cfi_offset %rbp, -16
        .cfi_offset %rbx, -24
        call    nothing
        jmp     hot_again
END cold
        .text

/* GCC's frame for variables of larger alignment than the stack's: r10 points at the arguments (DRAP), and rbp
   is saved where it points. GCC says so still behind `leave`, which has made rbp the caller's. */
FOLLOWED realigning
        lea     8(%rsp), %r10
        .cfi_def_cfa %r10, 0
        and     $-64, %rsp
        push    -8(%r10)
        push    %rbp
        mov     %rsp, %rbp
        .cfi_escape 0x10, 6, 2, 0x76, 0
        push    %r10
        CFA_IS  3, 0x76, 0x78, 0x06
        sub     $120, %rsp
        call    nothing
        mov     -8(%rbp), %r10
        .cfi_def_cfa %r10, 0
        leave
        lea     -8(%r10), %rsp
        .cfi_def_cfa %rsp, 8
        ret
END realigning

/* The first call of a function of another image: binds it. */
FUNCTION follow_binding
        DOWN    8
        STOP
        call    getppid@PLT
        UP      8
        ret
END follow_binding

/* The first instructions of glibc's vfork keep the return address in a register, for the child to return on the
   same stack. */
FUNCTION follow_vfork
        DOWN    8
        mov     vfork@GOTPCREL(%rip), %rax
        STOP
        call    *%rax
        UP      8
        ret
END follow_vfork

        .section .note.GNU-stack, "", @progbits
