/* A busy program whose stacks have as many frames as its first argument says, main and the leaf among them; the second is
 * how many bytes of memory the leaf reads at random, so that the caches are as a program with data leaves them; the third,
 * if it is not 0, after how many milliseconds of CPU time it ends; the fourth, if it is not 0, how many milliseconds it
 * sleeps after each 65,536 turns of its loop, some 200 microseconds; the fifth, after how many milliseconds of the clock it
 * ends and says how many turns it made. Frames of two functions with different sizes, no frame
 * pointers. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define NOINLINE __attribute__((noinline))

static clock_t end = -1;
static uint64_t end_ms;
static unsigned pause_us;
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
        if (turn % 65536 == 0) {
            if (end != -1 && clock() > end)
                exit(0);
            if (end_ms != 0 && now_ms() > end_ms) {
                printf("%llu\n", (unsigned long long)turn);
                exit(0);
            }
            if (pause_us != 0)
                usleep(pause_us);
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
    if (argc > 3 && atol(argv[3]) != 0)
        end = (clock_t)atol(argv[3]) * (CLOCKS_PER_SEC / 1000);
    if (argc > 4)
        pause_us = (unsigned)atoi(argv[4]) * 1000;
    if (argc > 5)
        end_ms = now_ms() + (uint64_t)atol(argv[5]);
    words = calloc(bytes / 8, 8);
    mask = bytes / 8 - 1;
    return words == NULL || even(frames) == 1;
}
