// Frames of aarch64 that a compiler makes seldom or never. SIGN and AUTHENTICATE are the hints `paciasp` and
// `autiasp`, or those of the B key: without pointer authentication they do nothing.
#ifdef B_KEY
#define SIGN hint 27
#define AUTHENTICATE hint 31
#define KEY .cfi_b_key_frame
#else
#define SIGN hint 25
#define AUTHENTICATE hint 29
#define KEY
#endif

    .section stepped, "ax", %progbits

    .macro function name
    .balign 16
    .global \name
    .type \name, %function
\name:
    .cfi_startproc
    KEY
    .endm

    .macro end name
    .cfi_endproc
    .size \name, . - \name
    .endm

// x30 saved, x29 not.
function x30_alone
    SIGN
    .cfi_negate_ra_state
    str x30, [sp, -16]!
    .cfi_def_cfa_offset 16
    .cfi_offset x30, -16
    bl leaf
    ldr x30, [sp], 16
    .cfi_def_cfa_offset 0
    .cfi_restore x30
    AUTHENTICATE
    .cfi_negate_ra_state
    ret
end x30_alone

// x29 and x30 at the top of the frame, as LLVM stores them.
function pair_at_the_top
    SIGN
    .cfi_negate_ra_state
    sub sp, sp, 48
    .cfi_def_cfa_offset 48
    stp x29, x30, [sp, 32]
    .cfi_offset x29, -16
    .cfi_offset x30, -8
    add x29, sp, 32
    .cfi_def_cfa x29, 16
    bl body
    .cfi_def_cfa sp, 48
    ldp x29, x30, [sp, 32]
    .cfi_restore x29
    .cfi_restore x30
    add sp, sp, 48
    .cfi_def_cfa_offset 0
    AUTHENTICATE
    .cfi_negate_ra_state
    ret
end pair_at_the_top

// The return address is kept in a register, as outlined code does. While another function runs, nothing says
// that the register still holds it: there the stack ends early.
function return_address_in_x10
    mov x10, x30
    .cfi_register x30, x10
    nop
    bl leaf_of_x10
    mov x30, x10
    .cfi_restore x30
    ret
end return_address_in_x10

function leaf_of_x10
    nop
    ret
end leaf_of_x10

// A leaf whose CFA is neither by the stack pointer nor by x29.
function frame_on_x9
    mov x9, sp
    .cfi_def_cfa x9, 0
    sub sp, sp, 32
    nop
    mov sp, x9
    .cfi_def_cfa sp, 0
    ret
end frame_on_x9

// A leaf that faults: its return address is in x30, and only the signal's context still has it. The instruction
// in front of the one that faults has another CFA.
function fault
    mov x0, 0
    sub sp, sp, 16
    .cfi_def_cfa_offset 16
    ldr x0, [x0]
    .global fault_resumed
fault_resumed:
    add sp, sp, 16
    .cfi_def_cfa_offset 0
    ret
end fault

// The kernel's trampoline with its CFI (arch/arm64/kernel/vdso/sigreturn.S): in front of it a `nop`, on which
// a return address minus one falls.
    .balign 16
    .cfi_startproc
    .cfi_signal_frame
    .cfi_def_cfa x29, 0
    .cfi_offset x29, 0
    .cfi_offset x30, 8
    nop
    .global kernel_like_restorer
    .type kernel_like_restorer, %function
kernel_like_restorer:
    mov x8, 139
    svc 0
    .cfi_endproc
    .size kernel_like_restorer, . - kernel_like_restorer

    .section .note.GNU-stack, "", %progbits
