//! HTTP: what is asked over it becomes commands to the coordinator and reads of the ledger; decides nothing.
//!
//! | file | holds |
//! |---|---|
//! | `router`, `docs`, `examples` | all routes; the OpenAPI document, its examples and its reader |
//! | `guard` | request id, Host and Origin, bounds; finishes every answer |
//! | `audit` | who did what |
//! | `client` | where a request came from: address, https |
//! | `authenticate`, `access` | credentials to a principal; what each route needs |
//! | `session`, `login`, `sessions` | logging in and out with a browser; listing and ending sessions |
//! | `cookies`, `csrf`, `slow` | a session's cookies; requests of other sites; slow hashes |
//! | `users`, `tenants`, `tokens`, `passwords`, `runtimes` | people, their tokens and passwords, and the planes they leave |
//! | `limits`, `buckets`, `shares` | how much callers may ask: a minute, and at once |
//! | `headers` | what every answer tells browsers |
//! | `error`, `redact` | every refusal and its status; what it tells back |
//! | `linger` | reading on what was refused |
//! | `body`, `json`, `fields`, `query`, `idempotency`, `cursor` | reading requests |
//! | `runs`, `job`, `run_view`, `run_ledger`, `checkpoint`, `commands`, `ledger`, `ledger_tools` | runs, commands, ledger |
//! | `queue`, `services`, `service_spec`, `image_spec`, `containers`, `service_control`, `service_logs`, `preempt`, `gpu`, `gpu_use` | the GPU dialect |
//! | `sse` | streams |
//! | `health`, `metrics` | probes and numbers |
//! | `state`, `config`, `listen`, `tls` | what handlers share; settings; the server loop and its certificate |

mod access;
mod audit;
mod authenticate;
mod body;
mod buckets;
mod checkpoint;
pub mod client;
mod commands;
pub mod config;
mod containers;
mod cookies;
mod csrf;
mod cursor;
mod docs;
pub mod error;
mod examples;
mod fields;
#[cfg(fuzzing)]
pub mod fuzzing;
mod gpu;
mod gpu_use;
mod guard;
mod headers;
mod health;
mod held;
mod idempotency;
mod image_spec;
mod job;
mod job_container;
mod json;
mod ladder;
mod ledger;
mod ledger_tools;
pub mod limits;
mod linger;
pub mod listen;
mod log_stream;
mod login;
mod metrics;
mod notify;
mod passwords;
mod preempt;
mod query;
mod queue;
mod reauth;
mod redact;
mod router;
mod routes;
mod run_ledger;
mod run_output;
mod run_view;
mod runs;
mod runtimes;
mod service_control;
mod service_logs;
mod service_owner;
mod service_spec;
mod services;
mod session;
mod sessions;
mod shares;
mod signing_keys;
mod slow;
mod sse;
mod sso;
mod state;
mod tenants;
pub mod tls;
mod tokens;
mod users;
mod work;

pub use authenticate::session_counts;
pub use config::ApiConfig;
pub use job_container::image_of as container_of_job;
pub use router::{openapi, router};
pub use state::{App, Parts};

#[cfg(test)]
mod tests;
