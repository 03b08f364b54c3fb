//! Reading single entries and ranges of records out of a snapshot.

use std::ops::{Bound, ControlFlow};

use serde::de::DeserializeOwned;

use crate::domain::ids::{Cursor, PlaneId, RunId, Seq};
use crate::domain::record::Record;

use super::error::ReadError;
use super::projection::inbox::InboxEntry;
use super::projection::run::RunSummary;
use super::projection::service::ServiceView;
use super::record_codec::Raw;
use super::store::{Direction, Snapshot, Table};
use super::{Scope, keys};

/// Decodes a projection's entry.
pub fn entry<T: DeserializeOwned>(table: Table, bytes: &[u8]) -> Result<T, ReadError> {
    postcard::from_bytes(bytes).map_err(|error| ReadError::BadEntry {
        table: table.name(),
        detail: error.to_string(),
    })
}

/// Reads and decodes a projection's entry.
pub fn get<T: DeserializeOwned>(
    snapshot: &dyn Snapshot,
    table: Table,
    key: &[u8],
) -> Result<Option<T>, ReadError> {
    match snapshot.get(table, key)? {
        Some(bytes) => entry(table, &bytes).map(Some),
        None => Ok(None),
    }
}

/// All entries of a projection, by key.
pub fn all<T: DeserializeOwned>(
    snapshot: &dyn Snapshot,
    table: Table,
) -> Result<Vec<T>, ReadError> {
    let mut entries = Vec::new();
    let bounds = (Bound::Unbounded, Bound::Unbounded);
    snapshot.scan(table, bounds, Direction::Up, &mut |_, value| {
        entries.push(entry(table, value));
        ControlFlow::Continue(())
    })?;
    entries.into_iter().collect()
}

pub fn run(
    snapshot: &dyn Snapshot,
    plane: PlaneId,
    run: RunId,
) -> Result<Option<RunSummary>, ReadError> {
    get(snapshot, Table::Runs, &keys::run(plane, run))
}

pub fn command(
    snapshot: &dyn Snapshot,
    plane: PlaneId,
    id: &str,
) -> Result<Option<InboxEntry>, ReadError> {
    get(snapshot, Table::Inbox, &keys::command(plane, id))
}

pub fn service(snapshot: &dyn Snapshot, name: &str) -> Result<Option<ServiceView>, ReadError> {
    get(snapshot, Table::Services, name.as_bytes())
}

pub fn record(snapshot: &dyn Snapshot, seq: Seq) -> Result<Option<Record>, ReadError> {
    match snapshot.get(Table::Events, &keys::seq(seq))? {
        Some(bytes) => Raw::parse(seq, &bytes)?.decode(seq).map(Some),
        None => Ok(None),
    }
}

/// How much to read at once: whichever bound is met first, but at least one record.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    pub records: usize,
    pub payload_bytes: usize,
}

/// Records of a scope after `after`, and how far it looked: the last seq examined.
pub fn records(
    snapshot: &dyn Snapshot,
    scope: Scope,
    after: Seq,
    chunk: Chunk,
) -> Result<(Vec<Record>, Seq), ReadError> {
    let (mut found, mut bytes, mut last, mut examined) = (Vec::new(), 0, after, 0usize);
    let mut failure = None;
    let from = keys::seq(after.saturating_add(1));
    let bounds = (Bound::Included(&from[..]), Bound::Unbounded);
    snapshot.scan(Table::Events, bounds, Direction::Up, &mut |key, value| {
        let seq = keys::parse_seq(key).unwrap_or_default();
        let raw = match Raw::parse(seq, value) {
            Ok(raw) => raw,
            Err(error) => {
                failure = Some(error);
                return ControlFlow::Break(());
            }
        };
        last = seq;
        examined += 1;
        if scope.holds(raw.plane) {
            match raw.decode(seq) {
                Ok(record) => {
                    bytes += raw.payload.len();
                    found.push(record);
                }
                Err(error) => failure = Some(error),
            }
        }
        let done = failure.is_some()
            || found.len() >= chunk.records
            || bytes >= chunk.payload_bytes
            || examined >= MAX_EXAMINED;
        if done {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    match failure {
        Some(error) => Err(error),
        None => Ok((found, last)),
    }
}

/// Most records of other planes that one read steps over, so that a read ends in bounded time.
const MAX_EXAMINED: usize = 100_000;

/// Records of a run after `after`.
pub fn run_records(
    snapshot: &dyn Snapshot,
    plane: PlaneId,
    run: RunId,
    after: Cursor,
    chunk: Chunk,
) -> Result<Vec<Record>, ReadError> {
    let from = keys::run_record(plane, run, after.saturating_add(1));
    let to = keys::run_record(plane, run, Cursor::MAX);
    let mut seqs = Vec::new();
    let bounds = (Bound::Included(&from[..]), Bound::Included(&to[..]));
    snapshot.scan(Table::RunRecords, bounds, Direction::Up, &mut |_, value| {
        seqs.push(keys::parse_seq(value).unwrap_or_default());
        if seqs.len() < chunk.records {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })?;
    let (mut found, mut bytes) = (Vec::with_capacity(seqs.len()), 0);
    for seq in seqs {
        let record = record(snapshot, seq)?.ok_or_else(|| ReadError::BadEntry {
            table: Table::RunRecords.name(),
            detail: format!("run {run} names record {seq}, which does not exist"),
        })?;
        bytes += record.payload.len();
        found.push(record);
        if bytes >= chunk.payload_bytes {
            break;
        }
    }
    Ok(found)
}
