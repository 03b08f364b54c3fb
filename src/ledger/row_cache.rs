//! What every request with a token reads, kept in memory: rows of the tables of tokens, users and tenants.
//!
//! **What is committed counts**, as if each read went to the disk. A commit that changes any of these rows first
//! declares the cache outdated, and writes its own rows into it before the cache counts again; its caller is answered
//! after that. So whoever asks after an answer finds what was answered, or newer. Meanwhile, and for good after a
//! commit that failed, reads go to the disk. What a read finds on disk is kept only when no commit was under way from before
//! its snapshot until then. A read takes all its rows from the cache, within one lock, or all from one snapshot: they are of one
//! moment.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::de::DeserializeOwned;

use super::error::{ReadError, StoreError};
use super::read;
use super::store::{Snapshot, Store, Table, WriteSet};

/// The tables whose rows are kept.
const TABLES: [Table; 4] = [
    Table::TokenDigests,
    Table::Tokens,
    Table::Users,
    Table::Tenants,
];

/// The most that is kept, then all of it is dropped and what is in use comes back: about 90,000 tokens of 20,000 users.
const MAX_BYTES: usize = 32 << 20;

/// What a row takes beside its bytes, in the map and in the allocator.
const ROW_BYTES: usize = 96;

/// A row of one of the tables; `None` where it is known that there is none.
pub(super) struct Row {
    table: Table,
    key: Box<[u8]>,
    value: Option<Box<[u8]>>,
}

/// Rows by key.
type Rows = HashMap<Box<[u8]>, Option<Box<[u8]>>>;

/// The cache of one open ledger.
#[derive(Default)]
pub(super) struct RowCache(RwLock<Kept>);

#[derive(Default)]
struct Kept {
    /// A commit that changes rows is under way, or has failed: the disk may be ahead.
    is_outdated: bool,
    /// How many such commits have begun.
    commits: u64,
    tables: [Rows; TABLES.len()],
    bytes: usize,
}

/// Where a read takes its rows from.
pub(super) enum Source<'a> {
    Kept(&'a [Rows; TABLES.len()]),
    Stored {
        snapshot: &'a dyn Snapshot,
        /// What it has found, to be kept.
        found: &'a RefCell<Vec<Row>>,
    },
}

/// Why a read came to no end.
pub(super) enum Unread {
    /// A row is not in the cache.
    NotKept,
    Failed(ReadError),
}

impl<E: Into<ReadError>> From<E> for Unread {
    fn from(error: E) -> Unread {
        Unread::Failed(error.into())
    }
}

impl Source<'_> {
    /// A row's bytes.
    pub fn bytes(&self, table: Table, key: &[u8]) -> Result<Option<Cow<'_, [u8]>>, Unread> {
        match self {
            Source::Kept(tables) => match place(table).and_then(|i| tables[i].get(key)) {
                Some(value) => Ok(value.as_deref().map(Cow::Borrowed)),
                None => Err(Unread::NotKept),
            },
            Source::Stored { snapshot, found } => {
                let value = snapshot.get(table, key)?;
                // Anybody can ask for tokens that do not exist; tenants are asked for by their users.
                if value.is_some() || table == Table::Tenants {
                    let (key, value) = (key.into(), value.as_deref().map(Into::into));
                    found.borrow_mut().push(Row { table, key, value });
                }
                Ok(value.map(Cow::Owned))
            }
        }
    }

    /// A row, decoded.
    pub fn get<T: DeserializeOwned>(&self, table: Table, key: &[u8]) -> Result<Option<T>, Unread> {
        match self.bytes(table, key)? {
            Some(bytes) => Ok(Some(read::entry(table, &bytes)?)),
            None => Ok(None),
        }
    }
}

impl RowCache {
    /// Reads rows as of one moment, from the cache if it has all of them.
    pub fn read<T>(
        &self,
        store: &dyn Store,
        read: impl Fn(&Source<'_>) -> Result<T, Unread>,
    ) -> Result<T, ReadError> {
        let kept = self.kept();
        let version = kept.version();
        if version.is_some() {
            match read(&Source::Kept(&kept.tables)) {
                Ok(found) => return Ok(found),
                Err(Unread::Failed(error)) => return Err(error),
                Err(Unread::NotKept) => {}
            }
        }
        // The disk may be slow, and the writer waits for the lock.
        drop(kept);
        let (snapshot, found) = (store.snapshot()?, RefCell::default());
        let stored = Source::Stored {
            snapshot: &*snapshot,
            found: &found,
        };
        let answer = read(&stored).map_err(|unread| match unread {
            Unread::Failed(error) => error,
            Unread::NotKept => StoreError::Other("a row was in neither place".into()).into(),
        })?;
        let mut kept = self.kept_mut();
        let dropped = match version.is_some() && kept.version() == version {
            true => kept.keep(found.into_inner()),
            false => Vec::new(),
        };
        drop(kept);
        drop(dropped);
        Ok(answer)
    }

    /// Commits, and keeps what is changed of rows. After an error, or a panic, nothing is read from the cache any more.
    pub fn commit(
        &self,
        writes: WriteSet,
        commit: impl FnOnce(WriteSet) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let rows = changed(&writes);
        if rows.is_empty() {
            return commit(writes);
        }
        let mut kept = self.kept_mut();
        kept.is_outdated = true;
        kept.commits += 1;
        drop(kept);
        commit(writes)?;
        let mut kept = self.kept_mut();
        let dropped = kept.keep(rows);
        kept.is_outdated = false;
        drop(kept);
        drop(dropped);
        Ok(())
    }

    fn kept(&self) -> RwLockReadGuard<'_, Kept> {
        // A change that was torn by a panic leaves the cache outdated, or a few bytes counted too many.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept_mut(&self) -> RwLockWriteGuard<'_, Kept> {
        // The same.
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// What the disk and the cache both show; `None` when they may differ.
    fn version(&self) -> Option<u64> {
        (!self.is_outdated).then_some(self.commits)
    }

    /// Keeps rows. What had to go is returned, to be dropped without the lock.
    fn keep(&mut self, rows: Vec<Row>) -> Vec<[Rows; TABLES.len()]> {
        let mut dropped = Vec::new();
        for Row { table, key, value } in rows {
            let Some(place) = place(table) else { continue };
            let bytes = size(&key, value.as_deref());
            if self.bytes + bytes > MAX_BYTES {
                self.bytes = 0;
                dropped.push(std::mem::take(&mut self.tables));
            }
            self.bytes += bytes;
            if let Some((key, value)) = self.tables[place].remove_entry(&*key) {
                self.bytes -= size(&key, value.as_deref());
            }
            self.tables[place].insert(key, value);
        }
        dropped
    }
}

/// Which of the tables it is, if any.
fn place(table: Table) -> Option<usize> {
    TABLES.iter().position(|kept| *kept == table)
}

fn size(key: &[u8], value: Option<&[u8]>) -> usize {
    ROW_BYTES + key.len() + value.map_or(0, <[u8]>::len)
}

/// The rows of the tables that a commit changes.
fn changed(writes: &WriteSet) -> Vec<Row> {
    let mut rows = Vec::new();
    for table in TABLES {
        rows.extend(writes.of(table).map(|(key, value)| Row {
            table,
            key: key.into(),
            value: value.map(Into::into),
        }));
    }
    rows
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Mutex, mpsc};

    use super::*;
    use crate::ledger::store::{Direction, KeyBounds, Visit};

    type Stored = BTreeMap<(Table, Vec<u8>), Vec<u8>>;

    /// A store in memory.
    #[derive(Default)]
    struct Memory {
        rows: Mutex<Stored>,
        snapshots: AtomicU64,
        /// Committed after the next snapshot was taken, before its reader has ended.
        overtaking: Mutex<Option<WriteSet>>,
    }

    struct Copied(Stored);

    impl Snapshot for Copied {
        fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
            Ok(self.0.get(&(table, key.to_vec())).cloned())
        }

        fn scan(
            &self,
            _: Table,
            _: KeyBounds<'_>,
            _: Direction,
            _: &mut Visit<'_>,
        ) -> Result<(), StoreError> {
            Err(StoreError::Failed)
        }

        fn len(&self, _: Table) -> Result<u64, StoreError> {
            Err(StoreError::Failed)
        }

        fn disk_bytes(&self, _: Table) -> Result<u64, StoreError> {
            Err(StoreError::Failed)
        }
    }

    impl Store for Memory {
        fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError> {
            self.snapshots.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(Copied(self.rows.lock().unwrap().clone())))
        }

        fn commit(&self, writes: WriteSet) -> Result<(), StoreError> {
            let mut rows = self.rows.lock().unwrap();
            for (table, changes) in writes.into_tables() {
                for (key, value) in changes {
                    match value {
                        Some(value) => drop(rows.insert((table, key.to_vec()), value)),
                        None => drop(rows.remove(&(table, key.to_vec()))),
                    }
                }
            }
            Ok(())
        }
    }

    /// A store and the cache of it.
    #[derive(Default)]
    struct Cached {
        store: Memory,
        cache: RowCache,
    }

    impl Cached {
        fn put(&self, table: Table, key: &str, value: &str) {
            let mut writes = WriteSet::default();
            writes.put(table, key, value);
            self.commit(writes);
        }

        fn commit(&self, writes: WriteSet) {
            let commit = |writes| self.store.commit(writes);
            self.cache.commit(writes, commit).unwrap();
        }

        fn get(&self, table: Table, key: &str) -> Option<String> {
            let read = self.cache.read(&self.store, |rows| {
                // Another commit gets in between a read's snapshot and its end.
                if matches!(rows, Source::Stored { .. }) {
                    let overtaking = self.store.overtaking.lock().unwrap().take();
                    overtaking
                        .into_iter()
                        .for_each(|writes| self.commit(writes));
                }
                Ok(rows.bytes(table, key.as_bytes())?.map(Cow::into_owned))
            });
            let value = read.unwrap_or_else(|_| panic!("{key} cannot be read"));
            value.map(|bytes| String::from_utf8(bytes).unwrap())
        }

        /// The same, and how many snapshots it took.
        fn looked_up(&self, table: Table, key: &str) -> (Option<String>, u64) {
            let before = self.store.snapshots.load(Ordering::SeqCst);
            let value = self.get(table, key);
            (value, self.store.snapshots.load(Ordering::SeqCst) - before)
        }
    }

    #[test]
    fn what_was_read_or_written_is_read_from_memory() {
        let cached = Cached::default();
        cached.put(Table::Users, "ann", "written");
        let found = Some("written".to_owned());
        assert_eq!(cached.looked_up(Table::Users, "ann"), (found.clone(), 0));
        *cached.cache.kept_mut() = Kept::default();
        assert_eq!(cached.looked_up(Table::Users, "ann"), (found.clone(), 1));
        assert_eq!(cached.looked_up(Table::Users, "ann"), (found, 0));
        // Of what is not there, it keeps tenants alone.
        assert_eq!(cached.looked_up(Table::Tenants, "acme"), (None, 1));
        assert_eq!(cached.looked_up(Table::Tenants, "acme"), (None, 0));
        for _ in 0..2 {
            assert_eq!(cached.looked_up(Table::TokenDigests, "none"), (None, 1));
        }
        // Commits of something else leave it alone.
        cached.put(Table::Runs, "a run", "queued");
        assert_eq!(cached.looked_up(Table::Users, "ann").1, 0);
    }

    #[test]
    fn what_a_commit_overtook_is_not_kept() {
        let cached = Cached::default();
        cached
            .store
            .rows
            .lock()
            .unwrap()
            .insert((Table::TokenDigests, b"digest".to_vec()), b"token".to_vec());
        let mut revoked = WriteSet::default();
        revoked.remove(Table::TokenDigests, "digest");
        *cached.store.overtaking.lock().unwrap() = Some(revoked);
        // It began before the commit, so either answer would be right.
        assert_eq!(
            cached.get(Table::TokenDigests, "digest").as_deref(),
            Some("token")
        );
        assert_eq!(cached.get(Table::TokenDigests, "digest"), None);
    }

    #[test]
    fn what_was_read_while_a_commit_went_on_is_not_kept() {
        let cached = Cached::default();
        cached.put(Table::Users, "ann", "enabled");
        let mut writes = WriteSet::default();
        writes.put(Table::Users, "ann", "disabled");
        let (reading, is_read) = mpsc::channel();
        let (committed, may_end) = mpsc::channel();
        std::thread::scope(|scope| {
            let cached = &cached;
            let reader = move || {
                cached.cache.read(&cached.store, |rows| {
                    let value = rows.bytes(Table::Users, b"ann")?.map(Cow::into_owned);
                    reading.send(()).unwrap();
                    may_end.recv().unwrap();
                    assert_eq!(value.as_deref(), Some(&b"enabled"[..]));
                    Ok(())
                })
            };
            let commit = |writes| {
                scope.spawn(reader);
                is_read.recv().unwrap();
                cached.store.commit(writes)
            };
            cached.cache.commit(writes, commit).unwrap();
            committed.send(()).unwrap();
        });
        let disabled = Some("disabled".to_owned());
        assert_eq!(cached.get(Table::Users, "ann"), disabled);
    }

    #[test]
    fn nothing_is_read_from_it_while_a_commit_goes_on_nor_after_one_that_failed() {
        let cached = Cached::default();
        cached.put(Table::Users, "ann", "enabled");
        let mut writes = WriteSet::default();
        writes.put(Table::Users, "ann", "disabled");
        let failed = cached.cache.commit(writes, |writes| {
            assert_eq!(cached.looked_up(Table::Users, "ann").1, 1);
            // It is on disk, and then the sync fails.
            cached.store.commit(writes)?;
            let disabled = Some("disabled".to_owned());
            assert_eq!(cached.looked_up(Table::Users, "ann"), (disabled, 1));
            Err(StoreError::Failed)
        });
        assert!(failed.is_err());
        for _ in 0..2 {
            let disabled = Some("disabled".to_owned());
            assert_eq!(cached.looked_up(Table::Users, "ann"), (disabled, 1));
        }
    }

    #[test]
    fn it_is_bounded() {
        let mut kept = Kept::default();
        let row = |n: u32| Row {
            table: Table::Tokens,
            key: n.to_be_bytes().into(),
            value: Some(vec![0; 1_000].into()),
        };
        let most = u32::try_from(MAX_BYTES / 1_000).unwrap();
        for n in 0..2 * most {
            kept.keep(vec![row(n)]);
            // The same again takes no more.
            kept.keep(vec![row(n)]);
            assert!(kept.bytes <= MAX_BYTES);
        }
        let rows = kept.tables.iter().flatten();
        let bytes: usize = rows.map(|(key, value)| size(key, value.as_deref())).sum();
        assert_eq!(kept.bytes, bytes);
    }

    /// Tokens come and go while others show them: one that is issued is known when the commit has returned, one that is
    /// revoked is not.
    #[test]
    fn no_reader_sees_a_token_after_its_revocation_has_returned() {
        const TOKENS: u64 = 20_000;
        let cached = Cached::default();
        let (issued, revoking, revoked) = Default::default();
        let (issued, revoking, revoked): (&AtomicU64, &AtomicU64, &AtomicU64) =
            (&issued, &revoking, &revoked);
        let reader = || {
            let mut seen = 0;
            while revoked.load(Ordering::SeqCst) < TOKENS {
                let gone = revoked.load(Ordering::SeqCst);
                let token = cached.get(Table::Tokens, &gone.to_string());
                assert_eq!(token, None, "token {gone} was revoked");
                let last = issued.load(Ordering::SeqCst);
                let token = cached.get(Table::Tokens, &last.to_string());
                let may_be_gone = last == 0 || revoking.load(Ordering::SeqCst) >= last;
                assert!(token.is_some() || may_be_gone, "token {last} was issued");
                seen += u64::from(token.is_some());
            }
            seen
        };
        std::thread::scope(|scope| {
            let readers = [scope.spawn(reader), scope.spawn(reader)];
            for n in 1..=TOKENS {
                cached.put(Table::Tokens, &n.to_string(), "token");
                issued.store(n, Ordering::SeqCst);
                if n % 16 == 0 {
                    std::thread::yield_now();
                }
                revoking.store(n, Ordering::SeqCst);
                let mut writes = WriteSet::default();
                writes.remove(Table::Tokens, n.to_string());
                cached.commit(writes);
                revoked.store(n, Ordering::SeqCst);
            }
            let seen: u64 = readers.into_iter().map(|r| r.join().unwrap()).sum();
            assert!(seen > 0, "no reader has seen any token");
        });
    }
}
