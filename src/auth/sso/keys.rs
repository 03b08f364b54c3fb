//! The keys of an issuer: fetched when a token needs them, kept, and fetched again when they are old or a token
//! names one that is not there. However many tokens are shown, only so many fetches are made.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde_json::Value;
use tokio::sync::{Mutex, Semaphore};

use crate::causes::with_causes;
use crate::outbound::GuardedClient;

/// How long keys are used without asking whether they still are the issuer's.
const FRESH: Duration = Duration::from_secs(600);

/// How long they are used while the issuer does not answer. A key that was withdrawn is good for no longer.
const STALE: Duration = Duration::from_secs(24 * 3_600);

/// How long a request waits for the renewal of a key that is there.
const RENEWAL_WAIT: Duration = Duration::from_secs(2);

/// Fetches at once, and how long until one more is allowed. A rotation is seen at once; a flood of made-up key
/// ids costs the issuer a fetch now and then, each of which is as good as any.
const BURST: u32 = 3;
const REFILL: Duration = Duration::from_secs(30);

/// Requests that wait for a slow issuer at most; further ones are told to come again.
const MAX_WAITING: usize = 64;

/// Largest answer that is read.
const MAX_ANSWER_BYTES: usize = 256 << 10;

/// Most keys of an issuer.
const MAX_KEYS: usize = 64;

/// No key is known and none can be had.
#[derive(Debug, thiserror::Error)]
#[error("the keys of the single sign-on issuer cannot be had")]
pub struct KeysUnavailable;

/// A public key of the issuer.
pub(super) struct IssuerKey {
    pub verifying: DecodingKey,
    /// The one it is for, when the issuer says so.
    algorithm: Option<Algorithm>,
}

impl IssuerKey {
    /// Whether it may verify signatures of an algorithm.
    pub fn fits(&self, algorithm: Algorithm) -> bool {
        self.verifying.family() == algorithm.family()
            && self.algorithm.is_none_or(|only| only == algorithm)
    }
}

/// What was fetched last.
#[derive(Default)]
struct Known {
    keys: HashMap<String, Arc<IssuerKey>>,
    fetched_at: Option<Instant>,
}

impl Known {
    fn age(&self) -> Duration {
        self.fetched_at.map_or(Duration::MAX, |at| at.elapsed())
    }
}

/// How many more fetches may be made.
struct Budget {
    left: u32,
    refilled_at: Instant,
}

impl Budget {
    fn take(&mut self) -> bool {
        let gained = self.refilled_at.elapsed().as_secs() / REFILL.as_secs();
        if gained > 0 {
            self.left = self
                .left
                .saturating_add(u32::try_from(gained).unwrap_or(BURST))
                .min(BURST);
            self.refilled_at = Instant::now();
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

pub(super) struct IssuerKeys {
    client: GuardedClient,
    issuer: String,
    jwks_url: Option<String>,
    known: RwLock<Arc<Known>>,
    /// Held during a fetch: there is one at a time.
    budget: Mutex<Budget>,
    /// Requests that wait for a fetch.
    waiting: Semaphore,
    /// Counts the fetches: who waited for one need not make another.
    tries: AtomicU64,
}

impl IssuerKeys {
    /// From `jwks_url`, or from where the issuer's own document says (OpenID Connect Discovery 1.0).
    pub fn new(client: GuardedClient, issuer: String, jwks_url: Option<String>) -> Self {
        Self {
            client,
            issuer,
            jwks_url,
            known: RwLock::default(),
            budget: Mutex::new(Budget {
                left: BURST,
                refilled_at: Instant::now(),
            }),
            waiting: Semaphore::new(MAX_WAITING),
            tries: AtomicU64::new(0),
        }
    }

    /// The key of that id; `None` when the issuer has none.
    ///
    /// # Errors
    /// Nothing is known of the issuer's keys, or too many wait for them.
    pub async fn find(&self, kid: &str) -> Result<Option<Arc<IssuerKey>>, KeysUnavailable> {
        let known = self.known();
        let found = known.keys.get(kid).filter(|_| known.age() < STALE);
        match found {
            Some(key) if known.age() < FRESH => return Ok(Some(key.clone())),
            // Old, yet good while another asks, or while the issuer thinks.
            Some(key) if self.budget.try_lock().is_err() => return Ok(Some(key.clone())),
            Some(_) => {
                // Past that, the old one does.
                let _ = tokio::time::timeout(RENEWAL_WAIT, self.refresh()).await;
            }
            None => {
                let _place = self.waiting.try_acquire().map_err(|_| KeysUnavailable)?;
                self.refresh().await;
            }
        }
        let known = self.known();
        if known.age() >= STALE {
            return Err(KeysUnavailable);
        }
        Ok(known.keys.get(kid).cloned())
    }

    fn known(&self) -> Arc<Known> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.clone()
    }

    /// Fetches the keys, unless somebody has just tried or too many have.
    async fn refresh(&self) {
        let tries = self.tries.load(Ordering::Acquire);
        let mut budget = self.budget.lock().await;
        if self.tries.load(Ordering::Acquire) != tries || !budget.take() {
            return;
        }
        let fetched = self.fetch().await;
        self.tries.fetch_add(1, Ordering::AcqRel);
        let result = if fetched.is_ok() { "ok" } else { "failed" };
        metrics::counter!("rungate_sso_key_fetches_total", "result" => result).increment(1);
        match fetched {
            Ok(keys) => {
                let known = Known {
                    keys,
                    fetched_at: Some(Instant::now()),
                };
                *self.known.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(known);
            }
            Err(error) => {
                tracing::warn!(
                    issuer = self.issuer,
                    error,
                    "the keys of the issuer cannot be had"
                );
            }
        }
    }

    async fn fetch(&self) -> Result<HashMap<String, Arc<IssuerKey>>, String> {
        let url = match &self.jwks_url {
            Some(url) => url.clone(),
            None => self.discover().await?,
        };
        Ok(read_keys(&self.get(&url).await?))
    }

    /// The address of the keys, from a document that must be about this very issuer.
    async fn discover(&self) -> Result<String, String> {
        let base = self.issuer.trim_end_matches('/');
        let document = self
            .get(&format!("{base}/.well-known/openid-configuration"))
            .await?;
        if document["issuer"].as_str() != Some(&self.issuer) {
            return Err("its discovery document is about another issuer".to_owned());
        }
        let url = document["jwks_uri"].as_str().unwrap_or_default();
        // No weaker than the issuer itself.
        if self.issuer.starts_with("https://") && !url.starts_with("https://") {
            return Err("its discovery document names no https address for its keys".to_owned());
        }
        Ok(url.to_owned())
    }

    async fn get(&self, url: &str) -> Result<Value, String> {
        let request = self
            .client
            .get(url)
            .map_err(|refused| format!("{url}: {refused}"))?;
        let request = request.header(http::header::ACCEPT, "application/json");
        let mut response = request.send().await.map_err(|error| with_causes(&error))?;
        let status = response.status();
        if status != http::StatusCode::OK {
            return Err(format!("{url} answered {}", status.as_u16()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| with_causes(&error))?
        {
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(format!("{url} answered more than {MAX_ANSWER_BYTES} bytes"));
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body).map_err(|error| format!("{url}: {error}"))
    }
}

/// The keys that can verify a signature, by id. Others are passed over: a set may hold keys for encryption, and of
/// kinds that we do not know.
fn read_keys(set: &Value) -> HashMap<String, Arc<IssuerKey>> {
    let listed = set["keys"].as_array().into_iter().flatten().take(MAX_KEYS);
    let mut keys = HashMap::new();
    for jwk in listed.filter_map(|jwk| serde_json::from_value::<Jwk>(jwk.clone()).ok()) {
        if let Some((kid, key)) = read_key(jwk) {
            // Of two with one id the first counts.
            keys.entry(kid).or_insert_with(|| Arc::new(key));
        }
    }
    keys
}

fn read_key(jwk: Jwk) -> Option<(String, IssuerKey)> {
    let signs = matches!(
        jwk.common.public_key_use,
        None | Some(PublicKeyUse::Signature)
    );
    let known = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => true,
        AlgorithmParameters::EllipticCurve(of) => {
            matches!(of.curve, EllipticCurve::P256 | EllipticCurve::P384)
        }
        AlgorithmParameters::OctetKeyPair(of) => of.curve == EllipticCurve::Ed25519,
        // A shared secret verifies nothing.
        _ => false,
    };
    if !signs || !known {
        return None;
    }
    let algorithm = match jwk.common.key_algorithm {
        Some(named) => Some(Algorithm::try_from(named).ok()?),
        None => None,
    };
    let verifying = DecodingKey::from_jwk(&jwk).ok()?;
    let key = IssuerKey {
        verifying,
        algorithm,
    };
    Some((jwk.common.key_id?, key))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_keys_that_verify_are_taken() {
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        let ed = |more: Value| {
            let mut key = json!({"kty": "OKP", "crv": "Ed25519", "x": x, "kid": "k"});
            key.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            key
        };
        let taken = |key: Value| read_keys(&json!({"keys": [key]})).remove("k");
        assert!(taken(ed(json!({}))).unwrap().fits(Algorithm::EdDSA));
        assert!(taken(ed(json!({"use": "sig", "alg": "EdDSA"}))).is_some());
        assert!(!taken(ed(json!({}))).unwrap().fits(Algorithm::RS256));
        assert!(taken(ed(json!({"use": "enc"}))).is_none());
        assert!(taken(ed(json!({"alg": "ES512"}))).is_none());
        assert!(taken(json!({"kty": "oct", "k": "AAAA", "kid": "k"})).is_none());
        assert!(taken(json!({"kty": "new", "kid": "k"})).is_none());
        assert!(read_keys(&json!({"keys": 7})).is_empty());
    }

    #[test]
    fn fetches_are_counted() {
        let mut budget = Budget {
            left: BURST,
            refilled_at: Instant::now(),
        };
        let taken = (0..100).filter(|_| budget.take()).count();
        assert_eq!(taken, BURST as usize);
    }
}
