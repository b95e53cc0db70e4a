/* The time, from the kernel's code in the process. */
#include "suite.h"
#include <sys/time.h>
#include <time.h>

NOINLINE uint64_t ask(void)
{
    struct timespec now;
    struct timeval day;
    clock_gettime(CLOCK_MONOTONIC, &now);
    gettimeofday(&day, 0);
    return (uint64_t)now.tv_nsec + (uint64_t)day.tv_usec;
}

int main(void)
{
    for (volatile uint64_t sum = 0;;)
        sum = sum + ask();
}
