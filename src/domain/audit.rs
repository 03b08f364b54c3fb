//! What the audit keeps of a request that asked for a write: who, whence, for what. Never a secret: of a query
//! string the names only, of a token a fingerprint, of a body its length.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::identity::UserKey;
use super::time::Timestamp;

/// How writes are audited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AuditMode {
    /// Records carry actor and request id only; refused writes leave nothing.
    Off,
    /// Every write is recorded; a refusal does not wait for its record.
    #[default]
    On,
    /// No answer to a write before its record is on disk; without one it is refused.
    Required,
}

/// A request that asked for a write, as records show it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// `None` when no credential was shown that is accepted.
    pub user: Option<UserKey>,
    /// The first 12 hex digits of the keyed hash of the token that was shown, accepted or not.
    pub token: Option<SmolStr>,
    pub address: Option<IpAddr>,
    pub method: SmolStr,
    /// The route's pattern, e.g. `/queue/{job_id}`.
    pub route: SmolStr,
    /// The path, where it is not the pattern itself.
    pub path: Option<SmolStr>,
    /// The names of the query string's parameters.
    pub query: Vec<SmolStr>,
    /// Kept beside it, in the record's meta: what was added to it since it was first written.
    #[serde(skip)]
    pub details: Details,
}

impl Source {
    /// Whose administrators see it: the tenant that the write is about, else the one of who asked, else the one of
    /// the account that was tried.
    pub fn tenant(&self) -> Option<&SmolStr> {
        let details = &self.details;
        let user = self.user.as_ref().or(details.tried.as_ref());
        details.about.as_ref().or(user.map(|user| &user.tenant))
    }
}

/// More of a request; records have it from format 3 on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// The account that a login tried, whether it was right or wrong.
    pub tried: Option<UserKey>,
    /// The tenant that the write is about, where it is another than that of who asked.
    pub about: Option<SmolStr>,
    /// The `Origin` header.
    pub origin: Option<SmolStr>,
    pub user_agent: Option<SmolStr>,
    /// Length of the body, as it was declared.
    pub bytes_in: Option<u64>,
}

/// A source as the first record of what came of it carries it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    pub source: Arc<Source>,
    /// From its arrival to the decision; the answer came after the commit.
    pub duration_us: u64,
}

/// Writes that left no record of their own: refused, or nothing was left to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditedWrite {
    /// Of the first of them.
    pub source: Arc<Source>,
    /// The answer's HTTP status.
    pub status: u16,
    /// The error's code.
    pub code: Option<SmolStr>,
    /// How long the first of them took.
    pub duration_us: u64,
    /// How many there were that are alike in user, network, route and status.
    pub count: u64,
    /// When the first of them was answered.
    pub since: Timestamp,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered with success.
    Allowed,
    /// Kept out: no valid credentials, not allowed, too many.
    Denied,
    /// Let in and refused, or gone wrong.
    Failed,
}

impl Outcome {
    pub const ALL: [Outcome; 3] = [Outcome::Allowed, Outcome::Denied, Outcome::Failed];

    /// Of an HTTP status.
    pub fn of(status: u16) -> Outcome {
        match status {
            ..=399 => Outcome::Allowed,
            401 | 403 | 429 => Outcome::Denied,
            _ => Outcome::Failed,
        }
    }

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Allowed => "allowed",
            Outcome::Denied => "denied",
            Outcome::Failed => "failed",
        }
    }

    pub fn from_name(name: &str) -> Option<Outcome> {
        Outcome::ALL
            .into_iter()
            .find(|outcome| outcome.name() == name)
    }
}
