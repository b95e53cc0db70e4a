use std::collections::BinaryHeap;

trait Area {
    fn area(&self) -> u64;
}

struct Square(u64);

impl Area for Square {
    #[inline(never)]
    fn area(&self) -> u64 {
        square(self.0)
    }
}

#[inline(always)]
fn square(side: u64) -> u64 {
    side.wrapping_mul(side)
}

#[inline(never)]
fn total<T: Area>(shapes: &[T]) -> u64 {
    shapes.iter().map(|shape| shape.area()).filter(|area| area % 3 != 0).fold(0, u64::wrapping_add)
}

#[inline(never)]
fn largest(sides: &[u64]) -> Option<u64> {
    let mut heap: BinaryHeap<u64> = sides.iter().copied().collect();
    heap.pop();
    heap.pop()
}

fn main() {
    let sides: Vec<u64> = (0..100 * std::env::args().count() as u64).map(|i| i * 37 % 101).collect();
    let shapes: Vec<Square> = sides.iter().copied().map(Square).collect();
    println!("{} {:?}", total(&shapes), largest(&sides));
}
