//! Which bytes of the chunks are free?
//!
//! Free extents are kept twice, by place and by size: what is given back grows together with what is free beside
//! it, and what is asked for gets the smallest extent that holds it. A table's pieces go into one extent if one
//! holds them all; otherwise each goes behind the one before it, or else where it fits best. Chunks are
//! opened only when nothing fits, and stay: what they cost is spent.

use std::collections::{BTreeMap, BTreeSet};

use windlass_schema::maps::{CHUNK_BYTES, GRANULE_BYTES, Location};

/// Bytes of a chunk, in whole granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Extent {
    pub(super) chunk: u32,
    pub(super) offset: u32,
    pub(super) bytes: u32,
}

impl Extent {
    fn end(self) -> u32 {
        self.offset + self.bytes
    }
}

/// The free bytes, and how many chunks there may be.
#[derive(Clone, Debug)]
pub(super) struct Room {
    most_chunks: u32,
    chunks: u32,
    /// Bytes free at each chunk and offset. Neighbours are one extent.
    by_place: BTreeMap<(u32, u32), u32>,
    /// The same as bytes, chunk, offset.
    by_size: BTreeSet<(u32, u32, u32)>,
}

impl Room {
    pub(super) fn new(most_chunks: u32) -> Self {
        Self { most_chunks, chunks: 0, by_place: BTreeMap::new(), by_size: BTreeSet::new() }
    }

    /// Chunks opened so far.
    pub(super) fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Bytes that could be given out, but for what lies in pieces too small.
    pub(super) fn free_bytes(&self) -> u64 {
        let unopened = u64::from(self.most_chunks - self.chunks) * u64::from(CHUNK_BYTES);
        unopened + self.by_place.values().map(|bytes| u64::from(*bytes)).sum::<u64>()
    }

    /// Extents of these sizes (whole granules), all or none. What is empty is nowhere.
    pub(super) fn take(&mut self, sizes: &[u32]) -> Option<Vec<Extent>> {
        let whole: u64 = sizes.iter().map(|bytes| u64::from(*bytes)).sum();
        let before = self.chunks;
        let mut taken: Vec<Extent> = Vec::with_capacity(sizes.len());
        let mut next = u32::try_from(whole).ok().and_then(|whole| self.best(whole));
        for bytes in sizes {
            if *bytes == 0 {
                taken.push(Extent { chunk: 0, offset: 0, bytes: 0 });
                continue;
            }
            let behind = next.and_then(|next| self.at(next.chunk, next.offset));
            let Some(free) = behind.filter(|free| free.bytes >= *bytes).or_else(|| self.best_or_open(*bytes))
            else {
                self.put_back(&taken, before);
                return None;
            };
            self.remove(free);
            let used = Extent { bytes: *bytes, ..free };
            let rest = Extent { offset: used.end(), bytes: free.bytes - bytes, ..free };
            if rest.bytes > 0 {
                self.insert(rest);
            }
            next = Some(rest);
            taken.push(used);
        }
        Some(taken)
    }

    /// Makes an extent free that was taken.
    pub(super) fn give_back(&mut self, extent: Extent) {
        if extent.bytes == 0 {
            return;
        }
        let mut free = extent;
        let before = self.by_place.range(..(extent.chunk, extent.offset)).next_back();
        if let Some((&(chunk, offset), &bytes)) = before
            && chunk == extent.chunk
            && offset + bytes == extent.offset
        {
            let before = Extent { chunk, offset, bytes };
            self.remove(before);
            free = Extent { bytes: before.bytes + free.bytes, ..before };
        }
        if let Some(behind) = self.at(extent.chunk, extent.end()) {
            self.remove(behind);
            free.bytes += behind.bytes;
        }
        self.insert(free);
    }

    /// Undoes a part of [`take`](Self::take), with the chunks opened for it.
    fn put_back(&mut self, taken: &[Extent], chunks: u32) {
        taken.iter().for_each(|extent| self.give_back(*extent));
        while self.chunks > chunks {
            self.chunks -= 1;
            self.remove(whole(self.chunks));
        }
    }

    fn best_or_open(&mut self, bytes: u32) -> Option<Extent> {
        loop {
            if let Some(best) = self.best(bytes) {
                return Some(best);
            }
            if self.chunks == self.most_chunks {
                return None;
            }
            self.insert(whole(self.chunks));
            self.chunks += 1;
        }
    }

    /// The smallest free extent that holds `bytes`.
    fn best(&self, bytes: u32) -> Option<Extent> {
        let (bytes, chunk, offset) = *self.by_size.range((bytes, 0, 0)..).next()?;
        Some(Extent { chunk, offset, bytes })
    }

    /// The free extent that starts there.
    fn at(&self, chunk: u32, offset: u32) -> Option<Extent> {
        self.by_place.get(&(chunk, offset)).map(|bytes| Extent { chunk, offset, bytes: *bytes })
    }

    fn insert(&mut self, free: Extent) {
        self.by_place.insert((free.chunk, free.offset), free.bytes);
        self.by_size.insert((free.bytes, free.chunk, free.offset));
    }

    fn remove(&mut self, free: Extent) {
        self.by_place.remove(&(free.chunk, free.offset));
        self.by_size.remove(&(free.bytes, free.chunk, free.offset));
    }
}

impl From<Extent> for Location {
    fn from(extent: Extent) -> Self {
        Location::new(extent.chunk, extent.offset)
    }
}

/// What a chunk has to give. Location 0 means nowhere, so the first granule of chunk 0 stays unused.
fn whole(chunk: u32) -> Extent {
    let offset = if chunk == 0 { GRANULE_BYTES } else { 0 };
    Extent { chunk, offset, bytes: CHUNK_BYTES - offset }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Take(Vec<u32>),
        GiveBack(prop::sample::Index),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let granules = prop_oneof![0u32..8, 0u32..1024, 0u32..=CHUNK_BYTES / GRANULE_BYTES];
        let sizes = prop::collection::vec(granules.prop_map(|granules| granules * GRANULE_BYTES), 1..12);
        let step =
            prop_oneof![sizes.prop_map(Step::Take), any::<prop::sample::Index>().prop_map(Step::GiveBack)];
        prop::collection::vec(step, 0..60)
    }

    /// All bytes are either free or taken once, and no free extent could have grown.
    fn check(room: &Room, live: &[Vec<Extent>]) {
        let mut all: Vec<(Extent, bool)> = live.iter().flatten().map(|taken| (*taken, false)).collect();
        all.retain(|(extent, _)| extent.bytes > 0);
        let free = room.by_place.iter();
        all.extend(free.map(|(&(chunk, offset), &bytes)| (Extent { chunk, offset, bytes }, true)));
        all.sort();
        let mut expect = all.iter();
        for chunk in 0..room.chunks {
            let mut offset = whole(chunk).offset;
            let mut free_before = false;
            while offset < CHUNK_BYTES {
                let (extent, free) = expect.next().expect("no byte is lost");
                assert_eq!((extent.chunk, extent.offset), (chunk, offset), "{all:?}");
                assert!(!(free_before && *free), "two free extents side by side at {extent:?}");
                (offset, free_before) = (extent.end(), *free);
            }
            assert_eq!(offset, CHUNK_BYTES, "across a chunk's end");
        }
        assert_eq!(expect.next(), None);
        let by_size = room.by_size.iter().map(|&(bytes, chunk, offset)| ((chunk, offset), bytes));
        assert_eq!(by_size.collect::<BTreeMap<_, _>>(), room.by_place);
        assert!(room.chunks <= room.most_chunks);
    }

    proptest! {
        #[test]
        fn every_byte_is_free_or_taken_once(most_chunks in 0u32..6, steps in steps()) {
            let mut room = Room::new(most_chunks);
            let mut live: Vec<Vec<Extent>> = Vec::new();
            for step in steps {
                match step {
                    Step::Take(sizes) => {
                        let before = room.clone();
                        match room.take(&sizes) {
                            Some(taken) => {
                                let bytes: Vec<_> = taken.iter().map(|extent| extent.bytes).collect();
                                prop_assert_eq!(bytes, sizes);
                                live.push(taken);
                            }
                            None => {
                                prop_assert_eq!(format!("{room:?}"), format!("{before:?}"));
                                let whole: u64 = sizes.iter().map(|bytes| u64::from(*bytes)).sum();
                                // One piece in an empty room fails only for its size.
                                prop_assert!(!(live.is_empty() && sizes.len() == 1)
                                    || whole > u64::from(CHUNK_BYTES - GRANULE_BYTES) || most_chunks == 0);
                            }
                        }
                    }
                    Step::GiveBack(which) if !live.is_empty() => {
                        let at = which.index(live.len());
                        live.swap_remove(at).into_iter().for_each(|extent| room.give_back(extent));
                    }
                    Step::GiveBack(_) => {}
                }
                check(&room, &live);
            }
            live.drain(..).flatten().for_each(|extent| room.give_back(extent));
            prop_assert_eq!(room.by_place.len() as u32, room.chunks, "all is free again, in whole chunks");
        }
    }
}
