//! The service over real HTTP, on a free port and in a temporary folder.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends here")]

mod access;
mod administered;
mod collected;
mod copies;
mod daemon;
mod debuginfod;
mod decoders;
mod faults;
mod full_disk;
mod hostile;
mod inventory;
mod kernel;
mod killed;
mod load;
mod namespaces;
mod naming;
mod openapi;
mod parts;
mod perf_map;
mod repaired;
mod server;
mod tables;
mod tls;
mod uploads;
mod upstream;
mod uses;
