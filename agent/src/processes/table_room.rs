//! Placing a table where another was.
//!
//! The order is what makes it safe. Mappings stop naming what is to go, then the backend waits for the walks that may still go
//! by it and frees its place, and only then is the new table written. If all that may go is not enough, nothing goes.

use std::collections::HashSet;
use std::time::Instant;

use windlass_schema::maps::Location;
use windlass_schema::{BuildId, Table};

use super::Processes;
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
        let candidates = eviction::candidates(self.images.placed_tables(), &mapped, needed, now);
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
        backend.remove_tables(&locations[..evicted.len()])?;
        tracing::debug!(tables = evicted.len(), for_image = %id, "unwind tables evicted");
        backend.place_table(table)
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
