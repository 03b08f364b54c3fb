//! Signing the head of a ledger that no gateway has open.

use std::path::{Path, PathBuf};

use super::ServeError;
use crate::auth::checkpoint_key::{CheckpointKey, public_path};
use crate::clock::now;
use crate::ledger::checkpoint::{Checkpoint, PublicKey};
use crate::ledger::{Ledger, OpenOptions};

/// Where the public half of the key that signs checkpoints lies.
pub fn public_key_path(data_dir: &Path) -> PathBuf {
    public_path(data_dir)
}

/// Signs the head of a data directory's ledger with its key, which is made when there is none.
///
/// # Errors
/// A gateway runs, the ledger cannot be read, or there is no key.
pub fn sign_checkpoint(data_dir: &Path, options: &OpenOptions) -> Result<Checkpoint, ServeError> {
    let ledger = Ledger::open_read_only(data_dir, options)?;
    let key = CheckpointKey::load_or_create(data_dir)?;
    let public = PublicKey::new(key.public());
    let made = Checkpoint::make(&ledger, now(), &public, |message| key.sign(message));
    made.map_err(|error| ServeError::Recover(error.into()))
}
