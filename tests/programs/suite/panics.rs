//! Panics: caught, or with `abort`, none.

use std::hint::black_box;

#[inline(never)]
fn spin(mut seed: u64) -> u64 {
    for round in 0..300_000 {
        seed = (seed ^ round).wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(seed >> 29);
    }
    seed
}

/// Something to clean up, slowly.
struct Cleaned(u64);

#[inline(never)]
fn clean(mut seed: u64) -> u64 {
    for round in 0..20_000 {
        seed = (seed ^ round).wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(seed >> 29);
    }
    seed
}

impl Drop for Cleaned {
    fn drop(&mut self) {
        black_box(clean(self.0));
    }
}

#[inline(never)]
fn level(depth: u64, seed: u64) -> u64 {
    let own = Cleaned(seed);
    if depth == 0 {
        let result = spin(seed);
        if cfg!(panic = "unwind") {
            std::panic::resume_unwind(Box::new(result));
        }
        return black_box(result);
    }
    level(depth - 1, seed + 1) ^ black_box(own.0)
}

#[cfg(panic = "unwind")]
#[inline(never)]
fn round(seed: u64) -> u64 {
    std::panic::catch_unwind(|| level(12, seed)).unwrap_or_else(|caught| *caught.downcast::<u64>().unwrap())
}

#[cfg(not(panic = "unwind"))]
#[inline(never)]
fn round(seed: u64) -> u64 {
    let call: Box<dyn Fn(u64) -> u64> = black_box(Box::new(|seed| level(12, seed)));
    black_box(call(seed)) + 1
}

#[inline(never)]
fn forever() {
    let mut seed = 1;
    loop {
        seed = black_box(round(seed));
    }
}

fn main() {
    let thread = std::thread::spawn(forever);
    forever();
    thread.join().unwrap();
}
