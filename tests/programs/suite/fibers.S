/* With call frame information, or without: -DBARE. */
#ifdef BARE
#define CFI(...)
#else
#define CFI(...) __VA_ARGS__
#endif

        .text
        .globl  switch_stacks
        .type   switch_stacks, @function
switch_stacks:
        CFI(.cfi_startproc)
        push    %rbp
        CFI(.cfi_adjust_cfa_offset 8; .cfi_rel_offset %rbp, 0)
        push    %rbx
        CFI(.cfi_adjust_cfa_offset 8)
        push    %r12
        CFI(.cfi_adjust_cfa_offset 8)
        push    %r13
        CFI(.cfi_adjust_cfa_offset 8)
        push    %r14
        CFI(.cfi_adjust_cfa_offset 8)
        push    %r15
        CFI(.cfi_adjust_cfa_offset 8)
        mov     %rsp, (%rdi)
        mov     %rsi, %rsp
        pop     %r15
        CFI(.cfi_adjust_cfa_offset -8)
        pop     %r14
        CFI(.cfi_adjust_cfa_offset -8)
        pop     %r13
        CFI(.cfi_adjust_cfa_offset -8)
        pop     %r12
        CFI(.cfi_adjust_cfa_offset -8)
        pop     %rbx
        CFI(.cfi_adjust_cfa_offset -8)
        pop     %rbp
        CFI(.cfi_adjust_cfa_offset -8; .cfi_restore %rbp)
        ret
        CFI(.cfi_endproc)
        .size   switch_stacks, . - switch_stacks

        .globl  fiber_start
        .type   fiber_start, @function
fiber_start:
        CFI(.cfi_startproc; .cfi_undefined %rip)
        call    fiber
        ud2
        CFI(.cfi_endproc)
        .size   fiber_start, . - fiber_start

        .section .note.GNU-stack, "", @progbits
