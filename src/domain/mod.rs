//! The pure core: what can be asked, what happened, and what follows. No clock, no randomness, no I/O,
//! no threads: `now` and fresh ids are arguments, so that a replay of the ledger gives the same state.
//!
//! `command` → `decide` → `event` → `state` → `scheduler` → `effect`.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod audit;
pub mod command;
pub mod container;
pub mod decide;
pub mod effect;
pub mod engine;
pub mod event;
pub mod identity;
pub mod ids;
pub mod ladder;
pub mod machine;
pub mod notify;
pub mod record;
pub mod scheduler;
pub mod settings;
pub mod spec;
pub mod state;
pub mod tenant;
pub mod time;
