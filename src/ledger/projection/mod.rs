//! What the API reads: current values folded from events, written in the same commit as the events. Each
//! fold is a pure function, shared by appending and by `verify`.

pub mod inbox;
pub mod people;
pub mod run;
pub mod service;
