#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

struct record {
    uint32_t key;
    uint32_t weight;
};

static inline __attribute__((always_inline)) uint32_t rotate(uint32_t value, int by)
{
    return value << by | value >> (32 - by);
}

static inline __attribute__((always_inline)) uint32_t mix(uint32_t a, uint32_t b)
{
    a ^= rotate(b, 13);
    a *= 0x9e3779b1u;
    return a ^ rotate(a, 7);
}

__attribute__((noinline)) uint32_t digest(const struct record *records, int count)
{
    uint32_t state = 1;
    for (int i = 0; i < count; i++) {
        state = mix(state, records[i].key);
        if (state & 1)
            state = mix(records[i].weight, state);
    }
    return state;
}

__attribute__((noinline)) static int compare(const void *left, const void *right)
{
    const struct record *a = left, *b = right;
    return (a->key > b->key) - (a->key < b->key);
}

__attribute__((noinline, cold)) void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

#ifdef ALIASES
uint32_t digest_alias(const struct record *, int) __attribute__((alias("digest")));
uint32_t weak_digest(const struct record *, int) __attribute__((weak, alias("digest")));
#endif

int main(int argc, char **argv)
{
    int count = argc > 1 ? atoi(argv[1]) : 64;
    struct record *records = calloc(count, sizeof *records);
    if (!records)
        fail("no memory");
    for (int i = 0; i < count; i++) {
        records[i].key = mix(i, 77);
        records[i].weight = i;
    }
    qsort(records, count, sizeof *records, compare);
    printf("%u\n", digest(records, count));
    free(records);
    return 0;
}
