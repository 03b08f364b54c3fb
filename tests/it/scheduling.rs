//! Scheduling, proved or broken: golden scripts (`scripts/*.txt`), and properties under random commands, outcomes,
//! time and restarts. No process, no clock, no disk: the pure core alone, driven as the coordinator drives it.

mod bed;
mod golden;
mod invariants;
mod ops;
mod play;
mod properties;
mod script;
mod tenants;
mod text;

mod words;
mod world;
