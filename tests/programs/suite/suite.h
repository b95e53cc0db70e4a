/* What the programs of the suite of walks share. Functions that a stack must show are NOINLINE, and use what they
   call for after the call, so that no call becomes a jump. */
#ifndef SUITE_H
#define SUITE_H
#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif
#if defined(__clang__)
#define NOINLINE __attribute__((noinline))
#else
#define NOINLINE __attribute__((noipa))
#endif

/* Under a millisecond's work: what a stack spends its time in. */
#define ROUNDS 300000
#define SPIN(name)                                                                                                     \
    NOINLINE uint64_t name(uint64_t seed)                                                                              \
    {                                                                                                                  \
        for (unsigned round = 0; round < ROUNDS; round++)                                                              \
            seed = (seed ^ round) * UINT64_C(0x2545f4914f6cdd1d) + (seed >> 29);                                       \
        return seed;                                                                                                   \
    }

#if defined(__cplusplus)
}
#endif
#endif
