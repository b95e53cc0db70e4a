/* Children that run on their parent's stack before they become another program, this one. */
#define _GNU_SOURCE
#include "suite.h"
#include <sys/wait.h>
#include <unistd.h>

SPIN(spin)
SPIN(child_spin)
SPIN(parent_spin)

static volatile uint64_t result;

NOINLINE uint64_t launch(const char *self, unsigned depth)
{
    if (depth > 1)
        return launch(self, depth - 1) + depth;
    pid_t child = vfork();
    if (child == 0) {
        for (int i = 0; i < 10; i++)
            result = child_spin(result);
        execl(self, self, "child", (char *)0);
        _exit(1);
    }
    for (int i = 0; i < 10; i++)
        result = parent_spin(result);
    waitpid(child, 0, 0);
    return result;
}

NOINLINE int as_child(void)
{
    for (int i = 0; i < 100; i++)
        result = spin(result);
    return (int)(result & 1);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        return as_child();
    for (;;)
        result = launch(argv[0], 5) + 1;
}
