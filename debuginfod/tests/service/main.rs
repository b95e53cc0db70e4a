//! The service over real HTTP, on a free port and in a temporary folder.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends here")]

mod debuginfod;
mod decoders;
mod faults;
mod kernel;
mod naming;
mod perf_map;
mod server;
mod tables;
mod uploads;
mod upstream;
