/* Laid out as a kernel module: code in sections by when it is needed. */

#define SECTION(name) __attribute__((noinline, section(name)))

struct table {
    unsigned used;
    unsigned rows[64];
};

extern unsigned from_the_kernel(unsigned);

static inline __attribute__((always_inline)) unsigned fold(unsigned value)
{
    value ^= value >> 15;
    return value * 0x2c1b3c6du;
}

__attribute__((noinline)) unsigned lookup(const struct table *table, unsigned key)
{
    for (unsigned i = 0; i < table->used; i++)
        if (table->rows[i] == fold(key))
            return i;
    return from_the_kernel(key);
}

SECTION(".text.unlikely") unsigned complain(unsigned key)
{
    return from_the_kernel(fold(key)) + 1;
}

SECTION(".noinstr.text") unsigned entry(unsigned key)
{
    return fold(fold(key) + 1);
}

SECTION(".init.text") int start(struct table *table)
{
    for (unsigned i = 0; i < 64; i++)
        table->rows[i] = fold(from_the_kernel(i));
    table->used = 64;
    return (int)complain(table->used);
}

SECTION(".exit.text") void stop(struct table *table)
{
    for (unsigned i = 0; i < 64; i++)
        table->rows[i] ^= fold(i);
    table->used = from_the_kernel(0);
}

SECTION(".text.of_its_own") unsigned nowhere(unsigned key)
{
    return fold(key) + from_the_kernel(3);
}

/* Instructions of this one lie in an inlined call that has several ranges. */
__attribute__((noinline)) unsigned lookup_all(const struct table *table, unsigned key)
{
    unsigned found = 0;
    for (unsigned i = 0; i < key; i++) {
        if (__builtin_expect(table->used == 77, 0))
            found += complain(fold(i));
        found += lookup(table, fold(i) ^ key);
    }
    return found;
}
