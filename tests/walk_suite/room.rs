//! Walks while tables take each other's place all the time.
//!
//! The programs run all at once and need more than the agent's budget has, and a sample protects no table. So each table goes
//! again and again while walks go by it, and another one lies where it was. Then walks end early, but no frame may be wrong, no
//! program may be without whole stacks for good, and sampling may not stop.

use std::time::{Duration, Instant, SystemTime};

use windlass_agent::Agent;
use windlass_schema::StopReason;
use windlass_schema::maps::CHUNK_BYTES;
use windlass_tests::service::TestService;
use windlass_tests::skip::may_use_bpf;
use windlass_tests::stacks::{Stack, stacks, total};

use super::launch::{self, Running};
use super::report::{print, wrong};
use super::{ALONE, PATIENCE, SHIP_INTERVAL, config, publish, samples_of, table};

/// Programs with tables of their own, small and large, and with libraries that several of them map.
const ROWS: [&str; 9] =
    ["deep57", "static", "staticpie", "nopie", "sorted", "exceptions", "threads", "large", "rust"];
/// Bytes of kernel memory: two chunks, of which libc's table takes one and a half. All of them together take three.
const BUDGET_BYTES: u64 = 2 * CHUNK_BYTES as u64;
/// Fewest tables that are placed: each of them several times.
const MIN_PLACED: u64 = 60;
/// Fewest whole stacks of each program.
const MIN_COMPLETE: i64 = 20;

/// Whether a walk may have ended so, beside as its row says.
fn is_allowed(program: &Running, stop: Option<StopReason>) -> bool {
    // Not `NoMapping`, which is where a walk by the wrong table ends.
    use StopReason::{MappingsChanged, ProcessUnknown, TableBudget, TablePending};
    stop.is_some_and(|stop| {
        stop.is_complete()
            || matches!(stop, TableBudget | TablePending | MappingsChanged | ProcessUnknown)
            || program.row.stops.iter().any(|allowed| allowed.reason == stop)
    })
}

fn complete(stacks: &[Stack]) -> i64 {
    total(stacks.iter().filter(|stack| stack.is_complete()))
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_take_turns_give_no_wrong_frame() {
    let _alone = ALONE.lock().await;
    let test = "suite::tables_that_take_turns_give_no_wrong_frame";
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let rows = table::rows().filter(|row| ROWS.contains(&row.name));
    let programs: Vec<Running> = rows.filter_map(|row| launch::start(test, row, service.folder())).collect();
    publish(&service, &programs).await;
    let mut config = config(&service);
    config.table_budget_bytes = BUDGET_BYTES;
    config.table_in_use = Duration::ZERO;
    let (start, from) = (Instant::now(), SystemTime::now());
    let agent = tokio::task::spawn_blocking(move || Agent::start(config))
        .await
        .expect("the agent's start does not panic")
        .expect("the agent starts");
    let seen = loop {
        tokio::time::sleep(2 * SHIP_INTERVAL).await;
        let seen = stacks(&service.profile_since(from).await);
        let is_enough = |program| complete(&samples_of(program, &seen)) >= MIN_COMPLETE;
        if programs.iter().all(is_enough) && start.elapsed() > PATIENCE / 4 || start.elapsed() > PATIENCE {
            break seen;
        }
    };
    let summary = tokio::task::spawn_blocking(move || agent.stop())
        .await
        .expect("the agent's end does not panic")
        .expect("the agent ends");
    println!("{} tables placed, {:?}", summary.tables_loaded, summary.stop_reasons);
    for program in &programs {
        let (name, samples) = (program.row.name, samples_of(program, &seen));
        let (wrong, whole) = (wrong(program, &samples), complete(&samples));
        println!("{name}: {whole} of {} complete", total(&samples));
        assert!(wrong.is_empty(), "{name} cannot have these stacks:\n{}", print(&wrong));
        let unlike = |stack: &&Stack| !is_allowed(program, stack.stop);
        let unlike: Vec<_> = samples.iter().filter(unlike).cloned().collect();
        assert!(unlike.is_empty(), "{name} ends as it may not:\n{}", print(&unlike));
        assert!(whole >= MIN_COMPLETE, "{name}: {whole} of {} complete", total(&samples));
    }
    assert!(summary.tables_loaded >= MIN_PLACED, "{} tables placed", summary.tables_loaded);
    assert_eq!(summary.lost_samples, 0);
    service.stop().await;
}
