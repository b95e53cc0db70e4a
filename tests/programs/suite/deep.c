/* deep PAIRS: work at the bottom of that many pairs of calls. */
#include "suite.h"
#include <stdlib.h>

SPIN(spin)

NOINLINE uint64_t descend_even(unsigned pairs, uint64_t seed);

NOINLINE uint64_t descend_odd(unsigned pairs, uint64_t seed)
{
    uint64_t own[8] = {seed, pairs};
    uint64_t below = pairs == 1 ? spin(seed) : descend_even(pairs - 1, own[seed & 7]);
    return below + own[pairs & 7];
}

NOINLINE uint64_t descend_even(unsigned pairs, uint64_t seed)
{
    return descend_odd(pairs, seed) ^ pairs;
}

int main(int argc, char **argv)
{
    unsigned pairs = argc > 1 ? (unsigned)atoi(argv[1]) : 1;
    for (uint64_t seed = 1;;)
        seed = descend_even(pairs, seed);
}
