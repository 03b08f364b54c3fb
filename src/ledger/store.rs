//! The seam under the ledger: ordered tables of bytes with snapshots and one atomic, durable commit at a
//! time. Knows nothing of records; `redb_store` is the one implementation.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use smallvec::SmallVec;

use super::error::StoreError;

/// The tables of the ledger. The name is part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// seq → record (`record_codec`).
    Events,
    /// (plane, run, cursor) → seq; from cursor 2 on, as the summary tells the first.
    RunRecords,
    /// (plane, run) → summary, or the first record's seq (`RunSummary::to_row`). Run ids are version 7 UUIDs, so this is the listing by time too.
    Runs,
    /// (plane, status, run) → nothing.
    RunsByStatus,
    /// (plane, blake3 of the session, run) → nothing; only for sessions that were given.
    RunsBySession,
    /// (plane, command id) → inbox entry.
    Inbox,
    /// (plane, blake3 of route and key) → body hash and stored reply.
    Idempotency,
    Services,
    Gpus,
    Planes,
    /// (seq, chunk) → a part of a snapshot.
    Snapshots,
    /// seq → how many chunks, how long, which checksum.
    SnapshotManifests,
    /// Format version and instance id.
    Meta,
    /// (tenant, user) → user.
    Users,
    /// (tenant, user, token) → token.
    Tokens,
    /// What a token is looked up by → key of `tokens`.
    TokenDigests,
    /// (tenant, runtime) → runtime.
    Runtimes,
    /// (tenant, user) → credentials.
    Credentials,
    /// tenant → tenant, of those that something was said of.
    Tenants,
    /// (tenant, user) → quotas, of users that have some.
    UserQuotas,
    /// (plane) or (plane, run) → what a purge of it still has to remove.
    Purges,
    /// When it was summed → seq of a `gpu_use_summed`.
    GpuUse,
}

impl Table {
    pub const ALL: [Table; 22] = [
        Table::Events,
        Table::RunRecords,
        Table::Runs,
        Table::RunsByStatus,
        Table::RunsBySession,
        Table::Inbox,
        Table::Idempotency,
        Table::Services,
        Table::Gpus,
        Table::Planes,
        Table::Snapshots,
        Table::SnapshotManifests,
        Table::Meta,
        Table::Users,
        Table::Tokens,
        Table::TokenDigests,
        Table::Runtimes,
        Table::Credentials,
        Table::Tenants,
        Table::UserQuotas,
        Table::Purges,
        Table::GpuUse,
    ];

    /// Its name on disk.
    pub fn name(self) -> &'static str {
        match self {
            Table::Events => "events",
            Table::RunRecords => "run_records",
            Table::Runs => "runs",
            Table::RunsByStatus => "runs_by_status",
            Table::RunsBySession => "runs_by_session",
            Table::Inbox => "inbox",
            Table::Idempotency => "idempotency",
            Table::Services => "services",
            Table::Gpus => "gpus",
            Table::Planes => "planes",
            Table::Snapshots => "snapshots",
            Table::SnapshotManifests => "snapshot_manifests",
            Table::Meta => "meta",
            Table::Users => "users",
            Table::Tokens => "tokens",
            Table::TokenDigests => "token_digests",
            Table::Runtimes => "runtimes",
            Table::Credentials => "credentials",
            Table::Tenants => "tenants",
            Table::UserQuotas => "user_quotas",
            Table::Purges => "purges",
            Table::GpuUse => "gpu_use",
        }
    }
}

/// Which way a scan walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Up,
    Down,
}

/// A range of keys.
pub type KeyBounds<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// Shown each entry of a scan; breaks to end it.
pub type Visit<'v> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'v;

/// A key of ours: few are longer, and those are on the heap.
type Key = SmallVec<[u8; 36]>;

/// What one commit changes in one table; `None` removes. Sorted, so that a B-tree is written in order.
pub type Changes = BTreeMap<Key, Option<Vec<u8>>>;

/// All that one commit changes.
#[derive(Default)]
pub struct WriteSet {
    tables: BTreeMap<Table, Changes>,
}

impl WriteSet {
    pub fn put(&mut self, table: Table, key: impl AsRef<[u8]>, value: impl Into<Vec<u8>>) {
        let changes = self.tables.entry(table).or_default();
        changes.insert(Key::from_slice(key.as_ref()), Some(value.into()));
    }

    pub fn remove(&mut self, table: Table, key: impl AsRef<[u8]>) {
        let changes = self.tables.entry(table).or_default();
        changes.insert(Key::from_slice(key.as_ref()), None);
    }

    /// What this set makes of the key: `None` when it leaves it alone.
    pub fn get(&self, table: Table, key: &[u8]) -> Option<Option<&[u8]>> {
        let change = self.tables.get(&table)?.get(key)?;
        Some(change.as_deref())
    }

    /// What it changes of a table, keys ascending.
    pub fn of(&self, table: Table) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        let changes = self.tables.get(&table).into_iter().flatten();
        changes.map(|(key, value)| (&key[..], value.as_deref()))
    }

    /// Whether it changes anything of a table.
    pub fn touches(&self, table: Table) -> bool {
        self.tables.contains_key(&table)
    }

    pub fn is_empty(&self) -> bool {
        self.tables.values().all(BTreeMap::is_empty)
    }

    /// The changes by table, keys ascending.
    pub fn into_tables(self) -> impl Iterator<Item = (Table, Changes)> {
        self.tables.into_iter()
    }
}

/// A store. Many snapshots at once, one commit at a time.
pub trait Store: Send + Sync {
    /// All that is committed at this moment; later commits do not show in it.
    fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError>;

    /// Writes all or nothing. When it returns `Ok`, the changes survive kill -9 and power loss, and every
    /// later snapshot shows them. After an error the store may hold either state until it is opened
    /// again, and no further commit may be tried.
    fn commit(&self, writes: WriteSet) -> Result<(), StoreError>;
}

/// A consistent view of the tables.
pub trait Snapshot: Send {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Shows entries in key order (or against it) until `visit` breaks. The slices live for the call only.
    fn scan(
        &self,
        table: Table,
        bounds: KeyBounds<'_>,
        direction: Direction,
        visit: &mut Visit<'_>,
    ) -> Result<(), StoreError>;

    /// How many entries a table has; constant time.
    fn len(&self, table: Table) -> Result<u64, StoreError>;

    /// Bytes that a table's entries and pages take on disk; walks the table.
    fn disk_bytes(&self, table: Table) -> Result<u64, StoreError>;
}
