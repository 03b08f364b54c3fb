//! The file of logins, `<data>/auth/logins.redb`: sessions of browsers and failed logins, hashes only. It is no part
//! of the ledger, since it is of no interest once it is over; losing it logs everybody out. One thread writes; what has
//! come in meanwhile goes to the disk with one sync.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use redb::{Builder, Database, ReadableDatabase, TableDefinition, TableError};
use tokio::sync::oneshot;

/// The file within `<data>/auth`.
const FILE_NAME: &str = "logins.redb";

/// Pages kept in memory: the file is small.
const CACHE_BYTES: usize = 1 << 20;

/// Changes that wait to be written at most; further ones wait for their turn.
const QUEUE: usize = 1_024;

/// Changes of one commit at most.
const BATCH: usize = 512;

/// A table. The name is part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Keyed hash of the session's secret → session.
    Sessions,
    /// (tenant, user, public id) → key of `Sessions`.
    SessionOwners,
    /// Key of `Sessions` → when it was last used.
    SessionUses,
    /// Keyed hash of an account or address → its failed logins.
    Failures,
    /// Keyed hash of an account and an address → when it last logged in from there.
    Familiar,
}

impl Table {
    fn definition(self) -> TableDefinition<'static, &'static [u8], &'static [u8]> {
        TableDefinition::new(match self {
            Table::Sessions => "sessions",
            Table::SessionOwners => "session_owners",
            Table::SessionUses => "session_uses",
            Table::Failures => "failures",
            Table::Familiar => "familiar",
        })
    }
}

/// A key and its value.
pub type Entry = (Vec<u8>, Vec<u8>);

/// What one commit changes.
type Changes = BTreeMap<Table, BTreeMap<Vec<u8>, Option<Vec<u8>>>>;

/// One entry of one table; `None` removes it.
pub struct Change {
    pub table: Table,
    pub key: Vec<u8>,
    pub value: Option<Vec<u8>>,
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot read or write {path}; check its permissions")]
    Io { path: PathBuf, source: io::Error },
    #[error("another process has {path} open; stop it first")]
    Locked { path: PathBuf },
    #[error(
        "{path} is damaged: {detail}; remove it, and everybody who is logged in with a browser logs in again"
    )]
    Damaged { path: PathBuf, detail: String },
}

/// Why something was not read or written. The log has the cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the file of logins: {0}")]
pub struct StoreError(pub String);

impl StoreError {
    fn of(error: impl Into<redb::Error>) -> StoreError {
        StoreError(error.into().to_string())
    }
}

/// Changes that belong together, and who waits for them to be on disk.
struct Job {
    changes: Vec<Change>,
    done: Option<oneshot::Sender<Result<(), StoreError>>>,
}

/// The open file. Cloneable; the writing thread ends with the last clone.
#[derive(Clone)]
pub struct LoginStore {
    database: Arc<Database>,
    jobs: Sender<Job>,
}

impl std::fmt::Debug for LoginStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LoginStore(..)")
    }
}

impl LoginStore {
    /// Opens the file, making it (0600) when there is none.
    pub fn open(data_dir: &Path) -> Result<LoginStore, OpenError> {
        let folder = data_dir.join("auth");
        let path = folder.join(FILE_NAME);
        let io = |source| OpenError::Io {
            path: path.clone(),
            source,
        };
        let mut directory = fs::DirBuilder::new();
        directory.recursive(true).mode(0o700);
        directory.create(&folder).map_err(io)?;
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600);
        let file = options.truncate(false).open(&path).map_err(io)?;
        let opened = Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create_file(file)
            .map_err(|error| open_error(&path, error))?;
        let database = Arc::new(opened);
        let (jobs, inbox) = crossbeam_channel::bounded(QUEUE);
        let written = Arc::clone(&database);
        std::thread::Builder::new()
            .name("logins".to_owned())
            .spawn(move || write_all(&written, &inbox))
            .map_err(io)?;
        Ok(LoginStore { database, jobs })
    }

    /// Writes changes, all or none; they are on disk when it returns.
    pub async fn write(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        let (done, written) = oneshot::channel();
        let job = Job {
            changes,
            done: Some(done),
        };
        self.submit(job).await?;
        let gone = StoreError("its thread has ended".to_owned());
        written.await.unwrap_or(Err(gone))
    }

    /// Writes changes without waiting for the disk; for what may get lost.
    pub fn write_later(&self, changes: Vec<Change>) {
        let job = Job {
            changes,
            done: None,
        };
        // A full queue has more important things in it.
        let _ = self.jobs.try_send(job);
    }

    async fn submit(&self, job: Job) -> Result<(), StoreError> {
        let Err(error) = self.jobs.try_send(job) else {
            return Ok(());
        };
        let (jobs, job) = (self.jobs.clone(), error.into_inner());
        let sent = tokio::task::spawn_blocking(move || jobs.send(job)).await;
        match sent {
            Ok(Ok(())) => Ok(()),
            _ => Err(StoreError("its thread has ended".to_owned())),
        }
    }

    /// One entry as it is on disk.
    pub fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let read = self.database.begin_read().map_err(StoreError::of)?;
        let open = match read.open_table(table.definition()) {
            Ok(open) => open,
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(StoreError::of(error)),
        };
        let found = open.get(key).map_err(StoreError::of)?;
        Ok(found.map(|value| value.value().to_vec()))
    }

    /// All entries whose keys begin with `prefix`, keys ascending.
    pub fn scan(&self, table: Table, prefix: &[u8]) -> Result<Vec<Entry>, StoreError> {
        let read = self.database.begin_read().map_err(StoreError::of)?;
        let open = match read.open_table(table.definition()) {
            Ok(open) => open,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(StoreError::of(error)),
        };
        let mut entries = Vec::new();
        for entry in open.range(prefix..).map_err(StoreError::of)? {
            let (key, value) = entry.map_err(StoreError::of)?;
            if !key.value().starts_with(prefix) {
                break;
            }
            entries.push((key.value().to_vec(), value.value().to_vec()));
        }
        Ok(entries)
    }
}

fn open_error(path: &Path, error: redb::DatabaseError) -> OpenError {
    let path = path.to_owned();
    match error {
        redb::DatabaseError::DatabaseAlreadyOpen => OpenError::Locked { path },
        redb::DatabaseError::Storage(redb::StorageError::Io(source))
            if source.kind() != io::ErrorKind::InvalidData =>
        {
            OpenError::Io { path, source }
        }
        error => OpenError::Damaged {
            path,
            detail: error.to_string(),
        },
    }
}

/// Writes what comes in, as much as there is with one commit, until nobody can send any more.
fn write_all(database: &Database, inbox: &Receiver<Job>) {
    while let Ok(first) = inbox.recv() {
        let mut jobs = vec![first];
        jobs.extend(inbox.try_iter().take(BATCH - 1));
        let mut tables = Changes::new();
        let mut waiting = Vec::new();
        for job in jobs {
            waiting.extend(job.done);
            for Change { table, key, value } in job.changes {
                tables.entry(table).or_default().insert(key, value);
            }
        }
        let written = commit(database, tables);
        if let Err(error) = &written {
            tracing::error!(%error, "logins could not be written");
        }
        for done in waiting {
            // Whoever asked has gone away.
            let _ = done.send(written.clone());
        }
    }
}

fn commit(database: &Database, tables: Changes) -> Result<(), StoreError> {
    let mut transaction = database.begin_write().map_err(StoreError::of)?;
    // As for the ledger: what outsiders send must not make half a commit look whole, nor a restart slow.
    transaction.set_two_phase_commit(true);
    transaction.set_quick_repair(true);
    for (table, changes) in tables {
        let mut open = transaction
            .open_table(table.definition())
            .map_err(StoreError::of)?;
        for (key, value) in changes {
            match value {
                Some(value) => drop(open.insert(&key[..], &value[..]).map_err(StoreError::of)?),
                None => drop(open.remove(&key[..]).map_err(StoreError::of)?),
            }
        }
    }
    transaction.commit().map_err(StoreError::of)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn change(key: &[u8], value: Option<&[u8]>) -> Change {
        Change {
            table: Table::Failures,
            key: key.to_vec(),
            value: value.map(<[u8]>::to_vec),
        }
    }

    #[tokio::test]
    async fn what_was_written_is_there_after_it_was_opened_again() {
        let data = tempfile::tempdir().unwrap();
        let store = LoginStore::open(data.path()).unwrap();
        let mode = fs::metadata(data.path().join("auth/logins.redb")).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, 0o600);
        assert_eq!(store.get(Table::Failures, b"a").unwrap(), None);
        let changes = vec![change(b"a1", Some(b"x")), change(b"a2", Some(b"y"))];
        store.write(changes).await.unwrap();
        store
            .write(vec![change(b"b", Some(b"z")), change(b"a1", None)])
            .await
            .unwrap();
        assert!(matches!(
            LoginStore::open(data.path()),
            Err(OpenError::Locked { .. })
        ));
        drop(store);
        // The thread lets go of the file when it has seen that nobody can send any more.
        let store = loop {
            match LoginStore::open(data.path()) {
                Err(OpenError::Locked { .. }) => std::thread::yield_now(),
                opened => break opened.unwrap(),
            }
        };
        let left = store.scan(Table::Failures, b"a").unwrap();
        assert_eq!(left, [(b"a2".to_vec(), b"y".to_vec())]);
    }

    #[test]
    fn a_damaged_file_is_named_with_the_remedy() {
        let data = tempfile::tempdir().unwrap();
        fs::create_dir(data.path().join("auth")).unwrap();
        fs::write(data.path().join("auth/logins.redb"), vec![7; 8_192]).unwrap();
        let error = LoginStore::open(data.path()).unwrap_err().to_string();
        assert!(
            error.contains("logins.redb") && error.contains("remove it"),
            "{error}"
        );
    }
}
