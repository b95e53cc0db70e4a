/* Frames aligned beyond what callers give, of constant and of variable size, with vector registers across calls. */
#include "suite.h"
#include <string.h>

#ifndef WIDTH
#define WIDTH 32
#endif
typedef uint64_t vector __attribute__((vector_size(WIDTH)));
enum { LANES = WIDTH / 8 };

NOINLINE vector spin(vector seed)
{
    vector state __attribute__((aligned(2 * WIDTH))) = seed;
    for (unsigned round = 0; round < ROUNDS / 4; round++)
        state = (state ^ round) * UINT64_C(0x2545f4914f6cdd1d) + (state >> 29);
    return state;
}

NOINLINE vector aligned_frame(vector seed)
{
    volatile vector own __attribute__((aligned(4 * WIDTH))) = seed;
    return spin(own) + own;
}

NOINLINE vector variable_frame(vector seed, unsigned count)
{
    vector own[count] __attribute__((aligned(4 * WIDTH)));
    memset(own, (int)count, sizeof own);
    return aligned_frame(seed + own[count / 2]) + own[count - 1];
}

/* Arguments on the stack, reached through the register that holds the stack pointer of before. */
NOINLINE vector many_arguments(vector a, vector b, vector c, vector d, vector e, vector f, vector g, vector h, vector i)
{
    volatile vector own __attribute__((aligned(4 * WIDTH))) = h + i;
    return variable_frame(a + b + c + d + e + f + g + own, 3 + (unsigned)(a[0] & 7)) + own + i;
}

int main(void)
{
    vector seed = {1};
    for (;;)
        seed = many_arguments(seed, seed, seed, seed, seed, seed, seed, seed, seed);
}
