//! Requests a second, bytes a second, times and memory of both servers under the same loads.

use std::time::Duration;

use anyhow::Result;

use crate::files::{Files, hex};
use crate::load::{Load, Measured};
use crate::servers::Server;

/// Times that each server is measured.
const ROUNDS: usize = 5;
/// How long each time.
const TIME: Duration = Duration::from_secs(2);
/// How long each is asked before, so that both have what they keep.
const WARM_UP: Duration = Duration::from_secs(1);
/// Build-IDs that nobody has.
const UNKNOWN: usize = 2000;

/// What one server did in all rounds.
struct Medians {
    rounds: Vec<Measured>,
    /// Largest growth of resident memory in a round.
    growth_bytes: u64,
}

impl Medians {
    fn of(&self, figure: impl Fn(&Measured) -> f64) -> f64 {
        let mut figures: Vec<f64> = self.rounds.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures[figures.len() / 2]
    }
}

/// The table.
pub(crate) fn print(ours: &Server, theirs: &Server, files: &Files, version: &str) -> Result<()> {
    let unknown = (0..UNKNOWN).map(|number| {
        let id = [&[0xee; 12][..], &(number as u64).to_be_bytes()].concat();
        format!("/buildid/{}/debuginfo", hex(&id))
    });
    let load = |paths: Vec<String>, connections: usize, status: u16| Load {
        paths,
        connections,
        time: TIME,
        status,
        encoding: "identity",
    };
    let mixed = files.mixed.iter().map(|file| file.path("executable")).collect();
    let sections = files.many.iter().map(|file| file.path("section/.note.gnu.build-id")).collect();
    let usual = format!("one file of {} KB, 16 connections", files.usual.content.len() / 1000);
    let rows = [
        (usual.as_str(), load(vec![files.usual.path("executable")], 16, 200)),
        ("288 files of 30 to 200 KB, 16 connections", load(mixed, 16, 200)),
        ("2,000 build-IDs that are not there, 16 connections", load(unknown.collect(), 16, 404)),
        ("sections of 36 bytes of 2,000 build-IDs, 16 connections", load(sections, 16, 200)),
        ("one file of 60 MB, 8 connections", load(vec![files.large.path("executable")], 8, 200)),
    ];
    println!("### Under load, beside {version}\n");
    println!(
        "| load | server | requests/s | MB/s | p50 ms | p99 ms | RSS growth MB | generator, % of a processor |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|---:|");
    for (name, load) in rows {
        let [ours, theirs] = alternate([ours, theirs], &load)?;
        let ratio = |figure: fn(&Measured) -> f64| ours.of(figure) / theirs.of(figure);
        for (server, found) in [("windlassd", &ours), ("elfutils", &theirs)] {
            println!(
                "| {name} | {server} | {:.0} | {:.0} | {:.2} | {:.2} | {:.1} | {:.0} |",
                found.of(|it| it.requests_a_second),
                found.of(|it| it.megabytes_a_second),
                found.of(|it| it.p50_ms),
                found.of(|it| it.p99_ms),
                found.growth_bytes as f64 / 1e6,
                found.of(|it| it.generator_percent),
            );
        }
        println!(
            "| | **times** | **{:.2}** | **{:.2}** | {:.2} | **{:.2}** | | |",
            ratio(|it| it.requests_a_second),
            ratio(|it| it.megabytes_a_second),
            ratio(|it| it.p50_ms),
            ratio(|it| it.p99_ms),
        );
    }
    println!(
        "\nMedians of {ROUNDS} alternations of {} s; both servers run all the time and share the processors with the \
         generator, a single thread that reads every byte. Bodies are identity.\n",
        TIME.as_secs()
    );
    Ok(())
}

/// Measures both in turn.
fn alternate(servers: [&Server; 2], load: &Load) -> Result<[Medians; 2]> {
    for server in servers {
        Load { time: WARM_UP, ..load.clone() }.run(server.address)?;
    }
    let mut found = servers.map(|_| Medians { rounds: Vec::new(), growth_bytes: 0 });
    for _ in 0..ROUNDS {
        for (server, found) in servers.iter().zip(&mut found) {
            server.forget_peak()?;
            let before = server.resident_bytes()?;
            found.rounds.push(load.run(server.address)?);
            found.growth_bytes = found.growth_bytes.max(server.peak_bytes()?.saturating_sub(before));
        }
    }
    Ok(found)
}
