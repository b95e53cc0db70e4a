/* A busy program whose stacks have as many frames as its first argument says, main and the leaf among them; the second is
 * how many bytes of memory the leaf reads at random, so that the caches are as a program with data leaves them; the third,
 * if there is one, after how many milliseconds of CPU time it ends; the fourth, after how many of the clock, saying how
 * many turns of its work it made. Frames of two functions with different sizes, no frame
 * pointers. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define NOINLINE __attribute__((noinline))

static clock_t end = -1;
static uint64_t end_ms;
static uint64_t mask;
static volatile uint64_t *words;

static uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

NOINLINE uint64_t work(void)
{
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (uint64_t turn = 0;; turn++) {
        if (turn % 65536 == 0 && end != -1 && clock() > end)
            exit(0);
        if (turn % 65536 == 0 && end_ms != 0 && now_ms() > end_ms) {
            printf("%llu\n", (unsigned long long)turn);
            exit(0);
        }
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state += words[state & mask];
        if (state == 0)
            return state;
    }
}

NOINLINE uint64_t odd(unsigned frames);

NOINLINE uint64_t even(unsigned frames)
{
    return (frames == 0 ? work() : odd(frames - 1)) + frames;
}

NOINLINE uint64_t odd(unsigned frames)
{
    volatile uint64_t own[12];
    own[frames % 12] = frames;
    return (frames == 0 ? work() : even(frames - 1)) + own[frames % 12];
}

int main(int argc, char **argv)
{
    /* _start, __libc_start_main, __libc_start_call_main, main, even or odd at 0, work. */
    unsigned frames = argc > 1 ? (unsigned)atoi(argv[1]) - 6 : 51;
    uint64_t bytes = argc > 2 ? (uint64_t)atol(argv[2]) : 4096;
    if (argc > 4)
        end_ms = now_ms() + (uint64_t)atol(argv[4]);
    else if (argc > 3)
        end = (clock_t)atol(argv[3]) * (CLOCKS_PER_SEC / 1000);
    words = calloc(bytes / 8, 8);
    mask = bytes / 8 - 1;
    return words == NULL || even(frames) == 1;
}
