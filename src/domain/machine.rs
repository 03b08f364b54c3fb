//! What is kept of the machine's GPUs besides their list: why one is quarantined, and how they were used.

use serde::{Deserialize, Serialize};

use super::ids::{Generation, GpuUuid, ServiceName};
use super::time::Timestamp;

/// What a GPU is quarantined for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuarantineCause {
    /// The driver reported an error that no application causes.
    Xid,
    /// Its memory had errors that could not be corrected.
    Ecc,
    /// Memory of an instance that has ended was not seen free in time.
    MemoryHeld,
}

impl QuarantineCause {
    /// As the ledger and the API name it.
    pub fn name(self) -> &'static str {
        match self {
            QuarantineCause::Xid => "xid",
            QuarantineCause::Ecc => "ecc",
            QuarantineCause::MemoryHeld => "memory_held",
        }
    }
}

/// A GPU that gets no new instances until someone lifts it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    pub cause: QuarantineCause,
    /// One sentence for people.
    pub detail: String,
    pub since: Timestamp,
}

/// The smallest, the mean and the largest of some samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spread {
    pub min: u64,
    pub mean: u64,
    pub max: u64,
}

/// How one GPU was used in a while; `None` where it does not tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuUse {
    pub gpu: GpuUuid,
    pub samples: u32,
    pub used_mib: Option<Spread>,
    pub utilization_pct: Option<Spread>,
    pub temperature_c: Option<Spread>,
    pub power_mw: Option<Spread>,
}

/// What was seen of the GPUs, as the executor reports it.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// A GPU is not to be trusted with new instances.
    Fault {
        gpu: GpuUuid,
        cause: QuarantineCause,
        detail: String,
    },
    /// How the GPUs were used since then.
    Use { since: Timestamp, gpus: Vec<GpuUse> },
    /// An instance died of too little GPU memory.
    OutOfMemory {
        service: ServiceName,
        generation: Generation,
    },
}
