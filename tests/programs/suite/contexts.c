/* Coroutines of libc: stacks that start in makecontext. */
#include "suite.h"
#include <stdlib.h>
#include <ucontext.h>

enum { FIBERS = 4, STACK_BYTES = 65536 };

SPIN(spin)
SPIN(main_spin)

static ucontext_t scheduler, fibers[FIBERS];
static volatile uint64_t result;

NOINLINE uint64_t descend(unsigned depth, int own)
{
    /* Nothing of before is left where the stack pointer is. */
    volatile uint64_t at_stack_pointer[3] = {depth, depth, depth};
    if (depth > 1)
        return descend(depth - 1, own) + at_stack_pointer[own & 1];
    result = spin(result);
    swapcontext(&fibers[own], &scheduler);
    return result;
}

NOINLINE void fiber(int own)
{
    for (;;)
        result = descend(10, own) + 1;
}

int main(void)
{
    for (int i = 0; i < FIBERS; i++) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = malloc(STACK_BYTES);
        fibers[i].uc_stack.ss_size = STACK_BYTES;
        fibers[i].uc_link = &scheduler;
        makecontext(&fibers[i], (void (*)(void))fiber, 1, i);
    }
    for (int i = 0;; i = (i + 1) % FIBERS) {
        result = main_spin(result);
        swapcontext(&scheduler, &fibers[i]);
    }
}
