//! Sessions of browsers, on tower-sessions: an opaque id in a cookie, of which only a keyed hash is kept. A session
//! stands on what its user logged in with, and counts for as long as that does; whether it does is in the ledger, so
//! that disabling, rotating and a new password end it at once.
//!
//! | file | holds |
//! |---|---|
//! | `kept` | tower-sessions' store on the file of logins |
//! | `mod` | what a session is, beginning and ending it, its timeouts |

mod kept;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;
use subtle::ConstantTimeEq;
use tower_sessions_core::SessionStore;
use tower_sessions_core::session::Id;

use self::kept::Kept;
use super::secret::TokenKey;
use super::store::{Change, LoginStore, StoreError, Table};
use crate::domain::identity::{TokenKey as UserToken, UserKey};
use crate::domain::time::Timestamp;
use crate::random;

/// What a session's secret begins with (`contracts/run-gateway.md` section 3.2).
const SECRET_PREFIX: &str = "agws_";

/// What a CSRF token begins with (the same).
const CSRF_PREFIX: &str = "agcsrf_";

/// Longest user agent that is kept.
const MAX_AGENT_CHARS: usize = 200;

/// Sessions that one commit removes, so that logins do not wait long behind it.
const SWEPT_AT_ONCE: usize = 500;

/// Keyed hash of a session's secret: what it is found by.
pub type Digest = [u8; 32];

/// How long sessions last, and how many there may be.
#[derive(Clone, Copy, Debug)]
pub struct SessionRules {
    /// Without a request, in milliseconds.
    pub idle_ms: u64,
    /// From login on, whatever happens.
    pub ttl_ms: u64,
    /// The same for those who asked to be remembered.
    pub remember_idle_ms: u64,
    pub remember_ttl_ms: u64,
    /// Of one user; one more ends the oldest.
    pub max_per_user: usize,
}

impl Default for SessionRules {
    fn default() -> Self {
        const HOUR_MS: u64 = 3_600_000;
        Self {
            idle_ms: 2 * HOUR_MS,
            ttl_ms: 8 * HOUR_MS,
            remember_idle_ms: 7 * 24 * HOUR_MS,
            remember_ttl_ms: 30 * 24 * HOUR_MS,
            max_per_user: 10,
        }
    }
}

/// What the user logged in with. The session counts for as long as it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Basis {
    Password,
    Token(UserToken),
    /// The first administrator's token, by its keyed hash.
    FirstAdmin(Digest),
}

/// What is kept of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Public: names it in lists, and tells nothing of the secret.
    pub id: SmolStr,
    pub user: UserKey,
    pub basis: Basis,
    /// The user's era at login (`Credentials`).
    pub era: u64,
    /// Keyed hash of the CSRF token.
    pub csrf: Digest,
    pub is_remembered: bool,
    pub created_at: Timestamp,
    /// The latest that it may end.
    pub ends_at: Timestamp,
    pub idle_ms: u64,
    /// Where the login came from.
    pub address: IpAddr,
    pub user_agent: String,
}

/// A login that was found right.
pub struct Login {
    pub user: UserKey,
    pub basis: Basis,
    pub era: u64,
    pub is_remembered: bool,
    pub address: IpAddr,
    pub user_agent: String,
}

/// A session that has begun, and its two secrets, which are known to the browser alone from now on.
pub struct Opened {
    pub session: Session,
    pub digest: Digest,
    pub secret: String,
    pub csrf: String,
}

/// All sessions. Cloneable.
#[derive(Clone)]
pub struct Sessions {
    kept: Kept,
    rules: SessionRules,
    key: TokenKey,
    /// When each was last used: kept in memory, and written down now and then.
    uses: Arc<Mutex<Uses>>,
}

#[derive(Default)]
struct Uses {
    last: HashMap<Digest, Timestamp>,
    unsaved: HashMap<Digest, Timestamp>,
}

impl Sessions {
    /// Those of a file.
    pub fn load(
        store: LoginStore,
        key: TokenKey,
        rules: SessionRules,
    ) -> Result<Sessions, StoreError> {
        let mut uses = Uses::default();
        for (digest, at) in store.scan(Table::SessionUses, &[])? {
            if let (Ok(digest), Ok(at)) = (digest.try_into(), at.try_into()) {
                let at = Timestamp(i64::from_be_bytes(at));
                uses.last.insert(digest, at);
            }
        }
        Ok(Sessions {
            kept: Kept::new(store, key.clone()),
            rules,
            key,
            uses: Arc::new(Mutex::new(uses)),
        })
    }

    /// Begins a session under a new id, whatever the browser had before; on disk when it returns. A user who has too
    /// many loses the oldest.
    pub async fn begin(&self, login: Login, now: Timestamp) -> Result<Opened, StoreError> {
        let csrf = format!(
            "{CSRF_PREFIX}{}",
            URL_SAFE_NO_PAD.encode(random::bytes::<32>())
        );
        let (idle_ms, ttl_ms) = match login.is_remembered {
            true => (self.rules.remember_idle_ms, self.rules.remember_ttl_ms),
            false => (self.rules.idle_ms, self.rules.ttl_ms),
        };
        let session = Session {
            id: SmolStr::new(format!(
                "ses_{:016x}",
                u64::from_be_bytes(random::bytes::<8>())
            )),
            user: login.user,
            basis: login.basis,
            era: login.era,
            csrf: self.key.digest(csrf.as_bytes()),
            is_remembered: login.is_remembered,
            created_at: now,
            ends_at: now + ttl_ms,
            idle_ms: idle_ms.min(ttl_ms),
            address: login.address,
            user_agent: login.user_agent.chars().take(MAX_AGENT_CHARS).collect(),
        };
        let mut record = kept::record_of(&session)?;
        self.kept
            .create(&mut record)
            .await
            .map_err(kept::store_error)?;
        let digest = self.kept.digest(&record.id);
        self.note_use(&digest, now);
        self.trim(&session.user).await?;
        Ok(Opened {
            session,
            digest,
            secret: format!("{SECRET_PREFIX}{}", record.id),
            csrf,
        })
    }

    /// Whoever logs in last trims last, and sees all others.
    async fn trim(&self, user: &UserKey) -> Result<(), StoreError> {
        let mut all = self.of_user(user)?;
        all.sort_by_key(|(_, session)| session.created_at);
        let surplus = all.len().saturating_sub(self.rules.max_per_user);
        for (digest, session) in all.into_iter().take(surplus) {
            self.end(&digest, &session).await?;
        }
        Ok(())
    }

    /// The session of a secret, unless its time is over. Whether what it stands on still counts is not looked at.
    pub fn find(
        &self,
        secret: &str,
        now: Timestamp,
    ) -> Result<Option<(Digest, Session)>, StoreError> {
        let id: Option<Id> = secret
            .strip_prefix(SECRET_PREFIX)
            .and_then(|id| id.parse().ok());
        let Some(id) = id else {
            return Ok(None);
        };
        let digest = self.kept.digest(&id);
        let session = self.by_digest(&digest, now)?;
        Ok(session.map(|session| (digest, session)))
    }

    /// The session of a digest, unless its time is over.
    pub fn by_digest(
        &self,
        digest: &Digest,
        now: Timestamp,
    ) -> Result<Option<Session>, StoreError> {
        let session = self.kept.read(digest)?;
        Ok(session.filter(|session| self.is_in_time(digest, session, now)))
    }

    fn is_in_time(&self, digest: &Digest, session: &Session, now: Timestamp) -> bool {
        now < session.ends_at && now < self.last_use(digest, session) + session.idle_ms
    }

    /// When it was last used.
    pub fn last_use(&self, digest: &Digest, session: &Session) -> Timestamp {
        let last = self.uses().last.get(digest).copied();
        last.unwrap_or(session.created_at).max(session.created_at)
    }

    /// A request was made with it.
    pub fn note_use(&self, digest: &Digest, at: Timestamp) {
        let mut uses = self.uses();
        uses.last.insert(*digest, at);
        uses.unsaved.insert(*digest, at);
    }

    /// Whether a text is the session's CSRF token.
    pub fn is_csrf(&self, kept: &Digest, shown: &str) -> bool {
        self.key.digest(shown.as_bytes()).ct_eq(kept).into()
    }

    /// A user's sessions, those included whose time is over and that were not swept out yet.
    pub fn of_user(&self, user: &UserKey) -> Result<Vec<(Digest, Session)>, StoreError> {
        self.kept.of_user(user)
    }

    /// Ends a session; on disk when it returns.
    pub async fn end(&self, digest: &Digest, session: &Session) -> Result<(), StoreError> {
        let changes = kept::removal(digest, session).into();
        self.kept.store().write(changes).await?;
        self.forget(digest);
        Ok(())
    }

    fn forget(&self, digest: &Digest) {
        let mut uses = self.uses();
        uses.last.remove(digest);
        uses.unsaved.remove(digest);
    }

    /// Writes down when sessions were last used. A crash loses what came since, which ends them a little early.
    pub async fn save_uses(&self) {
        let unsaved = std::mem::take(&mut self.uses().unsaved);
        let change = |(digest, at): (Digest, Timestamp)| Change {
            table: Table::SessionUses,
            key: digest.to_vec(),
            value: Some(at.0.to_be_bytes().to_vec()),
        };
        if unsaved.is_empty() {
            return;
        }
        let changes = unsaved.into_iter().map(change).collect();
        if let Err(error) = self.kept.store().write(changes).await {
            tracing::warn!(%error, "when sessions were last used could not be written down");
        }
    }

    /// Removes sessions that are over: their time, or what they stood on, as `counts` tells. Reads them all.
    pub async fn sweep(
        &self,
        counts: impl Fn(&Session) -> bool,
        now: Timestamp,
    ) -> Result<usize, StoreError> {
        let mut over = self.kept.all()?;
        let known: HashSet<Digest> = over.iter().map(|(digest, _)| *digest).collect();
        over.retain(|(digest, session)| !self.is_in_time(digest, session, now) || !counts(session));
        for some in over.chunks(SWEPT_AT_ONCE) {
            let removed = some
                .iter()
                .flat_map(|(digest, session)| kept::removal(digest, session));
            self.kept.store().write(removed.collect()).await?;
            for (digest, _) in some {
                self.forget(digest);
            }
        }
        self.sweep_uses(&known);
        Ok(over.len())
    }

    /// A request that was under way when its session ended has noted a use of nothing.
    fn sweep_uses(&self, known: &HashSet<Digest>) {
        let mut uses = self.uses();
        let unknown = |digest: &&Digest| !known.contains(*digest);
        let gone: Vec<Digest> = uses.last.keys().filter(unknown).copied().collect();
        for digest in &gone {
            uses.last.remove(digest);
            uses.unsaved.remove(digest);
        }
        drop(uses);
        let removed = gone.iter().map(|digest| Change {
            table: Table::SessionUses,
            key: digest.to_vec(),
            value: None,
        });
        if !gone.is_empty() {
            self.kept.store().write_later(removed.collect());
        }
    }

    fn uses(&self) -> MutexGuard<'_, Uses> {
        // Each change is a single operation, so a panic elsewhere cannot have torn it.
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    fn sessions(data: &tempfile::TempDir, key: &TokenKey) -> Sessions {
        let store = LoginStore::open(data.path()).unwrap();
        Sessions::load(store, key.clone(), SessionRules::default()).unwrap()
    }

    fn login() -> Login {
        Login {
            user: UserKey::first_admin(),
            basis: Basis::Password,
            era: 1,
            is_remembered: false,
            address: IpAddr::from([192, 0, 2, 1]),
            user_agent: "x".repeat(1_000),
        }
    }

    #[tokio::test]
    async fn a_session_lives_by_its_use_and_its_age() {
        let data = tempfile::tempdir().unwrap();
        let sessions = sessions(&data, &TokenKey::random());
        let opened = sessions.begin(login(), START).await.unwrap();
        assert_eq!(opened.session.user_agent.len(), MAX_AGENT_CHARS);
        let found = |at| sessions.find(&opened.secret, at).unwrap().is_some();
        let rules = SessionRules::default();
        assert!(found(START + (rules.idle_ms - 1)));
        assert!(!found(START + rules.idle_ms));
        let mut at = START;
        while at < START + (rules.ttl_ms - rules.idle_ms) {
            at = at + rules.idle_ms / 2;
            sessions.note_use(&opened.digest, at);
        }
        assert!(found(START + (rules.ttl_ms - 1)));
        assert!(!found(START + rules.ttl_ms));
    }

    #[tokio::test]
    async fn what_is_over_is_swept_out_with_all_that_points_to_it() {
        let data = tempfile::tempdir().unwrap();
        let sessions = sessions(&data, &TokenKey::random());
        let old = sessions.begin(login(), START).await.unwrap();
        let now = START + SessionRules::default().ttl_ms;
        let gone = sessions.begin(login(), now).await.unwrap();
        let stays = sessions.begin(login(), now).await.unwrap();
        sessions.save_uses().await;
        // Noted by a request that was under way.
        sessions.note_use(&[7; 32], now);
        sessions.save_uses().await;
        let counts = |session: &Session| session.id != gone.session.id;
        assert_eq!(sessions.sweep(counts, now).await.unwrap(), 2);
        sessions.end(&old.digest, &old.session).await.unwrap();
        let store = sessions.kept.store();
        for table in [Table::Sessions, Table::SessionOwners, Table::SessionUses] {
            assert_eq!(store.scan(table, &[]).unwrap().len(), 1, "{table:?}");
        }
        assert!(sessions.find(&stays.secret, now).unwrap().is_some());
    }

    #[tokio::test]
    async fn a_secret_is_known_under_its_key_only() {
        let data = tempfile::tempdir().unwrap();
        let sessions = sessions(&data, &TokenKey::random());
        let opened = sessions.begin(login(), START).await.unwrap();
        let other = Sessions {
            kept: Kept::new(sessions.kept.store().clone(), TokenKey::random()),
            ..sessions.clone()
        };
        assert!(other.find(&opened.secret, START).unwrap().is_none());
        assert!(sessions.is_csrf(&opened.session.csrf, &opened.csrf));
        assert!(!sessions.is_csrf(&opened.session.csrf, "agcsrf_"));
    }

    /// The trait's own way, as tower-sessions goes it.
    #[tokio::test]
    async fn the_store_is_one_of_tower_sessions() {
        let data = tempfile::tempdir().unwrap();
        let sessions = sessions(&data, &TokenKey::random());
        let opened = sessions.begin(login(), START).await.unwrap();
        let id: Id = opened.secret[SECRET_PREFIX.len()..].parse().unwrap();
        let store = Arc::new(sessions.kept.clone());
        let session = tower_sessions_core::Session::new(Some(id), store.clone(), None);
        let entry: Option<Session> = session.get("session").await.unwrap();
        assert_eq!(entry, Some(opened.session));
        session.delete().await.unwrap();
        assert!(store.load(&id).await.unwrap().is_none());
        assert!(sessions.find(&opened.secret, START).unwrap().is_none());
    }
}
