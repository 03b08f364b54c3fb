//! Single sign-on: tokens of one OpenID Connect issuer that the operator trusts, shown as Bearer. Which keys verify
//! them, which claims they must have and whom they name; making that user known is the API's.
//!
//! | file | holds |
//! |---|---|
//! | `keys` | the issuer's keys, fetched a bounded number of times |
//! | `rules` | settings to rules, claims to a person |

mod keys;
mod rules;

use std::sync::Arc;

use jsonwebtoken::{Algorithm, Header, Validation, dangerous, decode};
use serde_json::{Map, Value};

pub use keys::KeysUnavailable;
pub use rules::{Person, Settings, SettingsError};

use self::keys::IssuerKeys;
use self::rules::Rules;
use super::jwt::signing::seconds;
use crate::domain::time::Timestamp;
use crate::outbound::{self, GuardedClient, Purpose, Reach};

/// Difference between the issuer's clock and ours that is forgiven, in seconds.
const LEEWAY_S: u64 = 60;

/// The claims of a token.
type Claims = Map<String, Value>;

/// Why single sign-on cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum SsoError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("cannot make an HTTP client for the keys of the single sign-on issuer")]
    Client(#[from] reqwest::Error),
}

/// One issuer. Cloneable.
#[derive(Clone)]
pub struct Sso(Arc<Inner>);

struct Inner {
    rules: Rules,
    keys: IssuerKeys,
}

impl Sso {
    /// `None` when no issuer is set. Nothing is fetched yet: an issuer that is away does not keep the gateway from
    /// starting.
    ///
    /// # Errors
    /// A setting is wrong, or no HTTP client can be made.
    pub fn new(settings: &Settings) -> Result<Option<Sso>, SsoError> {
        let Some(rules) = Rules::read(settings)? else {
            return Ok(None);
        };
        let reach = match settings.allow_private {
            true => Reach::PublicAndPrivate,
            false => Reach::Public,
        };
        let keys = IssuerKeys::new(
            GuardedClient::for_issuer(outbound::Rules::new(Purpose::Issuer, reach, Vec::new()))?,
            settings.issuer.clone(),
            Some(settings.jwks_url.clone()).filter(|url| !url.is_empty()),
        );
        Ok(Some(Sso(Arc::new(Inner { rules, keys }))))
    }

    /// Whether a token with this header can be one of the issuer's: its algorithm and its type are the set ones.
    pub fn takes(&self, header: &Header) -> bool {
        let rules = &self.0.rules;
        let kind = header.typ.as_deref().unwrap_or_default();
        rules.algorithms.contains(&header.alg) && rules.takes_type(kind)
    }

    /// Whom a token names, if it is genuine, in time and meant for us, and names somebody.
    ///
    /// # Errors
    /// No key of the issuer is known, and none can be had.
    pub async fn verify(
        &self,
        token: &[u8],
        header: &Header,
        now: Timestamp,
    ) -> Result<Option<Person>, KeysUnavailable> {
        // What can never be accepted costs the issuer nothing.
        let promising = dangerous::insecure_decode_claims::<Claims>(token)
            .is_ok_and(|claims| self.0.rules.is_promising(&claims, seconds(now)));
        let Some(kid) = header.kid.as_deref().filter(|_| promising) else {
            return Ok(None);
        };
        let Some(key) = self.0.keys.find(kid).await? else {
            tracing::debug!("a token names a key that its issuer does not have");
            return Ok(None);
        };
        if !key.fits(header.alg) {
            return Ok(None);
        }
        let claims = match decode::<Claims>(token, &key.verifying, &self.validation(header.alg)) {
            Ok(token) => token.claims,
            Err(error) => {
                tracing::debug!(%error, "a token of the issuer is not accepted");
                return Ok(None);
            }
        };
        let latest = now + LEEWAY_S * 1_000;
        let person = self.0.rules.person(&claims);
        let person = person.filter(|person| person.issued_at.is_none_or(|at| at <= latest));
        if person.is_none() {
            tracing::debug!("a token of the issuer names nobody who is let in");
        }
        Ok(person)
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.leeway = LEEWAY_S;
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.0.rules.issuer]);
        validation.set_audience(&[&self.0.rules.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation
    }
}
