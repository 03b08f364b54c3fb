//! What can go wrong with the ledger: one enum per operation. `Display` is one sentence that names the
//! file and the remedy, fit for the operator's terminal.

use std::io;
use std::path::PathBuf;

use crate::domain::ids::Seq;

/// Why the ledger could not be opened. Nothing was changed on disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{path} is in use by another process; stop that gateway or choose another --data-dir")]
    Locked { path: PathBuf },
    #[error(
        "{path} has ledger format {found} and this program knows formats up to {known}; start it with a newer rungate"
    )]
    NewerFormat {
        path: PathBuf,
        found: u32,
        known: u32,
    },
    #[error(
        "{path} has ledger format {found}, which this program does not read any more; export it with the rungate that wrote it and import that (rungate ledger export, import)"
    )]
    OlderFormat { path: PathBuf, found: u32 },
    #[error("{path} is not a rungate ledger; move it away or choose another --data-dir")]
    NotALedger { path: PathBuf },
    #[error(
        "{path} is damaged ({detail}); restore it from a backup, or rebuild it with `rungate ledger import` from an export"
    )]
    Damaged { path: PathBuf, detail: String },
    #[error(
        "no space left for {path}: {free_mib} MiB free, at least {needed_mib} MiB needed; free some space and start again"
    )]
    DiskFull {
        path: PathBuf,
        free_mib: u64,
        needed_mib: u64,
    },
    #[error(
        "{path} lies on a read-only file system; mount it writable or choose another --data-dir"
    )]
    ReadOnly { path: PathBuf },
    #[error(
        "no permission to read and write {path}; give it to the user that runs rungate or choose another --data-dir"
    )]
    PermissionDenied { path: PathBuf },
    #[error("{path} is not a directory; choose another --data-dir")]
    NotADirectory { path: PathBuf },
    #[error("there is no ledger at {path}; check --data-dir")]
    Missing { path: PathBuf },
    /// Only when opened for reading: the file has to be repaired by a writer first.
    #[error(
        "{path} was not closed in good order and needs recovery; start and stop the gateway on it once"
    )]
    NeedsRecovery { path: PathBuf },
    /// Import wants an empty ledger.
    #[error("{path} exists already; import needs a data directory without a ledger")]
    AlreadyExists { path: PathBuf },
    #[error("cannot open {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// Why a read failed. The caller cannot mend it; it is logged and answered as an internal error.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("ledger record {seq} is damaged: {detail}")]
    BadRecord { seq: Seq, detail: String },
    #[error("the ledger's {table} table holds a damaged entry: {detail}")]
    BadEntry { table: &'static str, detail: String },
    #[error("the ledger cannot be read: {0}")]
    Store(#[from] StoreError),
    /// The ledger was closed, or its runtime is going down.
    #[error("the ledger is closed")]
    Closed,
}

/// Why nothing was committed. After any of them but `PayloadTooLarge` the writer refuses further work:
/// the process must stop, since what it would decide next might not be what the disk has.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    #[error("the ledger's disk is full; free some space and start again")]
    DiskFull(#[source] StoreError),
    #[error("the ledger could not be written")]
    Store(#[source] StoreError),
    #[error("the ledger could not be read while writing")]
    Read(#[from] ReadError),
    #[error("an earlier commit failed; start the gateway again")]
    Poisoned,
    #[error("a payload of {size_bytes} bytes is over the limit of {limit_bytes}")]
    PayloadTooLarge {
        size_bytes: usize,
        limit_bytes: usize,
    },
}

impl From<StoreError> for CommitError {
    fn from(error: StoreError) -> Self {
        if error.is_disk_full() {
            CommitError::DiskFull(error)
        } else {
            CommitError::Store(error)
        }
    }
}

/// What a store reports, whatever it is made of.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("input or output failed: {0}")]
    Io(#[source] io::Error),
    #[error("the file is damaged: {0}")]
    Corrupted(String),
    #[error("an earlier input or output error closed the store")]
    Failed,
    #[error("{0}")]
    Other(String),
}

impl StoreError {
    /// Whether the medium had no room.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, StoreError::Io(error)
            if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}
