# Every rule of an unwind table once, and a few that a table must refuse.
# Built by:  as -o rules.o rules.s && ld -static --build-id=0x57494e444c415353 -z noseparate-code -o rules.elf rules.o && strip rules.elf

        .text
        .globl _start
_start:                         # the end of the stack
        .cfi_startproc
        .cfi_undefined rip
        xor     %ebp, %ebp
        call    pushes
        hlt
        .cfi_endproc

pushes:                         # two runs, with rbp among the pushes
        .cfi_startproc
        push    %r15
        .cfi_adjust_cfa_offset 8
        push    %rbp
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset rbp, 0
        push    %rbx
        .cfi_adjust_cfa_offset 8
        sub     $0x48, %rsp
        .cfi_adjust_cfa_offset 0x48
        .fill   40, 1, 0x90
        add     $0x48, %rsp
        .cfi_adjust_cfa_offset -0x48
        pop     %rbx
        .cfi_adjust_cfa_offset -8
        pop     %rbp
        .cfi_adjust_cfa_offset -8
        .cfi_restore rbp
        pop     %r15
        .cfi_adjust_cfa_offset -8
        ret
        .cfi_endproc
        .fill   3, 1, 0xcc      # a gap

frame_pointer:
        .cfi_startproc
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset rbp, -16
        mov     %rsp, %rbp
        .cfi_def_cfa_register rbp
        .fill   300, 1, 0x90    # into the next block
        leave
        .cfi_def_cfa rsp, 8
        ret
        .cfi_endproc

realigned:                      # as GCC realigns a stack: CFA in r10, then behind rbp; rbp saved at *rbp
        .cfi_startproc
        lea     8(%rsp), %r10
        .cfi_def_cfa r10, 0
        and     $-32, %rsp
        push    -8(%r10)
        push    %rbp
        mov     %rsp, %rbp
        .cfi_escape 0x10, 0x06, 0x02, 0x76, 0x00                # rbp: expression breg6+0
        push    %r10
        .cfi_escape 0x0f, 0x03, 0x76, 0x78, 0x06                # CFA: breg6-8, deref
        nop
        .cfi_endproc

indexed:                        # CFA: breg7-16, breg9+0, lit8, mul, plus, deref, plus_uconst 8
        .cfi_startproc
        .cfi_escape 0x0f, 0x0a, 0x77, 0x70, 0x79, 0x00, 0x38, 0x1e, 0x22, 0x06, 0x23, 0x08
        nop
        .cfi_endproc

        .balign 16
plt:                            # as ld writes it
        .cfi_startproc
        .cfi_escape 0x0f, 0x0b, 0x77, 0x08, 0x80, 0x00, 0x3f, 0x1a, 0x3b, 0x2a, 0x33, 0x24, 0x22
        .fill   16, 1, 0x90
        .cfi_endproc

vfork:                          # the return address in a register
        .cfi_startproc
        pop     %rdi
        .cfi_adjust_cfa_offset -8
        .cfi_register rip, rdi
        syscall
        push    %rdi
        .cfi_adjust_cfa_offset 8
        .cfi_offset rip, -8
        ret
        .cfi_endproc

        nop
        .macro  at register, offset_low, offset_high
        .cfi_escape 0x10, \register, 0x03, 0x77, \offset_low, \offset_high
        .endm
restore_rt:                     # as glibc's __restore_rt
        .cfi_startproc
        .cfi_signal_frame
        .cfi_escape 0x0f, 0x04, 0x77, 0xa0, 0x01, 0x06          # CFA: breg7+160, deref
        at      8, 0xa8, 0
        at      9, 0xb0, 0
        at      10, 0xb8, 0
        at      11, 0xc0, 0
        at      12, 0xc8, 0
        at      13, 0xd0, 0
        at      14, 0xd8, 0
        at      15, 0xe0, 0
        at      5, 0xe8, 0
        at      4, 0xf0, 0
        at      6, 0xf8, 0
        at      3, 0x80, 1
        at      1, 0x88, 1
        at      0, 0x90, 1
        at      2, 0x98, 1
        at      7, 0xa0, 1
        at      16, 0xa8, 1
        mov     $15, %rax
        syscall
        .cfi_endproc

        # What follows no record can state.
bad_signal:
        .cfi_startproc
        .cfi_signal_frame
        nop
        .cfi_endproc
bad_stack_pointer:
        .cfi_startproc
        .cfi_register rsp, r8
        nop
        .cfi_endproc
bad_frame_pointer:
        .cfi_startproc
        .cfi_register rbp, r9
        nop
        .cfi_endproc
bad_return_address:
        .cfi_startproc
        .cfi_offset rip, -16
        nop
        .cfi_endproc
bad_register:
        .cfi_startproc
        .cfi_def_cfa xmm0, 8
        nop
        .cfi_endproc
bad_expression:                 # CFA: breg7+8, breg6+0, plus
        .cfi_startproc
        .cfi_escape 0x0f, 0x05, 0x77, 0x08, 0x76, 0x00, 0x22
        nop
        .cfi_endproc
bad_offset:                     # CFA: rsp + 2^32
        .cfi_startproc
        .cfi_escape 0x0c, 0x07, 0x80, 0x80, 0x80, 0x80, 0x10
        nop
        .cfi_endproc
malformed:                      # an unknown instruction behind the first row
        .cfi_startproc
        nop
        .cfi_adjust_cfa_offset 8
        nop
        .cfi_escape 0x3f
        nop
        .cfi_endproc
overlapped:                     # four of the eight bytes belong to another FDE too
        .cfi_startproc
        .cfi_undefined rbp
        .fill   8, 1, 0x90
        .cfi_endproc

        .section .eh_frame, "a", @progbits
cie:    .long   cie_end - . - 4
        .long   0
        .byte   1                                               # version
        .asciz  "zR"
        .uleb128 1                                              # code alignment
        .sleb128 -8                                             # data alignment
        .byte   16                                              # return address register
        .uleb128 1
        .byte   0x1b                                            # pcrel | sdata4
        .byte   0x0c, 7, 8                                      # CFA: rsp+8
        .byte   0x90, 1                                         # rip: CFA-8
        .balign 4
cie_end:
fde:    .long   fde_end - . - 4
        .long   . - cie
        .long   overlapped + 2 - .
        .long   4
        .uleb128 0
        .balign 4
fde_end:
        .section .note.GNU-stack, "", @progbits
