/* A library whose frames have FRAME words and whose functions are called by NAME. */
#include "suite.h"

#define JOIN(a, b) a##b
#define CALLED(a, b) JOIN(a, b)
#define INNER CALLED(NAME, _inner)
#define OUTER CALLED(NAME, _outer)

SPIN(INNER)

NOINLINE uint64_t OUTER(uint64_t seed)
{
    volatile uint64_t own[FRAME];
    own[seed % FRAME] = seed;
    return INNER(seed) + own[seed % FRAME];
}

NOINLINE uint64_t enter(uint64_t seed)
{
    return OUTER(seed) + 1;
}
