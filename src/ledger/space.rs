//! Room on the ledger's disk. It is looked at about once a second, and what is written meanwhile is taken off, so that
//! growing writes can be refused while every other one still fits: a commit that fails ends the gateway.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How often it is looked.
const EVERY: Duration = Duration::from_secs(1);

/// What a byte appended may take on disk: itself, and pages that are written anew beside the old ones.
const BYTES_ON_DISK: u64 = 2;

/// Cloneable view of a disk's room.
#[derive(Clone, Debug)]
pub struct Space(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    reserve_bytes: u64,
    free_bytes: AtomicU64,
    /// What the log was told last.
    is_short: AtomicBool,
}

impl Space {
    /// Of the disk that holds `dir`, looked at once. `reserve_bytes` are to stay free; 0 for none.
    pub fn new(dir: &Path, reserve_bytes: u64) -> Space {
        let space = Space(Arc::new(Inner {
            dir: dir.to_path_buf(),
            reserve_bytes,
            free_bytes: AtomicU64::new(u64::MAX),
            is_short: AtomicBool::new(false),
        }));
        space.look();
        space
    }

    /// Whether less is free than the reserve.
    pub fn is_short(&self) -> bool {
        self.free_bytes() < self.0.reserve_bytes
    }

    pub fn free_bytes(&self) -> u64 {
        self.0.free_bytes.load(Ordering::Relaxed)
    }

    pub fn reserve_bytes(&self) -> u64 {
        self.0.reserve_bytes
    }

    /// Takes off what is about to be written.
    pub fn spend(&self, bytes: usize) {
        let bytes = (bytes as u64).saturating_mul(BYTES_ON_DISK);
        let less = |free: u64| Some(free.saturating_sub(bytes));
        let free = &self.0.free_bytes;
        // It never fails, as the closure never answers `None`.
        let _ = free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Looks how much is free.
    pub fn look(&self) {
        let free_bytes = match rustix::fs::statvfs(&self.0.dir) {
            Ok(volume) => volume.f_bavail.saturating_mul(volume.f_frsize),
            Err(error) => {
                tracing::warn!(%error, "the ledger's free disk space cannot be told");
                return;
            }
        };
        self.0.free_bytes.store(free_bytes, Ordering::Relaxed);
        metrics::gauge!("rungate_disk_free_bytes").set(free_bytes as f64);
        let is_short = self.is_short();
        if self.0.is_short.swap(is_short, Ordering::Relaxed) != is_short {
            let (free_mib, reserve_mib) = (free_bytes >> 20, self.0.reserve_bytes >> 20);
            match is_short {
                true => tracing::error!(
                    disk.free_mib = free_mib,
                    disk.reserve_mib = reserve_mib,
                    "the disk is nearly full: starts, progress and checkpoints are refused until there is room; \
                     free some, or lower min_free_bytes"
                ),
                false => tracing::info!(disk.free_mib = free_mib, "the disk has room again"),
            }
        }
    }

    /// Looks again and again. Runs until dropped.
    pub async fn keep_looking(self) {
        loop {
            tokio::time::sleep(EVERY).await;
            let space = self.clone();
            // A file system that hangs must not hold up the runtime.
            if tokio::task::spawn_blocking(move || space.look())
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_between_two_looks_counts() {
        let dir = tempfile::TempDir::new().unwrap();
        let free = Space::new(dir.path(), 0).free_bytes();
        assert!(free > 0 && free < u64::MAX);
        let space = Space::new(dir.path(), free / 2);
        assert!(!space.is_short());
        space.spend(usize::try_from(free / 4 + free / 8).unwrap());
        assert!(space.is_short());
        space.look();
        assert!(!space.is_short());
    }
}
