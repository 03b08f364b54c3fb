//! Proves a ledger: the chain and its payloads record by record, then that every projection is what a
//! fold of the events gives. Stops at the first thing that is wrong, and names it.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::domain::event::Event;
use crate::domain::ids::{PlaneId, RunId, Seq, ServiceName};
use crate::domain::state::user::People;

use super::error::{ReadError, StoreError};
use super::projection::inbox::{self, InboxEntry, InboxState};
use super::projection::people as people_projection;
use super::projection::run::{self as run_projection, Place, RunSummary};
use super::projection::service::{self, PlaneView, ServiceView};
use super::purge::Purges;
use super::record_codec::{self, GENESIS, Hash, Raw};
use super::store::{Snapshot, Table};
use super::{Ledger, keys, read, view};

/// What was proved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub records: u64,
    /// Records whose payload was removed by a purge.
    pub purged: u64,
    pub runs: u64,
    pub commands: u64,
    pub services: u64,
    /// The last record; its hash stands for the whole ledger.
    pub tail_seq: Seq,
    pub tail_hash: String,
}

/// The first thing found wrong.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("record {seq} is bad: {detail}")]
    Record { seq: Seq, detail: String },
    #[error("the records are whole, but {what} in {table} does not follow from them: {detail}")]
    Projection {
        table: &'static str,
        what: String,
        detail: String,
    },
    #[error("the ledger cannot be read: {0}")]
    Store(#[from] StoreError),
}

impl From<ReadError> for VerifyError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::BadRecord { seq, detail } => VerifyError::Record { seq, detail },
            ReadError::Store(error) => VerifyError::Store(error),
            ReadError::BadEntry { table, detail } => VerifyError::Projection {
                table,
                what: "an entry".into(),
                detail,
            },
            ReadError::Closed => VerifyError::Store(StoreError::Failed),
        }
    }
}

/// Tables whose keys begin with a plane and that a purge of it empties.
const OF_A_PLANE: [Table; 7] = [
    Table::RunRecords,
    Table::Runs,
    Table::RunsByStatus,
    Table::RunsBySession,
    Table::Inbox,
    Table::Idempotency,
    Table::Planes,
];

/// How often `progress` hears of it.
const PROGRESS_EVERY: u64 = 65_536;

impl Ledger {
    /// Reads all of it as of now; a running gateway goes on meanwhile. `progress` hears the seq.
    ///
    /// # Errors
    /// The first bad record, or the first entry of a projection that does not follow from the records.
    pub fn verify(&self, progress: &mut dyn FnMut(Seq)) -> Result<Verified, VerifyError> {
        let snapshot = self.inner.store.snapshot()?;
        let snapshot = &*snapshot;
        let mut fold = Fold::default();
        walk(snapshot, Table::Events, &mut |key, bytes| {
            let seq = fold.record(snapshot, key, bytes)?;
            if seq % PROGRESS_EVERY == 0 {
                progress(seq);
            }
            Ok(())
        })?;
        fold.check_purged_planes(snapshot)?;
        fold.check_small_tables(snapshot)?;
        check_people(snapshot, &fold.people)?;
        let commands = fold.check_inbox(snapshot)?;
        let runs = fold.check_runs(snapshot)?;
        Ok(Verified {
            records: fold.seq,
            purged: fold.purged,
            runs,
            commands,
            services: fold.services.len() as u64,
            tail_seq: fold.seq,
            tail_hash: view::hex(&fold.hash),
        })
    }
}

/// What the records seen so far amount to.
#[derive(Default)]
struct Fold {
    seq: Seq,
    hash: Hash,
    purged: u64,
    /// Of each plane.
    counts: BTreeMap<PlaneId, Counts>,
    services: BTreeMap<ServiceName, ServiceView>,
    /// Which service each live attempt occupies.
    occupied: HashMap<(PlaneId, RunId), ServiceName>,
    gpus: Option<Vec<u8>>,
    /// When the use of GPUs was summed, and by which record.
    gpu_use: BTreeMap<[u8; 8], Seq>,
    planes: BTreeMap<u32, PlaneView>,
    people: People,
    /// What is right in a purged plane only: the first such fault of each plane, and the last record that has one.
    lacking: BTreeMap<PlaneId, (VerifyError, Seq)>,
    /// When a plane was purged.
    planes_purged: BTreeMap<PlaneId, Seq>,
}

/// What the projections of a plane must amount to.
#[derive(Clone, Copy, Default)]
struct Counts {
    /// Records of runs, without the first of each.
    later_in_runs: u64,
    accepted: u64,
    decided: u64,
}

impl Fold {
    fn record(
        &mut self,
        snapshot: &dyn Snapshot,
        key: &[u8],
        bytes: &[u8],
    ) -> Result<Seq, VerifyError> {
        let expected = self.seq + 1;
        let bad = |detail: &str| VerifyError::Record {
            seq: expected,
            detail: detail.to_owned(),
        };
        if keys::parse_seq(key) != Some(expected) {
            return Err(bad("it is missing"));
        }
        let raw = Raw::parse(expected, bytes)?;
        let prev_hash = if self.seq == 0 { GENESIS } else { self.hash };
        if raw.prev_hash != prev_hash {
            return Err(bad("it does not follow the record before it"));
        }
        if raw.computed_hash(expected) != raw.hash {
            return Err(bad("its hash does not match its content"));
        }
        if !raw.purged && *blake3::hash(raw.payload).as_bytes() != raw.payload_hash {
            return Err(bad("its payload does not match its hash"));
        }
        let event = raw.decode_event(expected)?;
        raw.decode_meta(expected)?;
        if raw.run.is_some() && raw.run != event.run() {
            return Err(bad("it belongs to another run than its event"));
        }
        self.hash = raw.hash;
        self.seq = expected;
        self.check_run(snapshot, &raw)?;
        self.command(snapshot, &event, &raw)?;
        self.small_tables(&event, &raw);
        Ok(expected)
    }

    /// That the run's index names the record, and that a purged payload was purged by its run or its plane.
    fn check_run(&mut self, snapshot: &dyn Snapshot, raw: &Raw<'_>) -> Result<(), VerifyError> {
        self.purged += u64::from(raw.purged);
        let Some(run) = raw.run else {
            if raw.purged {
                let error = self.bad("its payload is gone, and its plane was never purged");
                self.lacks(raw.plane, error);
            }
            return Ok(());
        };
        self.counts.entry(raw.plane).or_default().later_in_runs += u64::from(raw.cursor > 1);
        match read::seq_of(snapshot, raw.plane, run, raw.cursor)? {
            Some(seq) if seq == self.seq => {}
            found => {
                let error = wrong(
                    Table::RunRecords,
                    format!("cursor {} of run {run}", raw.cursor),
                    format!("it should name record {}", self.seq),
                );
                if found.is_some() {
                    return Err(error);
                }
                self.lacks(raw.plane, error);
            }
        }
        if raw.purged && !read::run(snapshot, raw.plane, run)?.is_some_and(|run| run.purged) {
            let error = self.bad("its payload is gone, and its run was never purged");
            self.lacks(raw.plane, error);
        }
        Ok(())
    }

    /// The current record shows something that is right in a purged plane only.
    fn lacks(&mut self, plane: PlaneId, error: VerifyError) {
        let (_, last) = self.lacking.entry(plane).or_insert((error, self.seq));
        *last = self.seq;
    }

    /// Whether a plane was purged: its rows are gone, or on their way.
    fn is_purged(&self, plane: PlaneId) -> bool {
        self.planes_purged.contains_key(&plane)
    }

    /// Whether what a key stands for was not purged; the key begins with a plane.
    fn unpurged(&self, key: &[u8]) -> bool {
        let plane = key.get(..4).and_then(keys::parse_plane);
        plane.is_none_or(|plane| !self.is_purged(plane))
    }

    /// The sum over the planes that were not purged.
    fn expected(&self, of: impl Fn(&Counts) -> u64) -> u64 {
        let counts = self
            .counts
            .iter()
            .filter(|(plane, _)| !self.is_purged(**plane));
        counts.map(|(_, counts)| of(counts)).sum()
    }

    fn bad(&self, detail: &str) -> VerifyError {
        VerifyError::Record {
            seq: self.seq,
            detail: detail.to_owned(),
        }
    }

    fn command(
        &mut self,
        snapshot: &dyn Snapshot,
        event: &Event,
        raw: &Raw<'_>,
    ) -> Result<(), VerifyError> {
        let Some(id) = inbox::command_of(event) else {
            return Ok(());
        };
        let entry = read::command(snapshot, raw.plane, id)?;
        let before = entry.clone().map(|entry| InboxEntry {
            state: InboxState::Accepted,
            decided_at: None,
            ..entry
        });
        let after = inbox::apply(before, event, self.seq, raw.at, raw.payload_hash);
        let counts = self.counts.entry(raw.plane).or_default();
        let agrees = match (event, &after, &entry) {
            // The decision comes later in the ledger, and is checked there.
            (Event::CommandAccepted { .. }, Some(after), Some(entry)) => {
                counts.accepted += 1;
                let undecided = InboxEntry {
                    state: InboxState::Accepted,
                    decided_at: None,
                    ..entry.clone()
                };
                *after == undecided
            }
            (_, Some(_), Some(_)) => {
                counts.decided += 1;
                after == entry
            }
            (Event::CommandAccepted { .. }, ..) => false,
            // A decision about a command that was never accepted is nothing to the inbox.
            _ => true,
        };
        if agrees {
            return Ok(());
        }
        let error = wrong(
            Table::Inbox,
            format!("command {id}"),
            format!("record {} says otherwise", self.seq),
        );
        if entry.is_some() {
            return Err(error);
        }
        self.lacks(raw.plane, error);
        Ok(())
    }

    fn small_tables(&mut self, event: &Event, raw: &Raw<'_>) {
        if let Some(run) = raw.run {
            self.occupy((raw.plane, run), event);
        }
        if let Some(name) = service::service_of(event) {
            let before = self.services.remove(name);
            if let Some(view) = service::apply(before, event, raw.at) {
                self.services.insert(name.clone(), view);
            }
        }
        self.people.apply(event, raw.at);
        match event {
            Event::PlanePurged { plane } => {
                self.planes_purged.insert(*plane, self.seq);
            }
            Event::GpusListed { gpus } => self.gpus = Some(record_codec::encode(gpus)),
            Event::GpuUseSummed { .. } => {
                self.gpu_use.insert(keys::instant(raw.at), self.seq);
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
                    opened_at: raw.at,
                };
                self.planes.insert(plane.0, view);
            }
            _ => {}
        }
    }

    /// Follows which service a run's attempt occupies, as the summaries' statuses tell it.
    fn occupy(&mut self, run: (PlaneId, RunId), event: &Event) {
        let before = self.occupied.get(&run).cloned();
        let after = match event {
            Event::JobDispatched { service, .. } => Some(service.clone()),
            Event::JobPaused { .. }
            | Event::JobResumed { .. }
            | Event::JobPreempted { .. }
            | Event::JobRequeued { .. }
            | Event::JobAttemptFailed {
                retry_at: Some(_), ..
            }
            | Event::JobCompleted { .. }
            | Event::JobFailed { .. }
            | Event::JobCancelled { .. }
            | Event::JobRevived { .. } => None,
            _ => return,
        };
        if before == after {
            return;
        }
        if let Some(view) = before.and_then(|name| self.services.get_mut(&name)) {
            service::occupy(view, run, false);
        }
        match after {
            Some(name) => {
                if let Some(view) = self.services.get_mut(&name) {
                    service::occupy(view, run, true);
                }
                self.occupied.insert(run, name);
            }
            None => drop(self.occupied.remove(&run)),
        }
    }

    fn check_small_tables(&self, snapshot: &dyn Snapshot) -> Result<(), VerifyError> {
        let stored: Vec<ServiceView> = read::all(snapshot, Table::Services)?;
        for (name, view) in &self.services {
            if stored.iter().find(|stored| stored.spec.name == *name) != Some(view) {
                let detail = "it differs from what the events give".to_owned();
                return Err(wrong(Table::Services, format!("service {name}"), detail));
            }
        }
        if stored.len() != self.services.len() {
            let detail = format!("{} instead of {}", stored.len(), self.services.len());
            return Err(wrong(Table::Services, "their number".into(), detail));
        }
        if snapshot.get(Table::Gpus, keys::GPUS)? != self.gpus {
            let detail = "it differs from the last one recorded".to_owned();
            return Err(wrong(Table::Gpus, "the list".into(), detail));
        }
        self.check_gpu_use(snapshot)?;
        let planes: Vec<PlaneView> = read::all(snapshot, Table::Planes)?;
        let planes = planes.iter().filter(|view| !self.is_purged(view.plane));
        let expected = self.planes.values();
        if !planes.eq(expected.filter(|view| !self.is_purged(view.plane))) {
            let detail = "it differs from what the events give".to_owned();
            return Err(wrong(Table::Planes, "the list".into(), detail));
        }
        Ok(())
    }

    fn check_gpu_use(&self, snapshot: &dyn Snapshot) -> Result<(), VerifyError> {
        let mut expected = self.gpu_use.iter();
        walk(
            snapshot,
            Table::GpuUse,
            &mut |key, value| match expected.next() {
                Some((at, seq)) if key == at && value == keys::seq(*seq) => Ok(()),
                _ => Err(differs(Table::GpuUse)),
            },
        )?;
        match expected.next() {
            Some(_) => Err(differs(Table::GpuUse)),
            None => Ok(()),
        }
    }

    /// That what a purge removes is lacking only where there was one, and that nothing is left of a plane that is
    /// said to be removed.
    fn check_purged_planes(&mut self, snapshot: &dyn Snapshot) -> Result<(), VerifyError> {
        let purged = |plane| self.planes_purged.get(&plane).copied().unwrap_or(0);
        let mut lacking = std::mem::take(&mut self.lacking).into_iter();
        if let Some((_, (error, _))) = lacking.find(|(plane, (_, last))| purged(*plane) < *last) {
            return Err(error);
        }
        let purges = Purges::of(snapshot);
        for plane in self.planes_purged.keys() {
            if purges.has_plane(*plane)? {
                continue;
            }
            for table in OF_A_PLANE {
                read::walk(snapshot, table, &keys::plane(*plane), |_, _| {
                    let detail = "it was purged, and no purge goes on".to_owned();
                    Err(wrong(
                        table,
                        format!("something of plane {}", plane.0),
                        detail,
                    ))
                })?;
            }
        }
        read::walk(snapshot, Table::Purges, &[], |key, _| {
            let plane = keys::parse_plane(key);
            match plane.is_none_or(|plane| self.is_purged(plane)) {
                true => Ok(ControlFlow::Continue(())),
                false => {
                    let detail = "it was never purged".to_owned();
                    Err(wrong(Table::Purges, "a plane".into(), detail))
                }
            }
        })
    }

    /// That the inbox holds no more than the records account for.
    fn check_inbox(&self, snapshot: &dyn Snapshot) -> Result<u64, VerifyError> {
        let (mut entries, mut decided) = (0, 0);
        walk(snapshot, Table::Inbox, &mut |key, bytes| {
            if !self.unpurged(key) {
                return Ok(());
            }
            let entry: InboxEntry = read::entry(Table::Inbox, bytes)?;
            entries += 1;
            decided += u64::from(entry.state != InboxState::Accepted);
            Ok(())
        })?;
        let expected = (self.expected(|c| c.accepted), self.expected(|c| c.decided));
        if (entries, decided) != expected {
            return Err(wrong(
                Table::Inbox,
                "the number of commands".into(),
                format!(
                    "{entries} of which {decided} are decided, instead of {} and {}",
                    expected.0, expected.1
                ),
            ));
        }
        Ok(entries)
    }

    /// Folds each run's records again and compares the summary and its place in the indexes.
    fn check_runs(&self, snapshot: &dyn Snapshot) -> Result<u64, VerifyError> {
        let (mut runs, mut later, mut sessions) = (0, 0, 0);
        walk(snapshot, Table::Runs, &mut |key, bytes| {
            if !self.unpurged(key) {
                return Ok(());
            }
            let stored = read::summary(snapshot, bytes)?;
            check_run(snapshot, key, &stored)?;
            runs += 1;
            later += stored.ledger_len.saturating_sub(1);
            sessions += u64::from(stored.session.is_some());
            Ok(())
        })?;
        let counts = [
            (Table::RunRecords, self.expected(|c| c.later_in_runs)),
            (Table::RunRecords, later),
            (Table::RunsByStatus, runs),
            (Table::RunsBySession, sessions),
        ];
        for (table, expected) in counts {
            let found = snapshot.len(table)? - self.purged_rows(snapshot, table)?;
            if found != expected {
                let detail = format!("{found} instead of {expected}");
                return Err(wrong(table, "the number of entries".into(), detail));
            }
        }
        Ok(runs)
    }

    /// Rows of planes whose purge goes on.
    fn purged_rows(&self, snapshot: &dyn Snapshot, table: Table) -> Result<u64, VerifyError> {
        let mut rows = 0;
        for plane in self.planes_purged.keys() {
            read::walk(snapshot, table, &keys::plane(*plane), |_, _| {
                rows += 1;
                Ok::<_, VerifyError>(ControlFlow::Continue(()))
            })?;
        }
        Ok(rows)
    }
}

/// That a run is what its records give, and stands in the indexes.
fn check_run(snapshot: &dyn Snapshot, key: &[u8], stored: &RunSummary) -> Result<(), VerifyError> {
    let (plane, run) = (stored.plane, stored.run);
    let what = || format!("run {run}");
    if keys::parse_run(key) != Some((plane, run)) {
        return Err(wrong(
            Table::Runs,
            what(),
            "it stands under another key".into(),
        ));
    }
    if fold_run(snapshot, stored)?.as_ref() != Some(stored) {
        let detail = "it differs from what its records give".to_owned();
        return Err(wrong(Table::Runs, what(), detail));
    }
    let key = keys::status(plane, stored.status, run);
    if snapshot.get(Table::RunsByStatus, &key)?.is_none() {
        return Err(wrong(Table::RunsByStatus, what(), "it is missing".into()));
    }
    if let Some(session) = &stored.session {
        let key = keys::session(plane, session, run);
        if snapshot.get(Table::RunsBySession, &key)?.is_none() {
            return Err(wrong(Table::RunsBySession, what(), "it is missing".into()));
        }
    }
    Ok(())
}

/// That users, tokens, runtimes, tenants and quotas are what the events give, and each token is found by its hash.
fn check_people(snapshot: &dyn Snapshot, people: &People) -> Result<(), VerifyError> {
    check_list(snapshot, Table::Users, people.users.values())?;
    check_list(snapshot, Table::Tokens, people.tokens.values())?;
    check_list(snapshot, Table::Runtimes, people.runtimes.values())?;
    check_list(snapshot, Table::Credentials, people.credentials.values())?;
    check_list(snapshot, Table::Tenants, people.tenants.values())?;
    check_list(snapshot, Table::UserQuotas, people.quotas.values())?;
    for token in people.tokens.values() {
        let digest = token.hash.digest();
        let found = snapshot.get(Table::TokenDigests, digest.as_bytes())?;
        if found != Some(people_projection::token_key(&token.key)) {
            return Err(differs(Table::TokenDigests));
        }
    }
    if snapshot.len(Table::TokenDigests)? != people.tokens.len() as u64 {
        return Err(differs(Table::TokenDigests));
    }
    Ok(())
}

fn check_list<'a, T: DeserializeOwned + PartialEq + 'a>(
    snapshot: &dyn Snapshot,
    table: Table,
    expected: impl Iterator<Item = &'a T>,
) -> Result<(), VerifyError> {
    match read::all::<T>(snapshot, table)?.iter().eq(expected) {
        true => Ok(()),
        false => Err(differs(table)),
    }
}

fn differs(table: Table) -> VerifyError {
    let detail = "it differs from what the events give".to_owned();
    wrong(table, "the list".into(), detail)
}

fn fold_run(
    snapshot: &dyn Snapshot,
    stored: &RunSummary,
) -> Result<Option<RunSummary>, VerifyError> {
    let (mut folded, mut kept) = (None, None);
    let purges = Purges::of(snapshot);
    for cursor in 1..=stored.ledger_len {
        let Some(seq) = read::seq_of(snapshot, stored.plane, stored.run, cursor)? else {
            return Ok(None);
        };
        let Some(bytes) = snapshot.get(Table::Events, &keys::seq(seq))? else {
            return Ok(None);
        };
        let raw = Raw::parse(seq, &bytes)?;
        let place = Place {
            cursor,
            ..raw.place(seq)
        };
        let event = raw.decode_event(seq)?;
        if let (Event::RunPurged { .. }, Some(seq)) = (&event, kept) {
            let detail = "its payload is there, and its run was purged".to_owned();
            return Err(VerifyError::Record { seq, detail });
        }
        if !raw.payload.is_empty() && !purges.hides(&raw)? {
            kept = Some(seq);
        }
        folded = run_projection::apply(folded, &event, place);
    }
    Ok(folded)
}

fn wrong(table: Table, what: String, detail: String) -> VerifyError {
    VerifyError::Projection {
        table: table.name(),
        what,
        detail,
    }
}

/// Shown each entry of a table; its first error ends the walk.
type Check<'c> = dyn FnMut(&[u8], &[u8]) -> Result<(), VerifyError> + 'c;

/// Shows every entry of a table until `visit` fails.
fn walk(snapshot: &dyn Snapshot, table: Table, visit: &mut Check<'_>) -> Result<(), VerifyError> {
    read::walk(snapshot, table, &[], |key, bytes| {
        visit(key, bytes).map(|()| ControlFlow::Continue(()))
    })
}
