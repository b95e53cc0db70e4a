//! What did a process map while it was being read?
//!
//! A reading takes some 100 microseconds, that of a process with sixty thousand mappings a hundred times as long, and such processes map
//! something all the time. What the reading says of a range that was mapped meanwhile may be of before that or of after, and in
//! between something may have been there of which no event tells (mremap). So what events tell is added to what was read
//! where that has nothing, and to what other events told, which are in order:
//!
//! | what was read at the range of the event | what that means |
//! |---|---|
//! | nothing | it was read before; or what the event tells of is gone again, and no walk comes there |
//! | the same, or another part of the same image where it lies | either is right |
//! | memory without a name, and the event tells of such | neither names anything |
//! | anything else | which of both is newer is not known: the reading says nothing |

use std::collections::VecDeque;
use std::ops::Range;

use crate::backend::MappedImage;
use crate::images::Images;
use crate::process::{ExecutableMapping, announced_mapping, has_name, is_among, is_of_same_image, outside};

/// Most mappings that are kept of a process while it is being read: ten a millisecond, for as long as the longest takes.
pub(super) const MAX_NOTED: usize = 1024;
/// Of how many of those it is looked whether the next one leaves anything: what is mapped again and again is among the last.
const LOOKED_AT: usize = 8;

/// The mappings that a process made since a reading of it was wanted, in order.
#[derive(Debug, Default)]
pub(super) struct Noted {
    mappings: VecDeque<NotedMapping>,
    /// When the last one was made for which there is no room: `CLOCK_MONOTONIC` in nanoseconds.
    left_out_ns: Option<u64>,
}

/// One of them.
#[derive(Clone, Debug)]
pub(super) struct NotedMapping {
    pub(super) range: Range<u64>,
    pub(super) of_file: bool,
    pub(super) image: Option<Box<MappedImage>>,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub(super) time_ns: u64,
}

impl NotedMapping {
    fn has_name(&self) -> bool {
        self.of_file || self.image.is_some()
    }

    fn is_within(&self, range: &Range<u64>) -> bool {
        range.start <= self.range.start && self.range.end <= range.end
    }

    fn touches(&self, range: &Range<u64>) -> bool {
        range.start <= self.range.end && self.range.start <= range.end
    }
}

/// A reading and what was mapped meanwhile.
pub(super) struct Merged {
    pub(super) mappings: Vec<ExecutableMapping>,
    /// Since when they are the process's: `CLOCK_MONOTONIC` in nanoseconds.
    pub(super) since_ns: u64,
    /// Whether something was mapped of which events do not tell what it is.
    pub(super) lacks_some: bool,
}

impl Noted {
    /// Notes what comes behind all others.
    pub(super) fn push(&mut self, new: NotedMapping) {
        // What is mapped over leaves nothing.
        for at in (self.mappings.len().saturating_sub(LOOKED_AT)..self.mappings.len()).rev() {
            if self.mappings[at].is_within(&new.range) {
                self.mappings.remove(at);
            }
        }
        // Just-in-time compilers take memory block by block.
        let grown = self
            .mappings
            .back_mut()
            .filter(|last| !last.has_name() && !new.has_name() && last.touches(&new.range));
        if let Some(last) = grown {
            last.range = last.range.start.min(new.range.start)..last.range.end.max(new.range.end);
            last.time_ns = new.time_ns;
            return;
        }
        if self.mappings.len() == MAX_NOTED {
            self.left_out_ns = self.mappings.pop_front().map(|noted| noted.time_ns);
        }
        self.mappings.push_back(new);
    }

    /// What process `tgid` maps now, of which `read` was read from `read_ns` on; `None` if that cannot be told.
    pub(super) fn merge(
        &self,
        tgid: u32,
        read: Vec<ExecutableMapping>,
        read_ns: u64,
        images: &Images,
    ) -> Option<Merged> {
        if self.left_out_ns.is_some_and(|left_out_ns| left_out_ns > read_ns) {
            return None;
        }
        let mut merged = Merged { mappings: read, since_ns: read_ns, lacks_some: false };
        let mut told: Vec<ExecutableMapping> = Vec::new();
        // The kernel tells of a mapping when it is there (`mmap_region` in mm/vma.c): what is no newer was found.
        for noted in self.mappings.iter().filter(|noted| noted.time_ns > read_ns) {
            let image = noted.image.as_deref();
            let mapping = image.and_then(|image| announced_mapping(tgid, &noted.range, image, images));
            merged.add(noted, mapping, &mut told)?;
        }
        Some(merged)
    }
}

impl Merged {
    /// Adds what is newer than `told`, what events told before it; `None` if it is not known whether it is newer than what was read.
    fn add(
        &mut self,
        noted: &NotedMapping,
        mapping: Option<ExecutableMapping>,
        told: &mut Vec<ExecutableMapping>,
    ) -> Option<()> {
        let first = self.mappings.partition_point(|known| known.end <= noted.range.start);
        let behind = self.mappings.partition_point(|known| known.start < noted.range.end);
        let over = &self.mappings[first..behind];
        if mapping.as_ref().is_some_and(|mapping| is_among(mapping, over)) {
            return Some(());
        }
        let goes_on = |known: &ExecutableMapping| {
            mapping.as_ref().is_some_and(|mapping| is_of_same_image(known, mapping))
        };
        let stays = |known: &ExecutableMapping| !noted.has_name() && !has_name(known);
        let is_certain = |known: &ExecutableMapping| goes_on(known) || stays(known) || is_among(known, told);
        if !over.iter().all(is_certain) {
            return None;
        }
        let rest = |known: &ExecutableMapping| match goes_on(known) {
            true => outside(known, &noted.range),
            false => Vec::from_iter(stays(known).then(|| known.clone())),
        };
        let mut now: Vec<_> = over.iter().flat_map(rest).collect();
        self.since_ns = self.since_ns.max(noted.time_ns);
        match mapping {
            Some(mapping) => {
                let at = now.partition_point(|known| known.start < mapping.start);
                told.push(mapping.clone());
                now.insert(at, mapping);
            }
            None => self.lacks_some = true,
        }
        self.mappings.splice(first..behind, now);
        Some(())
    }
}
