//! Setting passwords: one's own with the current one, others' as their administrator. All sessions of the user end.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use utoipa_axum::routes;

use super::body::{JsonBody, PathOf};
use super::error::{ApiError, ErrorCode};
use super::fields::Fields;
use super::guard::Caller;
use super::login::{Proof, hash};
use super::query::Query;
use super::reauth::{confirm, latest_end, read_current};
use super::routes::Routes;
use super::state::App;
use super::users::{find, may_grant, named, submit};
use crate::auth::password::{MAX_CHARS, MIN_CHARS};
use crate::domain::command::Rejection;
use crate::domain::identity::{IdentityCommand, IdentityRejection, PasswordHash};
use crate::ledger::SessionOwner;

/// Longest password of `MAX_CHARS` characters, in bytes.
const MAX_BYTES: usize = MAX_CHARS * 4;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(set_own))
        .routes(routes!(set))
}

/// A new password; `None` with the fault recorded. It is not told back.
fn read_new(fields: &Fields) -> Option<String> {
    let password = fields.secret("password", MAX_BYTES)?;
    let chars = password.chars().count();
    if (MIN_CHARS..=MAX_CHARS).contains(&chars) && !password.contains('\0') {
        return Some(password);
    }
    let message =
        format!("Value error, a password has {MIN_CHARS} to {MAX_CHARS} characters, and no NUL");
    fields.fault("password", "value_error", message);
    None
}

/// Set one's own password. Ends all of one's sessions, this one too.
///
/// With the current one; where there is none yet, by a login at most 15 minutes old, a token, or `current_token`.
#[utoipa::path(post, path = "/me/password", tag = "sessions",
    request_body(content = Object, example = json!({"current_password": "correct horse battery", "password": "wrong zebra staple"})),
    responses((status = 200, body = Object, example = json!({"ok": true})),
        (status = 400, description = "The first administrator has no password"),
        (status = 403, description = "The current password is wrong, or there is none yet and the login is too long ago"),
        (status = 409, description = "The password was changed meanwhile"),
        (status = 429, description = "Too many wrong passwords; `Retry-After` tells when")))]
async fn set_own(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let (current, password) = {
        let fields = body.fields()?;
        fields.forbid_others(&["current_password", "current_token", "password"]);
        let current = read_current(&fields);
        if !fields.has("password") {
            fields.fault("password", "missing", "Field required");
        }
        let password = read_new(&fields);
        fields.finish()?;
        (current, password.unwrap_or_default())
    };
    let key = &caller.principal.user;
    let kept = show_current(&app, &caller, current).await?;
    let command = IdentityCommand::SetPassword {
        key: key.clone(),
        password: Some(hash(&app, password).await?),
        replaces: kept,
    };
    submit(&app, &caller, command).await?;
    Ok(Json(json!({"ok": true})))
}

/// The hash of the current password, which was shown; `None` where there is none, and the caller may set a first one.
async fn show_current(
    app: &App,
    caller: &Caller,
    current: Option<Proof>,
) -> Result<Option<PasswordHash>, ApiError> {
    let key = &caller.principal.user;
    let owner = || app.ledger.session_owner(key, None);
    let before = owner()?;
    if before.as_ref().is_none_or(|owner| owner.password.is_none()) {
        // There is no password to show.
        let current = current.filter(|proof| matches!(proof, Proof::Token(_)));
        let shown = confirm(app, caller, current).await?;
        return match latest_end(app, &caller.principal, shown)? {
            Some(_) => Err(outlives()),
            None => Ok(None),
        };
    }
    let Some(current @ Proof::Password(_)) = current else {
        return Err(password_wrong());
    };
    confirm(app, caller, Some(current)).await?;
    // Its hash may have been renewed just now, which is not a change of it.
    let after = owner()?;
    let era = |owner: &Option<SessionOwner>| owner.as_ref().map(|owner| owner.era);
    match era(&before) == era(&after) {
        true => Ok(after.and_then(|owner| owner.password)),
        false => Err(Rejection::from(IdentityRejection::PasswordStale).into()),
    }
}

fn password_wrong() -> ApiError {
    let detail = "current_password is not the current password";
    ApiError::new(ErrorCode::PasswordWrong, detail)
}

/// A token that ends may not set a first password, which does not.
fn outlives() -> ApiError {
    ApiError::new(
        ErrorCode::ReauthenticationRequired,
        "A token that expires sets no first password: use one that does not, or ask an administrator",
    )
    .with("reason_code", "reauthentication_required")
}

/// Set a user's password, or take it away with null. Ends all of its sessions; its tokens stay.
#[utoipa::path(post, path = "/admin/users/{user_id}/password", tag = "users",
    params(("tenant_id" = Option<String>, Query, description = "`default` when absent")),
    request_body(content = Object, example = json!({"password": "correct horse battery"})),
    responses((status = 200, body = Object, example = json!({"ok": true, "user_id": "alice", "tenant_id": "default", "password": true})),
        (status = 400, description = "The first administrator has no password"),
        (status = 404, description = "Gateway user not found")))]
async fn set(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    query: Query,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let key = named(&caller, &id, &query)?;
    drop(query);
    let user = find(&app, &caller, &key)?;
    may_grant(&caller, user.power())?;
    let password = {
        let fields = body.fields()?;
        fields.forbid_others(&["password"]);
        if !fields.has("password") && !fields.is_null("password") {
            fields.fault("password", "missing", "Field required");
        }
        let password = read_new(&fields);
        fields.finish()?;
        password
    };
    let password = match password {
        Some(password) => Some(hash(&app, password).await?),
        None => None,
    };
    let has_password = password.is_some();
    let command = IdentityCommand::SetPassword {
        key: key.clone(),
        password,
        replaces: None,
    };
    submit(&app, &caller, command).await?;
    Ok(Json(json!({
        "ok": true, "user_id": key.user.as_str(), "tenant_id": key.tenant.as_str(),
        "password": has_password,
    })))
}
