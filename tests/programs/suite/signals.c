/* A timer's signals on a stack of their own interrupt a deep stack; "jump" leaves the handler by siglongjmp. */
#define _GNU_SOURCE
#include "suite.h"
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/time.h>

SPIN(spin)
SPIN(handler_spin)

static sigjmp_buf back;
static int jumps;
static volatile uint64_t handled;

NOINLINE void handler(int signal)
{
    for (int i = 0; i < 4; i++)
        handled = handled + handler_spin((uint64_t)signal);
    if (jumps)
        siglongjmp(back, 1);
}

NOINLINE uint64_t descend(unsigned depth, uint64_t seed)
{
    if (depth == 1)
        for (;;)
            seed = spin(seed);
    return descend(depth - 1, seed) + depth;
}

int main(int argc, char **argv)
{
    (void)argv;
    jumps = argc > 1;
    stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_ONSTACK};
    struct itimerval every = {{0, 4000}, {0, 4000}};
    if (sigaltstack(&stack, 0) || sigaction(SIGPROF, &action, 0) || setitimer(ITIMER_PROF, &every, 0))
        return 1;
    sigsetjmp(back, 1);
    return (int)descend(40, handled);
}
