//! What was read of the stack at once, for several frames.
//!
//! A read of user memory from the kernel takes longer than all else that a step does, however few bytes it is of: it
//! opens that memory to the kernel and closes it. Peers read a word or two for each frame. Frames that follow small ones
//! are mostly small, so here a small frame has a window read from its saved registers on, and those above are served from it;
//! a large one has its own words read and no more. Whatever cannot be served is read as without a window, so that a window
//! never decides what is readable.

/// Words of a window. Measured: to read 256 bytes takes two and a half times as long as to read 16.
pub const WINDOW_WORDS: usize = 32;
/// Largest frame, in bytes, behind which a window is read: three of them lie in one.
const SMALL_FRAME_BYTES: u64 = 80;

/// A part of the stack as it is during one walk.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct StackWindow {
    start: u64,
    /// 0 if nothing was read, else 1.
    is_filled: u64,
    words: [u64; WINDOW_WORDS],
}

impl StackWindow {
    /// Forgets what was read: the stack is that of one walk.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.is_filled = 0;
    }

    /// `N` words at `address` that a frame of `frame_bytes` saved, if they are in the window or a window is worth reading.
    /// `read` fills one from an address on, or says that it cannot.
    #[inline(always)]
    pub fn words<const N: usize>(
        &mut self,
        address: u64,
        frame_bytes: u64,
        read: impl FnOnce(u64, &mut [u64; WINDOW_WORDS]) -> bool,
    ) -> Option<[u64; N]> {
        let mut offset = address.wrapping_sub(self.start);
        if self.is_filled == 0 || offset > 8 * (WINDOW_WORDS - N) as u64 {
            if frame_bytes > SMALL_FRAME_BYTES {
                return None;
            }
            self.is_filled = u64::from(read(address, &mut self.words));
            // A window may reach over an end of the stack.
            if self.is_filled == 0 {
                return None;
            }
            self.start = address;
            offset = 0;
        }
        if offset & 7 != 0 {
            return None;
        }
        // Masked for the BPF verifier; the offset is in range.
        let first = (offset >> 3) as usize;
        let mut words = [0; N];
        let mut index = 0;
        while index < N {
            words[index] = self.words[(first + index) & (WINDOW_WORDS - 1)];
            index += 1;
        }
        Some(words)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The word at an address of memory that can be read from `first` on, so many bytes, and holds another
    /// word at each address.
    fn word(first: u64, bytes: u64, address: u64) -> Option<u64> {
        let offset = address.wrapping_sub(first);
        (offset < bytes && bytes - offset >= 8).then(|| address.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn check<const N: usize>(
        window: &mut StackWindow,
        first: u64,
        bytes: u64,
        address: u64,
        frame_bytes: u64,
    ) -> bool {
        let served: Option<[u64; N]> = window.words(address, frame_bytes, |from, into| {
            let all = (0..WINDOW_WORDS).map(|index| word(first, bytes, from.wrapping_add(8 * index as u64)));
            let Some(all) = all.collect::<Option<Vec<u64>>>() else {
                // As the kernel leaves it.
                into.fill(0);
                return false;
            };
            into.copy_from_slice(&all);
            true
        });
        let Some(served) = served else { return false };
        for (index, served) in served.into_iter().enumerate() {
            assert_eq!(
                Some(served),
                word(first, bytes, address.wrapping_add(8 * index as u64)),
                "{address:#x}"
            );
        }
        true
    }

    proptest! {
        /// Whatever is asked for in which order, in the window or around it, at the ends of memory and of the address space.
        #[test]
        fn what_is_served_is_what_memory_holds(
            first in prop_oneof![0u64..64, Just(0x7ffd_1234_5000), u64::MAX - 2048..u64::MAX - 1023],
            bytes in 0u64..1024,
            asks in prop::collection::vec((-64i64..1100, 0u64..160, any::<bool>()), 1..40),
        ) {
            let mut window = StackWindow::default();
            for (offset, frame_bytes, is_pair) in asks {
                let address = first.wrapping_add(offset as u64);
                if is_pair {
                    check::<2>(&mut window, first, bytes, address, frame_bytes);
                } else {
                    check::<1>(&mut window, first, bytes, address, frame_bytes);
                }
            }
        }
    }

    #[test]
    fn small_frames_are_served_by_one_read_and_large_ones_by_none() {
        let mut window = StackWindow::default();
        let (first, bytes) = (0x7000, 4096);
        assert!(!check::<2>(&mut window, first, bytes, first, SMALL_FRAME_BYTES + 1));
        assert!(check::<2>(&mut window, first, bytes, first + 8, SMALL_FRAME_BYTES));
        for offset in (8..=8 + 8 * (WINDOW_WORDS as u64 - 2)).step_by(8) {
            let served: Option<[u64; 2]> =
                window.words(first + offset, 8, |_, _| panic!("read again at {offset}"));
            assert!(served.is_some());
        }
        window.clear();
        assert!(!check::<2>(&mut window, first, bytes, first + 16, SMALL_FRAME_BYTES + 1), "of another walk");
    }
}
