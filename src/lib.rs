//! Rungate: a durable gateway in front of GPU machines. `docs/architecture.md` is the map.

pub mod api;
pub mod auth;
mod causes;
pub mod cli;
pub mod clock;
pub mod config;
pub mod coordinator;
pub mod domain;
pub mod driver;
pub mod executor;
mod glob;
pub mod gpu;
mod hex;
pub mod ledger;
pub mod outbound;
mod private_file;
mod random;
pub mod server;
pub mod telemetry;
pub mod worker;

/// Threads of the runtime allocate what the coordinator frees, and the other way round: glibc's allocator takes a
/// third of a start for that (`benches/`). Huge pages are off (`no_thp`): they would double what a follower costs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
