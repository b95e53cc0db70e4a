//! Placing a table where another was: of another image that has to go, or of the same image.
//!
//! The order is what makes it safe. Mappings stop naming what is to go, then the backend waits for the walks that may still go
//! by it and frees its place, and only then is the new table written. If all that may go is not enough, nothing goes.

use std::collections::HashSet;
use std::time::Instant;

use windlass_schema::maps::Location;
use windlass_schema::{BuildId, Table};

use super::{Placement, Processes};
use crate::backend::{Backend, PlaceError};
use crate::eviction;
use crate::images::TableState;
use crate::process::Content;

impl Processes {
    /// Places a table, in place of others if there is no room.
    pub(super) fn place_with_room(
        &mut self,
        id: BuildId,
        table: &Table<'_>,
        backend: &mut dyn Backend,
        now: Instant,
    ) -> Result<Location, PlaceError> {
        let refused = match backend.place_table(table) {
            Err(refused @ PlaceError::Budget { .. }) => refused,
            other => return other,
        };
        let mapped = self.mapped_images();
        let needed = self.images.last_sampled(id);
        let candidates =
            eviction::candidates(self.images.placed_tables(), &mapped, needed, self.table_in_use, now);
        let locations: Vec<_> = candidates.tables.iter().map(|table| table.location).collect();
        let Some(needed) = backend.to_remove(table, &locations) else { return Err(refused) };
        let evicted = candidates.evicted(needed);
        for table in evicted {
            // What nobody maps is as if it had never been there.
            let state = mapped.contains(&table.id).then_some(TableState::Evicted);
            self.images.set_table(table.id, state);
        }
        // Processes that ended lately count as well: what they map is still in the backend.
        self.set_again(&evicted.iter().map(|table| table.id).collect(), backend);
        self.evicted += evicted.len() as u64;
        backend.remove_tables(&locations[..evicted.len()])?;
        tracing::debug!(tables = evicted.len(), for_image = %id, "unwind tables evicted");
        backend.place_table(table)
    }

    /// Places another table of an image that has one: beside the old one, so that walks go on, and if there is no room for both,
    /// in its place.
    pub(super) fn replace_table(
        &mut self,
        id: BuildId,
        table: &Table<'_>,
        backend: &mut dyn Backend,
        now: Instant,
    ) -> Placement {
        let Some(old) = self.images.placed(id) else {
            // The next that needs it has it from the disk.
            return Placement::Postponed;
        };
        let beside = backend.place_table(table);
        let state = beside.as_ref().map_or(TableState::Evicted, |new| TableState::Placed(*new));
        self.images.set_table(id, Some(state));
        self.images.note_rows(id, table);
        self.set_again(&HashSet::from([id]), backend);
        let placed = match (backend.remove_tables(&[old]), beside) {
            (Ok(()), Err(PlaceError::Budget { .. })) => self.place_with_room(id, table, backend, now),
            (_, beside) => beside,
        };
        match placed {
            Ok(location) => {
                self.images.set_table(id, Some(TableState::Placed(location)));
                Placement::Placed
            }
            // Asked for again by the next sample that needs it.
            Err(_) => Placement::Postponed,
        }
    }

    /// The images that living processes map.
    fn mapped_images(&self) -> HashSet<BuildId> {
        let living = self.known.values().filter(|process| process.exited.is_none());
        let contents = living.flat_map(|process| process.mappings.iter().map(|mapping| &mapping.content));
        contents
            .filter_map(|content| match content {
                Content::Image { image, .. } => Some(image.id.build_id()),
                Content::NoTable(_) => None,
            })
            .collect()
    }
}
