//! From a request's headers to the principal: by a token, or by the session of a browser.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, header};
use smol_str::SmolStr;
use tokio::time::Instant;

use super::access::{Need, grants};
use super::client::Client;
use super::cookies;
use super::error::ApiError;
use super::guard::{Caller, unauthorized};
use super::state::App;
use super::{sso, work};
use crate::auth::secret::fits_imported;
use crate::auth::session::{Basis, Digest, Session};
use crate::auth::{Principal, Shown, Signed, fingerprint};
use crate::clock::now;
use crate::coordinator::SubmitError;
use crate::domain::audit::Source;
use crate::domain::command::{Command, Origin};
use crate::domain::identity::{IdentityCommand, Token, TokenHash, UserKey};
use crate::domain::ids::PlaneId;
use crate::domain::tenant::Tenancy;
use crate::domain::time::Timestamp;
use crate::ledger::{ReadError, TokenOwner};

/// How often it is looked whether the reader of a stream may still read it.
const WATCH_EVERY: Duration = Duration::from_secs(2);

/// A request whose sender is being found out, for the records of what that brings about besides: somebody who is made
/// known, a hash that is renewed.
#[derive(Clone, Copy)]
pub struct Asking<'a> {
    /// `None` where nothing is audited, of a route without credentials.
    pub request_id: Option<&'a SmolStr>,
    pub at: Timestamp,
    /// The request, as it came; `None` where nothing is audited.
    pub source: &'a (dyn Fn() -> Option<Source> + Sync),
}

impl Asking<'_> {
    /// Changes something about the sender of the request, whose token has this keyed hash.
    pub async fn submit(
        &self,
        app: &App,
        (plane, user): (PlaneId, &UserKey),
        digest: Option<&[u8; 32]>,
        command: IdentityCommand,
    ) -> Result<(), SubmitError> {
        let origin = Origin {
            plane,
            actor: user.actor(),
            request_id: self.request_id.cloned(),
            tenancy: Tenancy::All,
            at: self.at,
        };
        let source = (self.source)().map(|mut source| {
            source.user = Some(user.clone());
            source.token = digest.map(|digest| SmolStr::from(fingerprint(digest)));
            Arc::new(source)
        });
        let command = Command::Identity(Box::new(command));
        app.handle.put(origin, command, None, source).await?;
        Ok(())
    }
}

/// Who makes a request; `None` when it shows nothing that is accepted now. What is committed counts: a revocation
/// holds for the very next request. An `Authorization` header stands alone, whether it is right or wrong.
pub async fn authenticate(
    app: &App,
    client: Client,
    headers: &HeaderMap,
    asking: &Asking<'_>,
) -> Result<Option<Principal>, ApiError> {
    let at = asking.at;
    if let Some(authorization) = headers.get(header::AUTHORIZATION) {
        return match app.auth.read(Some(authorization), at) {
            Some(shown) => whose(app, shown, asking).await,
            None => Ok(None),
        };
    }
    let Some(secret) = cookies::secret(client, headers) else {
        return Ok(None);
    };
    let Some((digest, session)) = app.logins.sessions.find(&secret, at)? else {
        return Ok(None);
    };
    let principal = principal_of(app, &digest, session, at)?;
    if principal.is_some() {
        app.logins.sessions.note_use(&digest, at);
    }
    Ok(principal)
}

/// Whose token was shown.
pub async fn whose(
    app: &App,
    shown: Shown,
    asking: &Asking<'_>,
) -> Result<Option<Principal>, ApiError> {
    let at = asking.at;
    let (digest, imported) = match shown {
        Shown::FirstAdmin(principal) => return Ok(Some(*principal)),
        Shown::Token { digest } => (digest, None),
        Shown::Foreign {
            digest,
            fingerprint,
            token,
        } => (digest, Some((fingerprint, token))),
        Shown::Work { digest, work } => return work::principal(app, work, &digest),
        Shown::Sso {
            digest,
            header,
            token,
            // On the heap, as few requests come this way: every request would carry the room for it.
        } => return Box::pin(sso::principal(app, (&header, &token), &digest, asking)).await,
    };
    let mut owner = app.ledger.token_owner(&digest)?;
    if let (None, Some((fingerprint, token))) = (&owner, imported) {
        owner = Box::pin(check_imported(app, &fingerprint, token, digest, asking)).await?;
    }
    let Some(TokenOwner { user, token }) = owner else {
        return Ok(None);
    };
    let principal = Principal::of(&user, &token, &digest, at);
    if principal.is_some() {
        app.auth.note_use(&token.key, at);
    }
    Ok(principal)
}

/// Who a session is; `None` when what it stands on counts no more. Its own time is not looked at.
pub fn principal_of(
    app: &App,
    digest: &Digest,
    session: Session,
    at: Timestamp,
) -> Result<Option<Principal>, ReadError> {
    let principal = stands_on(app, &session, at)?;
    Ok(principal.map(|principal| principal.by_session(*digest, session)))
}

/// Whose token or password a session began with, if that still counts.
fn stands_on(app: &App, session: &Session, at: Timestamp) -> Result<Option<Principal>, ReadError> {
    let token = match &session.basis {
        Basis::FirstAdmin(of) => return Ok(app.auth.first_admin(of)),
        Basis::Token(token) => Some(token),
        Basis::Password => None,
    };
    let Some(owner) = app.ledger.session_owner(&session.user, token)? else {
        return Ok(None);
    };
    if owner.era != session.era {
        return Ok(None);
    }
    Ok(match (token, owner.token) {
        (Some(_), Some(token)) => Principal::of(&owner.user, &token, &digest_of(&token), at),
        (Some(_), None) => None,
        (None, _) => Principal::of_password(&owner.user, &[0; 32]),
    })
}

/// The keyed hash that a token is known by, so that its fingerprint is the same in whatever way it is shown.
fn digest_of(token: &Token) -> [u8; 32] {
    match token.hash {
        TokenHash::Keyed(digest) => digest,
        // Nobody has logged in with one that was imported and not used yet.
        TokenHash::Pbkdf2 { .. } => [0; 32],
    }
}

/// Whether what a session stands on still counts. One that cannot be looked up stays.
pub fn session_counts(app: &App, session: &Session, at: Timestamp) -> bool {
    !matches!(stands_on(app, session, at), Ok(None))
}

/// Checks a token against the slow hash that it was imported with, and sees to a keyed one.
async fn check_imported(
    app: &App,
    fingerprint: &[u8],
    token: Vec<u8>,
    digest: [u8; 32],
    asking: &Asking<'_>,
) -> Result<Option<TokenOwner>, ApiError> {
    let Some(owner) = app.ledger.token_owner(fingerprint)? else {
        return Ok(None);
    };
    let hash = owner.token.hash.clone();
    let fits = app
        .slow_hashes
        .compute(move || fits_imported(&token, &hash));
    if !fits.await? {
        return Ok(None);
    }
    let upgrade = IdentityCommand::UpgradeToken {
        key: owner.token.key.clone(),
        digest,
    };
    // Should it fail, the next use sees to it.
    let user = (owner.user.plane, &owner.user.key);
    let _ = asking.submit(app, user, Some(&digest), upgrade).await;
    Ok(Some(owner))
}

/// Whether the reader of a stream may still read it: looked at now and then, as only streams last long enough for a
/// token, a session or a role to end meanwhile.
pub struct Watch {
    app: App,
    principal: Arc<Principal>,
    need: Need,
    /// `None` for the first administrator's token, which counts for as long as the gateway runs.
    due: Option<Instant>,
}

impl Watch {
    /// Of a caller who was let in just now.
    pub fn new(app: &App, caller: &Caller) -> Watch {
        let principal = caller.principal.clone();
        let may_end =
            principal.token.is_some() || principal.signed.is_some() || principal.session.is_some();
        Watch {
            app: app.clone(),
            principal,
            need: caller.need,
            due: may_end.then(|| Instant::now() + WATCH_EVERY),
        }
    }

    /// The earlier of a time and the next look.
    pub fn due_by(&self, time: Instant) -> Instant {
        self.due.map_or(time, |due| due.min(time))
    }

    /// Whether the stream goes on; looks when it is time to.
    pub fn admits(&mut self, now: Instant) -> bool {
        match self.due {
            Some(due) if due <= now => {
                self.due = Some(now + WATCH_EVERY);
                self.is_admitted()
            }
            _ => true,
        }
    }

    /// What cannot be read ends nobody's stream; if it is the ledger, it ends the gateway.
    fn is_admitted(&self) -> bool {
        is_still_admitted(&self.app, &self.principal, self.need).unwrap_or(true)
    }
}

/// Looks again at a caller's credentials where it let the gateway wait: what was ended meanwhile writes nothing more.
///
/// # Errors
/// 401, as for who shows none.
pub fn readmit(app: &App, caller: &Caller, path: &str) -> Result<(), ApiError> {
    match is_still_admitted(app, &caller.principal, caller.need)? {
        true => Ok(()),
        false => Err(unauthorized(path)),
    }
}

/// Whether a principal would be let in now to what it was let in to.
fn is_still_admitted(app: &App, before: &Principal, need: Need) -> Result<bool, ApiError> {
    let Some(now) = readmitted(app, before)? else {
        return Ok(false);
    };
    // What it does may be in another plane of the tenant.
    let reaches = now.sees_tenant() || !before.sees_tenant();
    Ok(now.plane == before.plane && reaches && grants(need, &now))
}

/// The principal as it is now; `None` when it would be let in no more.
fn readmitted(app: &App, principal: &Principal) -> Result<Option<Principal>, ApiError> {
    let at = now();
    if let Some(live) = &principal.session {
        return match app.logins.sessions.by_digest(&live.digest, at)? {
            Some(session) => Ok(principal_of(app, &live.digest, session, at)?),
            None => Ok(None),
        };
    }
    if let Some(Signed::Sso { expires_at }) = principal.signed {
        return match expires_at > at {
            true => as_recorded(app, principal),
            false => Ok(None),
        };
    }
    if let Some(Signed::Work(work)) = &principal.signed {
        return work::principal(app, work.clone(), &[0; 32]);
    }
    let Some(key) = &principal.token else {
        return Ok(Some(principal.clone()));
    };
    let owner = app.ledger.token(key)?;
    Ok(owner.and_then(|owner| Principal::of(&owner.user, &owner.token, &[0; 32], at)))
}

/// Somebody who came by single sign-on, with what its record gives it by now.
fn as_recorded(app: &App, principal: &Principal) -> Result<Option<Principal>, ApiError> {
    if !app.ledger.admits(&principal.user.tenant)? {
        return Ok(None);
    }
    let Some(user) = app.ledger.user(&principal.user)? else {
        return Ok(None);
    };
    let mut now = principal.clone();
    if user.power() < now.power() {
        now.roles.clone_from(&user.profile.roles);
    }
    now.plane = user.plane;
    now.user_scopes.clone_from(&user.profile.scopes);
    Ok(user.profile.enabled.then_some(now))
}
