//! The ledger: the append-only, hash-chained log of all that happened, and the projections of it that
//! reads are answered from. One [`Writer`] appends; any number of [`Ledger`] clones read and follow.
//! Decides nothing: which events come of a command is the domain's business.
//!
//! | file | holds |
//! |---|---|
//! | `store`, `redb_store`, `keys` | the seam to the database, redb under it, key layouts |
//! | `record_codec` | a record's bytes and the hash chain |
//! | `open` | opening, creating, and why not |
//! | `batch`, `projection/`, `purge` | appending, what each event changes, and removing what is purged |
//! | `read`, `people`, `listing`, `audit`, `gpu_use`, `replay`, `snapshot` | reading |
//! | `row_cache` | what each request reads, kept in memory |
//! | `hub`, `follow`, `view` | live followers and the JSON they see |
//! | `counts`, `expiry` | how many runs stand in each status; forgetting Idempotency-Keys |
//! | `verify`, `checkpoint` | proving a ledger, and that it is the one it was |
//! | `transfer`, `stats` | moving and measuring a ledger |

pub mod audit;
pub mod batch;
pub mod checkpoint;
mod counts;
pub mod error;
mod expiry;
pub mod follow;
mod gpu_use;
mod hub;
mod keys;
pub mod listing;
mod open;
mod people;
pub mod projection;
mod purge;
mod read;
pub mod record_codec;
mod redb_store;
mod replay;
mod row_cache;
mod snapshot;
pub mod space;
mod stats;
pub mod store;
pub mod transfer;
mod verify;
pub mod view;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use smol_str::SmolStr;
use tokio::sync::watch;
use uuid::Uuid;

use crate::domain::ids::{Cursor, PlaneId, RunId, Seq};
use crate::domain::record::Record;
use crate::domain::tenant::DEFAULT_TENANT;

pub use audit::{AuditEntry, AuditFilter, AuditPage};
pub use batch::{Appended, Batch, MAX_PAYLOAD_BYTES, StoredReply, Writer};
pub use error::{CommitError, OpenError, ReadError, StoreError};
pub use expiry::KEY_LIFE_MS;
pub use follow::{Follower, Frame};
pub use gpu_use::GpuUseView;
pub use hub::Topic;
pub use listing::{RunFilter, RunPage};
pub use open::{FILE_NAME, FORMAT, OpenOptions};
pub use projection::inbox::{InboxEntry, InboxState};
pub use projection::people::{SessionOwner, TokenOwner};
pub use projection::run::{RunStatus, RunSummary};
pub use projection::service::{InstancePhase, InstanceView, PlaneView, ServiceView};
pub use purge::PurgeLeft;
pub use record_codec::Hash;
pub use space::Space;
pub use stats::Stats;
pub use transfer::{TransferError, Transferred};
pub use verify::{Verified, VerifyError};
pub use view::record_json;

use counts::StatusCounts;
use purge::Purges;
use read::Chunk;
use row_cache::RowCache;
use store::{Snapshot, Store, Table};

/// Which records a read shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    All,
    Plane(PlaneId),
}

impl Scope {
    fn holds(self, plane: PlaneId) -> bool {
        match self {
            Scope::All => true,
            Scope::Plane(own) => own == plane,
        }
    }
}

/// Reads of what is committed. Cheap to clone; every call sees a consistent snapshot and blocks on the
/// disk, so asynchronous code wraps it in `spawn_blocking`.
#[derive(Clone)]
pub struct Ledger {
    inner: Arc<Inner>,
}

struct Inner {
    store: Box<dyn Store>,
    hub: hub::Hub,
    counts: StatusCounts,
    /// What each request with a token reads.
    rows: RowCache,
    instance_id: Uuid,
    path: PathBuf,
}

/// Most payload bytes that one read of records returns; it ends after the record that goes over.
const READ_PAYLOAD_BYTES: usize = 16 << 20;

impl Ledger {
    /// Made once, when the ledger was created.
    pub fn instance_id(&self) -> Uuid {
        self.inner.instance_id
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The last committed record; 0 when there is none.
    pub fn tail(&self) -> Seq {
        self.inner.hub.tail()
    }

    /// Tells each new tail.
    pub fn watch(&self) -> watch::Receiver<Seq> {
        self.inner.hub.watch()
    }

    /// How many followers there are.
    pub fn followers(&self) -> usize {
        self.inner.hub.followers()
    }

    pub fn record(&self, seq: Seq) -> Result<Option<Record>, ReadError> {
        read::record(&*self.inner.store.snapshot()?, seq)
    }

    /// A record's payload; `None` when the record does not exist or was purged.
    pub fn payload(&self, seq: Seq) -> Result<Option<Bytes>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let Some(bytes) = snapshot.get(Table::Events, &keys::seq(seq))? else {
            return Ok(None);
        };
        let raw = Purges::of(&*snapshot).show(record_codec::Raw::parse(seq, &bytes)?)?;
        Ok((!raw.purged).then(|| Bytes::copy_from_slice(raw.payload)))
    }

    /// Records after `after`, at most `limit`, fewer when they are large. An empty answer is the end.
    pub fn records(
        &self,
        scope: Scope,
        mut after: Seq,
        limit: usize,
    ) -> Result<Vec<Record>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        loop {
            let (found, examined) = read::records(&*snapshot, scope, after, page(limit))?;
            if !found.is_empty() || examined == after {
                return Ok(found);
            }
            after = examined;
        }
    }

    /// A run's records after `after`, at most `limit`, fewer when they are large. An empty answer is the
    /// end.
    pub fn run_records(
        &self,
        plane: PlaneId,
        run: RunId,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<Record>, ReadError> {
        read::run_records(
            &*self.inner.store.snapshot()?,
            plane,
            run,
            after,
            page(limit),
        )
    }

    /// The same as JSON, each record as design section 6 shows it, with its cursor.
    pub fn run_records_json(
        &self,
        plane: PlaneId,
        run: RunId,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<(Cursor, Vec<u8>)>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let records = read::run_records(&*snapshot, plane, run, after, page(limit))?;
        let mut contexts = view::Contexts::new(&*snapshot);
        let render =
            |record: &Record| Ok((record.cursor, view::json(record, &contexts.of(record)?)));
        records.iter().map(render).collect()
    }

    /// Records of a scope as JSON, each with its seq.
    pub fn records_json(
        &self,
        scope: Scope,
        after: Seq,
        limit: usize,
    ) -> Result<Vec<(Seq, Vec<u8>)>, ReadError> {
        let records = self.records(scope, after, limit)?;
        let snapshot = self.inner.store.snapshot()?;
        let mut contexts = view::Contexts::new(&*snapshot);
        let render = |record: &Record| Ok((record.seq, view::json(record, &contexts.of(record)?)));
        records.iter().map(render).collect()
    }

    pub fn run(&self, plane: PlaneId, run: RunId) -> Result<Option<RunSummary>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let found = read::run(&*snapshot, plane, run)?;
        found.map(|run| hide_foreign(&*snapshot, run)).transpose()
    }

    /// Runs older than `before` that pass the filter, newest first.
    pub fn runs(
        &self,
        plane: PlaneId,
        filter: &RunFilter,
        before: Option<RunId>,
        limit: usize,
    ) -> Result<RunPage, ReadError> {
        self.runs_of(&[plane], filter, before, limit)
    }

    /// The same of several planes.
    pub fn runs_of(
        &self,
        planes: &[PlaneId],
        filter: &RunFilter,
        before: Option<RunId>,
        limit: usize,
    ) -> Result<RunPage, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let RunPage { items, next } = listing::runs(&*snapshot, planes, filter, before, limit)?;
        let items = items.into_iter().map(|run| hide_foreign(&*snapshot, run));
        let items = items.collect::<Result<_, _>>()?;
        Ok(RunPage { items, next })
    }

    /// A command's place in the inbox.
    pub fn command(&self, plane: PlaneId, id: &str) -> Result<Option<InboxEntry>, ReadError> {
        read::command(&*self.inner.store.snapshot()?, plane, id)
    }

    /// All services, by name.
    pub fn services(&self) -> Result<Vec<ServiceView>, ReadError> {
        read::all(&*self.inner.store.snapshot()?, Table::Services)
    }

    pub fn service(&self, name: &str) -> Result<Option<ServiceView>, ReadError> {
        read::service(&*self.inner.store.snapshot()?, name)
    }

    /// All data planes.
    pub fn planes(&self) -> Result<Vec<PlaneView>, ReadError> {
        read::all(&*self.inner.store.snapshot()?, Table::Planes)
    }

    /// Whose a plane is; the default tenant's, where it is not known.
    pub fn tenant_of(&self, plane: PlaneId) -> Result<SmolStr, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let view = read::get::<PlaneView>(&*snapshot, Table::Planes, &plane.0.to_be_bytes())?;
        Ok(view.map_or_else(|| DEFAULT_TENANT.clone(), |view| view.tenant))
    }

    /// Follows a topic from after a position: a cursor for a run, else a seq. Needs a Tokio runtime.
    pub fn follow(&self, topic: Topic, after: u64) -> Follower {
        Follower::new(self.clone(), topic, after)
    }
}

/// A run of another plane that preempted this one is named to nobody.
fn hide_foreign(snapshot: &dyn Snapshot, run: RunSummary) -> Result<RunSummary, ReadError> {
    let foreign = match run.preempted_by {
        Some(by) => read::run(snapshot, run.plane, by)?.is_none(),
        None => false,
    };
    Ok(RunSummary {
        preempted_by: run.preempted_by.filter(|_| !foreign),
        ..run
    })
}

fn page(limit: usize) -> Chunk {
    Chunk {
        // A limit of none would read as "the end".
        records: limit.max(1),
        payload_bytes: READ_PAYLOAD_BYTES,
    }
}
