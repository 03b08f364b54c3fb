//! Users, tokens and runtimes as requests read them, and the index that a token is found by.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::domain::event::Event;
use crate::domain::identity::{PasswordHash, RuntimeKey, Token, TokenKey, User, UserKey};
use crate::domain::state::user::{
    Subject, fold_credentials, fold_quotas, fold_runtime, fold_tenant, fold_token, fold_user,
    subject,
};
use crate::domain::time::Timestamp;
use crate::ledger::error::ReadError;
use crate::ledger::read;
use crate::ledger::record_codec::encode;
use crate::ledger::store::Table;

/// A user and one of its tokens, as a request that shows the token needs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenOwner {
    pub user: User,
    pub token: Token,
}

/// What a session stands on, as of one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOwner {
    pub user: User,
    /// The token that it began with, if it still exists.
    pub token: Option<Token>,
    pub password: Option<PasswordHash>,
    /// See `Credentials`; 0 for a user without.
    pub era: u64,
}

/// One entry of one table; `None` removes it.
pub struct Change {
    pub table: Table,
    pub key: Vec<u8>,
    pub value: Option<Vec<u8>>,
}

/// Parts are sanitised ids, so that none holds a NUL.
fn joined(parts: &[&str]) -> Vec<u8> {
    parts.join("\0").into_bytes()
}

pub fn user_key(key: &UserKey) -> Vec<u8> {
    joined(&[&key.tenant, &key.user])
}

pub fn token_key(key: &TokenKey) -> Vec<u8> {
    joined(&[&key.owner.tenant, &key.owner.user, &key.token])
}

pub fn runtime_key(key: &RuntimeKey) -> Vec<u8> {
    joined(&[&key.tenant, &key.runtime])
}

/// What an event changes; `get` reads an entry as it was before.
pub fn changes(
    event: &Event,
    at: Timestamp,
    get: impl Fn(Table, &[u8]) -> Result<Option<Vec<u8>>, ReadError>,
) -> Result<Vec<Change>, ReadError> {
    let Some(subject) = subject(event) else {
        return Ok(Vec::new());
    };
    match subject {
        Subject::User(key) => folded(get, Table::Users, user_key(&key), |user| {
            fold_user(user, event, at)
        }),
        Subject::Credentials(key) => folded(get, Table::Credentials, user_key(&key), |kept| {
            fold_credentials(kept, event)
        }),
        Subject::Runtime(key) => folded(get, Table::Runtimes, runtime_key(&key), |runtime| {
            fold_runtime(runtime, event, at)
        }),
        Subject::Tenant(key) => folded(get, Table::Tenants, key.as_bytes().to_vec(), |tenant| {
            fold_tenant(tenant, event, at)
        }),
        Subject::Quotas(key) => folded(get, Table::UserQuotas, user_key(&key), |quotas| {
            fold_quotas(quotas, event)
        }),
        Subject::Token(key) => {
            let key = token_key(&key);
            let mut digests = Vec::new();
            let mut digest = |token: &Option<Token>, value: Option<&Vec<u8>>| {
                digests.extend(token.as_ref().map(|token| Change {
                    table: Table::TokenDigests,
                    key: token.hash.digest().as_bytes().to_vec(),
                    value: value.cloned(),
                }));
            };
            let mut changes = folded(get, Table::Tokens, key.clone(), |before| {
                digest(&before, None);
                let after = fold_token(before, event, at);
                digest(&after, Some(&key));
                after
            })?;
            changes.extend(digests);
            Ok(changes)
        }
    }
}

/// What a fold makes of one entry.
fn folded<T: Serialize + DeserializeOwned>(
    get: impl Fn(Table, &[u8]) -> Result<Option<Vec<u8>>, ReadError>,
    table: Table,
    key: Vec<u8>,
    fold: impl FnOnce(Option<T>) -> Option<T>,
) -> Result<Vec<Change>, ReadError> {
    let before = get(table, &key)?;
    let before = before.map(|bytes| read::entry(table, &bytes)).transpose()?;
    let value = fold(before).as_ref().map(encode);
    Ok(vec![Change { table, key, value }])
}
