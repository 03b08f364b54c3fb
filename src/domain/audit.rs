//! What the audit keeps of a request that asked for a write: who, whence, for what. Never a secret: of a query
//! string the names only, of a token a fingerprint, of a body nothing.

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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
