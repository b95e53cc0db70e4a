//! How much memory does compiling take?
//!
//! A service compiles for a fleet, several images at once, inside a memory limit; what counts is the peak,
//! and that it stays in proportion to the input. Peers report the size of their process, which
//! an allocator and a runtime blur. Here the allocator itself counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use windlass_unwind_compiler::compile;

use crate::large::large;
use crate::measured::Measured;

/// The system's allocator, and how many bytes are allocated.
pub(crate) struct Counting {
    bytes: AtomicUsize,
    peak_bytes: AtomicUsize,
}

impl Counting {
    pub(crate) const fn new() -> Self {
        Self { bytes: AtomicUsize::new(0), peak_bytes: AtomicUsize::new(0) }
    }

    fn add(&self, bytes: usize) {
        let now = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak_bytes.fetch_max(now, Ordering::Relaxed);
    }

    fn subtract(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Most bytes that are allocated at once during `work`, beyond those before it.
    fn peak_of<T>(&self, work: impl FnOnce() -> T) -> (T, usize) {
        let before = self.bytes.load(Ordering::Relaxed);
        self.peak_bytes.store(before, Ordering::Relaxed);
        let result = work();
        (result, self.peak_bytes.load(Ordering::Relaxed).saturating_sub(before))
    }
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        self.subtract(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // Both count while it moves, though the kernel may merely remap pages.
        self.add(new_size);
        // SAFETY: the caller's promises are the same.
        let moved = unsafe { System.realloc(block, layout, new_size) };
        self.subtract(layout.size());
        moved
    }
}

pub(crate) fn print(all: &[Measured], heap: &Counting) -> Result<()> {
    println!("### Memory\n\n| file | .eh_frame | table | peak heap of compile | / (.eh_frame + table) |");
    println!("|---|---:|---:|---:|---:|");
    for number in large(all) {
        let file = &all[number];
        let (compiled, peak) = heap.peak_of(|| compile(file.image.elf(), file.image.build_id));
        let sizes = [file.eh_frame_bytes as f64, compiled?.table.len() as f64];
        let megabytes = sizes.map(|bytes| bytes / 1e6);
        println!(
            "| {} | {:.2} MB | {:.2} MB | {:.1} MB | {:.2} |",
            file.image.name(),
            megabytes[0],
            megabytes[1],
            peak as f64 / 1e6,
            peak as f64 / (sizes[0] + sizes[1]),
        );
    }
    println!(
        "\nBytes that were allocated at once, the table among them; a block that grows counts at both sizes while it moves. \
         The mapped file is not on the heap.\n"
    );
    Ok(())
}
