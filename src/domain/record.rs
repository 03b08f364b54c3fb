//! A record: an event with its place in the ledger and its payload.

use bytes::Bytes;
use smol_str::SmolStr;

use super::audit::Asked;
use super::event::Event;
use super::ids::{Cursor, PlaneId, Seq};
use super::time::Timestamp;

/// An event that was decided and is about to be appended.
#[derive(Clone, Debug, PartialEq)]
pub struct NewRecord {
    pub plane: PlaneId,
    pub at: Timestamp,
    /// Who caused it: `admin`, `scheduler`, `executor`, `gateway`, later a user's id.
    pub actor: SmolStr,
    pub request_id: Option<SmolStr>,
    /// The request that it came of; in the first record of each that is audited.
    pub asked: Option<Asked>,
    pub event: Event,
    /// A client's bytes that belong to the event; empty when there are none.
    pub payload: Bytes,
}

/// A record as it stands in the ledger.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub seq: Seq,
    /// Position within its run's records, 0 when it belongs to no run.
    pub cursor: Cursor,
    pub plane: PlaneId,
    pub at: Timestamp,
    pub actor: SmolStr,
    pub request_id: Option<SmolStr>,
    pub asked: Option<Asked>,
    pub event: Event,
    pub payload: Bytes,
    /// The payload was removed by a purge; its hash still stands in the chain.
    pub purged: bool,
    pub prev_hash: [u8; 32],
    pub hash: [u8; 32],
}
