//! Users, tokens and runtimes as requests read them, and the index that a token is found by.

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
    let change = |table, key, value| Change { table, key, value };
    Ok(match subject {
        Subject::User(key) => {
            let key = user_key(&key);
            let before = entry(get(Table::Users, &key)?, Table::Users)?;
            let after = fold_user(before, event, at);
            vec![change(Table::Users, key, after.as_ref().map(encode))]
        }
        Subject::Credentials(key) => {
            let key = user_key(&key);
            let before = entry(get(Table::Credentials, &key)?, Table::Credentials)?;
            let after = fold_credentials(before, event);
            vec![change(Table::Credentials, key, after.as_ref().map(encode))]
        }
        Subject::Runtime(key) => {
            let key = runtime_key(&key);
            let before = entry(get(Table::Runtimes, &key)?, Table::Runtimes)?;
            let after = fold_runtime(before, event, at);
            vec![change(Table::Runtimes, key, after.as_ref().map(encode))]
        }
        Subject::Token(key) => {
            let key = token_key(&key);
            let before: Option<Token> = entry(get(Table::Tokens, &key)?, Table::Tokens)?;
            let after = fold_token(before.clone(), event, at);
            let mut changes = Vec::new();
            if let Some(before) = before {
                let digest = before.hash.digest().as_bytes().to_vec();
                changes.push(change(Table::TokenDigests, digest, None));
            }
            if let Some(after) = &after {
                let digest = after.hash.digest().as_bytes().to_vec();
                changes.push(change(Table::TokenDigests, digest, Some(key.clone())));
            }
            changes.push(change(Table::Tokens, key, after.as_ref().map(encode)));
            changes
        }
        Subject::Tenant(tenant) => {
            let key = tenant.as_bytes().to_vec();
            let before = entry(get(Table::Tenants, &key)?, Table::Tenants)?;
            let after = fold_tenant(before, event, at);
            vec![change(Table::Tenants, key, after.as_ref().map(encode))]
        }
        Subject::Quotas(key) => {
            let key = user_key(&key);
            let before = entry(get(Table::UserQuotas, &key)?, Table::UserQuotas)?;
            let after = fold_quotas(before, event);
            vec![change(Table::UserQuotas, key, after.as_ref().map(encode))]
        }
    })
}

fn entry<T: serde::de::DeserializeOwned>(
    bytes: Option<Vec<u8>>,
    table: Table,
) -> Result<Option<T>, ReadError> {
    bytes.map(|bytes| read::entry(table, &bytes)).transpose()
}
