//! HTTP: what is asked over it becomes commands to the coordinator and reads of the ledger; decides nothing.
//!
//! | file | holds |
//! |---|---|
//! | `router`, `docs`, `examples` | all routes; the OpenAPI document, its examples and its reader |
//! | `guard` | request id, Host and Origin, bounds; finishes every answer |
//! | `authenticate`, `access` | credentials to a principal; what each route needs |
//! | `users`, `tokens`, `runtimes` | people, their tokens, and the planes they leave |
//! | `error` | every refusal and its status |
//! | `linger` | reading on what was refused |
//! | `body`, `json`, `fields`, `query`, `idempotency`, `cursor` | reading requests |
//! | `runs`, `job`, `run_view`, `run_ledger`, `checkpoint`, `commands`, `ledger`, `ledger_tools` | runs, commands, ledger |
//! | `queue`, `services`, `service_spec`, `service_control`, `service_logs`, `preempt`, `gpu` | the GPU dialect |
//! | `sse` | streams |
//! | `health`, `metrics` | probes and numbers |
//! | `state`, `config`, `listen` | what handlers share; settings; the server loop |

mod access;
mod authenticate;
mod body;
mod checkpoint;
mod commands;
pub mod config;
mod cursor;
mod docs;
pub mod error;
mod examples;
mod fields;
mod gpu;
mod guard;
mod health;
mod idempotency;
mod job;
mod json;
mod ledger;
mod ledger_tools;
mod linger;
pub mod listen;
mod metrics;
mod preempt;
mod query;
mod queue;
mod router;
mod run_ledger;
mod run_view;
mod runs;
mod runtimes;
mod service_control;
mod service_logs;
mod service_spec;
mod services;
mod signing_keys;
mod sse;
mod sso;
mod state;
mod tokens;
mod users;
mod work;

pub use config::ApiConfig;
pub use router::{openapi, router};
pub use state::{App, Parts};

#[cfg(test)]
mod tests;
