//! The service: takes in what builds produce, keeps it, and serves debuggers, agents and people from it.
//!
//! One binary, no other server needed: contents in a folder or object store, the catalog in SQLite. In reading
//! order:
//!
//! - [`config`], [`service`]: what it is started with; its parts, start and stop
//! - `routes`: every route; `connection`: how connections are accepted and end
//! - [`error`]: from what went wrong to what the client is told; `access`, [`token`]: who may do what;
//!   [`namespace`]: whose artefact goes in front of whose; `audit`: who did what; [`tls`]: over what
//! - `intake`, `upload`, `unfinished`, `missing`: how contents come in; `memory`: how much of it decoded requests may take
//! - `storing`, [`elf`], [`conflict`]: how they are checked and become durable, and which of two stays
//! - [`content`], [`content_hash`], [`seekable`], [`blob`], [`catalog`]: how they are kept
//! - `protocol`, `metadata`, `delivery`: how debuginfod clients are served; `rows`, `copies`, `sendfile`, `recent`: fast; `upstream`: what
//!   others have
//! - `derive`, `flight`: what is made from contents, once; `unwind`, `symbols`, `symbolize`: what for
//! - [`profiles`]: stacks of addresses in, named profiles out
//! - `inventory`: what is there, as people ask for it
//! - `uses`: when artefacts were last used; [`quota`], [`retention`]: how much may be there, for how long; [`gc`](mod@gc), [`holding`]: how the
//!   rest goes
//! - `openapi`: all of it as a document
//! - `status`, `metrics`, [`check`](mod@check), [`administration`]: operations
//!
//! ```no_run
//! # async fn run() -> Result<(), windlass_debuginfod::StartError> {
//! let config = windlass_debuginfod::Config::new("windlass-data".into());
//! let service = windlass_debuginfod::start(config).await?;
//! println!("{}", service.url());
//! service.stop().await;
//! # Ok(())
//! # }
//! ```

mod access;
pub mod administration;
mod audit;
pub mod blob;
pub mod catalog;
pub mod check;
pub mod config;
pub mod conflict;
mod connection;
pub mod content;
pub mod content_hash;
mod copies;
mod delivery;
mod derive;
pub mod elf;
pub mod error;
mod flight;
pub mod gc;
pub mod holding;
mod intake;
mod inventory;
mod memory;
mod metadata;
mod metrics;
mod missing;
pub mod namespace;
mod openapi;
pub mod profiles;
mod protocol;
pub mod quota;
mod recent;
pub mod retention;
mod routes;
mod rows;
pub mod seekable;
mod sendfile;
pub mod service;
mod status;
mod storing;
mod symbolize;
mod symbols;
pub mod tls;
pub mod token;
mod unfinished;
mod unwind;
mod upload;
mod upstream;
mod uses;

pub use check::{CheckReport, check};
pub use config::Config;
pub use gc::{Collect, gc};
pub use service::{Service, StartError, start};
