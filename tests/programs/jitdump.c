/* A compiler at run time, that writes down what it makes as jitdump (the kernel's
 * tools/perf/Documentation/jitdump-specification.txt): a function of each name in turn at the same place, and one
 * that it moves.
 *
 *     jitdump FOLDER     for as long as it is left alone
 */
#include <elf.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static int dump;

struct head {
	uint32_t kind, size;
	uint64_t time;
};

static void loaded(void *code, uint64_t size, const char *name)
{
	struct {
		struct head head;
		uint32_t process, thread;
		uint64_t address, code, size, number;
	} load = { { 0, sizeof(load) + strlen(name) + 1 + size, now() }, getpid(), getpid(),
		   (uintptr_t)code, (uintptr_t)code, size, (uintptr_t)code };
	write(dump, &load, sizeof(load));
	write(dump, name, strlen(name) + 1);
	write(dump, code, size);
}

static void moved(void *from, void *to, uint64_t size)
{
	struct {
		struct head head;
		uint32_t process, thread;
		uint64_t address, from, to, size, number;
	} move = { { 1, sizeof(move), now() }, getpid(), getpid(),
		   (uintptr_t)to, (uintptr_t)from, (uintptr_t)to, size, (uintptr_t)from };
	write(dump, &move, sizeof(move));
}

/* push %rbp; mov %rsp,%rbp; mov %edi,%ecx; 1: dec %ecx; jnz 1b; pop %rbp; ret */
static const unsigned char code[] = { 0x55, 0x48, 0x89, 0xe5, 0x89, 0xf9, 0xff, 0xc9, 0x75, 0xfc, 0x5d, 0xc3 };

/* As long as it takes for the agent to have read the file between two names, and to have samples of each. */
#define SECONDS_EACH 2

__attribute__((noinline)) static void drive(void (*function)(int))
{
	for (uint64_t end = now() + SECONDS_EACH * 1000000000ull; now() < end;)
		function(10000000);
}

int main(int argc, char **argv)
{
	char path[4096];
	struct {
		uint32_t magic, version, size, machine, zero, process;
		uint64_t time, flags;
	} header = { 0x4A695444, 1, sizeof(header), EM_X86_64, 0, getpid(), now(), 0 };

	if (argc != 2)
		return 2;
	snprintf(path, sizeof(path), "%s/jit-%d.dump", argv[1], getpid());
	dump = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	write(dump, &header, sizeof(header));
	/* What tells a profiler of the file. */
	if (mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, dump, 0) == MAP_FAILED)
		return 1;
	unsigned char *memory = mmap(NULL, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	for (;;) {
		memcpy(memory, code, sizeof(code));
		loaded(memory, sizeof(code), "made::first");
		drive((void (*)(int))memory);
		loaded(memory, sizeof(code), "made::second(int)");
		drive((void (*)(int))memory);
		memcpy(memory + 4096, code, sizeof(code));
		moved(memory, memory + 4096, sizeof(code));
		memset(memory, 0xcc, sizeof(code));
		drive((void (*)(int))(memory + 4096));
	}
}
