//! From a request's headers to the principal, and ending the streams of those who are let in no more.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::response::Response;
use http::{HeaderMap, header};
use http_body_util::BodyExt;

use super::access::{Need, grants};
use super::error::{ApiError, ErrorCode};
use super::state::App;
use super::{sso, work};
use crate::auth::secret::fits_imported;
use crate::auth::{Principal, Shown, Signed};
use crate::clock::now;
use crate::domain::command::{Command, Origin};
use crate::domain::identity::IdentityCommand;
use crate::domain::time::Timestamp;
use crate::ledger::TokenOwner;

/// How long a request waits for its turn to have an imported token checked.
const SLOW_CHECK_WAIT: Duration = Duration::from_secs(2);

/// How often it is looked whether the reader of a stream may still read it.
const WATCH_EVERY: Duration = Duration::from_secs(2);

/// Whose token a request shows; `None` when it shows none that is accepted now. What is committed counts: a
/// revocation holds for the very next request.
pub async fn authenticate(
    app: &App,
    headers: &HeaderMap,
    at: Timestamp,
) -> Result<Option<Principal>, ApiError> {
    let Some(shown) = app.auth.read(headers.get(header::AUTHORIZATION), at) else {
        return Ok(None);
    };
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
        } => return sso::principal(app, (&header, &token), &digest, at).await,
    };
    let mut owner = app.ledger.token_owner(&digest)?;
    if let (None, Some((fingerprint, token))) = (&owner, imported) {
        owner = check_imported(app, &fingerprint, token, digest, at).await?;
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

/// Checks a token against the slow hash that it was imported with, and sees to a keyed one. Few at a time: the
/// rest of the processor is for requests.
async fn check_imported(
    app: &App,
    fingerprint: &[u8],
    token: Vec<u8>,
    digest: [u8; 32],
    at: Timestamp,
) -> Result<Option<TokenOwner>, ApiError> {
    let Some(owner) = app.ledger.token_owner(fingerprint)? else {
        return Ok(None);
    };
    let busy = || {
        ApiError::new(
            ErrorCode::TooManyRequests,
            "Too Many Requests (token checks)",
        )
        .retry_after(1)
    };
    let turn = tokio::time::timeout(SLOW_CHECK_WAIT, app.slow_checks.acquire());
    let _turn = turn.await.map_err(|_| busy())?.map_err(|_| busy())?;
    let hash = owner.token.hash.clone();
    let fits = tokio::task::spawn_blocking(move || fits_imported(&token, &hash)).await;
    if !fits.unwrap_or(false) {
        return Ok(None);
    }
    let origin = Origin {
        plane: owner.user.plane,
        actor: owner.user.key.actor(),
        request_id: None,
        at,
    };
    let upgrade = IdentityCommand::UpgradeToken {
        key: owner.token.key.clone(),
        digest,
    };
    // Should it fail, the next use sees to it.
    let _ = app
        .handle
        .submit(origin, Command::Identity(Box::new(upgrade)))
        .await;
    Ok(Some(owner))
}

/// An answer that ends soon after its reader's token or powers do. Only streams last long enough for that.
pub fn watched(app: &App, principal: Principal, need: Need, response: Response) -> Response {
    let kind = response.headers().get(header::CONTENT_TYPE);
    let is_stream = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    // The first administrator's token counts for as long as the gateway runs.
    let may_end = principal.token.is_some() || principal.signed.is_some();
    if !is_stream || !may_end || response.body().is_end_stream() {
        return response;
    }
    let app = app.clone();
    response.map(|mut body| {
        Body::from_stream(async_stream::stream! {
            let mut ticks = tokio::time::interval(WATCH_EVERY);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                let frame = tokio::select! {
                    biased;
                    _ = ticks.tick() => match still_admitted(&app, &principal, need) {
                        true => continue,
                        false => break,
                    },
                    frame = body.frame() => frame,
                };
                match frame {
                    Some(Ok(frame)) => {
                        if let Ok(bytes) = frame.into_data() {
                            yield Ok(bytes);
                        }
                    }
                    Some(Err(error)) => {
                        yield Err(error);
                        break;
                    }
                    None => break,
                }
            }
        })
    })
}

/// Whether a principal's token is still good for what it was let in to. A ledger that cannot be read ends nobody's
/// stream; it ends the gateway.
fn still_admitted(app: &App, principal: &Principal, need: Need) -> bool {
    if let Some(Signed::Sso { expires_at }) = principal.signed {
        return expires_at > now() && is_still_user(app, principal, need);
    }
    let Some(key) = &principal.token else {
        return true;
    };
    match app.ledger.token(key) {
        Ok(Some(TokenOwner { user, token })) => Principal::of(&user, &token, &[0; 32], now())
            .is_some_and(|now| {
                // A stream may be of another plane of the tenant.
                let reaches = now.sees_tenant() || !principal.sees_tenant();
                now.plane == principal.plane && reaches && grants(need, &now)
            }),
        Ok(None) => false,
        Err(error) => {
            tracing::error!(%error, "whether a stream's reader is still known could not be read");
            true
        }
    }
}

/// Whether somebody who came by single sign-on is still let in, with what its record gives it by now.
fn is_still_user(app: &App, principal: &Principal, need: Need) -> bool {
    let user = match app.ledger.admits(&principal.user.tenant) {
        Ok(false) => Ok(None),
        Ok(true) => app.ledger.user(&principal.user),
        Err(error) => Err(error),
    };
    match user {
        Ok(Some(user)) => {
            let mut now = principal.clone();
            if user.power() < now.power() {
                now.roles.clone_from(&user.profile.roles);
            }
            now.user_scopes.clone_from(&user.profile.scopes);
            let reaches = now.sees_tenant() || !principal.sees_tenant();
            let enabled = user.profile.enabled && reaches;
            enabled && user.plane == principal.plane && grants(need, &now)
        }
        Ok(None) => false,
        Err(error) => {
            tracing::error!(%error, "whether a stream's reader is still known could not be read");
            true
        }
    }
}
