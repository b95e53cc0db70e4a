/* Runs itself again and again, for 50 ms each time. */
#define _GNU_SOURCE
#include "suite.h"
#include <spawn.h>
#include <sys/wait.h>
#include <time.h>

SPIN(spin)

extern char **environ;
static volatile uint64_t result;

NOINLINE int work(void)
{
    struct timespec used;
    do {
        result = spin(result);
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    } while (used.tv_sec == 0 && used.tv_nsec < 50000000);
    return (int)(result & 1);
}

int main(int argc, char **argv)
{
    char *arguments[] = {argv[0], "child", 0};
    pid_t child;
    if (argc > 1)
        return work();
    while (!posix_spawn(&child, argv[0], 0, 0, arguments, environ))
        waitpid(child, 0, 0);
    return 1;
}
