//! Containers: what one is made of, and what is told of one that exists.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::ladder::Step;

/// A container that Rungate makes of an image, one for each instance. What is not said is as strict as the engine has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    pub image: String,
    /// What the image's entry point gets; empty takes the image's own.
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub volumes: Vec<Volume>,
    /// MiB of `/dev/shm`; `None` takes the engine's default.
    pub shm_mib: Option<u64>,
    pub ipc: Ipc,
    pub ulimits: Vec<Ulimit>,
    /// Thousandths of a processor; `None` takes all there are.
    pub cpus_milli: Option<u64>,
    /// MiB of memory; `None` takes the gateway's setting.
    pub memory_mib: Option<u64>,
    /// User, or user and group, inside; `None` takes the image's.
    pub user: Option<String>,
    /// Networks of the engine; empty takes its default bridge.
    pub networks: Vec<String>,
    /// TCP port that it listens on inside.
    pub port: u16,
}

/// What the gateway keeps in mind of a job with a container of its own; what that is made of lies in the job's payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobContainer {
    /// How it is stopped, step by step; empty stops it at once.
    pub ladder: Vec<Step>,
    /// Milliseconds between TERM and KILL.
    pub grace_ms: u64,
}

impl JobContainer {
    /// Asked to save its work by a signal and given time for it, if so; then TERM, and KILL when the time is over.
    pub fn new(checkpoint: Option<Step>, grace_ms: u64) -> JobContainer {
        let stop = Step::Stop { ms: grace_ms };
        let ladder = checkpoint.map_or_else(Vec::new, |checkpoint| vec![checkpoint, stop]);
        JobContainer { ladder, grace_ms }
    }
}

/// A folder of the host, or a volume of the engine, that is seen inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// An absolute path, or the name of a volume.
    pub source: String,
    /// An absolute path.
    pub target: String,
    pub read_only: bool,
}

/// Whose shared memory it sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ipc {
    /// Its own alone.
    #[default]
    Private,
    /// The host's.
    Host,
}

/// A bound on what its processes use of one thing, as in setrlimit(2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    pub name: String,
    pub soft: i64,
    pub hard: i64,
}

/// What is known of an instance's container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerFacts {
    /// The engine's id.
    pub id: SmolStr,
    /// Without a slash.
    pub name: SmolStr,
    pub status: ContainerStatus,
}

/// Where a container stands, as the engine tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerStatus {
    /// Made, not started.
    Created,
    Running,
    /// Its processes stand still, by somebody's order.
    Paused,
    Exited,
    /// The engine does not have it any more.
    Removed,
}

/// What is known of the container engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Engine {
    /// It answered when last asked.
    pub up: bool,
    /// Why it is not up, as a sentence.
    pub error: Option<String>,
}

impl Engine {
    /// Why it is not up, as the end of a sentence.
    pub fn why_down(&self) -> &str {
        let unknown = "the container engine was not reached yet";
        self.error.as_deref().unwrap_or(unknown)
    }
}
