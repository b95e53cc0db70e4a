/* Calls that are jumps: first and second leave no frame. */
#include "suite.h"

SPIN(spin)

NOINLINE uint64_t third(uint64_t seed)
{
    return spin(seed) + 1;
}

NOINLINE uint64_t second(uint64_t seed)
{
    return third(seed + 2);
}

NOINLINE uint64_t first(uint64_t seed)
{
    volatile uint64_t own[4] = {seed};
    uint64_t before = spin(own[0]);
    return second(before);
}

int main(void)
{
    for (uint64_t seed = 1;;)
        seed = first(seed) + 1;
}
