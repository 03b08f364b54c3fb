//! Containers, by the engine's HTTP interface: services in ones that are there already, or in ones made of an image.
//!
//! `connect` the ways to an engine, with `tls` and `ssh`, `engine` the connection and whether it answers, `space` its disk, `rules` what the operator allows, `recipe` what a container is made
//! of, `container` one of them, `checkpoint` what a job's attempts hand on, `watch` what becomes of them, `running` which run, `output` what they say, `position` how far that was copied, `owners` who lives in which, `orphans` those nobody knows.

mod checkpoint;
mod connect;
mod container;
mod engine;
mod orphans;
mod output;
mod owners;
mod position;
mod recipe;
mod registry;
mod rules;
mod running;
mod space;
mod ssh;
mod tls;
mod watch;

use std::time::Duration;

pub use checkpoint::Checkpoint;
pub(super) use container::{Container, Making, StartError};
pub use engine::{Docker, DockerError, DockerOptions};
pub use orphans::Kept;
pub(super) use output::copy;
pub use owners::ContainerOwners;
pub(super) use owners::Occupied;
pub(super) use position::Copied;
pub use recipe::JobParts;
pub use rules::{ContainerRules, Forbidden};
pub(super) use watch::Seen;

/// Before an engine that was lost while it was asked is asked again.
pub(super) const ASK_AGAIN: Duration = Duration::from_millis(200);
/// Between looks for orphans.
pub(super) const SWEEP_EVERY: Duration = Duration::from_secs(60);
