//! Reading single entries and ranges of records out of a snapshot.

use std::ops::{Bound, ControlFlow};

use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::domain::ids::{Cursor, PlaneId, RunId, Seq};
use crate::domain::record::Record;
use crate::domain::time::Timestamp;

use super::error::{ReadError, StoreError};
use super::projection::inbox::InboxEntry;
use super::projection::run::{self as run_projection, RunSummary};
use super::projection::service::ServiceView;
use super::purge::Purges;
use super::record_codec::Raw;
use super::store::{Direction, KeyBounds, Snapshot, Table};
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

/// Shows the entries under a prefix in order of their keys until `visit` breaks or fails.
pub fn walk<E: From<StoreError>>(
    snapshot: &dyn Snapshot,
    table: Table,
    prefix: &[u8],
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>, E>,
) -> Result<(), E> {
    let bounds = (Bound::Included(prefix), Bound::Unbounded);
    walk_range(
        snapshot,
        table,
        bounds,
        Direction::Up,
        |key, value| match key.starts_with(prefix) {
            true => visit(key, value),
            false => Ok(ControlFlow::Break(())),
        },
    )
}

/// Shows the entries of a range until `visit` breaks or fails.
pub fn walk_range<E: From<StoreError>>(
    snapshot: &dyn Snapshot,
    table: Table,
    bounds: KeyBounds<'_>,
    direction: Direction,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>, E>,
) -> Result<(), E> {
    let mut failure = None;
    snapshot.scan(table, bounds, direction, &mut |key, value| {
        visit(key, value).unwrap_or_else(|error| {
            failure = Some(error);
            ControlFlow::Break(())
        })
    })?;
    failure.map_or(Ok(()), Err)
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
    match snapshot.get(Table::Runs, &keys::run(plane, run))? {
        Some(row) => summary(snapshot, &row).map(Some),
        None => Ok(None),
    }
}

/// A run from its row (`RunSummary::to_row`).
pub fn summary(snapshot: &dyn Snapshot, row: &[u8]) -> Result<RunSummary, ReadError> {
    let Some(seq) = keys::parse_seq(row) else {
        return entry(Table::Runs, row);
    };
    let lost = || ReadError::BadEntry {
        table: Table::Runs.name(),
        detail: format!("a run names record {seq}, which does not queue it"),
    };
    let bytes = snapshot.get(Table::Events, &keys::seq(seq))?;
    let bytes = bytes.ok_or_else(lost)?;
    let raw = Raw::parse(seq, &bytes)?;
    let event = raw.decode_event(seq)?;
    run_projection::apply(None, &event, raw.place(seq)).ok_or_else(lost)
}

/// Where a record of a run lies. That of its first is told by its summary, those of the others by `run_records`.
pub fn seq_of(
    snapshot: &dyn Snapshot,
    plane: PlaneId,
    run: RunId,
    cursor: Cursor,
) -> Result<Option<Seq>, ReadError> {
    if cursor == 1 {
        return first_record(snapshot, plane, run);
    }
    let seq = snapshot.get(Table::RunRecords, &keys::run_record(plane, run, cursor))?;
    Ok(seq.and_then(|seq| keys::parse_seq(&seq)))
}

fn first_record(
    snapshot: &dyn Snapshot,
    plane: PlaneId,
    id: RunId,
) -> Result<Option<Seq>, ReadError> {
    Ok(run(snapshot, plane, id)?.map(|run| run.payload))
}

/// The highest id of all runs; nil when there are none. One look at each plane that has any.
pub fn highest_run(snapshot: &dyn Snapshot) -> Result<RunId, ReadError> {
    let (mut highest, mut before) = (RunId(Uuid::nil()), None);
    loop {
        let end = before.as_ref().map_or(Bound::Unbounded, |plane: &[u8; 4]| {
            Bound::Excluded(&plane[..])
        });
        let mut last = None;
        let bounds = (Bound::Unbounded, end);
        snapshot.scan(Table::Runs, bounds, Direction::Down, &mut |key, _| {
            last = keys::parse_run(key);
            ControlFlow::Break(())
        })?;
        let Some((plane, run)) = last else {
            return Ok(highest);
        };
        highest = highest.max(run);
        before = Some(keys::plane(plane));
    }
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
        Some(bytes) => {
            let raw = Purges::of(snapshot).show(Raw::parse(seq, &bytes)?)?;
            raw.decode(seq).map(Some)
        }
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
    let purges = Purges::of(snapshot);
    let from = keys::seq(after.saturating_add(1));
    let bounds = (Bound::Included(&from[..]), Bound::Unbounded);
    walk_range(
        snapshot,
        Table::Events,
        bounds,
        Direction::Up,
        |key, value| {
            let seq = keys::parse_seq(key).unwrap_or_default();
            let raw = Raw::parse(seq, value)?;
            last = seq;
            examined += 1;
            if scope.holds(raw.plane) {
                let raw = purges.show(raw)?;
                found.push(raw.decode(seq)?);
                bytes += raw.payload.len();
            }
            let done = found.len() >= chunk.records
                || bytes >= chunk.payload_bytes
                || examined >= MAX_EXAMINED;
            Ok::<_, ReadError>(match done {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })
        },
    )?;
    Ok((found, last))
}

/// Most records of other planes that one read steps over, so that a read ends in bounded time.
const MAX_EXAMINED: usize = 100_000;

/// Records of a run after `after`, at least one if there are any.
pub fn run_records(
    snapshot: &dyn Snapshot,
    plane: PlaneId,
    run: RunId,
    after: Cursor,
    chunk: Chunk,
) -> Result<Vec<Record>, ReadError> {
    let mut seqs = Vec::new();
    if after == 0 {
        seqs.extend(first_record(snapshot, plane, run)?);
    }
    let from = keys::run_record(plane, run, after.max(1).saturating_add(1));
    let to = keys::run_record(plane, run, Cursor::MAX);
    let bounds = (Bound::Included(&from[..]), Bound::Included(&to[..]));
    snapshot.scan(Table::RunRecords, bounds, Direction::Up, &mut |_, value| {
        if seqs.len() >= chunk.records.max(1) {
            return ControlFlow::Break(());
        }
        seqs.push(keys::parse_seq(value).unwrap_or_default());
        ControlFlow::Continue(())
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

/// The first record at or after an instant, found by halving; one after `tail` when there is none.
pub fn first_at(snapshot: &dyn Snapshot, tail: Seq, at: Timestamp) -> Result<Seq, ReadError> {
    let (mut low, mut high) = (1, tail + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        match record(snapshot, middle)? {
            Some(record) if record.at < at => low = middle + 1,
            _ => high = middle,
        }
    }
    Ok(low)
}
