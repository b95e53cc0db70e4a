/* Runs each function of rules.S and followed.S that is named on the command line in a thread of its own.
   None returns. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

/* Most threads. */
#define MOST 1024

extern void enter(void *function, uint64_t *rsp);
extern void on_invalid_instruction(int), on_segmentation_fault(int), on_division(int);

/* What the test reads: of each thread its number, and its stack pointer in `enter`. */
struct entry {
    uint64_t tid;
    uint64_t rsp;
} entries[MOST];

static char **names;
static char signal_stacks[MOST][16384];

static void *run(void *argument)
{
    uintptr_t index = (uintptr_t)argument;
    char above[sizeof signal_stacks[0]];
    /* Of two threads one takes its signals below its stack, and one above its frames. */
    stack_t stack = {.ss_sp = index % 2 ? above : signal_stacks[index], .ss_size = sizeof above};
    void *function = dlsym(RTLD_DEFAULT, names[index]);
    if (!function || sigaltstack(&stack, 0))
        abort();
    entries[index].tid = (uint64_t)gettid();
    enter(function, &entries[index].rsp);
    abort();
}

static void handle(int signal, void (*handler)(int), int flags)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    if (sigaction(signal, &action, 0))
        abort();
}

int main(int argc, char **argv)
{
    pthread_t thread;
    if (argc - 1 > MOST)
        return 1;
    names = argv + 1;
    handle(SIGILL, on_invalid_instruction, 0);
    handle(SIGSEGV, on_segmentation_fault, SA_ONSTACK);
    handle(SIGFPE, on_division, SA_ONSTACK);
    for (uintptr_t index = 0; index < (uintptr_t)argc - 1; index++)
        if (pthread_create(&thread, 0, run, (void *)index))
            return 1;
    pthread_join(thread, 0);
    return 0;
}
