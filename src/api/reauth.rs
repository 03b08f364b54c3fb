//! Showing again who one is, before what the thief of a session would do first: make a token, set a first password,
//! change an e-mail address, purge a runtime (OWASP ASVS 5.0, V7). A Bearer token is itself the proof, as whoever sends it
//! has it, and so is a login just now. And what is made to log in with gives nobody more than it has.

use super::access::lacks_role;
use super::authenticate::Asking;
use super::error::{ApiError, ErrorCode};
use super::fields::Fields;
use super::guard::Caller;
use super::login::{Proof, prove};
use super::session::{MAX_SECRET_BYTES, throttled};
use super::state::App;
use crate::auth::throttle::Trying;
use crate::auth::{Principal, Signed};
use crate::domain::audit::Source;
use crate::domain::time::Timestamp;

/// The members of a body that show it.
pub const MEMBERS: [&str; 2] = ["current_password", "current_token"];

/// How long a login is proof enough.
const FRESH_MS: u64 = 15 * 60_000;

/// By what a caller has shown who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// What it came by: a Bearer token, or a session that began just now; or one of its tokens besides.
    Credentials,
    /// Its password, now.
    Password,
}

/// What a body shows; `None` for nothing, or with the fault recorded.
pub fn read_current(fields: &Fields) -> Option<Proof> {
    let secret = |name| fields.secret(name, MAX_SECRET_BYTES);
    match (fields.has("current_token"), fields.has("current_password")) {
        (true, true) => {
            let message = "Value error, a token or a password, not both";
            fields.fault("current_token", "value_error", message);
            None
        }
        (true, false) => secret("current_token").map(Proof::Token),
        (false, true) => secret("current_password").map(Proof::Password),
        (false, false) => None,
    }
}

/// Lets a caller pass that shows who it is, or need not.
///
/// # Errors
/// 403 when it must and does not, or what it shows is wrong; 429 after too many of those, as for logins.
pub async fn confirm(
    app: &App,
    caller: &Caller,
    current: Option<Proof>,
) -> Result<Shown, ApiError> {
    if let Some(proof) = current {
        return prove_own(app, caller, proof).await;
    }
    let login = caller.principal.session.as_ref();
    let is_fresh =
        login.is_none_or(|live| caller.at.millis_since(live.session.created_at) <= FRESH_MS);
    match is_fresh {
        true => Ok(Shown::Credentials),
        false => Err(ApiError::new(
            ErrorCode::ReauthenticationRequired,
            "The login is too long ago for this: send current_password or current_token too, or log in again",
        )
        .with("reason_code", "reauthentication_required")),
    }
}

/// Throttled, since who has come by a session must not get at the password through it; but by itself, so that nobody
/// who is not in can keep others from it.
async fn prove_own(app: &App, caller: &Caller, proof: Proof) -> Result<Shown, ApiError> {
    let principal = &caller.principal;
    let key = &principal.user;
    let by = match (&principal.session, &principal.token) {
        (Some(live), _) => live.digest.to_vec(),
        (None, Some(token)) => format!("token {} of {}", token.token, token.owner).into_bytes(),
        (None, None) => format!("sign-on of {key}").into_bytes(),
    };
    let trying = Trying::Current {
        account: key,
        by: &by,
    };
    let attempt = app.logins.throttle.begin(trying, caller.at);
    let attempt = attempt.map_err(throttled)?;
    let asking = Asking {
        request_id: Some(&caller.request_id),
        at: caller.at,
        source: &|| Some(Source::clone(&caller.trail.as_ref()?.source())),
    };
    let (shown, wrong) = match &proof {
        Proof::Password(_) => (
            Shown::Password,
            "current_password is not the current password",
        ),
        Proof::Token(_) => (
            Shown::Credentials,
            "current_token is no token of yours that may do all that you may",
        ),
    };
    match prove(app, &key.user, Some(&key.tenant), proof, &asking).await {
        Ok(Ok(proven)) if shown == Shown::Password || proven.principal.is_whole() => {
            attempt.succeeded();
            Ok(shown)
        }
        Ok(_) => {
            attempt.failed().await?;
            Err(ApiError::new(ErrorCode::PasswordWrong, wrong))
        }
        Err(error) => {
            attempt.withdrawn();
            Err(error)
        }
    }
}

/// Until when at the latest what a caller makes to log in with may count: as long as the token that it showed or logged
/// in with, if that ends. Whoever shows its password, or comes by single sign-on, has logged in anew.
///
/// # Errors
/// 403 for who has fewer roles by its issuer's word than its user: what it makes would have all of the user's.
pub fn latest_end(
    app: &App,
    principal: &Principal,
    shown: Shown,
) -> Result<Option<Timestamp>, ApiError> {
    if shown == Shown::Password {
        return Ok(None);
    }
    if let Some(Signed::Sso { .. }) = principal.signed {
        let user = app.ledger.user(&principal.user)?;
        let power = user.map(|user| user.power());
        if let Some(power) = power.filter(|power| *power > principal.power()) {
            return Err(lacks_role(power));
        }
    }
    let token = match &principal.token {
        Some(key) => app.ledger.token(key)?,
        None => None,
    };
    Ok(token.and_then(|owner| owner.token.expires_at))
}
