//! Opening and creating the file, and telling in one sentence why that is not possible. Nothing on disk
//! changes when it fails: a new file is made under another name and renamed when it is whole.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::{Bound, ControlFlow};
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Builder, DatabaseError, ReadOnlyDatabase, StorageBackend, StorageError};
use uuid::Uuid;

use super::batch::{self, Writer};
use super::counts::StatusCounts;
use super::error::{OpenError, ReadError, StoreError};
use super::expiry::KeyWalk;
use super::hub::Hub;
use super::redb_store::RedbStore;
use super::row_cache::RowCache;
use super::store::{Direction, Store, Table, WriteSet};
use super::{Inner, Ledger, keys, read};

/// The file within the data directory.
pub const FILE_NAME: &str = "ledger.redb";
/// A new ledger's name until it is whole.
const NEW_FILE_NAME: &str = "ledger.redb.new";
/// The format this program writes, and the only one it reads: tables, keys and projections together. Records outlive
/// it: an export of any format can be imported.
pub const FORMAT: u32 = 3;
/// Free space without which a gateway does not start: some seconds of work, and a snapshot.
const MIN_FREE_MIB: u64 = 16;
/// What every redb file begins with (redb, docs/design.md, "Database header").
const REDB_MAGIC: [u8; 9] = [b'r', b'e', b'd', b'b', 0x1A, 0x0A, 0xA9, 0x0D, 0x0A];

/// How to open a ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Bytes of pages kept in memory. Small, since the operating system caches the file as well and an
    /// idle gateway should be small.
    pub cache_bytes: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 16 << 20,
        }
    }
}

impl Ledger {
    /// Opens the ledger of a data directory for writing; makes both when missing.
    pub fn open(data_dir: &Path, options: &OpenOptions) -> Result<(Ledger, Writer), OpenError> {
        let path = data_dir.join(FILE_NAME);
        prepare(data_dir)?;
        if !path.try_exists().map_err(|error| io_error(&path, error))? {
            return create(data_dir, &path, options);
        }
        check_file(&path)?;
        // A first look that writes nothing: opening for writing would mark the file.
        match read_only(&path, options) {
            Ok(store) => check_format(&path, &store, false)?,
            Err(OpenError::NeedsRecovery { .. }) => {}
            Err(error) => return Err(error),
        }
        check_writable(&path)?;
        let database = guarded(&path, || builder(options).open(&path))?;
        finish(&path, RedbStore::Writable(database), false)
    }

    /// Opens an existing ledger for reading only, while no gateway has it.
    pub fn open_read_only(data_dir: &Path, options: &OpenOptions) -> Result<Ledger, OpenError> {
        let path = data_dir.join(FILE_NAME);
        if !path.try_exists().map_err(|error| io_error(&path, error))? {
            return Err(OpenError::Missing { path });
        }
        check_file(&path)?;
        let store = read_only(&path, options)?;
        check_format(&path, &store, false)?;
        Ok(finish(&path, store, false)?.0)
    }

    /// Opens a ledger on any storage, which tests use to simulate a disk.
    pub fn open_backend(
        backend: impl StorageBackend,
        options: &OpenOptions,
    ) -> Result<(Ledger, Writer), OpenError> {
        let path = PathBuf::from("<storage backend>");
        let database = guarded(&path, || builder(options).create_with_backend(backend))?;
        finish(&path, RedbStore::Writable(database), true)
    }
}

fn builder(options: &OpenOptions) -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(options.cache_bytes);
    builder
}

fn read_only(path: &Path, options: &OpenOptions) -> Result<RedbStore, OpenError> {
    let database: ReadOnlyDatabase = guarded(path, || builder(options).open_read_only(path))?;
    Ok(RedbStore::ReadOnly(database))
}

/// Makes the data directory when missing, and looks whether it can be written to at all.
fn prepare(data_dir: &Path) -> Result<(), OpenError> {
    let path = || data_dir.to_path_buf();
    match fs::metadata(data_dir) {
        Ok(metadata) if !metadata.is_dir() => {
            return Err(OpenError::NotADirectory { path: path() });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            use std::os::unix::fs::DirBuilderExt;
            let mut directory = fs::DirBuilder::new();
            directory.recursive(true).mode(0o700);
            directory
                .create(data_dir)
                .map_err(|error| io_error(data_dir, error))?;
        }
        Err(error) => return Err(io_error(data_dir, error)),
    }
    let volume = rustix::fs::statvfs(data_dir).map_err(|error| io_error(data_dir, error.into()))?;
    if volume
        .f_flag
        .contains(rustix::fs::StatVfsMountFlags::RDONLY)
    {
        return Err(OpenError::ReadOnly { path: path() });
    }
    let free_mib = volume.f_bavail.saturating_mul(volume.f_frsize) >> 20;
    if free_mib < MIN_FREE_MIB {
        return Err(OpenError::DiskFull {
            path: data_dir.join(FILE_NAME),
            free_mib,
            needed_mib: MIN_FREE_MIB,
        });
    }
    Ok(())
}

/// That it is a regular file and begins as a ledger does.
fn check_file(path: &Path) -> Result<(), OpenError> {
    let mut file = File::open(path).map_err(|error| io_error(path, error))?;
    let metadata = file.metadata().map_err(|error| io_error(path, error))?;
    let not_a_ledger = || OpenError::NotALedger {
        path: path.to_path_buf(),
    };
    if !metadata.is_file() {
        return Err(not_a_ledger());
    }
    let mut start = [0; REDB_MAGIC.len()];
    match file.read_exact(&mut start) {
        Ok(()) if start == REDB_MAGIC => Ok(()),
        Ok(()) => Err(not_a_ledger()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(OpenError::Damaged {
            path: path.to_path_buf(),
            detail: format!("it is cut short to {} bytes", metadata.len()),
        }),
        Err(error) => Err(io_error(path, error)),
    }
}

fn check_writable(path: &Path) -> Result<(), OpenError> {
    let file = File::options().read(true).write(true).open(path);
    file.map(drop).map_err(|error| io_error(path, error))
}

/// Makes a new ledger under another name, then renames it: a crash leaves none, or a whole one.
fn create(
    data_dir: &Path,
    path: &Path,
    options: &OpenOptions,
) -> Result<(Ledger, Writer), OpenError> {
    let new = data_dir.join(NEW_FILE_NAME);
    let made = guarded(&new, || builder(options).create(&new)).or_else(|error| match error {
        // Left over from a crash in this very place: nothing was ever acknowledged in it.
        OpenError::Damaged { .. } | OpenError::NotALedger { .. } => {
            fs::remove_file(&new).map_err(|error| io_error(&new, error))?;
            guarded(&new, || builder(options).create(&new))
        }
        error => Err(error),
    });
    let opened = made.and_then(|database| {
        let opened = finish(path, RedbStore::Writable(database), true)?;
        // Payloads are people's data: for the owner only, whatever the directory allows.
        let renamed = fs::set_permissions(&new, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&new, path))
            .and_then(|()| File::open(data_dir)?.sync_all());
        renamed.map_err(|error| io_error(path, error))?;
        Ok(opened)
    });
    if !matches!(opened, Ok(_) | Err(OpenError::Locked { .. })) {
        let _ = fs::remove_file(&new);
    }
    opened
}

/// Reads what an open ledger needs to know of itself; `initialise` writes it when it is not there yet.
fn finish(path: &Path, store: RedbStore, initialise: bool) -> Result<(Ledger, Writer), OpenError> {
    check_format(path, &store, initialise)?;
    let store_error = |error| store_error(path, error);
    let snapshot = store.snapshot().map_err(store_error)?;
    let mut instance = snapshot
        .get(Table::Meta, keys::META_INSTANCE)
        .map_err(store_error)?;
    if instance.is_none() && initialise {
        let fresh = Uuid::new_v4();
        let mut writes = WriteSet::default();
        writes.put(Table::Meta, keys::META_FORMAT, FORMAT.to_le_bytes());
        writes.put(Table::Meta, keys::META_INSTANCE, *fresh.as_bytes());
        store.commit(writes).map_err(store_error)?;
        instance = Some(fresh.as_bytes().to_vec());
    }
    let instance_id = instance.and_then(|bytes| Uuid::from_slice(&bytes).ok());
    let instance_id = instance_id.ok_or_else(|| OpenError::Damaged {
        path: path.to_path_buf(),
        detail: "its instance id is missing".into(),
    })?;
    let (seq, hash) = batch::tail(&*snapshot).map_err(|error| read_error(path, &error))?;
    let highest_run = read::highest_run(&*snapshot).map_err(|error| read_error(path, &error))?;
    drop(snapshot);
    let hub = Hub::start(seq).map_err(|error| io_error(path, error))?;
    let inner = Arc::new(Inner {
        store: Box::new(store),
        hub,
        counts: StatusCounts::default(),
        rows: RowCache::default(),
        instance_id,
        path: path.to_path_buf(),
    });
    let writer = Writer {
        inner: inner.clone(),
        next_seq: seq + 1,
        tail_hash: hash,
        highest_run,
        poisoned: false,
        // Until somebody has looked.
        purging: true,
        keys: KeyWalk::default(),
    };
    Ok((Ledger { inner }, writer))
}

/// That the ledger's format is one we know. A file without one is new, or none of ours.
fn check_format(path: &Path, store: &RedbStore, may_be_new: bool) -> Result<(), OpenError> {
    let store_error = |error| store_error(path, error);
    let snapshot = store.snapshot().map_err(store_error)?;
    let Some(format) = snapshot
        .get(Table::Meta, keys::META_FORMAT)
        .map_err(store_error)?
    else {
        let mut empty = true;
        let all = (Bound::Unbounded, Bound::Unbounded);
        let scanned = snapshot.scan(Table::Events, all, Direction::Up, &mut |_, _| {
            empty = false;
            ControlFlow::Break(())
        });
        scanned.map_err(store_error)?;
        return if may_be_new && empty {
            Ok(())
        } else {
            Err(OpenError::NotALedger {
                path: path.to_path_buf(),
            })
        };
    };
    let found = format.try_into().map(u32::from_le_bytes).unwrap_or(0);
    match found {
        FORMAT => Ok(()),
        0 => Err(OpenError::Damaged {
            path: path.to_path_buf(),
            detail: "its format version cannot be read".into(),
        }),
        1..FORMAT => Err(OpenError::OlderFormat {
            path: path.to_path_buf(),
            found,
        }),
        found => Err(OpenError::NewerFormat {
            path: path.to_path_buf(),
            found,
            known: FORMAT,
        }),
    }
}

/// Opens with redb, and takes a panic in it for the damage that it comes of.
fn guarded<T>(
    path: &Path,
    open: impl FnOnce() -> Result<T, DatabaseError>,
) -> Result<T, OpenError> {
    match catch_unwind(AssertUnwindSafe(open)) {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(error)) => Err(database_error(path, error)),
        Err(_) => Err(OpenError::Damaged {
            path: path.to_path_buf(),
            detail: "its structure makes no sense".into(),
        }),
    }
}

fn database_error(path: &Path, error: DatabaseError) -> OpenError {
    let path_buf = path.to_path_buf();
    match error {
        DatabaseError::DatabaseAlreadyOpen => OpenError::Locked { path: path_buf },
        DatabaseError::RepairAborted => OpenError::NeedsRecovery { path: path_buf },
        DatabaseError::UpgradeRequired(version) => OpenError::Damaged {
            path: path_buf,
            detail: format!("its file format {version} is none that this program wrote"),
        },
        DatabaseError::Storage(StorageError::Io(error)) => io_error(path, error),
        error => OpenError::Damaged {
            path: path_buf,
            detail: error.to_string(),
        },
    }
}

fn store_error(path: &Path, error: StoreError) -> OpenError {
    match error {
        StoreError::Io(error) => io_error(path, error),
        error => OpenError::Damaged {
            path: path.to_path_buf(),
            detail: error.to_string(),
        },
    }
}

fn read_error(path: &Path, error: &ReadError) -> OpenError {
    OpenError::Damaged {
        path: path.to_path_buf(),
        detail: error.to_string(),
    }
}

fn io_error(path: &Path, error: io::Error) -> OpenError {
    let path_buf = path.to_path_buf();
    match error.kind() {
        io::ErrorKind::PermissionDenied => OpenError::PermissionDenied { path: path_buf },
        io::ErrorKind::ReadOnlyFilesystem => OpenError::ReadOnly { path: path_buf },
        io::ErrorKind::NotADirectory => OpenError::NotADirectory { path: path_buf },
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => OpenError::DiskFull {
            path: path_buf,
            free_mib: 0,
            needed_mib: MIN_FREE_MIB,
        },
        io::ErrorKind::UnexpectedEof => OpenError::Damaged {
            path: path_buf,
            detail: "it is cut short".into(),
        },
        // redb's word for a file without its magic number.
        io::ErrorKind::InvalidData => OpenError::Damaged {
            path: path_buf,
            detail: error.to_string(),
        },
        _ => OpenError::Io {
            path: path_buf,
            source: error,
        },
    }
}
