//! Keys of the tables: big-endian numbers, so that byte order is the order we list in.

use uuid::Uuid;

use crate::domain::ids::{Cursor, PlaneId, RunId, Seq};
use crate::domain::time::Timestamp;

use super::projection::run::RunStatus;

/// Key of `events`, `snapshot_manifests`.
pub fn seq(seq: Seq) -> [u8; 8] {
    seq.to_be_bytes()
}

/// Back from `seq`; `None` when it is no such key.
pub fn parse_seq(key: &[u8]) -> Option<Seq> {
    Some(Seq::from_be_bytes(key.try_into().ok()?))
}

/// Key of `planes`; prefix of all keys that begin with a plane.
pub fn plane(plane: PlaneId) -> [u8; 4] {
    plane.0.to_be_bytes()
}

/// Back from `plane`; `None` when it is no such key.
pub fn parse_plane(key: &[u8]) -> Option<PlaneId> {
    Some(PlaneId(u32::from_be_bytes(key.try_into().ok()?)))
}

/// Key of `runs`; prefix of `run_records`.
pub fn run(plane: PlaneId, run: RunId) -> [u8; 20] {
    let mut key = [0; 20];
    key[..4].copy_from_slice(&plane.0.to_be_bytes());
    key[4..].copy_from_slice(run.0.as_bytes());
    key
}

/// Plane and run of a key of `runs`.
pub fn parse_run(key: &[u8]) -> Option<(PlaneId, RunId)> {
    let plane = PlaneId(u32::from_be_bytes(key.get(..4)?.try_into().ok()?));
    Some((plane, last_run(key)?))
}

/// The run that ends a key of `runs` or of one of its indexes.
pub fn last_run(key: &[u8]) -> Option<RunId> {
    let start = key.len().checked_sub(16)?;
    Uuid::from_slice(&key[start..]).ok().map(RunId)
}

/// Key of `run_records`.
pub fn run_record(plane: PlaneId, run_id: RunId, cursor: Cursor) -> [u8; 28] {
    let mut key = [0; 28];
    key[..20].copy_from_slice(&run(plane, run_id));
    key[20..].copy_from_slice(&cursor.to_be_bytes());
    key
}

/// Key of `runs_by_status`.
pub fn status(plane: PlaneId, status: RunStatus, run: RunId) -> [u8; 21] {
    let mut key = [0; 21];
    key[..4].copy_from_slice(&plane.0.to_be_bytes());
    key[4] = status.number();
    key[5..].copy_from_slice(run.0.as_bytes());
    key
}

/// Key of `runs_by_session`: the session hashed, so that every key has the same width.
pub fn session(plane: PlaneId, session: &str, run: RunId) -> [u8; 36] {
    let mut key = [0; 36];
    key[..4].copy_from_slice(&plane.0.to_be_bytes());
    key[4..20].copy_from_slice(&blake3::hash(session.as_bytes()).as_bytes()[..16]);
    key[20..].copy_from_slice(run.0.as_bytes());
    key
}

/// Key of `inbox`.
pub fn command(plane: PlaneId, id: &str) -> Vec<u8> {
    [&plane.0.to_be_bytes()[..], id.as_bytes()].concat()
}

/// Key of `idempotency`.
pub fn idempotency(plane: PlaneId, route: &str, key: &str) -> [u8; 36] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(route.len() as u64).to_be_bytes());
    hasher.update(route.as_bytes()).update(key.as_bytes());
    let mut bytes = [0; 36];
    bytes[..4].copy_from_slice(&plane.0.to_be_bytes());
    bytes[4..].copy_from_slice(hasher.finalize().as_bytes());
    bytes
}

/// Key of `snapshots`.
pub fn snapshot_chunk(seq: Seq, chunk: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&seq.to_be_bytes());
    key[8..].copy_from_slice(&chunk.to_be_bytes());
    key
}

/// Key of `gpu_use`: an instant, those before the epoch left out.
pub fn instant(at: Timestamp) -> [u8; 8] {
    at.0.max(0).to_be_bytes()
}

/// The one key of `gpus`.
pub const GPUS: &[u8] = b"gpus";
/// Keys of `meta`.
pub const META_FORMAT: &[u8] = b"format";
pub const META_INSTANCE: &[u8] = b"instance";
