//! What a ledger holds, counted: events by kind, bytes, runs by status, and where it ends.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use serde::Serialize;

use crate::domain::ids::Seq;
use crate::domain::time::Timestamp;

use super::error::ReadError;
use super::record_codec::{GENESIS, HEADER_BYTES, Raw};
use super::store::{Snapshot, Table};
use super::{Ledger, keys, listing, read, view};

/// Counts over a whole ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stats {
    pub records: u64,
    /// By the event's name in snake case.
    pub events: BTreeMap<String, u64>,
    /// Records whose payload was removed by a purge.
    pub purged: u64,
    pub runs: u64,
    pub runs_by_status: BTreeMap<&'static str, u64>,
    pub commands: u64,
    /// Headers, events and metas.
    pub record_bytes: u64,
    pub payload_bytes: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// Bytes that each table takes within it.
    pub table_bytes: BTreeMap<&'static str, u64>,
    pub first_at: Option<Timestamp>,
    pub last_at: Option<Timestamp>,
    pub tail_seq: Seq,
    pub tail_hash: String,
}

impl Ledger {
    /// Counts all of it as of now; a running gateway goes on meanwhile.
    pub fn stats(&self) -> Result<Stats, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let mut stats = Stats {
            records: 0,
            events: BTreeMap::new(),
            purged: 0,
            runs: snapshot.len(Table::Runs)?,
            runs_by_status: BTreeMap::new(),
            commands: snapshot.len(Table::Inbox)?,
            record_bytes: 0,
            payload_bytes: 0,
            file_bytes: std::fs::metadata(self.path()).map_or(0, |metadata| metadata.len()),
            table_bytes: BTreeMap::new(),
            first_at: None,
            last_at: None,
            tail_seq: 0,
            tail_hash: view::hex(&GENESIS),
        };
        count_records(&*snapshot, &mut stats)?;
        for (status, count) in listing::count_by_status(&*snapshot)? {
            if count > 0 {
                stats.runs_by_status.insert(status.name(), count);
            }
        }
        for table in Table::ALL {
            let bytes = snapshot.disk_bytes(table)?;
            stats.table_bytes.insert(table.name(), bytes);
        }
        Ok(stats)
    }
}

fn count_records(snapshot: &dyn Snapshot, stats: &mut Stats) -> Result<(), ReadError> {
    // An event's bytes begin with its variant's number (postcard; one byte, as there are fewer than
    // 128 variants). Its name comes from decoding one event of each.
    let mut kinds: BTreeMap<u8, (Seq, u64)> = BTreeMap::new();
    read::walk(snapshot, Table::Events, &[], |key, bytes| {
        let seq = keys::parse_seq(key).unwrap_or_default();
        let raw = Raw::parse(seq, bytes)?;
        let kind = raw.event.first().copied().unwrap_or_default();
        kinds.entry(kind).or_insert((seq, 0)).1 += 1;
        stats.records += 1;
        stats.purged += u64::from(raw.purged);
        stats.record_bytes += (HEADER_BYTES + raw.event.len() + raw.meta.len()) as u64;
        stats.payload_bytes += raw.payload.len() as u64;
        stats.first_at = stats.first_at.or(Some(raw.at));
        stats.last_at = Some(raw.at);
        stats.tail_seq = seq;
        Ok::<_, ReadError>(ControlFlow::Continue(()))
    })?;
    let (_, hash) = super::batch::tail(snapshot)?;
    stats.tail_hash = view::hex(&hash);
    for (seq, count) in kinds.into_values() {
        if let Some(record) = read::record(snapshot, seq)? {
            let (name, _) = view::name_and_fields(&record.event);
            *stats.events.entry(name).or_default() += count;
        }
    }
    Ok(())
}
