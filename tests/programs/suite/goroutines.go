// Goroutines that allocate, hand over to each other and recurse.
package main

var sink uint64

//go:noinline
func spin(seed uint64) uint64 {
	for round := uint64(0); round < 300000; round++ {
		seed = (seed^round)*0x2545f4914f6cdd1d + seed>>29
	}
	return seed
}

//go:noinline
func descend(depth int, seed uint64) uint64 {
	if depth == 1 {
		return spin(seed)
	}
	return descend(depth-1, seed) + uint64(depth)
}

func work(in, out chan uint64) {
	for seed := range in {
		out <- descend(20, seed)
	}
}

func main() {
	first, second := make(chan uint64), make(chan uint64)
	go work(first, second)
	for seed := uint64(1); ; {
		first <- seed
		seed = descend(20, seed) + <-second
	}
}
