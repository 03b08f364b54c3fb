//! Moving a ledger: export as newline-delimited JSON, one record a line, and import, which rebuilds an
//! equal ledger and checks every hash on the way. Replies kept under Idempotency-Keys are not part of
//! the ledger and stay behind.

use std::io::{self, BufRead, Read, Write};
use std::ops::{Bound, ControlFlow};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::domain::ids::{Cursor, PlaneId, RunId, Seq};
use crate::domain::time::Timestamp;

use super::batch::{Batch, MAX_PAYLOAD_BYTES, Writer};
use super::error::{CommitError, OpenError, ReadError, StoreError};
use super::open::{FILE_NAME, OpenOptions};
use super::purge::Purges;
use super::read;
use super::record_codec::{self, GENESIS, Raw};
use super::store::{Direction, Table};
use super::{Ledger, keys, view};

/// Records that import commits together.
const IMPORT_BATCH_RECORDS: u64 = 4_096;
/// Longest line that import reads: the largest payload in base64, and room for the rest.
const MAX_LINE_BYTES: u64 = MAX_PAYLOAD_BYTES as u64 / 3 * 4 + (8 << 20);

/// How far it went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Transferred {
    pub records: u64,
    pub tail_seq: Seq,
    pub tail_hash: String,
}

/// Why an export or an import ended early. A failed import leaves no ledger behind.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error("cannot write the export: {0}")]
    Write(#[source] io::Error),
    #[error("cannot read the export: {0}")]
    Input(#[source] io::Error),
    #[error("line {line} is no record of an export: {detail}")]
    BadLine { line: u64, detail: String },
}

impl From<StoreError> for TransferError {
    fn from(error: StoreError) -> Self {
        TransferError::Read(error.into())
    }
}

/// One line. `event`, `actor` and `request_id` are for the reader; the bytes are what counts.
#[derive(Serialize, Deserialize)]
struct Line {
    seq: Seq,
    cursor: Cursor,
    at: String,
    at_us: i64,
    plane: u32,
    run: Option<RunId>,
    actor: String,
    request_id: Option<String>,
    event: Value,
    format: u16,
    event_bytes: String,
    meta_bytes: String,
    payload: Option<String>,
    payload_size_bytes: u32,
    payload_hash: String,
    purged: bool,
    prev_hash: String,
    hash: String,
}

impl Ledger {
    /// Writes every record after `after` as of now; a running gateway goes on meanwhile.
    pub fn export(&self, after: Seq, out: &mut dyn Write) -> Result<Transferred, TransferError> {
        let snapshot = self.inner.store.snapshot().map_err(ReadError::from)?;
        let mut done = Transferred {
            records: 0,
            tail_seq: after,
            tail_hash: view::hex(&GENESIS),
        };
        let purges = Purges::of(&*snapshot);
        let from = keys::seq(after.saturating_add(1));
        let bounds = (Bound::Included(&from[..]), Bound::Unbounded);
        read::walk_range(
            &*snapshot,
            Table::Events,
            bounds,
            Direction::Up,
            |key, bytes| {
                let seq = keys::parse_seq(key).unwrap_or_default();
                let raw = purges.show(Raw::parse(seq, bytes)?)?;
                done.tail_hash = export_one(seq, &raw, out)?;
                done.records += 1;
                done.tail_seq = seq;
                Ok::<_, TransferError>(ControlFlow::Continue(()))
            },
        )?;
        out.flush().map(|()| done).map_err(TransferError::Write)
    }
}

fn export_one(seq: Seq, raw: &Raw<'_>, out: &mut dyn Write) -> Result<String, TransferError> {
    let record = raw.decode(seq)?;
    let line = Line {
        seq,
        cursor: raw.cursor,
        at: raw.at.to_string(),
        at_us: raw.at.0,
        plane: raw.plane.0,
        run: raw.run,
        actor: record.actor.to_string(),
        request_id: record.request_id.as_ref().map(ToString::to_string),
        event: serde_json::to_value(&record.event).unwrap_or(Value::Null),
        format: raw.format,
        event_bytes: STANDARD.encode(raw.event),
        meta_bytes: STANDARD.encode(raw.meta),
        payload: (!raw.purged).then(|| STANDARD.encode(raw.payload)),
        payload_size_bytes: raw.payload_len,
        payload_hash: view::hex(&raw.payload_hash),
        purged: raw.purged,
        prev_hash: view::hex(&raw.prev_hash),
        hash: view::hex(&raw.hash),
    };
    let mut text = serde_json::to_vec(&line).expect("a line has string keys only");
    text.push(b'\n');
    out.write_all(&text).map_err(TransferError::Write)?;
    Ok(line.hash)
}

/// Rebuilds a ledger in a data directory that has none.
///
/// # Errors
/// `OpenError::AlreadyExists`, or the first line that is no record, does not follow the one before, or
/// does not give its hash; nothing is left behind then.
pub fn import(
    input: &mut dyn BufRead,
    data_dir: &Path,
    options: &OpenOptions,
) -> Result<Transferred, TransferError> {
    let path = data_dir.join(FILE_NAME);
    if path.exists() {
        return Err(OpenError::AlreadyExists { path }.into());
    }
    let (ledger, mut writer) = Ledger::open(data_dir, options)?;
    let imported = import_all(input, &mut writer);
    drop((ledger, writer));
    if imported.is_err() {
        let _ = std::fs::remove_file(&path);
    }
    imported
}

fn import_all(input: &mut dyn BufRead, writer: &mut Writer) -> Result<Transferred, TransferError> {
    let mut number = 0;
    loop {
        let before = number;
        let mut batch = writer.begin()?;
        while batch.len() < IMPORT_BATCH_RECORDS {
            let mut text = Vec::new();
            let mut limited = Read::take(&mut *input, MAX_LINE_BYTES);
            let read = limited.read_until(b'\n', &mut text);
            if read.map_err(TransferError::Input)? == 0 {
                break;
            }
            number += 1;
            import_one(&mut batch, number, &text)?;
        }
        let purging = batch.is_purging();
        if purging {
            batch.purge_on()?;
        }
        let tail_seq = batch.commit()?;
        if number == before && !purging {
            return Ok(Transferred {
                records: number,
                tail_seq,
                tail_hash: view::hex(&writer.tail_hash()),
            });
        }
    }
}

fn import_one(batch: &mut Batch<'_>, number: u64, text: &[u8]) -> Result<(), TransferError> {
    let bad = |detail: String| TransferError::BadLine {
        line: number,
        detail,
    };
    let line: Line = serde_json::from_slice(text).map_err(|error| bad(error.to_string()))?;
    let bytes = |text: &str| {
        STANDARD
            .decode(text)
            .map_err(|error| bad(error.to_string()))
    };
    let hash =
        |text: &str| view::parse_hex(text).ok_or_else(|| bad(format!("{text:?} is no hash")));
    if line.seq != number {
        return Err(bad(format!(
            "it is record {}; an import begins at record 1",
            line.seq
        )));
    }
    let (event, meta) = (bytes(&line.event_bytes)?, bytes(&line.meta_bytes)?);
    let payload = bytes(line.payload.as_deref().unwrap_or_default())?;
    let payload_hash = hash(&line.payload_hash)?;
    let is_whole = payload.len() == line.payload_size_bytes as usize
        && *blake3::hash(&payload).as_bytes() == payload_hash;
    if line.purged != line.payload.is_none() || !(line.purged || is_whole) {
        return Err(bad("its payload does not match its hash".into()));
    }
    let decoded = record_codec::decode(line.seq, &event)?;
    let mut raw = Raw {
        format: line.format,
        purged: line.purged,
        plane: PlaneId(line.plane),
        at: Timestamp(line.at_us),
        cursor: 0,
        run: None,
        prev_hash: GENESIS,
        payload_hash,
        hash: GENESIS,
        event: &event,
        meta: &meta,
        payload_len: line.payload_size_bytes,
        payload: &payload,
    };
    raw.decode_meta(line.seq)?;
    batch.push(&mut raw, &decoded)?;
    if batch.tail_hash() != hash(&line.hash)? {
        return Err(bad(
            "its hash does not follow from it and the lines before".into()
        ));
    }
    Ok(())
}
