//! Tokens for work: one for each attempt, which a dispatch carries, and one for each instance of a service, which
//! lies in a file. Both die with what they are for: whether that still lives is asked of the ledger at each use.

use std::time::Duration;

use jsonwebtoken::{Algorithm, Header, Validation, decode, encode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use smol_str::SmolStr;
use uuid::Uuid;

use super::LEEWAY_S;
use super::signing::{SigningKeys, SigningKeysError, seconds};
use crate::domain::ids::{Attempt, Generation, PlaneId, RunId, ServiceName};
use crate::domain::time::Timestamp;

/// `typ` of an attempt's token.
pub const JOB_TYPE: &str = "rungate-job+jwt";

/// `typ` of an instance's token.
pub const INSTANCE_TYPE: &str = "rungate-instance+jwt";

/// Whom both are for: the gateway that made them, which `iss` names.
pub const AUDIENCE: &str = "rungate";

/// What a token lets its bearer work on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// One attempt of a run.
    Attempt {
        plane: PlaneId,
        run: RunId,
        attempt: Attempt,
        service: ServiceName,
        generation: Generation,
    },
    /// Whatever attempt an instance of a service works on.
    Instance {
        service: ServiceName,
        generation: Generation,
    },
}

impl Work {
    /// Who works.
    pub fn service(&self) -> &ServiceName {
        match self {
            Work::Attempt { service, .. } | Work::Instance { service, .. } => service,
        }
    }
}

/// What both kinds say.
#[derive(Serialize, Deserialize)]
struct Claims<T> {
    iss: String,
    aud: String,
    iat: u64,
    nbf: u64,
    exp: u64,
    /// The service, and which life of it.
    svc: ServiceName,
    #[serde(rename = "gen")]
    generation: Generation,
    #[serde(flatten)]
    of: T,
}

#[derive(Serialize, Deserialize)]
struct OfAttempt {
    /// The run.
    sub: RunId,
    att: Attempt,
    pln: PlaneId,
}

#[derive(Serialize, Deserialize)]
struct OfInstance {
    /// The service again: every token has a subject.
    sub: ServiceName,
}

/// Makes and reads tokens for work. Cloneable.
#[derive(Clone)]
pub struct WorkTokens {
    keys: SigningKeys,
    /// This gateway, told from others by its ledger.
    issuer: SmolStr,
}

impl WorkTokens {
    pub fn new(keys: SigningKeys, ledger: Uuid) -> Self {
        Self {
            keys,
            issuer: SmolStr::new(format!("urn:uuid:{ledger}")),
        }
    }

    /// The keys, for those who verify.
    pub fn keys(&self) -> &SigningKeys {
        &self.keys
    }

    /// A token that lasts for `lasting`.
    ///
    /// # Errors
    /// It could not be signed.
    pub fn issue(
        &self,
        work: &Work,
        lasting: Duration,
        now: Timestamp,
    ) -> Result<String, jsonwebtoken::errors::Error> {
        match work.clone() {
            Work::Attempt {
                plane,
                run,
                attempt,
                service,
                generation,
            } => {
                let of = OfAttempt {
                    sub: run,
                    att: attempt,
                    pln: plane,
                };
                self.sign(JOB_TYPE, (service, generation), of, lasting, now)
            }
            Work::Instance {
                service,
                generation,
            } => {
                let of = OfInstance {
                    sub: service.clone(),
                };
                self.sign(INSTANCE_TYPE, (service, generation), of, lasting, now)
            }
        }
    }

    fn sign<T: Serialize>(
        &self,
        kind: &str,
        (svc, generation): (ServiceName, Generation),
        of: T,
        lasting: Duration,
        now: Timestamp,
    ) -> Result<String, jsonwebtoken::errors::Error> {
        let key = self.keys.active();
        let iat = seconds(now);
        // A begun second counts whole.
        let exp = iat.saturating_add(lasting.as_secs()).saturating_add(1);
        key.need_until(exp);
        let mut header = Header::new(Algorithm::EdDSA);
        header.typ = Some(kind.to_owned());
        header.kid = Some(key.kid.clone());
        let claims = Claims {
            iss: self.issuer.to_string(),
            aud: AUDIENCE.to_owned(),
            iat,
            nbf: iat,
            exp,
            svc,
            generation,
            of,
        };
        encode(&header, &claims, &key.signing)
    }

    /// Whether a header is that of a token for work. Its `typ` decides, and nothing else may take such a token.
    pub fn is_ours(header: &Header) -> bool {
        matches!(header.typ.as_deref(), Some(JOB_TYPE | INSTANCE_TYPE))
    }

    /// What a token is for, if it is genuine and in time.
    pub fn read(&self, token: &[u8], header: &Header, now: Timestamp) -> Option<Work> {
        let kid = header.kid.as_deref()?;
        match header.typ.as_deref()? {
            JOB_TYPE => {
                let claims: Claims<OfAttempt> = self.verify(token, kid, now)?;
                Some(Work::Attempt {
                    plane: claims.of.pln,
                    run: claims.of.sub,
                    attempt: claims.of.att,
                    service: claims.svc,
                    generation: claims.generation,
                })
            }
            INSTANCE_TYPE => {
                let claims: Claims<OfInstance> = self.verify(token, kid, now)?;
                (claims.of.sub == claims.svc).then_some(Work::Instance {
                    service: claims.svc,
                    generation: claims.generation,
                })
            }
            _ => None,
        }
    }

    /// One signature is checked, with a key of ours.
    fn verify<T: DeserializeOwned>(
        &self,
        token: &[u8],
        kid: &str,
        now: Timestamp,
    ) -> Option<Claims<T>> {
        let key = self.keys.find(kid, now)?;
        let mut rules = Validation::new(Algorithm::EdDSA);
        rules.leeway = LEEWAY_S;
        rules.validate_nbf = true;
        rules.set_issuer(&[&self.issuer]);
        rules.set_audience(&[AUDIENCE]);
        rules.set_required_spec_claims(&["exp", "nbf", "iss", "aud", "sub"]);
        // `iss` and `aud` are texts here: a list that holds ours among others is none of our making.
        decode(token, &key.verifying, &rules)
            .ok()
            .map(|token| token.claims)
    }

    /// The public halves of the keys.
    pub fn jwks(&self, now: Timestamp) -> Value {
        self.keys.jwks(now)
    }

    /// See [`SigningKeys::rotate`].
    ///
    /// # Errors
    /// Nothing has changed.
    pub fn rotate(&self, now: Timestamp) -> Result<String, SigningKeysError> {
        self.keys.rotate(now)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Real: the library compares with the clock of the system.
    fn now() -> Timestamp {
        Timestamp(jiff::Timestamp::now().as_microsecond())
    }

    fn tokens(data: &std::path::Path) -> WorkTokens {
        WorkTokens::new(
            SigningKeys::load_or_create(data, now()).unwrap(),
            Uuid::from_u128(7),
        )
    }

    fn attempt() -> Work {
        Work::Attempt {
            plane: PlaneId(3),
            run: RunId(Uuid::from_u128(1)),
            attempt: 2,
            service: "s".into(),
            generation: Generation(4),
        }
    }

    fn read(tokens: &WorkTokens, token: &str) -> Option<Work> {
        let header = super::super::header(token.as_bytes())?;
        tokens.read(token.as_bytes(), &header, now())
    }

    #[test]
    fn a_token_says_what_it_was_made_for_and_outlives_a_rotation() {
        let data = tempfile::tempdir().unwrap();
        let tokens = tokens(data.path());
        let instance = Work::Instance {
            service: "s".into(),
            generation: Generation(4),
        };
        let all = [attempt(), instance];
        let issued = all
            .clone()
            .map(|work| tokens.issue(&work, Duration::from_secs(60), now()).unwrap());
        tokens.rotate(now()).unwrap();
        for (work, token) in all.iter().zip(&issued) {
            assert_eq!(read(&tokens, token).as_ref(), Some(work));
        }
        let other = tempfile::tempdir().unwrap();
        assert_eq!(read(&self::tokens(other.path()), &issued[0]), None);
    }

    /// Signed with the right key, yet wrong in one claim each.
    #[test]
    fn every_claim_is_held_to() {
        let data = tempfile::tempdir().unwrap();
        let tokens = tokens(data.path());
        let key = tokens.keys.active();
        let s = seconds(now());
        let good = json!({
            "iss": tokens.issuer.as_str(), "aud": AUDIENCE, "iat": s, "nbf": s, "exp": s + 60,
            "svc": "s", "gen": 4, "sub": RunId(Uuid::from_u128(1)), "att": 2, "pln": 3,
        });
        let made = |kind: &str, claims: &Value| {
            let mut header = Header::new(Algorithm::EdDSA);
            header.typ = Some(kind.to_owned());
            header.kid = Some(key.kid.clone());
            encode(&header, claims, &key.signing).unwrap()
        };
        assert_eq!(read(&tokens, &made(JOB_TYPE, &good)), Some(attempt()));
        for (claim, wrong) in [
            ("iss", json!("urn:uuid:other")),
            ("iss", json!([tokens.issuer.as_str()])),
            ("aud", json!("other")),
            ("aud", json!([AUDIENCE, "other"])),
            ("exp", json!(s - 60)),
            ("exp", json!(-1)),
            ("exp", json!("soon")),
            ("nbf", json!(s + 60)),
            ("sub", json!("no run")),
            ("att", json!("2")),
            ("pln", json!(-1)),
            ("gen", json!(null)),
        ] {
            let mut claims = good.clone();
            claims[claim] = wrong;
            assert_eq!(read(&tokens, &made(JOB_TYPE, &claims)), None, "{claims}");
            let mut claims = good.clone();
            claims.as_object_mut().unwrap().remove(claim);
            assert_eq!(read(&tokens, &made(JOB_TYPE, &claims)), None, "{claims}");
        }
        for kind in ["JWT", "at+jwt", "RUNGATE-JOB+JWT"] {
            assert_eq!(read(&tokens, &made(kind, &good)), None, "{kind}");
        }
    }
}
