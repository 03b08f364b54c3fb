//! tower-sessions' store on the file of logins. A record's one entry is the session; its id, which is the browser's
//! secret, is hashed before anything is looked up or written.

use async_trait::async_trait;
use time::OffsetDateTime;
use tower_sessions_core::SessionStore;
use tower_sessions_core::session::{Id, Record};
use tower_sessions_core::session_store::{Error, Result as Stored};

use super::{Digest, Session};
use crate::auth::secret::TokenKey;
use crate::auth::store::{Change, LoginStore, StoreError, Table};
use crate::domain::identity::UserKey;

/// The name of the record's one entry.
const ENTRY: &str = "session";

/// Sessions as they are on disk. Cloneable.
#[derive(Clone)]
pub(super) struct Kept {
    store: LoginStore,
    key: TokenKey,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept(..)")
    }
}

impl Kept {
    pub fn new(store: LoginStore, key: TokenKey) -> Kept {
        Kept { store, key }
    }

    pub fn store(&self) -> &LoginStore {
        &self.store
    }

    /// What a session is found by.
    pub fn digest(&self, id: &Id) -> Digest {
        self.key.digest(&id.0.to_be_bytes())
    }

    /// The session of a digest.
    pub fn read(&self, digest: &Digest) -> Result<Option<Session>, StoreError> {
        let bytes = self.store.get(Table::Sessions, digest)?;
        bytes.map(|bytes| decode(&bytes)).transpose()
    }

    /// A user's.
    pub fn of_user(&self, user: &UserKey) -> Result<Vec<(Digest, Session)>, StoreError> {
        let owned = self
            .store
            .scan(Table::SessionOwners, &owner_key(user, ""))?;
        let mut sessions = Vec::with_capacity(owned.len());
        for (_, digest) in owned {
            let Ok(digest) = Digest::try_from(digest) else {
                continue;
            };
            if let Some(session) = self.read(&digest)? {
                sessions.push((digest, session));
            }
        }
        Ok(sessions)
    }

    /// Everybody's.
    pub fn all(&self) -> Result<Vec<(Digest, Session)>, StoreError> {
        let rows = self.store.scan(Table::Sessions, &[])?;
        let row = |(digest, bytes): (Vec<u8>, Vec<u8>)| {
            let digest = Digest::try_from(digest).ok()?;
            Some((digest, decode(&bytes).ok()?))
        };
        Ok(rows.into_iter().filter_map(row).collect())
    }
}

/// What removes a session and all that points to it.
pub(super) fn removal(digest: &Digest, session: &Session) -> [Change; 3] {
    let removed = |table, key| Change {
        table,
        key,
        value: None,
    };
    let owned = owner_key(&session.user, &session.id);
    [
        removed(Table::Sessions, digest.to_vec()),
        removed(Table::SessionUses, digest.to_vec()),
        removed(Table::SessionOwners, owned),
    ]
}

/// Parts are sanitised ids, so that none holds a NUL.
fn owner_key(user: &UserKey, id: &str) -> Vec<u8> {
    [&*user.tenant, &*user.user, id].join("\0").into_bytes()
}

fn decode(bytes: &[u8]) -> Result<Session, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError(format!("a session: {error}")))
}

/// The session in a record.
pub(super) fn session_of(record: &Record) -> Option<Session> {
    serde_json::from_value(record.data.get(ENTRY)?.clone()).ok()
}

/// A new record for a session, under a new id.
pub(super) fn record_of(session: &Session) -> Result<Record, StoreError> {
    let value = serde_json::to_value(session).map_err(|error| StoreError(error.to_string()))?;
    let ends_at = i128::from(session.ends_at.0) * 1_000;
    Ok(Record {
        id: Id::default(),
        data: [(ENTRY.to_owned(), value)].into(),
        expiry_date: OffsetDateTime::from_unix_timestamp_nanos(ends_at)
            .map_err(|error| StoreError(error.to_string()))?,
    })
}

/// What tower-sessions made of an error of ours.
pub(super) fn store_error(error: Error) -> StoreError {
    StoreError(error.to_string())
}

fn backend(error: StoreError) -> Error {
    Error::Backend(error.0)
}

#[async_trait]
impl SessionStore for Kept {
    async fn create(&self, record: &mut Record) -> Stored<()> {
        // Of 128 random bits none was ever drawn twice; should it be, the older session stays whose it is.
        while self.load(&record.id).await?.is_some() {
            record.id = Id::default();
        }
        self.save(record).await
    }

    async fn save(&self, record: &Record) -> Stored<()> {
        let session = session_of(record)
            .ok_or_else(|| Error::Encode("a record without a session".to_owned()))?;
        let digest = self.digest(&record.id).to_vec();
        let bytes =
            serde_json::to_vec(&session).map_err(|error| Error::Encode(error.to_string()))?;
        let changes = vec![
            Change {
                table: Table::Sessions,
                key: digest.clone(),
                value: Some(bytes),
            },
            Change {
                table: Table::SessionOwners,
                key: owner_key(&session.user, &session.id),
                value: Some(digest),
            },
        ];
        self.store.write(changes).await.map_err(backend)
    }

    async fn load(&self, id: &Id) -> Stored<Option<Record>> {
        let Some(session) = self.read(&self.digest(id)).map_err(backend)? else {
            return Ok(None);
        };
        let mut record = record_of(&session).map_err(backend)?;
        record.id = *id;
        Ok(Some(record))
    }

    async fn delete(&self, id: &Id) -> Stored<()> {
        let digest = self.digest(id);
        match self.read(&digest).map_err(backend)? {
            Some(session) => {
                let changes = removal(&digest, &session).into();
                self.store.write(changes).await.map_err(backend)
            }
            None => Ok(()),
        }
    }
}
