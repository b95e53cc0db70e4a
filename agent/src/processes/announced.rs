//! What do process events alone tell of mappings?
//!
//! A process that lives for a tenth of a second has lived for long when `/proc` is read for it, and a thousand short ones
//! a second are more than can be read. So what an event tells counts: a fork has its parent's mappings, an exec
//! leaves none, and a mapping of an image that is known by its build-ID is put beside the others, or in the place of those that it is
//! mapped over. Only for what is not known so is `/proc` read: for new images, and for those without a build-ID.
//!
//! Two files of one build-ID have the same segments, or neither is told by it (`Images::known`).

use std::ops::Range;
use std::time::Instant;

use windlass_schema::StopReason;

use super::{Process, Processes, REREAD_AFTER_NS};
use crate::backend::{Backend, MappedImage, Sample};
use crate::process::{
    ExecutableMapping, announced_mapping, is_among, is_of_same_image, is_replaced, outside,
};

impl Processes {
    /// Has the process of a sample read if its mappings may have been found wanting.
    pub(super) fn note_sample(&mut self, sample: &Sample, now: Instant) {
        let known = self.known.get(&sample.tgid);
        if known.is_some_and(|process| process.whole_ns <= self.lost_until_ns) {
            if self.selection.includes(sample.tgid) {
                self.schedule.want_at_once(sample.tgid, now);
            }
            return;
        }
        let is_wanting = matches!(sample.stop, StopReason::ProcessUnknown | StopReason::NoMapping);
        // One that went by what the backend had before tells nothing of what it has now.
        let is_answered =
            known.and_then(|process| process.stated).is_some_and(|stated| stated.last != sample.generation);
        let is_old =
            known.is_some_and(|process| sample.time_ns.saturating_sub(process.whole_ns) > REREAD_AFTER_NS);
        if is_wanting && !is_answered || is_old {
            self.want_scan(sample.tgid, now);
        }
    }

    /// A process runs another executable: its mappings come one by one.
    pub(super) fn note_exec(&mut self, tgid: u32, time_ns: u64, backend: &mut dyn Backend, now: Instant) {
        self.selection.exec(tgid);
        // It was read since.
        if self.known.get(&tgid).is_some_and(|process| time_ns < process.whole_ns) {
            return;
        }
        self.announced.remove(&tgid);
        self.readings.forget(tgid);
        if self.known.remove(&tgid).is_some() {
            backend.remove_process(tgid);
        }
        if self.selection.includes(tgid) {
            self.known.insert(tgid, Process::new(Vec::new(), time_ns, false));
            self.schedule.exec(tgid, now);
        }
    }

    /// A process mapped executable memory.
    #[expect(clippy::too_many_arguments, reason = "the parts of one event")]
    pub(super) fn note_mapped(
        &mut self,
        tgid: u32,
        range: Range<u64>,
        of_file: bool,
        image: Option<&MappedImage>,
        time_ns: u64,
        backend: &mut dyn Backend,
        now: Instant,
    ) {
        let Some(process) = self.known.get_mut(&tgid) else {
            self.want_scan(tgid, now);
            return;
        };
        // It was there when the process was read.
        if time_ns <= process.whole_ns {
            return;
        }
        let mapping = image.and_then(|image| announced_mapping(tgid, &range, image, &self.images));
        // A reading that began before may have found it, and what is made writable for a moment appears anew.
        if !process.withdrawn && mapping.as_ref().is_some_and(|mapping| is_among(mapping, &process.mappings))
        {
            return;
        }
        let is_over = |known: &&ExecutableMapping| known.start < range.end && range.start < known.end;
        let goes_on = |known: &ExecutableMapping| {
            mapping.as_ref().is_some_and(|mapping| is_of_same_image(known, mapping))
        };
        let replaces = is_replaced(&process.mappings, &range, of_file)
            && !process.mappings.iter().filter(is_over).all(goes_on);
        if process.withdrawn || replaces && mapping.is_none() {
            process.withdrawn = true;
            process.stated = None;
            self.announced.remove(&tgid);
            backend.remove_process(tgid);
            self.schedule.want_at_once(tgid, now);
            return;
        }
        let Some(mapping) = &mapping else {
            process.lacks_some = true;
            self.want_scan(tgid, now);
            return;
        };
        if replaces {
            // Walks by what was there before say nothing of what is there now.
            process.stated = None;
        }
        // What was where it is now is gone, and what is left of that most likely, too. But a part of an image whose
        // protection changed (`mprotect_fixup` in mm/mprotect.c tells of it as of a mapping) leaves the rest as it was.
        let rest = |known: &ExecutableMapping| match goes_on(known) {
            true => outside(known, &range),
            false => Vec::from_iter((!is_over(&known)).then(|| known.clone())),
        };
        let mut mappings: Vec<_> = process.mappings.iter().flat_map(rest).collect();
        let at = mappings.partition_point(|known| known.start < mapping.start);
        mappings.insert(at, mapping.clone());
        // What older walks went by is a part of it, and of the rest they know nothing.
        process.read_ns = process.read_ns.max(time_ns);
        (process.mappings, process.prefetched) = (mappings.into(), false);
        self.announced.insert(tgid);
    }

    /// A process was forked, and has what its parent had then.
    pub(super) fn note_forked(
        &mut self,
        tgid: u32,
        parent: u32,
        time_ns: u64,
        backend: &mut dyn Backend,
        now: Instant,
    ) {
        // The number may have been another process's.
        self.schedule.forget(tgid);
        self.announced.remove(&tgid);
        self.readings.forget(tgid);
        if self.known.remove(&tgid).is_some() {
            backend.remove_process(tgid);
        }
        self.selection.forked(tgid, parent);
        if !self.selection.includes(tgid) {
            return;
        }
        match self.known.get(&parent) {
            None => {}
            // What the parent has now may be newer than what it had then.
            Some(parent) if parent.withdrawn || parent.mappings.is_empty() || time_ns <= parent.read_ns => {
                self.schedule.want_at_once(tgid, now);
            }
            Some(parent) => {
                // What the parent was read for since then says nothing of what the child did.
                let whole_ns = parent.whole_ns.min(time_ns);
                let child =
                    Process { stated: None, whole_ns, exited: None, leaderless: false, ..parent.clone() };
                self.known.insert(tgid, child);
                self.set(tgid, backend);
            }
        }
    }

    /// Tells the backend the mappings that events announced. They are not told one by one: a dynamic linker maps ten
    /// libraries within a millisecond.
    pub(super) fn set_announced(&mut self, backend: &mut dyn Backend) {
        for tgid in std::mem::take(&mut self.announced) {
            let Some(process) = self.known.get(&tgid).filter(|process| process.exited.is_none()) else {
                continue;
            };
            if !process.lacks_some {
                self.schedule.settled(tgid);
            }
            self.set(tgid, backend);
        }
    }
}
