//! A table that the service has replaced replaces the one that is here, if it is what it should be.

use std::time::Duration;

use windlass_agent::backend::Event;
use windlass_agent::table_cache::TableCache;
use windlass_agent::{Agent, Config};
use windlass_schema::maps::{EXACT_ADDRESS, no_table};
use windlass_schema::{BuildId, StopReason, TableFile};

use crate::fake_backend::{FakeBackend, View, sample};
use crate::fake_service::{FakeService, Tables, table_of, table_with};
use crate::{config, eventually, own_address, own_pid, stop};

/// An agent that asks for its tables again soon, with the table of this binary placed.
fn start(config: &Config) -> (Agent, View, BuildId) {
    let (backend, view) = FakeBackend::new();
    let agent = Agent::start_with_backend(config.clone(), Box::new(backend)).unwrap();
    view.send(Event::Sample(sample(1, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
    eventually("the table is placed", || no_table::reason(own_image(&view)).is_none());
    let id = view.placed_id(own_image(&view));
    (agent, view, id)
}

fn own_image(view: &View) -> windlass_schema::maps::Location {
    view.mapping(own_pid(), own_address()).unwrap().mapping.image
}

#[test]
fn a_table_that_the_service_replaced_replaces_the_one_that_is_here() {
    let service = FakeService::start(Tables::Tagged);
    let cache = tempfile::tempdir().unwrap();
    let mut config = config(&service, &cache);
    config.refresh_after = Duration::from_millis(100);
    let (agent, view, id) = start(&config);
    let answers = |status: u16| {
        let line = format!("GET {id} unwind {status}");
        service.requests().iter().filter(|request| **request == line).count()
    };
    let first = own_image(&view);
    eventually("it is asked for again", || answers(304) > 1);
    assert_eq!((answers(200), own_image(&view)), (1, first));

    // What does not pass replaces nothing, here and on disk.
    let lies: [fn(Vec<u8>) -> Vec<u8>; 3] = [
        |_| table_of("abcd".parse().unwrap()),
        |mut table| {
            table[8] ^= 1;
            table
        },
        |table| table[..table.len() - 8].to_vec(),
    ];
    for lie in lies {
        service.change_tables(1, lie);
        let before = answers(200);
        eventually("another table comes", || answers(200) > before + 1);
        assert_eq!(own_image(&view), first);
    }
    service.change_tables(1, |table| table);
    eventually("the other table is placed", || own_image(&view) != first);
    assert_eq!(view.placed_id(own_image(&view)), id);
    let second = own_image(&view);
    let unchanged = answers(304);
    eventually("it is asked for again", || answers(304) > unchanged + 1);
    assert_eq!(own_image(&view), second, "the same table is not placed again");
    stop(agent);
    let on_disk = TableCache::open(&cache.path().join("tables"), u64::MAX, Default::default()).unwrap();
    assert_eq!(on_disk.get(id), Some(TableFile::parse(table_with(id, 1)).unwrap()));

    // Without a service the next agent uses it as it is.
    let fetched = answers(200);
    config.server = FakeService::reserve().url();
    let (agent, view, _) = start(&config);
    std::thread::sleep(Duration::from_millis(300));
    assert!(no_table::reason(own_image(&view)).is_none());
    stop(agent);
    assert_eq!(answers(200), fetched);
}

#[test]
fn a_table_from_disk_is_used_before_it_is_asked_for() {
    let service = FakeService::start(Tables::Tagged);
    let cache = tempfile::tempdir().unwrap();
    let mut config = config(&service, &cache);
    let (agent, _, id) = start(&config);
    stop(agent);
    // It changes while no agent runs, and the next one finds it old.
    service.change_tables(1, |table| table);
    let asked = || service.requests().iter().filter(|line| line.starts_with(&format!("GET {id} "))).count();
    let before = asked();
    let (agent, _, _) = start(&config);
    std::thread::sleep(Duration::from_millis(300));
    stop(agent);
    assert_eq!(asked(), before, "it is young");
    config.refresh_after = Duration::from_millis(100);
    let (agent, view, _) = start(&config);
    eventually("the other table is placed", || view.placements(id) == 2);
    stop(agent);
}
