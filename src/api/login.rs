//! Whether somebody is who it says: a token or a password for a session. Who does not exist, is disabled or has no
//! password gets the same answer as who is wrong, for the same work.

use super::authenticate::{Asking, whose};
use super::error::{ApiError, ErrorCode};
use super::state::App;
use crate::auth::Principal;
use crate::auth::password::Verdict;
use crate::auth::session::Basis;
use crate::domain::identity::{IdentityCommand, PasswordHash, User, UserKey};

/// What somebody shows.
pub enum Proof {
    Token(String),
    Password(String),
}

/// Who somebody has proven to be, and what a session of it stands on.
pub struct Proven {
    pub principal: Principal,
    pub basis: Basis,
    pub era: u64,
}

impl Proven {
    /// Of the token that was shown; `None` for a password.
    pub fn fingerprint(&self) -> Option<&str> {
        match self.basis {
            Basis::Password => None,
            Basis::Token(_) | Basis::FirstAdmin(_) => Some(&self.principal.fingerprint),
        }
    }
}

/// Tries a proof on a user; of a token its tenant may be left open. The inner error is the answer to a wrong proof.
pub async fn prove(
    app: &App,
    user: &str,
    tenant: Option<&str>,
    proof: Proof,
    asking: &Asking<'_>,
) -> Result<Result<Proven, ApiError>, ApiError> {
    match proof {
        Proof::Token(token) => by_token(app, user, tenant, &token, asking).await,
        Proof::Password(password) => {
            let key = UserKey {
                tenant: tenant.unwrap_or("default").into(),
                user: user.into(),
            };
            by_password(app, &key, password, asking).await
        }
    }
}

fn wrong(detail: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::LoginFailed, detail.into())
}

async fn by_token(
    app: &App,
    user: &str,
    tenant: Option<&str>,
    token: &str,
    asking: &Asking<'_>,
) -> Result<Result<Proven, ApiError>, ApiError> {
    let read = || app.auth.read_token(token.as_bytes());
    let found = match read() {
        Some(shown) => whose(app, shown, asking).await?,
        None => None,
    };
    let invalid = || Ok(Err(wrong("Invalid Gateway user token")));
    let Some(found) = found else {
        return invalid();
    };
    let key = &found.user;
    if key.user != user || tenant.is_some_and(|tenant| key.tenant != tenant) {
        let detail = format!(
            "Gateway token resolved to user '{}', not '{user}'.",
            key.user
        );
        return Ok(Err(wrong(detail)));
    }
    // The era first, then the token: were all ended in between, the session would be of an era that is over.
    let owner = app.ledger.session_owner(key, None)?;
    let era = owner.map_or(0, |owner| owner.era);
    let again = match read() {
        Some(shown) => whose(app, shown, asking).await?,
        None => None,
    };
    let Some(principal) = again else {
        return invalid();
    };
    let basis = match &principal.token {
        Some(token) => Basis::Token(token.clone()),
        None => Basis::FirstAdmin(app.auth.admin_digest()),
    };
    Ok(Ok(Proven {
        principal,
        basis,
        era,
    }))
}

async fn by_password(
    app: &App,
    key: &UserKey,
    password: String,
    asking: &Asking<'_>,
) -> Result<Result<Proven, ApiError>, ApiError> {
    app.slow_hashes.check()?;
    let owner = app.ledger.session_owner(key, None)?;
    let kept = owner.as_ref().and_then(|owner| owner.password.clone());
    let verdict = check(app, &password, kept.clone()).await?;
    let invalid = || Ok(Err(wrong("Invalid Gateway user or password")));
    let (Some(owner), Some(kept), Verdict::Right { is_outdated }) = (owner, kept, verdict) else {
        return invalid();
    };
    let Some(principal) = Principal::of_password(&owner.user, &[0; 32]) else {
        return invalid();
    };
    if is_outdated {
        rehash(app, &owner.user, kept, password, asking).await;
    }
    Ok(Ok(Proven {
        principal,
        basis: Basis::Password,
        era: owner.era,
    }))
}

/// Whether a password is the one that was kept.
pub async fn check(
    app: &App,
    password: &str,
    kept: Option<PasswordHash>,
) -> Result<Verdict, ApiError> {
    let (passwords, password) = (app.logins.passwords.clone(), password.to_owned());
    let checked = app
        .slow_hashes
        .compute(move || passwords.check(&password, kept.as_ref()));
    checked.await
}

/// What is kept of a password.
pub async fn hash(app: &App, password: String) -> Result<PasswordHash, ApiError> {
    let passwords = app.logins.passwords.clone();
    let hashed = app.slow_hashes.compute(move || passwords.hash(&password));
    hashed.await?.map_err(|error| {
        tracing::error!(%error, "no password can be set");
        ApiError::internal()
    })
}

/// Sees to a stronger hash. Should it fail, the next login sees to it.
async fn rehash(
    app: &App,
    user: &User,
    replaces: PasswordHash,
    password: String,
    asking: &Asking<'_>,
) {
    let Ok(password) = hash(app, password).await else {
        return;
    };
    let command = IdentityCommand::RehashPassword {
        key: user.key.clone(),
        replaces,
        password,
    };
    let of = (user.plane, &user.key);
    if let Err(error) = asking.submit(app, of, None, command).await {
        tracing::warn!(?error, "a password's hash was not renewed");
    }
}
