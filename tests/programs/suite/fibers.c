/* Coroutines of their own kind: fibers.S switches stacks and is what a fiber starts in. */
#include "suite.h"
#include <stdlib.h>

enum { FIBERS = 4, STACK_BYTES = 65536, SAVED = 6 };

SPIN(spin)
SPIN(main_spin)

extern void switch_stacks(void **save, void *next);
extern void fiber_start(void);

static void *scheduler, *fibers[FIBERS];
static volatile uint64_t result;
static int own;

NOINLINE uint64_t descend(unsigned depth)
{
    if (depth > 1)
        return descend(depth - 1) + depth;
    result = spin(result);
    switch_stacks(&fibers[own], scheduler);
    return result;
}

NOINLINE void fiber(void)
{
    for (;;)
        result = descend(10) + 1;
}

int main(void)
{
    for (int i = 0; i < FIBERS; i++) {
        void **top = (void **)((char *)aligned_alloc(64, STACK_BYTES) + STACK_BYTES);
        /* Aligned at the start of fiber_start as behind a call, where there is none. */
        *--top = 0;
        *--top = 0;
        *--top = START;
        for (int j = 0; j < SAVED; j++)
            *--top = 0;
        fibers[i] = top;
    }
    for (own = 0;; own = (own + 1) % FIBERS) {
        result = main_spin(result);
        switch_stacks(&scheduler, fibers[own]);
    }
}
