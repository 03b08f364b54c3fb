//! How events change users, tokens and runtimes. Each event changes one entry, by a pure fold that State,
//! the projections and their verification share.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use crate::domain::event::Event;
use crate::domain::identity::{
    Credentials, PasswordHash, Reservation, Runtime, RuntimeKey, Token, TokenDigest, TokenHash,
    TokenKey, User, UserKey,
};
use crate::domain::ids::PlaneId;
use crate::domain::notify::Notify;
use crate::domain::tenant::{Allowance, Quotas, Tenant, UserAllowance};
use crate::domain::time::Timestamp;

/// All people.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct People {
    pub users: BTreeMap<UserKey, User>,
    pub tokens: BTreeMap<TokenKey, Token>,
    pub runtimes: BTreeMap<RuntimeKey, Runtime>,
    pub credentials: BTreeMap<UserKey, Credentials>,
    /// Tenants of which something was said.
    pub tenants: BTreeMap<SmolStr, Tenant>,
    /// Of users that have some.
    pub quotas: BTreeMap<UserKey, Quotas>,
    /// Those of all tokens: an index, not part of a snapshot.
    #[serde(skip)]
    digests: BTreeSet<TokenDigest>,
}

/// The entry that an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    User(UserKey),
    Token(TokenKey),
    Runtime(RuntimeKey),
    Credentials(UserKey),
    Tenant(SmolStr),
    Quotas(UserKey),
}

/// Which entry an event changes, if any.
pub fn subject(event: &Event) -> Option<Subject> {
    Some(match event {
        Event::UserCreated { key, .. }
        | Event::UserUpdated { key, .. }
        | Event::UserDeleted { key } => Subject::User(key.clone()),
        Event::TokenIssued { owner, token } => Subject::Token(TokenKey {
            owner: owner.clone(),
            token: token.token.clone(),
        }),
        Event::TokenRevoked { key, .. } | Event::TokenUpgraded { key, .. } => {
            Subject::Token(key.clone())
        }
        Event::RuntimeReserved { key, .. }
        | Event::RuntimeAssigned { key, .. }
        | Event::RuntimePurging { key }
        | Event::RuntimeReleased { key } => Subject::Runtime(key.clone()),
        Event::PlaneOpened {
            tenant, runtime, ..
        } => Subject::Runtime(RuntimeKey {
            tenant: tenant.clone(),
            runtime: runtime.clone(),
        }),
        Event::PasswordChanged { key, .. }
        | Event::PasswordRehashed { key, .. }
        | Event::SessionsEnded { key } => Subject::Credentials(key.clone()),
        Event::TenantCreated { tenant, .. }
        | Event::TenantUpdated { tenant, .. }
        | Event::TenantAllowanceChanged { tenant, .. }
        | Event::TenantNotifyChanged { tenant, .. } => Subject::Tenant(tenant.clone()),
        Event::UserAllowanceChanged { key, .. } => Subject::User(key.clone()),
        Event::UserQuotasChanged { key, .. } => Subject::Quotas(key.clone()),
        _ => return None,
    })
}

/// A user after an event about it.
pub fn fold_user(user: Option<User>, event: &Event, at: Timestamp) -> Option<User> {
    match event {
        Event::UserCreated {
            key,
            profile,
            plane,
        } => Some(User {
            key: key.clone(),
            profile: profile.clone(),
            plane: *plane,
            allowance: UserAllowance::default(),
            created_at: at,
            updated_at: at,
        }),
        Event::UserAllowanceChanged { allowance, .. } => user.map(|user| User {
            allowance: *allowance,
            updated_at: at,
            ..user
        }),
        Event::UserUpdated { profile, plane, .. } => user.map(|user| User {
            profile: profile.clone(),
            plane: *plane,
            updated_at: at,
            ..user
        }),
        Event::UserDeleted { .. } => None,
        _ => user,
    }
}

/// A token after an event about it.
pub fn fold_token(token: Option<Token>, event: &Event, at: Timestamp) -> Option<Token> {
    match event {
        Event::TokenIssued { owner, token } => Some(Token {
            key: TokenKey {
                owner: owner.clone(),
                token: token.token.clone(),
            },
            name: token.name.clone(),
            scopes: token.scopes.clone(),
            hash: token.hash.clone(),
            expires_at: token.expires_at,
            created_at: at,
        }),
        Event::TokenRevoked { .. } => None,
        Event::TokenUpgraded { digest, .. } => token.map(|token| Token {
            hash: TokenHash::Keyed(*digest),
            ..token
        }),
        _ => token,
    }
}

/// A runtime after an event about it.
pub fn fold_runtime(runtime: Option<Runtime>, event: &Event, at: Timestamp) -> Option<Runtime> {
    if let Event::PlaneOpened {
        plane,
        tenant,
        runtime,
    } = event
    {
        return Some(Runtime {
            key: RuntimeKey {
                tenant: tenant.clone(),
                runtime: runtime.clone(),
            },
            plane: *plane,
            reservation: None,
        });
    }
    let mut runtime = runtime?;
    match event {
        Event::RuntimeReserved { owner, reason, .. } => {
            runtime.reservation = Some(Reservation {
                owner: owner.clone(),
                reason: *reason,
                purging: false,
                created_at: at,
                updated_at: at,
            });
        }
        Event::RuntimeAssigned { .. } => runtime.reservation = None,
        Event::RuntimePurging { .. } => {
            if let Some(reservation) = &mut runtime.reservation {
                reservation.purging = true;
                reservation.updated_at = at;
            }
        }
        Event::RuntimeReleased { .. } => return None,
        _ => {}
    }
    Some(runtime)
}

/// A user's credentials after an event about them.
pub fn fold_credentials(credentials: Option<Credentials>, event: &Event) -> Option<Credentials> {
    let of = |key: &UserKey| {
        credentials.clone().unwrap_or_else(|| Credentials {
            key: key.clone(),
            password: None,
            era: 0,
        })
    };
    match event {
        Event::PasswordChanged { key, password } => {
            let before = of(key);
            Some(Credentials {
                password: password.clone(),
                era: before.era + 1,
                ..before
            })
        }
        Event::PasswordRehashed { key, password } => Some(Credentials {
            password: Some(password.clone()),
            ..of(key)
        }),
        Event::SessionsEnded { key } => {
            let before = of(key);
            Some(Credentials {
                era: before.era + 1,
                ..before
            })
        }
        _ => credentials,
    }
}

/// A tenant after an event about it.
pub fn fold_tenant(tenant: Option<Tenant>, event: &Event, at: Timestamp) -> Option<Tenant> {
    match event {
        Event::TenantCreated { tenant, profile } => Some(Tenant {
            tenant: tenant.clone(),
            profile: profile.clone(),
            allowance: Allowance::default(),
            created_at: at,
            updated_at: at,
            // Until something was said of it, it was enabled.
            era: u64::from(!profile.enabled),
            notify: Notify::default(),
        }),
        Event::TenantNotifyChanged { notify, .. } => tenant.map(|tenant| Tenant {
            notify: notify.clone(),
            updated_at: at,
            ..tenant
        }),
        Event::TenantAllowanceChanged { allowance, .. } => tenant.map(|tenant| Tenant {
            allowance: *allowance,
            updated_at: at,
            ..tenant
        }),
        Event::TenantUpdated { profile, .. } => tenant.map(|tenant| Tenant {
            era: tenant.era + u64::from(tenant.profile.enabled && !profile.enabled),
            profile: profile.clone(),
            updated_at: at,
            ..tenant
        }),
        _ => tenant,
    }
}

/// A user's quotas after an event about them; without any limit there are none.
pub fn fold_quotas(quotas: Option<Quotas>, event: &Event) -> Option<Quotas> {
    match event {
        Event::UserQuotasChanged { quotas, .. } => Some(*quotas).filter(|q| !q.is_unlimited()),
        _ => quotas,
    }
}

fn fold<K: Ord, V>(
    entries: &mut BTreeMap<K, V>,
    key: K,
    fold: impl FnOnce(Option<V>) -> Option<V>,
) {
    let before = entries.remove(&key);
    if let Some(after) = fold(before) {
        entries.insert(key, after);
    }
}

impl People {
    /// Applies an event; one that is about nobody changes nothing.
    pub fn apply(&mut self, event: &Event, at: Timestamp) {
        match subject(event) {
            Some(Subject::User(key)) => fold(&mut self.users, key, |u| fold_user(u, event, at)),
            Some(Subject::Token(key)) => self.apply_token(key, event, at),
            Some(Subject::Runtime(key)) => {
                fold(&mut self.runtimes, key, |r| fold_runtime(r, event, at));
            }
            Some(Subject::Credentials(key)) => {
                fold(&mut self.credentials, key, |c| fold_credentials(c, event));
            }
            Some(Subject::Tenant(key)) => {
                fold(&mut self.tenants, key, |t| fold_tenant(t, event, at));
            }
            Some(Subject::Quotas(key)) => fold(&mut self.quotas, key, |q| fold_quotas(q, event)),
            None => {}
        }
    }

    fn apply_token(&mut self, key: TokenKey, event: &Event, at: Timestamp) {
        let before = self.tokens.remove(&key);
        if let Some(before) = &before {
            self.digests.remove(&before.hash.digest());
        }
        if let Some(after) = fold_token(before, event, at) {
            self.digests.insert(after.hash.digest());
            self.tokens.insert(key, after);
        }
    }

    /// Makes the index of tokens anew.
    pub(super) fn index_tokens(&mut self) {
        let digests = self.tokens.values().map(|token| token.hash.digest());
        self.digests = digests.collect();
    }

    /// Whether a token is found by this.
    pub fn is_taken(&self, digest: &TokenDigest) -> bool {
        self.digests.contains(digest)
    }

    /// A tenant's users, by id.
    pub fn users_of<'a>(&'a self, tenant: &'a SmolStr) -> impl Iterator<Item = &'a User> {
        let first = UserKey {
            tenant: tenant.clone(),
            user: SmolStr::default(),
        };
        let users = self.users.range(first..).map(|(_, user)| user);
        users.take_while(move |user| user.key.tenant == *tenant)
    }

    /// A user's tokens, by id.
    pub fn tokens_of<'a>(&'a self, owner: &'a UserKey) -> impl Iterator<Item = &'a Token> {
        let first = TokenKey {
            owner: owner.clone(),
            token: SmolStr::default(),
        };
        self.tokens
            .range(first..)
            .map(|(_, token)| token)
            .take_while(move |token| token.key.owner == *owner)
    }

    /// The hash of a user's password.
    pub fn password_of(&self, key: &UserKey) -> Option<&PasswordHash> {
        self.credentials.get(key)?.password.as_ref()
    }

    /// Runtimes whose purge has begun.
    pub fn purging(&self) -> impl Iterator<Item = &Runtime> {
        let runtimes = self.runtimes.values();
        runtimes.filter(|runtime| runtime.reservation.as_ref().is_some_and(|r| r.purging))
    }

    /// The plane of a runtime that was opened and not released.
    pub fn plane_of(&self, key: &RuntimeKey) -> Option<PlaneId> {
        self.runtimes.get(key).map(|runtime| runtime.plane)
    }
}
