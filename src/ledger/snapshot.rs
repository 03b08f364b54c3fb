//! Snapshots of State: bytes that spare a restart the replay of all before them. A snapshot is a cache:
//! a damaged one is passed over, and events are never deleted for it.

use std::ops::{Bound, ControlFlow};

use serde::{Deserialize, Serialize};

use crate::domain::ids::Seq;

use super::batch::Writer;
use super::counts::Moves;
use super::error::{CommitError, ReadError};
use super::record_codec::{self, Hash};
use super::store::{Direction, Snapshot, Table, WriteSet};
use super::{Ledger, keys, read};

/// Bytes of one entry; a larger one would take a run of pages that is hard to find in a used file.
const CHUNK_BYTES: usize = 1 << 20;
/// The newest, and one to fall back to.
const KEPT: usize = 2;

#[derive(Serialize, Deserialize)]
struct Manifest {
    chunks: u32,
    size_bytes: u64,
    hash: Hash,
}

impl Writer {
    /// Keeps a snapshot of State as it is after record `at`, and drops all but the newest two.
    pub fn save_snapshot(&mut self, at: Seq, bytes: &[u8]) -> Result<(), CommitError> {
        self.check()?;
        let mut writes = WriteSet::default();
        let store = self.inner.store.snapshot()?;
        let mut kept = manifests(&*store)?;
        kept.retain(|(seq, _)| *seq != at);
        for (old, manifest) in kept.split_off(kept.len().min(KEPT - 1)) {
            remove(&mut writes, old, manifest.as_ref());
        }
        drop(store);
        let mut chunks = 0;
        for chunk in bytes.chunks(CHUNK_BYTES) {
            writes.put(Table::Snapshots, keys::snapshot_chunk(at, chunks), chunk);
            chunks += 1;
        }
        let manifest = Manifest {
            chunks,
            size_bytes: bytes.len() as u64,
            hash: *blake3::hash(bytes).as_bytes(),
        };
        let encoded = record_codec::encode(&manifest);
        writes.put(Table::SnapshotManifests, keys::seq(at), encoded);
        self.write(writes, Moves::default())
    }
}

impl Ledger {
    /// The newest readable snapshot: the seq after which to replay, and the bytes.
    pub fn load_snapshot(&self) -> Result<Option<(Seq, Vec<u8>)>, ReadError> {
        let store = self.inner.store.snapshot()?;
        for (seq, manifest) in manifests(&*store)? {
            match manifest
                .ok_or("its manifest is damaged")
                .and_then(|m| load(&*store, seq, &m))
            {
                Ok(bytes) => return Ok(Some((seq, bytes))),
                Err(detail) => {
                    tracing::warn!(
                        snapshot.seq = seq,
                        detail,
                        "passing over a damaged snapshot"
                    );
                }
            }
        }
        Ok(None)
    }
}

/// Newest first; `None` for a manifest that cannot be read.
fn manifests(store: &dyn Snapshot) -> Result<Vec<(Seq, Option<Manifest>)>, ReadError> {
    let mut found = Vec::new();
    let all = (Bound::Unbounded, Bound::Unbounded);
    store.scan(
        Table::SnapshotManifests,
        all,
        Direction::Down,
        &mut |key, value| {
            let manifest = read::entry(Table::SnapshotManifests, value).ok();
            found.extend(keys::parse_seq(key).map(|seq| (seq, manifest)));
            ControlFlow::Continue(())
        },
    )?;
    Ok(found)
}

fn load(store: &dyn Snapshot, seq: Seq, manifest: &Manifest) -> Result<Vec<u8>, &'static str> {
    let mut bytes = Vec::new();
    // A damaged manifest may claim anything; what cannot be had at once is not needed either.
    let _ = bytes.try_reserve_exact(usize::try_from(manifest.size_bytes).unwrap_or(0));
    for chunk in 0..manifest.chunks {
        match store.get(Table::Snapshots, &keys::snapshot_chunk(seq, chunk)) {
            Ok(Some(part)) => bytes.extend_from_slice(&part),
            Ok(None) => return Err("a part is missing"),
            Err(_) => return Err("a part cannot be read"),
        }
    }
    if bytes.len() as u64 != manifest.size_bytes
        || *blake3::hash(&bytes).as_bytes() != manifest.hash
    {
        return Err("its checksum does not match");
    }
    Ok(bytes)
}

fn remove(writes: &mut WriteSet, seq: Seq, manifest: Option<&Manifest>) {
    for chunk in 0..manifest.map_or(0, |manifest| manifest.chunks) {
        writes.remove(Table::Snapshots, keys::snapshot_chunk(seq, chunk));
    }
    writes.remove(Table::SnapshotManifests, keys::seq(seq));
}
