/* Frames of aarch64 as GCC makes them; aarch64.S has those that it makes seldom or never. The test steps through
   all of this section, so nothing here depends on where anything else lies. */
#include <alloca.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define STEPPED __attribute__((noipa, section("stepped")))
#define FAULT_BYTES 4

unsigned long x30_alone(unsigned long);
unsigned long pair_at_the_top(unsigned long);
unsigned long return_address_in_x10(unsigned long);
unsigned long frame_on_x9(unsigned long);
unsigned long fault(void);
void kernel_like_restorer(void);

/* A whole number of pages; the test takes its end for the end of the thread's stack. */
_Alignas(65536) unsigned char thread_stack[2 * 65536];
static volatile unsigned long sink;

STEPPED unsigned long leaf(unsigned long value)
{
    return value * 3 + sink;
}

STEPPED unsigned long body(unsigned long value)
{
    return leaf(value + 1) + leaf(value);
}

STEPPED unsigned long variable(unsigned long count)
{
    unsigned char bytes[count], *more = alloca(2 * count);
    bytes[0] = more[0] = 1;
    __asm__ volatile("" : : "r"(bytes), "r"(more) : "memory");
    return body(count) + bytes[0];
}

/* More than an instruction's immediate value holds, so that the stack pointer moves in two steps. */
STEPPED unsigned long large(unsigned long count)
{
    unsigned char bytes[9000];
    __asm__ volatile("" : : "r"(bytes) : "memory");
    return body(count) + bytes[count];
}

/* What is saved at the frame's lower end is further from its CFA than 16 bits say. */
STEPPED unsigned long huge(unsigned long count)
{
    unsigned char bytes[70000];
    __asm__ volatile("" : : "r"(bytes) : "memory");
    return body(count) + bytes[count];
}

/* Each way out has an epilogue of its own. */
STEPPED unsigned long several_ends(unsigned long value)
{
    if (value == 0)
        return 1;
    if (leaf(value) == 6)
        return body(value) + 1;
    return body(value + 1) * 2;
}

STEPPED unsigned long many_registers(unsigned long a, unsigned long b)
{
    unsigned long c = leaf(a), d = leaf(b), e = leaf(c), f = leaf(d), g = leaf(e), h = leaf(f);
    return leaf(a + b + c + d + e + f + g + h) + a * b + c * d + e * f + g * h;
}

STEPPED void on_fault(int number, siginfo_t *info, void *context)
{
    (void)info;
    ((ucontext_t *)context)->uc_mcontext.pc += FAULT_BYTES;
    sink += body((unsigned long)number);
}

STEPPED void *in_thread(void *argument)
{
    sink += variable((unsigned long)argument);
    return argument;
}

/* What sigaction() does, but for a trampoline of the caller's. */
static void set_handler(void (*restorer)(void))
{
    struct {
        void (*handler)(int, siginfo_t *, void *);
        unsigned long flags;
        void (*restorer)(void);
        unsigned long mask;
    } action = {on_fault, SA_SIGINFO | (restorer ? 0x04000000 : 0), restorer, 0};
    syscall(SYS_rt_sigaction, SIGSEGV, &action, NULL, sizeof action.mask);
}

int main(int argc, char **argv)
{
    (void)argv;
    sink += body(argc) + variable(100) + large(argc) + huge(argc) + many_registers(1, 2);
    sink += several_ends(0) + several_ends(2) + several_ends(3);
    sink += x30_alone(1) + pair_at_the_top(1) + return_address_in_x10(1) + frame_on_x9(1);
    set_handler(kernel_like_restorer);
    sink += fault();
    set_handler(NULL);
    sink += fault();
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstack(&attributes, thread_stack, sizeof thread_stack);
    if (pthread_create(&thread, &attributes, in_thread, (void *)64) != 0)
        return 1;
    pthread_join(thread, NULL);
    return 0;
}
