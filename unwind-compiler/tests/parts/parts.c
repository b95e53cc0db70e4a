/* Functions of which a part, moved away, is jumped to with several frames: some behind a call that does not return,
   some of them in front of a jump to another function. */
__attribute__((noreturn, cold)) void die(int);
__attribute__((cold)) int note(int);
int work(int *, int);
#define WORK(n, m) int buf[n]; int r = work(buf, a); if (r == m) die(r); return r + buf[b];
int f1(int a, int b) { if (a < 0) return note(a); WORK(8, 3) }
int f2(int a, int b) { if (a < 0) goto x; WORK(8, 3) x: return note(a); }
int f3(int a, int b) { if (a > 0) { WORK(8, 3) } return note(a); }
int f4(int a, int b) { if (__builtin_expect(a > 0, 1)) { WORK(8, 3) } if (b) return note(a); return 3; }
int f5(int a, int b) { if (a > 0) { WORK(8, 3) } if (b > 3) return note(a); if (b == 2) return note(b); return 3; }
int f6(int a, int b) { switch (a) { case 1: { WORK(8, 3) } case 2: return note(b); case 3: { WORK(9, 4) } } return 0; }
int main(int c, char **v) { return f1(c, c) + f2(c, c) + f3(c, c) + f4(c, c) + f5(c, c) + f6(c, c); }
