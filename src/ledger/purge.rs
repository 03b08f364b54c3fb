//! Purges. What is purged is hidden from reads by the commit that says so; the payloads themselves, and the rows of a
//! purged plane, then go a share at a time, so that no batch takes long. What is left is kept in `purges`: whoever
//! writes goes on with it, after a restart too.

use std::cell::OnceCell;
use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use crate::domain::ids::{Cursor, PlaneId, RunId, Seq};

use super::batch::Batch;
use super::error::{CommitError, ReadError};
use super::projection::inbox::InboxEntry;
use super::projection::run::RunSummary;
use super::record_codec::{self, Raw};
use super::store::{Snapshot, Table};
use super::{Ledger, keys, read};

/// Records and rows that one batch looks at for purges: some hundredths of a second.
const SHARE_ROWS: usize = 1_000;
/// Payload bytes that it reads for them, at most one record more.
const SHARE_PAYLOAD_BYTES: usize = 8 << 20;

/// Most that is counted of what a purge has left.
const MAX_COUNTED: u64 = 100_000;

/// What a batch may still look at for purges.
pub(super) struct Share {
    rows: usize,
    payload_bytes: usize,
}

impl Default for Share {
    fn default() -> Self {
        Share {
            rows: SHARE_ROWS,
            payload_bytes: SHARE_PAYLOAD_BYTES,
        }
    }
}

impl Share {
    fn spend(&mut self, payload_bytes: usize) {
        self.rows = self.rows.saturating_sub(1);
        self.payload_bytes = self.payload_bytes.saturating_sub(payload_bytes);
    }

    fn is_spent(&self) -> bool {
        self.rows == 0 || self.payload_bytes == 0
    }
}

/// The payloads of a run that are still to be removed: those of the records from `next` until before `until`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unpurged {
    next: Cursor,
    until: Cursor,
}

/// What a purge of a plane has left to remove. Counting ends at 100,000 of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PurgeLeft {
    pub runs: u64,
    /// Records of runs.
    pub records: u64,
}

/// A row's key and value.
type Row = (Vec<u8>, Vec<u8>);

impl Batch<'_> {
    /// Whether there may be something to go on with.
    pub fn is_purging(&self) -> bool {
        self.writer.purging
    }

    /// Removes the payloads of a run's records before `until`; hashes and lengths stay.
    pub(super) fn purge_run(
        &mut self,
        plane: PlaneId,
        run: RunId,
        until: Cursor,
    ) -> Result<(), CommitError> {
        let before = self.unpurged(plane, run)?;
        let next = before.map_or(1, |left| left.next);
        self.purge_payloads(plane, run, Unpurged { next, until }, before.is_some())
    }

    /// Everything of a plane is to go: payloads, and its rows in the projections.
    pub(super) fn purge_plane(&mut self, plane: PlaneId) {
        self.writes.put(Table::Purges, keys::plane(plane), []);
        self.writer.purging = true;
    }

    /// Whether a plane's purge has begun and not ended.
    pub fn is_plane_purging(&self, plane: PlaneId) -> Result<bool, CommitError> {
        Ok(self.get(Table::Purges, &keys::plane(plane))?.is_some())
    }

    /// Goes on with purges, as far as one batch should. Tells whether one of a plane may have ended.
    pub fn purge_on(&mut self) -> Result<bool, CommitError> {
        let mut left = Vec::new();
        read::walk(&*self.snapshot, Table::Purges, &[], |key, _| {
            left.push(key.to_vec());
            Ok::<_, ReadError>(more(left.len() < SHARE_ROWS))
        })?;
        if left.is_empty() && !self.writes.touches(Table::Purges) {
            self.writer.purging = false;
            return Ok(true);
        }
        let mut ended = false;
        for key in left {
            if self.share.is_spent() {
                break;
            }
            if let Some((plane, run)) = keys::parse_run(&key) {
                // It may have gone with its plane, or have been purged again, in this very batch.
                if let Some(left) = self.unpurged(plane, run)? {
                    self.purge_payloads(plane, run, left, true)?;
                }
            } else if let Some(plane) = keys::parse_plane(&key) {
                ended |= self.purge_rows(plane)?;
            }
        }
        Ok(ended)
    }

    fn unpurged(&self, plane: PlaneId, run: RunId) -> Result<Option<Unpurged>, ReadError> {
        let bytes = self.get(Table::Purges, &keys::run(plane, run))?;
        bytes
            .map(|bytes| read::entry(Table::Purges, &bytes))
            .transpose()
    }

    fn purge_payloads(
        &mut self,
        plane: PlaneId,
        run: RunId,
        mut left: Unpurged,
        is_kept: bool,
    ) -> Result<(), CommitError> {
        let place = keys::run(plane, run);
        while left.next < left.until {
            if self.share.is_spent() {
                let encoded = record_codec::encode(&left);
                self.writes.put(Table::Purges, place, encoded);
                self.writer.purging = true;
                return Ok(());
            }
            match self.seq_of(plane, run, left.next)? {
                Some(seq) => self.purge_record(seq)?,
                None => self.share.spend(0),
            }
            left.next += 1;
        }
        if is_kept {
            self.writes.remove(Table::Purges, place);
        }
        Ok(())
    }

    /// Where a record of a run lies, this batch's own included.
    fn seq_of(
        &self,
        plane: PlaneId,
        run: RunId,
        cursor: Cursor,
    ) -> Result<Option<Seq>, CommitError> {
        if cursor == 1 {
            return Ok(self.run(plane, run)?.map(|run| run.payload));
        }
        let seq = self.get(Table::RunRecords, &keys::run_record(plane, run, cursor))?;
        Ok(seq.and_then(|seq| keys::parse_seq(&seq)))
    }

    /// Removes a record's payload; its hash and length stay.
    fn purge_record(&mut self, seq: Seq) -> Result<(), CommitError> {
        let key = keys::seq(seq);
        let bytes = self.get(Table::Events, &key)?.unwrap_or_default();
        self.share.spend(bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        let raw = Raw::parse(seq, &bytes)?;
        if !raw.purged && !raw.payload.is_empty() {
            let purged = Raw {
                purged: true,
                ..raw
            };
            self.writes.put(Table::Events, key, purged.to_bytes());
        }
        Ok(())
    }

    /// Removes a share of a plane's rows; `true` when that was the last of it. Run by run, so that what is left tells
    /// how far it is.
    fn purge_rows(&mut self, plane: PlaneId) -> Result<bool, CommitError> {
        for (_, bytes) in self.rows(Table::Runs, &keys::plane(plane))? {
            let run = read::summary(&*self.snapshot, &bytes)?;
            if !self.purge_run_rows(&run)? {
                return Ok(false);
            }
        }
        for (key, bytes) in self.rows(Table::Inbox, &keys::plane(plane))? {
            if self.share.is_spent() {
                return Ok(false);
            }
            let entry: InboxEntry = read::entry(Table::Inbox, &bytes)?;
            self.purge_record(entry.seq)?;
            self.writes.remove(Table::Inbox, key);
        }
        for table in [Table::Idempotency, Table::Purges] {
            for (key, _) in self.rows(table, &keys::plane(plane))? {
                if key != keys::plane(plane) {
                    self.writes.remove(table, key);
                    self.share.spend(0);
                }
            }
        }
        // What this batch says of it is written yet, and goes with the next one.
        let mut said = self.runs.keys().map(|(plane, _)| plane);
        let mut asked = self.inbox.keys().map(|(plane, _)| plane);
        if self.share.is_spent() || said.any(|of| *of == plane) || asked.any(|of| *of == plane) {
            return Ok(false);
        }
        self.writes.remove(Table::Planes, keys::plane(plane));
        self.writes.remove(Table::Purges, keys::plane(plane));
        Ok(true)
    }

    /// Removes a run with its records' payloads; `false` when the share did not suffice.
    fn purge_run_rows(&mut self, run: &RunSummary) -> Result<bool, CommitError> {
        let place = keys::run(run.plane, run.run);
        for (key, seq) in self.rows(Table::RunRecords, &place)? {
            if self.share.is_spent() {
                return Ok(false);
            }
            self.purge_record(keys::parse_seq(&seq).unwrap_or_default())?;
            self.writes.remove(Table::RunRecords, key);
        }
        if self.share.is_spent() {
            return Ok(false);
        }
        self.purge_record(run.payload)?;
        self.share.spend(0);
        self.writes.remove(Table::Runs, place);
        self.moves.count(Some(run.status), None);
        let status = keys::status(run.plane, run.status, run.run);
        self.writes.remove(Table::RunsByStatus, status);
        if let Some(session) = &run.session {
            let session = keys::session(run.plane, session, run.run);
            self.writes.remove(Table::RunsBySession, session);
        }
        Ok(true)
    }

    /// The first rows under a prefix, as many as the share allows, as they were before this batch.
    fn rows(&self, table: Table, prefix: &[u8]) -> Result<Vec<Row>, ReadError> {
        let mut rows = Vec::new();
        if self.share.is_spent() {
            return Ok(rows);
        }
        read::walk(&*self.snapshot, table, prefix, |key, value| {
            rows.push((key.to_vec(), value.to_vec()));
            Ok::<_, ReadError>(more(rows.len() < self.share.rows))
        })?;
        Ok(rows)
    }
}

fn more(more: bool) -> ControlFlow<()> {
    match more {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    }
}

impl Ledger {
    /// What the purge of a plane has left; `None` when none goes on.
    pub fn purge_left(&self, plane: PlaneId) -> Result<Option<PurgeLeft>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        if !Purges::of(&*snapshot).has_plane(plane)? {
            return Ok(None);
        }
        let count = |table| {
            let mut rows = 0;
            read::walk(&*snapshot, table, &keys::plane(plane), |_, _| {
                rows += 1;
                Ok::<_, ReadError>(more(rows < MAX_COUNTED))
            })?;
            Ok::<_, ReadError>(rows)
        };
        let runs = count(Table::Runs)?;
        Ok(Some(PurgeLeft {
            runs,
            // The first of each run has no row of its own.
            records: (runs + count(Table::RunRecords)?).min(MAX_COUNTED),
        }))
    }
}

/// The purges that go on: what they will remove is hidden already.
pub(super) struct Purges<'s> {
    snapshot: &'s dyn Snapshot,
    /// Whether there are any; looked at when it is first asked.
    any: OnceCell<bool>,
}

impl<'s> Purges<'s> {
    pub fn of(snapshot: &'s dyn Snapshot) -> Purges<'s> {
        Purges {
            snapshot,
            any: OnceCell::new(),
        }
    }

    /// Whether all of a plane is being removed.
    pub fn has_plane(&self, plane: PlaneId) -> Result<bool, ReadError> {
        let found = self.any()? && self.get(&keys::plane(plane))?.is_some();
        Ok(found)
    }

    /// A record as it may be seen.
    pub fn show<'a>(&self, raw: Raw<'a>) -> Result<Raw<'a>, ReadError> {
        if raw.purged || raw.payload.is_empty() || !self.hides(&raw)? {
            return Ok(raw);
        }
        Ok(Raw {
            purged: true,
            payload: &[],
            ..raw
        })
    }

    /// Whether a record's payload is to be removed.
    pub fn hides(&self, raw: &Raw<'_>) -> Result<bool, ReadError> {
        if !self.any()? {
            return Ok(false);
        }
        if let Some(run) = raw.run
            && let Some(bytes) = self.get(&keys::run(raw.plane, run))?
        {
            let left: Unpurged = read::entry(Table::Purges, &bytes)?;
            if raw.cursor < left.until {
                return Ok(true);
            }
        }
        self.has_plane(raw.plane)
    }

    fn any(&self) -> Result<bool, ReadError> {
        if let Some(any) = self.any.get() {
            return Ok(*any);
        }
        let any = self.snapshot.len(Table::Purges)? > 0;
        Ok(*self.any.get_or_init(|| any))
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        Ok(self.snapshot.get(Table::Purges, key)?)
    }
}
