//! The integration tests: one binary, so that they link once. `driver_*`, `executor_*` and `ledger_*` go through
//! the library's own interface; the others drive the built binary (`support` has a gateway, `rungate` a command).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(
    clippy::too_many_lines,
    reason = "a table of cases or a story reads best in one piece"
)]

mod audit;
mod audit_canary;
mod bad_input;
mod bad_input_logins;
mod bad_input_table;
mod bad_input_users;
mod checkpoints;
mod cli_basics;
mod cli_client;
mod cli_demo;
mod cli_safety;
mod cli_worker;
mod clients;
mod commands;
mod crash;
mod crash_audit;
mod crash_clients;
mod dialect;
mod disk_full;
mod docker;
mod docs;
mod driver_find;
mod driver_health;
mod driver_logs;
mod driver_process;
mod examples;
mod executor_callbacks;
mod executor_calls;
mod executor_ladder;
mod gpu;
mod headers;
mod health;
mod hosts;
mod image;
mod isolation;
mod job_tokens;
mod ladder;
mod late_bodies;
mod ledger_disk;
mod ledger_follow;
mod ledger_golden;
mod ledger_http;
mod ledger_open;
mod ledger_people;
mod ledger_reads;
mod ledger_transfer;
mod ledger_world;
mod limits;
mod logins;
mod notices;
mod notify;
mod nvml;
mod nvml_memory;
mod panic_canary;
mod preempt;
mod purge;
mod queue;
mod recovery;
mod rungate;
mod runs;
mod scheduling;
mod schema;
mod service_tenants;
mod services;
mod sessions;
mod sso;
mod ssrf;
mod startup;
mod streams;
mod support;
mod tenants;
mod tidy;
mod tls;
mod users;
mod world;
