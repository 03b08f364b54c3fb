//! Reads of users, tokens, runtimes, tenants and quotas.

use std::ops::ControlFlow;

use crate::domain::identity::{Credentials, Runtime, RuntimeKey, Token, TokenKey, User, UserKey};
use crate::domain::ids::RunId;
use crate::domain::tenant::{Quotas, Tenant};

use super::error::ReadError;
use super::projection::inbox::InboxEntry;
use super::projection::people::{self, SessionOwner, TokenOwner};
use super::projection::run::RunSummary;
use super::purge::Purges;
use super::row_cache::{Source, Unread};
use super::store::{Snapshot, Table};
use super::{Ledger, hide_foreign, read};

impl Ledger {
    /// Whose token has this keyed hash. What is committed counts at once (`row_cache`).
    pub fn token_owner(&self, digest: &[u8]) -> Result<Option<TokenOwner>, ReadError> {
        let inner = &*self.inner;
        inner.rows.read(&*inner.store, |rows| {
            match rows.bytes(Table::TokenDigests, digest)? {
                Some(key) => owned(rows, &key),
                None => Ok(None),
            }
        })
    }

    /// A token and its user, by the token's public key.
    pub fn token(&self, key: &TokenKey) -> Result<Option<TokenOwner>, ReadError> {
        let (inner, key) = (&*self.inner, people::token_key(key));
        inner.rows.read(&*inner.store, |rows| owned(rows, &key))
    }

    /// Requests a minute of all users of a tenant together; `None` is unlimited.
    pub fn requests_per_minute(&self, tenant: &str) -> Result<Option<u64>, ReadError> {
        let inner = &*self.inner;
        inner.rows.read(&*inner.store, |rows| {
            let tenant = rows.get::<Tenant>(Table::Tenants, tenant.as_bytes())?;
            Ok(tenant.and_then(|tenant| tenant.allowance.requests_per_minute))
        })
    }

    /// What was said of a tenant.
    pub fn tenant(&self, tenant: &str) -> Result<Option<Tenant>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        read::get(&*snapshot, Table::Tenants, tenant.as_bytes())
    }

    /// Whether a tenant's users are let in: it is not disabled.
    pub fn admits(&self, tenant: &str) -> Result<bool, ReadError> {
        admits(&*self.inner.store.snapshot()?, tenant)
    }

    /// All tenants of which something was said, by id.
    pub fn tenants(&self) -> Result<Vec<Tenant>, ReadError> {
        read::all(&*self.inner.store.snapshot()?, Table::Tenants)
    }

    /// A user's quotas.
    pub fn quotas(&self, key: &UserKey) -> Result<Quotas, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let quotas = read::get(&*snapshot, Table::UserQuotas, &people::user_key(key))?;
        Ok(quotas.unwrap_or_default())
    }

    /// A tenant's runtimes, by name, without those that are being removed.
    pub fn runtimes_of(&self, tenant: &str) -> Result<Vec<Runtime>, ReadError> {
        runtimes_of(&*self.inner.store.snapshot()?, tenant)
    }

    /// A run of any of a tenant's planes. Looks at each of them until it is found: an id of another tenant's takes
    /// as long as one that does not exist.
    pub fn run_of_tenant(&self, tenant: &str, run: RunId) -> Result<Option<RunSummary>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        for runtime in runtimes_of(&*snapshot, tenant)? {
            if let Some(found) = read::run(&*snapshot, runtime.plane, run)? {
                return hide_foreign(&*snapshot, found).map(Some);
            }
        }
        Ok(None)
    }

    /// A command of any of a tenant's planes.
    pub fn command_of_tenant(
        &self,
        tenant: &str,
        id: &str,
    ) -> Result<Option<InboxEntry>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        for runtime in runtimes_of(&*snapshot, tenant)? {
            if let Some(found) = read::command(&*snapshot, runtime.plane, id)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// A user, what it logs in with, and one of its tokens: all as of one moment.
    pub fn session_owner(
        &self,
        key: &UserKey,
        token: Option<&TokenKey>,
    ) -> Result<Option<SessionOwner>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let row = people::user_key(key);
        let tenant: Option<Tenant> = read::get(&*snapshot, Table::Tenants, key.tenant.as_bytes())?;
        if !is_let_in(tenant.as_ref()) {
            return Ok(None);
        }
        let Some(user) = read::get::<User>(&*snapshot, Table::Users, &row)? else {
            return Ok(None);
        };
        let credentials = read::get::<Credentials>(&*snapshot, Table::Credentials, &row)?;
        let token = match token {
            Some(token) => read::get(&*snapshot, Table::Tokens, &people::token_key(token))?,
            None => None,
        };
        // Neither ever shrinks: the sum is the same only as long as both are.
        let era =
            credentials.as_ref().map_or(0, |kept| kept.era) + tenant.map_or(0, |tenant| tenant.era);
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

    /// The same with their quotas, as of one moment.
    pub fn users_with_quotas(&self) -> Result<Vec<(User, Quotas)>, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let any = snapshot.len(Table::UserQuotas)? > 0;
        let mut users = Vec::new();
        read::walk(&*snapshot, Table::Users, &[], |key, bytes| {
            let quotas = match any {
                true => read::get(&*snapshot, Table::UserQuotas, key)?,
                false => None,
            };
            users.push((
                read::entry(Table::Users, bytes)?,
                quotas.unwrap_or_default(),
            ));
            Ok::<_, ReadError>(ControlFlow::Continue(()))
        })?;
        Ok(users)
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
        read::walk(&*snapshot, Table::Tokens, &first, |_, bytes| {
            tokens.push(read::entry(Table::Tokens, bytes)?);
            Ok::<_, ReadError>(ControlFlow::Continue(()))
        })?;
        Ok(tokens)
    }
}

/// A token with its user; a disabled tenant's is as good as none.
fn owned(rows: &Source<'_>, token: &[u8]) -> Result<Option<TokenOwner>, Unread> {
    let Some(token) = rows.get::<Token>(Table::Tokens, token)? else {
        return Ok(None);
    };
    let owner = &token.key.owner;
    let user = rows.get::<User>(Table::Users, &people::user_key(owner))?;
    let tenant = rows.get::<Tenant>(Table::Tenants, owner.tenant.as_bytes())?;
    let user = user.filter(|_| is_let_in(tenant.as_ref()));
    Ok(user.map(|user| TokenOwner { user, token }))
}

fn admits(snapshot: &dyn Snapshot, tenant: &str) -> Result<bool, ReadError> {
    let tenant = read::get::<Tenant>(snapshot, Table::Tenants, tenant.as_bytes())?;
    Ok(is_let_in(tenant.as_ref()))
}

fn is_let_in(tenant: Option<&Tenant>) -> bool {
    tenant.is_none_or(|tenant| tenant.profile.enabled)
}

fn runtimes_of(snapshot: &dyn Snapshot, tenant: &str) -> Result<Vec<Runtime>, ReadError> {
    let first = people::runtime_key(&RuntimeKey {
        tenant: tenant.into(),
        runtime: "".into(),
    });
    let mut runtimes = Vec::new();
    let purges = Purges::of(snapshot);
    read::walk(snapshot, Table::Runtimes, &first, |_, bytes| {
        let runtime: Runtime = read::entry(Table::Runtimes, bytes)?;
        if !purges.has_plane(runtime.plane)? {
            runtimes.push(runtime);
        }
        Ok::<_, ReadError>(ControlFlow::Continue(()))
    })?;
    Ok(runtimes)
}
