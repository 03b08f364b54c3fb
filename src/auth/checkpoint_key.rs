//! The key that signs the ledger's checkpoints: Ed25519, made at the first need, kept in a file that only its owner
//! reads, with its public half beside it for whoever checks them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use secrecy::{ExposeSecret, SecretString};

use crate::{hex, private_file, random};

/// The key. Its `Debug` does not show it.
#[derive(Clone, Debug)]
pub struct CheckpointKey(Arc<Ed25519KeyPair>);

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointKeyError {
    #[error("cannot read or write the key of the ledger's checkpoints, {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{path} holds no key (64 hexadecimal digits); put the right one back, or remove it to get a new one"
    )]
    Malformed { path: PathBuf },
    #[error("the operating system gives no randomness")]
    NotMade,
}

/// Where the public half lies.
pub fn public_path(data_dir: &Path) -> PathBuf {
    data_dir.join("auth").join("checkpoint-key.pub")
}

impl CheckpointKey {
    /// Reads `<data>/auth/checkpoint-key`, making it (0600) when there is none.
    pub fn load_or_create(data_dir: &Path) -> Result<CheckpointKey, CheckpointKeyError> {
        let path = data_dir.join("auth").join("checkpoint-key");
        let failed = |source| CheckpointKeyError::Io {
            path: path.clone(),
            source,
        };
        let text = match private_file::read(&path).map_err(failed)? {
            Some(text) => SecretString::from(text),
            None => {
                let text = fresh();
                private_file::write(&path, text.expose_secret().as_bytes()).map_err(failed)?;
                text
            }
        };
        let key = CheckpointKey::parse(&text);
        let key = key.ok_or_else(|| CheckpointKeyError::Malformed { path: path.clone() })?;
        let (public, text) = (public_path(data_dir), line(&key.public()));
        if std::fs::read_to_string(&public).ok().as_deref() != Some(&text) {
            private_file::write(&public, text.as_bytes()).map_err(failed)?;
        }
        Ok(key)
    }

    /// A key that nothing keeps.
    pub fn random() -> Result<CheckpointKey, CheckpointKeyError> {
        CheckpointKey::parse(&fresh()).ok_or(CheckpointKeyError::NotMade)
    }

    /// Its public half.
    pub fn public(&self) -> [u8; 32] {
        let bytes = self.0.public_key().as_ref().try_into();
        bytes.expect("an Ed25519 public key has 32 bytes")
    }

    /// Signs.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(message).as_ref().to_vec()
    }

    fn parse(text: &SecretString) -> Option<CheckpointKey> {
        let seed = hex::decode(text.expose_secret().trim())?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).ok()?;
        Some(CheckpointKey(Arc::new(pair)))
    }
}

/// A new key, as its file has it.
fn fresh() -> SecretString {
    SecretString::from(line(&random::bytes::<32>()))
}

/// As a key's file has it.
fn line(bytes: &[u8]) -> String {
    format!("{}\n", hex::encode(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_key_is_kept_and_only_its_owner_reads_it() {
        let data = tempfile::tempdir().unwrap();
        let first = CheckpointKey::load_or_create(data.path()).unwrap();
        let again = CheckpointKey::load_or_create(data.path()).unwrap();
        assert_eq!(first.public(), again.public());
        assert_eq!(first.sign(b"x"), again.sign(b"x"));
        let file = data.path().join("auth/checkpoint-key");
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let secret = std::fs::read_to_string(&file).unwrap();
        assert!(!format!("{first:?}").contains(secret.trim()));
        std::fs::write(&file, "no key").unwrap();
        let error = CheckpointKey::load_or_create(data.path()).err().unwrap();
        assert!(matches!(error, CheckpointKeyError::Malformed { .. }));
    }
}
