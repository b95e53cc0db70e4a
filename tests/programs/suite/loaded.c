/* loaded LIBRARY LIBRARY: loads them in turn, where the other was. */
#define _GNU_SOURCE
#include "suite.h"
#include <dlfcn.h>
#include <stdlib.h>

NOINLINE uint64_t load(const char *path, uint64_t seed)
{
    void *library = dlopen(path, RTLD_NOW);
    if (!library)
        abort();
    uint64_t (*enter)(uint64_t) = (uint64_t(*)(uint64_t))(uintptr_t)dlsym(library, "enter");
    for (int i = 0; i < CALLS; i++)
        seed = enter(seed);
    dlclose(library);
    return seed;
}

int main(int argc, char **argv)
{
    for (uint64_t seed = 1; argc == 3;)
        seed = load(argv[2], load(argv[1], seed));
}
