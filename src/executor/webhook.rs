//! Standard Webhooks: the secret and the signature of a message. Source: github.com/standard-webhooks/standard-webhooks,
//! `spec/standard-webhooks.md`: `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`.

use std::io;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use reqwest::RequestBuilder;
use reqwest::header::CONTENT_TYPE;
use secrecy::{ExposeSecret, SecretSlice};
use sha2::Sha256;

use super::ExecutorOptions;
use crate::clock::now;
use crate::domain::ids::RunId;
use crate::domain::time::Timestamp;
use crate::{private_file, random};

const PREFIX: &str = "whsec_";
/// What is made, and what the standard allows.
const KEY_BYTES: usize = 32;
const KEY_BYTES_ALLOWED: std::ops::RangeInclusive<usize> = 24..=64;

/// The key that signs callbacks. Its `Debug` does not show it.
#[derive(Clone, Debug)]
pub struct Secret {
    key: SecretSlice<u8>,
}

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("cannot use the webhook secret file {path}")]
    File { path: String, source: io::Error },
    #[error(
        "{path} holds no webhook secret, which reads whsec_ and the base64 of 24 to 64 bytes; delete it to get a new one"
    )]
    Damaged { path: String },
}

impl Secret {
    /// Whether [`Secret::load_or_create`] will have nothing to complain of in what is there; changes nothing.
    ///
    /// # Errors
    /// As `load_or_create`.
    pub fn check(data_dir: &Path) -> Result<(), SecretError> {
        let there = data_dir.join("auth").join("webhook-secret");
        match std::fs::symlink_metadata(there) {
            Ok(_) => Secret::load_or_create(data_dir).map(drop),
            // A missing one will be made; any other trouble is the ledger's to tell, which lies beside it.
            Err(_) => Ok(()),
        }
    }

    /// From `<data_dir>/auth/webhook-secret`, which is made (readable by its owner only) when it is missing.
    pub fn load_or_create(data_dir: &Path) -> Result<Secret, SecretError> {
        let path = data_dir.join("auth").join("webhook-secret");
        let shown = path.display().to_string();
        let file = |source| SecretError::File {
            path: shown.clone(),
            source,
        };
        let text = match private_file::read(&path).map_err(file)? {
            Some(text) => text,
            None => {
                let key = random::bytes::<KEY_BYTES>();
                let text = format!("{PREFIX}{}\n", STANDARD.encode(key));
                private_file::write(&path, text.as_bytes()).map_err(file)?;
                text
            }
        };
        Secret::parse(&text).ok_or(SecretError::Damaged { path: shown })
    }

    /// From `whsec_<base64>`.
    pub fn parse(text: &str) -> Option<Secret> {
        let key = STANDARD.decode(text.trim().strip_prefix(PREFIX)?).ok()?;
        let key = SecretSlice::from(key);
        KEY_BYTES_ALLOWED
            .contains(&key.expose_secret().len())
            .then_some(Secret { key })
    }

    /// The `webhook-signature` of a message.
    pub fn sign(&self, id: &str, timestamp_s: i64, body: &[u8]) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.key.expose_secret())
            .expect("HMAC takes keys of any length");
        mac.update(format!("{id}.{timestamp_s}.").as_bytes());
        mac.update(body);
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

/// What a message's headers say of it: those of CloudEvents in binary mode, so that the body's members stay at the top.
pub(super) struct CloudEvent {
    /// The same at each try.
    pub id: String,
    pub kind: &'static str,
    pub subject: Option<RunId>,
    pub time: Timestamp,
}

impl CloudEvent {
    /// The request with these headers and the signature of its body.
    pub(super) fn signed(
        &self,
        options: &ExecutorOptions,
        request: RequestBuilder,
        json: &[u8],
    ) -> RequestBuilder {
        let timestamp_s = now().0.div_euclid(1_000_000);
        let source = format!("urn:uuid:{}", options.ledger.hyphenated());
        let signature = options.secret.sign(&self.id, timestamp_s, json);
        let request = request
            .header(CONTENT_TYPE, "application/json")
            .header("webhook-signature", signature)
            .header("webhook-timestamp", timestamp_s)
            .header("webhook-id", &self.id)
            .header("ce-specversion", "1.0")
            .header("ce-id", &self.id)
            .header("ce-type", self.kind)
            .header("ce-source", source)
            .header("ce-time", self.time.to_string());
        match self.subject {
            Some(run) => request.header("ce-subject", run.to_string()),
            None => request,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// The example of the standard's own test suite.
    #[test]
    fn the_standards_example_signs_alike() {
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signed = secret.sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            br#"{"test": 2432232314}"#,
        );
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_secret_is_made_once_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let made = Secret::load_or_create(dir.path()).unwrap();
        let again = Secret::load_or_create(dir.path()).unwrap();
        assert_eq!(made.key.expose_secret(), again.key.expose_secret());
        let path = dir.path().join("auth/webhook-secret");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(format!("{made:?}").contains("REDACTED"), "{made:?}");
        fs::write(&path, "whsec_short").unwrap();
        let error = Secret::load_or_create(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("webhook-secret") && error.contains("delete it"),
            "{error}"
        );
    }
}
