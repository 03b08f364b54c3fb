//! Rungate: a durable gateway in front of GPU machines. `docs/architecture.md` is the map.

pub mod api;
pub mod auth;
pub mod cli;
pub mod config;
pub mod coordinator;
pub mod domain;
pub mod driver;
pub mod executor;
pub mod gpu;
pub mod ledger;
pub mod outbound;
pub mod server;
pub mod telemetry;
pub mod worker;
