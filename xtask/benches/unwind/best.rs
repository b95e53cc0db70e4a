//! How times are taken: the best of several runs, those of both sides in turn.
//!
//! The mean of a shared machine measures its neighbours. The best run is the one that was disturbed
//! least, and taking turns keeps a change of clock rate from falling on one side alone.

use std::time::Instant;

/// Runs of which the best counts.
pub(crate) const RUNS: usize = 5;

/// The shortest time seen, in seconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Best(f64);

impl Best {
    /// None seen.
    pub(crate) const fn new() -> Self {
        Self(f64::INFINITY)
    }

    /// Runs `work` once more.
    pub(crate) fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = std::hint::black_box(work());
        self.0 = self.0.min(start.elapsed().as_secs_f64());
        result
    }

    pub(crate) fn seconds(self) -> f64 {
        self.0
    }

    pub(crate) fn ms(self) -> f64 {
        1e3 * self.0
    }
}
