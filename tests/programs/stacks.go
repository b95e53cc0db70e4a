// Goroutines that stay where Go, C and Go called by C meet, and one that keeps crossing between them.
package main

/*
extern void goSpins(void);
extern int goBriefly(int);
static volatile unsigned long turns;
static void __attribute__((noipa)) c_spins(void) {
	for (;;)
		turns++;
}
static int __attribute__((noipa)) c_calls(void) {
	c_spins();
	return turns;
}
static int __attribute__((noipa)) c_calls_back(void) {
	goSpins();
	return turns;
}
static int __attribute__((noipa)) c_briefly(int n) { return n > 1 ? goBriefly(n - 2) + 1 : n; }
*/
import "C"

import (
	"runtime"
	"time"
)

var turns [4]uint64

//export goSpins
//go:noinline
func goSpins() {
	for {
		turns[0]++
	}
}

//export goBriefly
//go:noinline
func goBriefly(n C.int) C.int {
	turns[1]++
	return C.c_briefly(n)
}

//go:noinline
func spinsDeep(n int) {
	for n == 0 {
		turns[2]++
	}
	spinsDeep(n - 1)
	turns[2]++
}

func inGo() {
	runtime.LockOSThread()
	spinsDeep(20)
}

func inC() {
	runtime.LockOSThread()
	C.c_calls()
}

func inGoFromC() {
	runtime.LockOSThread()
	C.c_calls_back()
}

func crossing() {
	runtime.LockOSThread()
	for {
		turns[3] += uint64(C.c_briefly(6))
	}
}

func main() {
	go inGo()
	go inC()
	go inGoFromC()
	go crossing()
	time.Sleep(time.Hour)
}
