//! Appending: the one writer and its batches. A batch holds its records and the projections they change
//! in memory, reads through them, and writes all in one commit.

use std::collections::{BTreeMap, HashMap};
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;
use std::time::Instant;

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use crate::domain::container::JobContainer;
use crate::domain::event::Event;
use crate::domain::ids::{CommandId, Cursor, PlaneId, RunId, Seq, ServiceName};
use crate::domain::record::{NewRecord, Record};
use crate::domain::spec::Target;
use crate::domain::time::Timestamp;

use super::counts::Moves;
use super::error::{CommitError, ReadError};
use super::expiry::KeyWalk;
use super::hub::Published;
use super::projection::inbox::{self, InboxEntry};
use super::projection::people;
use super::projection::run::{self as run_projection, RunStatus, RunSummary};
use super::projection::service::{self, PlaneView, ServiceView};
use super::purge::Share;
use super::record_codec::{self, Hash, Meta, Raw};
use super::store::{Direction, Snapshot, Table, WriteSet};
use super::{Inner, keys, read, view};

/// Longest payload of one record. The API's own limits are far lower; this one keeps a record's lengths
/// within 32 bits and a batch within memory.
pub const MAX_PAYLOAD_BYTES: usize = 64 << 20;

/// Appends to the ledger. There is one for each open ledger; the coordinator's thread owns it.
pub struct Writer {
    pub(super) inner: Arc<Inner>,
    pub(super) next_seq: Seq,
    pub(super) tail_hash: Hash,
    /// No run on disk has a higher id: most that are queued are not looked for there.
    pub(super) highest_run: RunId,
    pub(super) poisoned: bool,
    /// Purges may have something left to remove.
    pub(super) purging: bool,
    pub(super) keys: KeyWalk,
}

/// A record's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    pub seq: Seq,
    /// 0 when the record belongs to no run.
    pub cursor: Cursor,
}

/// What is kept under an Idempotency-Key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredReply {
    pub body_hash: Hash,
    pub reply: Vec<u8>,
    /// The ledger's tail when it was kept.
    pub seq: Seq,
}

impl Writer {
    /// Starts a batch. Dropping it leaves everything as it was.
    ///
    /// # Errors
    /// `Poisoned` after a failed commit.
    pub fn begin(&mut self) -> Result<Batch<'_>, CommitError> {
        self.check()?;
        let snapshot = self.inner.store.snapshot()?;
        Ok(Batch {
            seq: self.next_seq,
            prev_hash: self.tail_hash,
            published: self.inner.hub.is_followed().then(Vec::new),
            writer: self,
            snapshot,
            writes: WriteSet::default(),
            runs: FxHashMap::default(),
            services: BTreeMap::new(),
            inbox: HashMap::new(),
            share: Share::default(),
            moves: Moves::default(),
        })
    }

    /// The last committed record's hash.
    pub fn tail_hash(&self) -> Hash {
        self.tail_hash
    }

    /// Whether purges may have something left to remove: then `Batch::purge_on` goes on with them.
    pub fn is_purging(&self) -> bool {
        self.purging
    }

    pub(super) fn check(&self) -> Result<(), CommitError> {
        if self.poisoned {
            return Err(CommitError::Poisoned);
        }
        Ok(())
    }

    /// Commits, and refuses all further work when that fails. `moves` is what it changes in the counts.
    pub(super) fn write(&mut self, writes: WriteSet, moves: Moves) -> Result<(), CommitError> {
        self.check()?;
        // Set first, so that a panic in the store poisons as well.
        self.poisoned = true;
        let inner = &self.inner;
        let commit = || {
            inner
                .rows
                .commit(writes, |writes| inner.store.commit(writes))
        };
        inner.counts.commit(moves, commit)?;
        self.poisoned = false;
        Ok(())
    }
}

/// A run as the batch sees it.
pub(super) struct RunSlot {
    /// Its status on disk, which the index by status shows.
    stored: Option<RunStatus>,
    now: Option<RunSummary>,
    changed: bool,
}

/// Records and projections that become durable together.
pub struct Batch<'a> {
    pub(super) writer: &'a mut Writer,
    pub(super) snapshot: Box<dyn Snapshot>,
    seq: Seq,
    prev_hash: Hash,
    pub(super) writes: WriteSet,
    pub(super) runs: FxHashMap<(PlaneId, RunId), RunSlot>,
    services: BTreeMap<ServiceName, Option<ServiceView>>,
    pub(super) inbox: HashMap<(PlaneId, CommandId), InboxEntry>,
    /// For those who follow; `None` when nobody did as it was begun.
    published: Option<Vec<Published>>,
    /// What it may still do for purges.
    pub(super) share: Share,
    pub(super) moves: Moves,
}

impl Batch<'_> {
    /// The inbox entry of a command, this batch's own included.
    pub fn inbox(&self, plane: PlaneId, id: &str) -> Result<Option<InboxEntry>, CommitError> {
        if let Some(entry) = self.inbox.get(&(plane, CommandId::new(id))) {
            return Ok(Some(entry.clone()));
        }
        Ok(read::command(&*self.snapshot, plane, id)?)
    }

    /// What was kept under an Idempotency-Key, this batch's own included. `route` names the operation.
    pub fn idempotency(
        &self,
        plane: PlaneId,
        route: &str,
        key: &str,
    ) -> Result<Option<StoredReply>, CommitError> {
        let key = keys::idempotency(plane, route, key);
        if let Some(Some(bytes)) = self.writes.get(Table::Idempotency, &key) {
            return Ok(Some(read::entry(Table::Idempotency, bytes)?));
        }
        Ok(read::get(&*self.snapshot, Table::Idempotency, &key)?)
    }

    /// Keeps a reply under an Idempotency-Key.
    pub fn put_idempotency(
        &mut self,
        plane: PlaneId,
        route: &str,
        key: &str,
        body_hash: Hash,
        reply: &[u8],
    ) -> Result<(), CommitError> {
        let stored = StoredReply {
            body_hash,
            reply: reply.to_vec(),
            seq: self.seq - 1,
        };
        self.writes.put(
            Table::Idempotency,
            keys::idempotency(plane, route, key),
            record_codec::encode(&stored),
        );
        Ok(())
    }

    /// A run's summary, this batch's changes included.
    pub fn run(&self, plane: PlaneId, run: RunId) -> Result<Option<RunSummary>, CommitError> {
        match self.runs.get(&(plane, run)) {
            Some(slot) => Ok(slot.now.clone()),
            None => Ok(read::run(&*self.snapshot, plane, run)?),
        }
    }

    /// How a run's own container is stopped, which its first record says; `None` for one that has none.
    pub fn container_of(&self, run: &RunSummary) -> Result<Option<Box<JobContainer>>, CommitError> {
        if !matches!(run.spec.target, Target::Container(_)) {
            return Ok(None);
        }
        let Some(bytes) = self.get(Table::Events, &keys::seq(run.payload))? else {
            return Ok(None);
        };
        let raw = Raw::parse(run.payload, &bytes)?;
        match raw.decode_event(run.payload)? {
            Event::JobQueued { container, .. } => Ok(container),
            _ => Ok(None),
        }
    }

    /// How many records the batch holds.
    pub fn len(&self) -> u64 {
        self.seq - self.writer.next_seq
    }

    /// The hash of its last record, or of the one before it.
    pub fn tail_hash(&self) -> Hash {
        self.prev_hash
    }

    /// Whether it holds no record.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there is anything to commit.
    pub fn has_changes(&self) -> bool {
        !self.is_empty() || !self.writes.is_empty()
    }

    /// Appends a record and folds its event into the projections.
    ///
    /// # Errors
    /// `PayloadTooLarge`; the batch is as before and may go on. Any other error: drop the batch and stop.
    pub fn append(&mut self, record: &NewRecord) -> Result<Appended, CommitError> {
        if record.payload.len() > MAX_PAYLOAD_BYTES {
            return Err(CommitError::PayloadTooLarge {
                size_bytes: record.payload.len(),
                limit_bytes: MAX_PAYLOAD_BYTES,
            });
        }
        let event_bytes = record_codec::encode(&record.event);
        let (format, meta_bytes) = Meta::of(record).to_bytes();
        let mut raw = Raw {
            format,
            purged: false,
            plane: record.plane,
            at: record.at,
            cursor: 0,
            run: None,
            prev_hash: self.prev_hash,
            payload_hash: *blake3::hash(&record.payload).as_bytes(),
            hash: record_codec::GENESIS,
            event: &event_bytes,
            meta: &meta_bytes,
            payload_len: u32::try_from(record.payload.len()).expect("checked above"),
            payload: &record.payload,
        };
        let appended = self.push(&mut raw, &record.event)?;
        self.note_published(record, &raw, appended)?;
        Ok(appended)
    }

    /// Keeps a record for those who follow, if anybody does.
    fn note_published(
        &mut self,
        record: &NewRecord,
        raw: &Raw<'_>,
        appended: Appended,
    ) -> Result<(), CommitError> {
        if self.published.is_none() {
            return Ok(());
        }
        let plane = raw.plane;
        let session = raw.run.and_then(|run| {
            let slot = self.runs.get(&(plane, run))?;
            slot.now.as_ref()?.session.clone()
        });
        let hides_other = match view::other_run(&record.event) {
            Some(other) => self.load_run(plane, other)?.now.is_none(),
            None => false,
        };
        let published = Published {
            record: Record {
                seq: appended.seq,
                cursor: appended.cursor,
                plane,
                at: raw.at,
                actor: record.actor.clone(),
                request_id: record.request_id.clone(),
                asked: record.asked.clone(),
                event: record.event.clone(),
                payload: record.payload.clone(),
                purged: raw.purged,
                prev_hash: raw.prev_hash,
                hash: raw.hash,
            },
            context: view::Context {
                session,
                hides_other,
            },
        };
        self.published.get_or_insert_with(Vec::new).push(published);
        Ok(())
    }

    /// Gives an encoded record its place, its cursor and its hash, whatever it came from.
    pub(super) fn push(
        &mut self,
        raw: &mut Raw<'_>,
        event: &Event,
    ) -> Result<Appended, CommitError> {
        let (seq, plane) = (self.seq, raw.plane);
        if let Some(run) = event.run() {
            let known = self.load_run(plane, run)?.now.as_ref();
            if let Some(known_len) = known.map(|summary| summary.ledger_len) {
                raw.cursor = known_len + 1;
            } else if matches!(event, Event::JobQueued { .. }) {
                raw.cursor = 1;
            }
            raw.run = (raw.cursor > 0).then_some(run);
        }
        raw.prev_hash = self.prev_hash;
        raw.hash = raw.computed_hash(seq);
        self.writes
            .put(Table::Events, keys::seq(seq), raw.to_bytes());
        if let Some(run) = raw.run
            && raw.cursor > 1
        {
            let key = keys::run_record(plane, run, raw.cursor);
            self.writes.put(Table::RunRecords, key, keys::seq(seq));
        }
        self.project(event, seq, raw)?;
        self.prev_hash = raw.hash;
        self.seq += 1;
        Ok(Appended {
            seq,
            cursor: raw.cursor,
        })
    }

    fn project(&mut self, event: &Event, seq: Seq, raw: &Raw<'_>) -> Result<(), CommitError> {
        let (plane, at) = (raw.plane, raw.at);
        if let Some(run) = raw.run {
            self.project_run(plane, run, event, seq, raw)?;
        }
        if let Some(command) = inbox::command_of(event) {
            let before = self.inbox(plane, command)?;
            if let Some(entry) = inbox::apply(before, event, seq, at, raw.payload_hash) {
                self.inbox.insert((plane, command.clone()), entry);
            }
        }
        if let Some(name) = service::service_of(event) {
            let view = self.take_service(name)?;
            let view = service::apply(view, event, at);
            self.services.insert(name.clone(), view);
        }
        self.project_people(event, at)?;
        match event {
            Event::PlanePurged { plane } => self.purge_plane(*plane),
            Event::GpusListed { gpus } => {
                self.writes
                    .put(Table::Gpus, keys::GPUS, record_codec::encode(gpus));
            }
            Event::GpuUseSummed { .. } => {
                self.writes
                    .put(Table::GpuUse, keys::instant(at), keys::seq(seq));
            }
            Event::PlaneOpened {
                plane,
                tenant,
                runtime,
            } => {
                let view = PlaneView {
                    plane: *plane,
                    tenant: tenant.clone(),
                    runtime: runtime.clone(),
                    opened_at: at,
                };
                let key = keys::plane(*plane);
                self.writes
                    .put(Table::Planes, key, record_codec::encode(&view));
            }
            _ => {}
        }
        Ok(())
    }

    /// Users, tokens and runtimes: small tables, written at once.
    fn project_people(&mut self, event: &Event, at: Timestamp) -> Result<(), CommitError> {
        for change in people::changes(event, at, |table, key| self.get(table, key))? {
            match change.value {
                Some(value) => self.writes.put(change.table, change.key, value),
                None => self.writes.remove(change.table, change.key),
            }
        }
        Ok(())
    }

    fn project_run(
        &mut self,
        plane: PlaneId,
        run: RunId,
        event: &Event,
        seq: Seq,
        raw: &Raw<'_>,
    ) -> Result<(), CommitError> {
        let place = raw.place(seq);
        let slot = self.load_run(plane, run)?;
        let before = slot.now.take();
        let occupied_before = service::occupied(before.as_ref()).cloned();
        slot.now = run_projection::apply(before, event, place);
        slot.changed = true;
        let occupied_after = service::occupied(slot.now.as_ref()).cloned();
        if occupied_before != occupied_after {
            self.occupy(occupied_before, (plane, run), false)?;
            self.occupy(occupied_after, (plane, run), true)?;
        }
        if matches!(event, Event::RunPurged { .. }) {
            self.purge_run(plane, run, raw.cursor)?;
        }
        Ok(())
    }

    fn occupy(
        &mut self,
        name: Option<ServiceName>,
        run: (PlaneId, RunId),
        active: bool,
    ) -> Result<(), CommitError> {
        let Some(name) = name else { return Ok(()) };
        let mut view = self.take_service(&name)?;
        if let Some(view) = view.as_mut() {
            service::occupy(view, run, active);
        }
        self.services.insert(name, view);
        Ok(())
    }

    /// A table's entry, this batch's changes included.
    pub(super) fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        match self.writes.get(table, key) {
            Some(change) => Ok(change.map(<[u8]>::to_vec)),
            None => Ok(self.snapshot.get(table, key)?),
        }
    }

    fn load_run(&mut self, plane: PlaneId, run: RunId) -> Result<&mut RunSlot, ReadError> {
        use std::collections::hash_map::Entry;
        match self.runs.entry((plane, run)) {
            Entry::Occupied(slot) => Ok(slot.into_mut()),
            Entry::Vacant(vacant) => {
                let now = match run > self.writer.highest_run {
                    true => None,
                    false => read::run(&*self.snapshot, plane, run)?,
                };
                Ok(vacant.insert(RunSlot {
                    stored: now.as_ref().map(|summary| summary.status),
                    now,
                    changed: false,
                }))
            }
        }
    }

    fn take_service(&mut self, name: &ServiceName) -> Result<Option<ServiceView>, ReadError> {
        match self.services.remove(name) {
            Some(view) => Ok(view),
            None => read::service(&*self.snapshot, name),
        }
    }

    /// Makes it durable, then shows it to followers. An empty batch writes nothing.
    ///
    /// # Errors
    /// The writer is poisoned: the coordinator stops the process, since the disk may hold either state.
    pub fn commit(mut self) -> Result<Seq, CommitError> {
        self.settle();
        let Batch {
            writer,
            snapshot,
            seq,
            prev_hash,
            writes,
            runs,
            published,
            moves,
            ..
        } = self;
        let queued = runs.iter().filter(|(_, slot)| slot.now.is_some());
        let highest_run = queued.fold(writer.highest_run, |highest, ((_, run), _)| {
            highest.max(*run)
        });
        // Gone before the commit, so that the pages it pins can be used again.
        drop(snapshot);
        if writes.is_empty() {
            return Ok(seq - 1);
        }
        let started = Instant::now();
        writer.write(writes, moves)?;
        metrics::histogram!("rungate_ledger_commit_seconds").record(started.elapsed());
        let records = seq - writer.next_seq;
        metrics::histogram!("rungate_ledger_batch_records").record(records as f64);
        writer.next_seq = seq;
        writer.tail_hash = prev_hash;
        writer.highest_run = highest_run;
        writer.inner.hub.publish(seq - 1, published);
        Ok(seq - 1)
    }

    /// Writes each changed projection once, however many records changed it.
    fn settle(&mut self) {
        for ((plane, run), slot) in &self.runs {
            let Some(summary) = slot.now.as_ref().filter(|_| slot.changed) else {
                continue;
            };
            let row = summary.to_row();
            self.writes.put(Table::Runs, keys::run(*plane, *run), row);
            if slot.stored != Some(summary.status) {
                self.moves.count(slot.stored, Some(summary.status));
                if let Some(stored) = slot.stored {
                    let key = keys::status(*plane, stored, *run);
                    self.writes.remove(Table::RunsByStatus, key);
                }
                let key = keys::status(*plane, summary.status, *run);
                self.writes.put(Table::RunsByStatus, key, []);
            }
            if let (None, Some(session)) = (slot.stored, &summary.session) {
                let key = keys::session(*plane, session, *run);
                self.writes.put(Table::RunsBySession, key, []);
            }
        }
        for (name, view) in &self.services {
            match view {
                Some(view) => {
                    let encoded = record_codec::encode(view);
                    self.writes.put(Table::Services, name.as_bytes(), encoded);
                }
                None => self.writes.remove(Table::Services, name.as_bytes()),
            }
        }
        for ((plane, command), entry) in &self.inbox {
            let key = keys::command(*plane, command);
            self.writes
                .put(Table::Inbox, key, record_codec::encode(entry));
        }
    }
}

/// The last record's seq and hash.
pub(super) fn tail(snapshot: &dyn Snapshot) -> Result<(Seq, Hash), ReadError> {
    let mut tail = Ok((0, record_codec::GENESIS));
    let all = (Bound::Unbounded, Bound::Unbounded);
    snapshot.scan(Table::Events, all, Direction::Down, &mut |key, value| {
        let seq = keys::parse_seq(key).unwrap_or_default();
        tail = Raw::parse(seq, value).map(|raw| (seq, raw.hash));
        ControlFlow::Break(())
    })?;
    tail
}
