/* multiplied LIBRARY: matrices multiplied by the kernels of a BLAS library. */
#include "suite.h"
#include <dlfcn.h>
#include <stdlib.h>

enum { SIZE = 192, ROW_MAJOR = 101, NO_TRANSPOSE = 111 };
typedef void dgemm(int, int, int, int, int, int, double, const double *, int, const double *, int, double, double *, int);

static double a[SIZE * SIZE], b[SIZE * SIZE], c[SIZE * SIZE];

NOINLINE double multiply(dgemm *function)
{
    function(ROW_MAJOR, NO_TRANSPOSE, NO_TRANSPOSE, SIZE, SIZE, SIZE, 0.5, a, SIZE, b, SIZE, 0.5, c, SIZE);
    return c[1];
}

int main(int argc, char **argv)
{
    void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : 0;
    dgemm *function = library ? (dgemm *)(uintptr_t)dlsym(library, "cblas_dgemm") : 0;
    if (!function)
        return 1;
    for (int i = 0; i < SIZE * SIZE; i++)
        a[i] = b[i] = i % 7;
    while (multiply(function) >= 0)
        ;
    return 1;
}
