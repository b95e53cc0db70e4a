// Exceptions on their way through frames that have something to clean up.
#include "suite.h"

extern "C" {
static volatile uint64_t cleaned;

NOINLINE void clean(uint64_t seed)
{
    for (unsigned round = 0; round < 2000; round++)
        seed = (seed ^ round) * UINT64_C(0x2545f4914f6cdd1d) + (seed >> 29);
    cleaned = cleaned + seed;
}

struct Cleaned {
    uint64_t seed;
    ~Cleaned() { clean(seed); }
};

NOINLINE void thrower(uint64_t seed)
{
    throw seed;
}

NOINLINE uint64_t level(unsigned depth, uint64_t seed)
{
    Cleaned own{seed};
    if (depth == 1)
        thrower(seed);
    else
        own.seed += level(depth - 1, seed + 1);
    return own.seed;
}

NOINLINE uint64_t catcher(uint64_t seed)
{
    try {
        return level(12, seed);
    } catch (uint64_t caught) {
        return caught * 3;
    }
}
}

int main()
{
    for (uint64_t seed = 1;;)
        seed = catcher(seed) + 1;
}
