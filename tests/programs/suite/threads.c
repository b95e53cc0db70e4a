/* Many threads, each at a depth of its own. */
#include "suite.h"
#include <pthread.h>

enum { THREADS = 24 };

SPIN(spin)

NOINLINE uint64_t level(uintptr_t depth, uint64_t seed)
{
    return (depth > 1 ? level(depth - 1, seed) : spin(seed)) + depth;
}

NOINLINE void *run(void *argument)
{
    for (uint64_t seed = 1;;)
        seed = level((uintptr_t)argument, seed);
    return 0;
}

int main(void)
{
    pthread_t thread;
    for (uintptr_t depth = 1; depth <= THREADS; depth++)
        if (pthread_create(&thread, 0, run, (void *)depth))
            return 1;
    pthread_join(thread, 0);
    return 0;
}
