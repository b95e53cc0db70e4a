/* Frames of 96 KiB and of 2 MiB. */
#include "suite.h"

SPIN(spin)

#define FRAME(name, words, callee)                                                                                     \
    NOINLINE uint64_t name(uint64_t seed)                                                                              \
    {                                                                                                                  \
        volatile uint64_t own[words];                                                                                  \
        own[seed % (words)] = seed;                                                                                    \
        return callee(seed) + own[seed % (words)];                                                                     \
    }

FRAME(frame_of_96_kib, 12288, spin)
FRAME(frame_of_2_mib, 262144, frame_of_96_kib)

int main(void)
{
    for (uint64_t seed = 1;;)
        seed = frame_of_2_mib(seed) + 1;
}
