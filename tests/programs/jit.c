/* Code in anonymous memory, as a JIT compiler writes it, that keeps frame pointers and has no call frame information. It
   calls back into C, which keeps none, level by level. Once; or with an argument, again and again. */
#include <string.h>
#include <sys/mman.h>

#define LEVELS 20

/* relay(depth, level): calls pass(depth, level), which calls level(depth), and all return what that does. Nothing of
   what was on the stack before is left in its frame: an old return address might be its own.
   spin(turns): counts down. Copied to where it runs. */
__asm__(".pushsection .rodata\n"
        "code:\n"
        "relay:\n"
        "        push    %rbp\n"
        "        mov     %rsp, %rbp\n"
        "        push    %rbx\n"
        "        push    $0\n"
        "        push    $0\n"
        "        push    $0\n"
        "        lea     1(%rdi), %rbx\n"
        "        call    pass\n"
        "        lea     (%rax, %rbx), %eax\n"
        "        sub     %ebx, %eax\n"
        "        add     $24, %rsp\n"
        "        pop     %rbx\n"
        "        pop     %rbp\n"
        "        ret\n"
        "        .p2align 4, 0xcc\n"
        "pass:\n"
        "        push    %rbp\n"
        "        mov     %rsp, %rbp\n"
        "        call    *%rsi\n"
        "        leave\n"
        "        ret\n"
        "        .p2align 4, 0xcc\n"
        "spin:\n"
        "        push    %rbp\n"
        "        mov     %rsp, %rbp\n"
        "1:      dec     %edi\n"
        "        jne     1b\n"
        "        mov     %edi, %eax\n"
        "        pop     %rbp\n"
        "        ret\n"
        "        .p2align 4, 0xcc\n"
        "code_end:\n"
        ".popsection\n");

extern const char code[], code_end[], relay[], spin[];

static int turns = 10;
static char *memory;
static volatile int sink;

static void *written(const char *function)
{
    return memory + (function - code);
}

__attribute__((noinline)) int compute(int count)
{
    int sum = 0;
    for (int at = 0; at < count; at++)
        sink = sum += at;
    return sum;
}

__attribute__((noinline)) int level(long depth)
{
    int (*in_memory)(long, int (*)(long));
    if (depth == 0) {
        int (*down)(int);
        *(void **)&down = written(spin);
        return down(turns) + compute(turns);
    }
    *(void **)&in_memory = written(relay);
    return in_memory(depth - 1, level) + 1;
}

__attribute__((noinline)) int descend(void)
{
    return level(LEVELS) + 1;
}

int main(int argc, char **argv)
{
    int page = 4096;
    (void)argv;
    memory = mmap(0, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 1;
    memcpy(memory, code, code_end - code);
    if (mprotect(memory, page, PROT_READ | PROT_EXEC))
        return 1;
    if (argc > 1)
        turns = 1000000;
    do
        descend();
    while (argc > 1);
    return 0;
}
