/* What those of parts.c call, where the compiler does not see it. */
__attribute__((cold)) int note(int a) { return a + 1; }
int work(int *p, int a) { p[0] = a; return a * 3; }
__attribute__((noreturn)) void die(int a) { for (;;) ; }
