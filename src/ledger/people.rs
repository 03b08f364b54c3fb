//! Reads of users, tokens and runtimes.

use std::ops::{Bound, ControlFlow};

use crate::domain::identity::{Credentials, Runtime, RuntimeKey, Token, TokenKey, User, UserKey};

use super::error::ReadError;
use super::projection::people::{self, SessionOwner, TokenOwner};
use super::store::{Direction, Table};
use super::{Ledger, read};

impl Ledger {
    /// Whose token has this keyed hash. One snapshot and three look-ups: what is committed counts at once.
    pub fn token_owner(&self, digest: &[u8]) -> Result<Option<TokenOwner>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let Some(key) = snapshot.get(Table::TokenDigests, digest)? else {
            return Ok(None);
        };
        let Some(token) = read::get::<Token>(&*snapshot, Table::Tokens, &key)? else {
            return Ok(None);
        };
        let owner = people::user_key(&token.key.owner);
        let user = read::get::<User>(&*snapshot, Table::Users, &owner)?;
        Ok(user.map(|user| TokenOwner { user, token }))
    }

    /// A token and its user, by the token's public key.
    pub fn token(&self, key: &TokenKey) -> Result<Option<TokenOwner>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let token = read::get::<Token>(&*snapshot, Table::Tokens, &people::token_key(key))?;
        let user = read::get::<User>(&*snapshot, Table::Users, &people::user_key(&key.owner))?;
        Ok(user
            .zip(token)
            .map(|(user, token)| TokenOwner { user, token }))
    }

    /// A user, what it logs in with, and one of its tokens: all as of one moment.
    pub fn session_owner(
        &self,
        key: &UserKey,
        token: Option<&TokenKey>,
    ) -> Result<Option<SessionOwner>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let row = people::user_key(key);
        let Some(user) = read::get::<User>(&*snapshot, Table::Users, &row)? else {
            return Ok(None);
        };
        let credentials = read::get::<Credentials>(&*snapshot, Table::Credentials, &row)?;
        let token = match token {
            Some(token) => read::get(&*snapshot, Table::Tokens, &people::token_key(token))?,
            None => None,
        };
        let era = credentials.as_ref().map_or(0, |kept| kept.era);
        Ok(Some(SessionOwner {
            user,
            token,
            password: credentials.and_then(|kept| kept.password),
            era,
        }))
    }

    /// All users, by tenant and id.
    pub fn users(&self) -> Result<Vec<User>, ReadError> {
        read::all(&*self.inner.store.snapshot()?, Table::Users)
    }

    pub fn user(&self, key: &UserKey) -> Result<Option<User>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        read::get(&*snapshot, Table::Users, &people::user_key(key))
    }

    /// All runtimes, by tenant and name.
    pub fn runtimes(&self) -> Result<Vec<Runtime>, ReadError> {
        read::all(&*self.inner.store.snapshot()?, Table::Runtimes)
    }

    pub fn runtime(&self, key: &RuntimeKey) -> Result<Option<Runtime>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        read::get(&*snapshot, Table::Runtimes, &people::runtime_key(key))
    }

    /// A user's tokens, by id.
    pub fn tokens(&self, owner: &UserKey) -> Result<Vec<Token>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let first = people::token_key(&TokenKey {
            owner: owner.clone(),
            token: "".into(),
        });
        let mut tokens = Vec::new();
        let bounds = (Bound::Included(&first[..]), Bound::Unbounded);
        snapshot.scan(Table::Tokens, bounds, Direction::Up, &mut |key, bytes| {
            if !key.starts_with(&first) {
                return ControlFlow::Break(());
            }
            tokens.push(read::entry(Table::Tokens, bytes));
            ControlFlow::Continue(())
        })?;
        tokens.into_iter().collect()
    }
}
