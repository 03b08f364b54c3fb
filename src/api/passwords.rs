//! Setting passwords: one's own with the current one, others' as their administrator. All sessions of the user end.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::body::{JsonBody, PathOf};
use super::error::{ApiError, ErrorCode};
use super::fields::Fields;
use super::guard::Caller;
use super::login::{check, hash};
use super::query::Query;
use super::session::throttled;
use super::state::App;
use super::users::{find, may_grant, named, submit};
use crate::auth::password::{MAX_CHARS, MIN_CHARS, Verdict};
use crate::auth::throttle::Trying;
use crate::domain::identity::{IdentityCommand, PasswordHash};

/// Longest password of `MAX_CHARS` characters, in bytes.
const MAX_BYTES: usize = MAX_CHARS * 4;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
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
#[utoipa::path(post, path = "/me/password", tag = "sessions",
    request_body(content = Object, example = json!({"current_password": "correct horse battery", "password": "wrong zebra staple"})),
    responses((status = 200, body = Object, example = json!({"ok": true})),
        (status = 400, description = "The first administrator has no password"),
        (status = 403, description = "The current password is wrong"),
        (status = 409, description = "The password was changed meanwhile"),
        (status = 429, description = "Too many wrong passwords; `Retry-After` tells when")))]
async fn set_own(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let (current, password) = {
        let fields = body.fields()?;
        fields.forbid_others(&["current_password", "password"]);
        let current = fields.secret("current_password", MAX_BYTES);
        if !fields.has("password") {
            fields.fault("password", "missing", "Field required");
        }
        let password = read_new(&fields);
        fields.finish()?;
        (current, password.unwrap_or_default())
    };
    let key = &caller.principal.user;
    let owner = app.ledger.session_owner(key, None)?;
    let kept = owner.and_then(|owner| owner.password);
    if let Some(kept) = &kept {
        prove_current(&app, &caller, current, kept).await?;
    }
    let command = IdentityCommand::SetPassword {
        key: key.clone(),
        password: Some(hash(&app, password).await?),
        replaces: kept,
    };
    submit(&app, &caller, command).await?;
    Ok(Json(json!({"ok": true})))
}

/// Throttled, since who has come by a session must not get at the password through it; but by itself, so that nobody
/// who is not in can keep others from changing theirs.
async fn prove_current(
    app: &App,
    caller: &Caller,
    current: Option<String>,
    kept: &PasswordHash,
) -> Result<(), ApiError> {
    let principal = &caller.principal;
    let by = match (&principal.session, &principal.token) {
        (Some(live), _) => live.digest.to_vec(),
        (None, Some(key)) => format!("token {} of {}", key.token, key.owner).into_bytes(),
        (None, None) => format!("sign-on of {}", principal.user).into_bytes(),
    };
    let trying = Trying::Current {
        account: &principal.user,
        by: &by,
    };
    let attempt = app.logins.throttle.begin(trying, caller.at);
    let attempt = attempt.map_err(throttled)?;
    let current = current.unwrap_or_default();
    match check(app, &current, Some(kept.clone())).await {
        Ok(Verdict::Right { .. }) => {
            attempt.succeeded();
            Ok(())
        }
        Ok(Verdict::Wrong) => {
            attempt.failed().await?;
            let detail = "current_password is not the current password";
            Err(ApiError::new(ErrorCode::PasswordWrong, detail))
        }
        Err(error) => {
            attempt.withdrawn();
            Err(error)
        }
    }
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
