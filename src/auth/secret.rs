//! What is kept of tokens: hashes keyed with the gateway's token key, and how imported slow hashes are checked.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretBox, SecretString};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::domain::identity::TokenHash;
use crate::{hex, private_file, random};

/// The key of all token hashes. Without its file no token but the first administrator's is known any more.
#[derive(Clone)]
pub struct TokenKey(Arc<SecretBox<[u8; 32]>>);

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum TokenKeyError {
    #[error("cannot read or write the key of the tokens' hashes, {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} holds no key (64 hexadecimal digits); put the right one back from a backup")]
    Malformed { path: PathBuf },
}

impl TokenKey {
    /// Reads `<data>/auth/token-key`, making it (0600) when there is none.
    pub fn load_or_create(data_dir: &Path) -> Result<TokenKey, TokenKeyError> {
        let path = data_dir.join("auth").join("token-key");
        let failed = |source| TokenKeyError::Io {
            path: path.clone(),
            source,
        };
        if let Some(text) = private_file::read(&path).map_err(failed)? {
            let text = SecretString::from(text);
            let key =
                hex::decode(text.expose_secret().trim()).and_then(|bytes| bytes.try_into().ok());
            let key: [u8; 32] = key.ok_or(TokenKeyError::Malformed { path })?;
            return Ok(TokenKey::new(key));
        }
        let key = TokenKey::random();
        let text = hex::encode(key.0.expose_secret());
        let line = SecretString::from(format!("{text}\n"));
        private_file::write(&path, line.expose_secret().as_bytes()).map_err(failed)?;
        Ok(key)
    }

    fn new(key: [u8; 32]) -> TokenKey {
        TokenKey(Arc::new(SecretBox::new(Box::new(key))))
    }

    /// A key that nothing keeps.
    pub fn random() -> TokenKey {
        TokenKey::new(random::bytes())
    }

    /// A key for something else, which tells nothing of this one.
    pub fn derive(&self, context: &str) -> [u8; 32] {
        blake3::derive_key(context, &self.0.expose_secret()[..])
    }

    /// The keyed hash of a token.
    pub fn digest(&self, token: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(self.0.expose_secret(), token).as_bytes()
    }
}

/// The first bytes of a token's SHA-256, by which an imported one is found.
pub fn fingerprint(token: &[u8]) -> [u8; 6] {
    let mut first = [0; 6];
    first.copy_from_slice(&Sha256::digest(token)[..6]);
    first
}

/// Fewest and most rounds of an imported hash: fewer are no protection, more are an attack on us.
const ITERATIONS: std::ops::RangeInclusive<u32> = 1_000..=2_000_000;

/// Longest salt.
const MAX_SALT_BYTES: usize = 64;

/// Reads `pbkdf2_sha256$<iterations>$<salt, hex>$<digest, hex>` and the first 12 hex digits of the token's
/// SHA-256; `None` when they are none.
pub fn parse_imported(hash: &str, fingerprint: &str) -> Option<TokenHash> {
    let mut parts = hash.split('$');
    if parts.next()? != "pbkdf2_sha256" {
        return None;
    }
    let iterations = parts
        .next()?
        .parse()
        .ok()
        .filter(|n| ITERATIONS.contains(n))?;
    let salt = hex::decode(parts.next()?)?;
    let digest = hex::decode(parts.next()?)?.try_into().ok()?;
    let fingerprint = hex::decode(fingerprint)?.try_into().ok()?;
    if parts.next().is_some() || salt.len() > MAX_SALT_BYTES {
        return None;
    }
    Some(TokenHash::Pbkdf2 {
        iterations,
        salt,
        digest,
        fingerprint,
    })
}

/// Whether a token has this slow hash. Takes tenths of a second, so it is done off the runtime.
pub fn fits_imported(token: &[u8], hash: &TokenHash) -> bool {
    match hash {
        TokenHash::Keyed(_) => false,
        TokenHash::Pbkdf2 {
            iterations,
            salt,
            digest,
            ..
        } => pbkdf2(token, salt, *iterations).ct_eq(digest).into(),
    }
}

/// The first block of PBKDF2-HMAC-SHA256 (RFC 8018 section 5.2), which is the whole of a 32-byte key.
fn pbkdf2(password: &[u8], salt: &[u8], iterations: u32) -> [u8; 32] {
    let keyed = Hmac::<Sha256>::new_from_slice(password).expect("HMAC takes a key of any length");
    let mut mac = keyed.clone();
    mac.update(salt);
    mac.update(&1u32.to_be_bytes());
    let mut last: [u8; 32] = mac.finalize().into_bytes().into();
    let mut sum = last;
    for _ in 1..iterations {
        let mut mac = keyed.clone();
        mac.update(&last);
        last = mac.finalize().into_bytes().into();
        for (sum, byte) in sum.iter_mut().zip(last) {
            *sum ^= byte;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pbkdf2_is_the_standard_one() {
        // RFC 7914 section 11, the first 32 bytes.
        let expected = "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc";
        assert_eq!(
            pbkdf2(b"passwd", b"salt", 1).to_vec(),
            hex::decode(expected).unwrap()
        );
    }

    #[test]
    fn an_imported_hash_is_read_and_fits_its_token_only() {
        // Made by Python's hashlib.pbkdf2_hmac with 1000 rounds.
        let digest = "6f0626067f2424b62001fa998d7fd1583b3947784c0e1ab81145b654c2ccc8bd";
        let hash = format!("pbkdf2_sha256$1000$73616c74${digest}");
        let parsed = parse_imported(&hash, "0123456789ab").unwrap();
        assert!(fits_imported(b"agw_x", &parsed));
        assert!(!fits_imported(b"agw_y", &parsed));
        for bad in [
            "",
            "pbkdf2_sha256$1$00$00",
            "md5$1000$00$00",
            &format!("{hash}$"),
        ] {
            assert!(parse_imported(bad, "0123456789ab").is_none(), "{bad}");
        }
        assert!(parse_imported(&hash, "").is_none());
    }

    #[test]
    fn the_key_is_kept() {
        let data = tempfile::tempdir().unwrap();
        let first = TokenKey::load_or_create(data.path()).unwrap().digest(b"t");
        assert_eq!(
            TokenKey::load_or_create(data.path()).unwrap().digest(b"t"),
            first
        );
        assert_ne!(TokenKey::random().digest(b"t"), first);
    }
}
