//! Identifiers: small types that cannot be mixed up. Fresh ids are made outside the domain and passed in.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;
use uuid::Uuid;

/// One durable execution. A version 7 UUID, so that key order in the store is creation order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub Uuid);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for RunId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::try_parse(text).map(RunId)
    }
}

/// One user's data plane, `(tenant, runtime)`, as a short number given by `PlaneOpened`. Every key of a
/// run, command or artifact in the store starts with it, big-endian.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct PlaneId(pub u32);

impl PlaneId {
    /// `default/admin`: the plane of the first administrator, opened with the ledger itself.
    pub const ROOT: PlaneId = PlaneId(0);
}

/// Numbers the lives of one service's process or container, from 1. An outcome that carries an older
/// generation than the current one is recorded as stale and changes nothing.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The client's id of a command: the key of its one place in the durable inbox. 1 to 200 characters.
pub type CommandId = SmolStr;

/// A registered service's name: `[A-Za-z0-9][A-Za-z0-9_.-]{0,62}`, checked when it is registered.
pub type ServiceName = SmolStr;

/// A GPU's stable identifier, `GPU-…` from the vendor or `SIM-…` for a simulated one.
pub type GpuUuid = SmolStr;

/// Position in the whole ledger, from 1.
pub type Seq = u64;

/// Position within one run's records, from 1.
pub type Cursor = u64;

/// Numbers the dispatches of one run, from 1. Fences the outcomes of earlier dispatches.
pub type Attempt = u32;
