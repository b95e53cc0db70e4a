//! Which tables do walks through what processes map need, and what became of one that was asked for?
//!
//! A table is asked for when a sample meets its image, and then at once; those of all else that the process maps are asked for behind it,
//! if a walk ended for want of one: such a process has begun, and will be met there next.

use std::time::Instant;

use windlass_schema::{BuildId, StopReason};

use super::Processes;
use crate::backend::{Backend, PlaceError, Sample};
use crate::images::{Images, TableState};
use crate::process::{Content, ExecutableMapping, Met, lookup_address};
use crate::tables::{TableOutcome, TableRequest, TableResult};

/// What came of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Walks use it.
    Placed,
    /// They cannot, and why.
    Unavailable(String),
    /// The image will be asked for again.
    Postponed,
}

impl Processes {
    /// Number of tables that were asked for and are not here yet.
    pub fn pending_tables(&self) -> usize {
        self.images.pending_tables()
    }

    /// Number of tables that made room for others since the last call.
    pub fn take_evicted(&mut self) -> u64 {
        std::mem::take(&mut self.evicted)
    }

    /// The tables to ask for because of a sample: at once those of the images that it went through; and
    /// if it ended for want of one, later those of all that its process maps.
    pub fn touch(&mut self, sample: &Sample, now: Instant) -> Vec<TableRequest> {
        let Some(process) = self.known.get_mut(&sample.tgid) else { return Vec::new() };
        let images = &mut self.images;
        let mut met = Met::new(&process.mappings);
        for address in &sample.user {
            met.find(lookup_address(*address));
        }
        let mut wishes: Vec<TableRequest> =
            met.all().iter().filter_map(|mapping| wish(images, mapping, true, now)).collect();
        if sample.stop == StopReason::TablePending && !process.prefetched {
            process.prefetched = true;
            wishes.extend(process.mappings.iter().filter_map(|mapping| wish(images, mapping, false, now)));
        }
        wishes
    }

    /// The tables of everything that the selected processes map, to be asked for ahead of any sample;
    /// none if all processes are selected.
    pub fn prefetch(&mut self, now: Instant) -> Vec<TableRequest> {
        let mut wishes = Vec::new();
        if self.selection.is_narrow() {
            for process in self.known.values_mut().filter(|process| !process.prefetched) {
                process.prefetched = true;
                let images = &mut self.images;
                wishes
                    .extend(process.mappings.iter().filter_map(|mapping| wish(images, mapping, false, now)));
            }
        }
        wishes
    }

    /// Places a table, or notes why there is none.
    pub fn place(&mut self, result: &TableResult, backend: &mut dyn Backend, now: Instant) -> Placement {
        let unavailable =
            |reason: String| (Some(TableState::Unavailable { since: now }), Placement::Unavailable(reason));
        // Asked for ahead of samples and then by one, when the first answer was on its way: what is placed stays.
        if !matches!(result.outcome, TableOutcome::Newer(_)) && self.images.placed(result.id).is_some() {
            return Placement::Postponed;
        }
        let (state, placement) = match &result.outcome {
            TableOutcome::Newer(file) => return self.replace_table(result.id, &file.table(), backend, now),
            TableOutcome::ImageGone(_) => {
                self.look_elsewhere(result.id, now);
                (None, Placement::Postponed)
            }
            TableOutcome::Unavailable(reason) => unavailable(reason.clone()),
            TableOutcome::Table(file) => match self.place_with_room(result.id, &file.table(), backend, now) {
                Ok(location) => (Some(TableState::Placed(location)), Placement::Placed),
                Err(error @ PlaceError::Budget { .. }) => {
                    return match self.images.note_refused(result.id, now) {
                        true => Placement::Unavailable(error.to_string()),
                        false => Placement::Postponed,
                    };
                }
                Err(error @ PlaceError::Kernel(_)) => unavailable(error.to_string()),
            },
        };
        self.images.set_table(result.id, state);
        if let TableOutcome::Table(file) = &result.outcome {
            self.images.note_rows(result.id, &file.table());
        }
        placement
    }

    /// An image is not to be read any more where it was known to be. Those that were announced took that on trust: each has a file of
    /// its own, which reading it finds.
    fn look_elsewhere(&mut self, id: BuildId, now: Instant) {
        self.images.forget_source(id);
        let maps_it = |mapping: &ExecutableMapping| matches!(&mapping.content, Content::Image { image, .. } if image.id.build_id() == id);
        for (tgid, process) in &self.known {
            if process.mappings.iter().any(maps_it) {
                self.schedule.want(*tgid, now);
            }
        }
    }
}

/// A request for the table of what `mapping` maps, if one is due.
fn wish(
    images: &mut Images,
    mapping: &ExecutableMapping,
    urgent: bool,
    now: Instant,
) -> Option<TableRequest> {
    let Content::Image { image, source, .. } = &mapping.content else { return None };
    let id = image.id.build_id();
    images.want_table(id, urgent, now).then(|| TableRequest {
        id,
        path: mapping.module.path.clone(),
        source: source.clone(),
        urgent,
    })
}
