/* libc sorts, and calls back. */
#include "suite.h"
#include <stdlib.h>

enum { ITEMS = 256 };

NOINLINE uint64_t weigh(uint64_t item)
{
    for (unsigned round = 0; round < 2000; round++)
        item = (item ^ round) * UINT64_C(0x2545f4914f6cdd1d) + (item >> 29);
    return item;
}

NOINLINE int compare(const void *left, const void *right)
{
    uint64_t a = weigh(*(const uint64_t *)left), b = weigh(*(const uint64_t *)right);
    return (a > b) - (a < b);
}

NOINLINE uint64_t sort(uint64_t seed)
{
    uint64_t items[ITEMS];
    for (unsigned i = 0; i < ITEMS; i++)
        items[i] = seed = seed * UINT64_C(6364136223846793005) + 1;
    qsort(items, ITEMS, sizeof *items, compare);
    return items[0];
}

int main(void)
{
    for (uint64_t seed = 1;;)
        seed = sort(seed) + 1;
}
