//! The gateway's signing keys (Ed25519): one signs, the ones before it verify until the last token that they
//! signed has expired. They lie in a file that only its owner reads, and are in no ledger.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::{DecodingKey, EncodingKey};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::LEEWAY_S;
use crate::domain::time::Timestamp;
use crate::private_file;

/// Earlier keys that are kept at most. Who rotates more often than that within the life of a token wants the oldest
/// gone; the file stays small.
const MAX_RETIRED: usize = 8;

/// Format of the file; another one is refused rather than overwritten.
const VERSION: u32 = 1;

/// A key pair. Its secret half is never shown: the type has no `Debug`.
pub struct Key {
    pub kid: String,
    pub signing: EncodingKey,
    pub verifying: DecodingKey,
    public: Vec<u8>,
    pkcs8: Vec<u8>,
    created_at: Timestamp,
    /// When the last token that it signed expires, in seconds since the epoch.
    needed_until_s: AtomicU64,
}

impl Key {
    fn generate(now: Timestamp) -> Result<Key, SigningKeysError> {
        let pair = Ed25519KeyPair::generate().map_err(|_| SigningKeysError::Random)?;
        let pkcs8 = pair.to_pkcs8().map_err(|_| SigningKeysError::Random)?;
        Key::read(pkcs8.as_ref(), now, 0).ok_or(SigningKeysError::Random)
    }

    fn read(pkcs8: &[u8], created_at: Timestamp, needed_until_s: u64) -> Option<Key> {
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8).ok()?;
        let public = pair.public_key().as_ref().to_vec();
        Some(Key {
            kid: blake3::hash(&public).to_hex()[..16].to_owned(),
            signing: EncodingKey::from_ed_der(pkcs8),
            verifying: DecodingKey::from_ed_der(&public),
            public,
            pkcs8: pkcs8.to_vec(),
            created_at,
            needed_until_s: AtomicU64::new(needed_until_s),
        })
    }

    /// It is about to sign a token that lasts until then.
    pub fn need_until(&self, expires_at_s: u64) {
        self.needed_until_s
            .fetch_max(expires_at_s, Ordering::Relaxed);
    }

    fn is_needed(&self, now: Timestamp) -> bool {
        let until = self.needed_until_s.load(Ordering::Relaxed);
        until.saturating_add(LEEWAY_S) >= seconds(now)
    }

    fn stored(&self) -> Stored {
        Stored {
            created_at_us: self.created_at.0,
            needed_until_s: self.needed_until_s.load(Ordering::Relaxed),
            pkcs8: STANDARD.encode(&self.pkcs8),
        }
    }
}

/// Whole seconds since the epoch, as JWTs count.
pub fn seconds(at: Timestamp) -> u64 {
    u64::try_from(at.0 / 1_000_000).unwrap_or(0)
}

/// The file.
#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    /// The one that signs comes first.
    keys: Vec<Stored>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    created_at_us: i64,
    needed_until_s: u64,
    pkcs8: String,
}

/// The keys at one time.
struct Ring {
    active: Arc<Key>,
    /// The youngest first.
    retired: Vec<Arc<Key>>,
}

impl Ring {
    fn all(&self) -> impl Iterator<Item = &Arc<Key>> {
        std::iter::once(&self.active).chain(&self.retired)
    }
}

/// Why there is no key to sign with.
#[derive(Debug, thiserror::Error)]
pub enum SigningKeysError {
    #[error("cannot read or write the signing keys, {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} holds no signing keys; remove it to get a new one at the next start")]
    Malformed { path: PathBuf },
    #[error("the operating system gave no randomness for a signing key")]
    Random,
}

/// Cloneable.
#[derive(Clone)]
pub struct SigningKeys(Arc<Inner>);

struct Inner {
    path: PathBuf,
    ring: RwLock<Arc<Ring>>,
    /// Held while the keys change.
    changing: Mutex<()>,
}

impl SigningKeys {
    /// Reads `<data>/auth/signing-keys`, making it (0600) with one key when there is none.
    ///
    /// # Errors
    /// The file cannot be read or written, or is none of ours.
    pub fn load_or_create(data_dir: &Path, now: Timestamp) -> Result<Self, SigningKeysError> {
        let path = data_dir.join("auth").join("signing-keys");
        let text = private_file::read(&path).map_err(|source| SigningKeysError::Io {
            path: path.clone(),
            source,
        })?;
        let ring = match text {
            Some(text) => {
                parse(&text).ok_or_else(|| SigningKeysError::Malformed { path: path.clone() })?
            }
            None => {
                let active = Arc::new(Key::generate(now)?);
                let ring = Ring {
                    active,
                    retired: Vec::new(),
                };
                write(&path, &ring)?;
                ring
            }
        };
        Ok(Self(Arc::new(Inner {
            path,
            ring: RwLock::new(Arc::new(ring)),
            changing: Mutex::new(()),
        })))
    }

    /// The key that signs.
    pub fn active(&self) -> Arc<Key> {
        self.ring().active.clone()
    }

    /// The key of that id, if tokens of it may still be good.
    pub fn find(&self, kid: &str, now: Timestamp) -> Option<Arc<Key>> {
        let ring = self.ring();
        let found = ring.all().find(|key| key.kid == kid)?;
        (found.kid == ring.active.kid || found.is_needed(now)).then(|| found.clone())
    }

    /// The public halves as a JWK set (RFC 7517, RFC 8037), the one that signs first.
    pub fn jwks(&self, now: Timestamp) -> Value {
        let ring = self.ring();
        let retired = ring.retired.iter().filter(|key| key.is_needed(now));
        let keys: Vec<Value> = std::iter::once(&ring.active)
            .chain(retired)
            .map(|key| {
                json!({
                    "kty": "OKP",
                    "crv": "Ed25519",
                    "use": "sig",
                    "alg": "EdDSA",
                    "kid": key.kid,
                    "x": URL_SAFE_NO_PAD.encode(&key.public),
                })
            })
            .collect();
        json!({ "keys": keys })
    }

    /// Whether the key that signs is that old.
    pub fn is_older_than(&self, age_ms: u64, now: Timestamp) -> bool {
        now.millis_since(self.ring().active.created_at) >= age_ms
    }

    /// Signs with a new key from now on; its id. On disk before it is used. Blocks on the disk.
    ///
    /// # Errors
    /// Nothing has changed.
    pub fn rotate(&self, now: Timestamp) -> Result<String, SigningKeysError> {
        let _changing = self
            .0
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let old = self.ring();
        let active = Arc::new(Key::generate(now)?);
        // The last one stays in any case: a token that it signs at this very moment will need it.
        let earlier = old.retired.iter().filter(|key| key.is_needed(now));
        let earlier = std::iter::once(&old.active).chain(earlier);
        let ring = Ring {
            retired: earlier.take(MAX_RETIRED).cloned().collect(),
            active,
        };
        write(&self.0.path, &ring)?;
        let kid = ring.active.kid.clone();
        *self.0.ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
        Ok(kid)
    }

    fn ring(&self) -> Arc<Ring> {
        // It is only ever replaced whole, so a panic elsewhere cannot have torn it.
        let ring = self.0.ring.read().unwrap_or_else(PoisonError::into_inner);
        ring.clone()
    }
}

fn parse(text: &str) -> Option<Ring> {
    let file: File = serde_json::from_str(text).ok()?;
    if file.version != VERSION {
        return None;
    }
    let read = |stored: &Stored| {
        let pkcs8 = STANDARD.decode(&stored.pkcs8).ok()?;
        let created_at = Timestamp(stored.created_at_us);
        Key::read(&pkcs8, created_at, stored.needed_until_s).map(Arc::new)
    };
    let keys: Option<Vec<_>> = file.keys.iter().map(read).collect();
    let mut keys = keys?.into_iter();
    Some(Ring {
        active: keys.next()?,
        retired: keys.collect(),
    })
}

fn write(path: &Path, ring: &Ring) -> Result<(), SigningKeysError> {
    let file = File {
        version: VERSION,
        keys: ring.all().map(|key| key.stored()).collect(),
    };
    let failed = |source| SigningKeysError::Io {
        path: path.to_owned(),
        source,
    };
    let text = serde_json::to_string(&file).map_err(|error| failed(io::Error::other(error)))?;
    private_file::write(path, text.as_bytes()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    #[test]
    fn an_earlier_key_verifies_until_its_last_token_has_expired() {
        let data = tempfile::tempdir().unwrap();
        let keys = SigningKeys::load_or_create(data.path(), NOW).unwrap();
        let mode = std::fs::metadata(data.path().join("auth/signing-keys"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let first = keys.active();
        first.need_until(seconds(NOW) + 60);
        let kid = keys.rotate(NOW).unwrap();
        assert_ne!(kid, first.kid);
        assert!(keys.find(&first.kid, NOW + 60_000).is_some());
        assert!(keys.find(&first.kid, NOW + 66_000).is_none());
        assert_eq!(keys.jwks(NOW)["keys"].as_array().unwrap().len(), 2);
        let late = keys.jwks(NOW + 66_000);
        assert_eq!(late["keys"].as_array().unwrap().len(), 1);
        assert!(!keys.jwks(NOW).to_string().contains("\"d\""));

        let again = SigningKeys::load_or_create(data.path(), NOW).unwrap();
        assert_eq!(again.active().kid, kid);
        assert!(again.find(&first.kid, NOW).is_some());
        assert!(again.is_older_than(1_000, NOW + 1_000));
        assert!(!again.is_older_than(1_001, NOW + 1_000));
    }

    #[test]
    fn keys_do_not_pile_up_and_a_damaged_file_is_refused() {
        let data = tempfile::tempdir().unwrap();
        let keys = SigningKeys::load_or_create(data.path(), NOW).unwrap();
        for _ in 0..20 {
            keys.active().need_until(seconds(NOW) + 60);
            keys.rotate(NOW).unwrap();
        }
        let listed = keys.jwks(NOW)["keys"].as_array().unwrap().len();
        assert_eq!(listed, 1 + MAX_RETIRED);
        // The whole file is read back.
        let again = SigningKeys::load_or_create(data.path(), NOW).unwrap();
        assert_eq!(again.jwks(NOW), keys.jwks(NOW));
        std::fs::write(data.path().join("auth/signing-keys"), "{}").unwrap();
        let error = SigningKeys::load_or_create(data.path(), NOW).err().unwrap();
        assert!(matches!(error, SigningKeysError::Malformed { .. }));
    }
}
