.globl _start
_start:
        xor %ebp, %ebp
        mov $1, %edi
        call main
        hlt
        .section .note.GNU-stack, "", @progbits
