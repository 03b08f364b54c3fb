//! Logging in and out with a browser (`contracts/run-gateway.md` section 3.2).

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, header};
use metrics::counter;
use serde_json::{Value, json};
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::audit::{MaybeTrail, Trail};
use super::authenticate::Asking;
use super::body::JsonBody;
use super::client::Client;
use super::cookies;
use super::csrf;
use super::error::{ApiError, ErrorCode};
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::login::{Proof, Proven, prove};
use super::routes::Routes;
use super::state::App;
use super::tokens::described;
use super::users::MAX_ID_CHARS;
use crate::auth::password::MAX_CHARS;
use crate::auth::session::Login;
use crate::auth::throttle::{Locked, Trying};
use crate::clock::now;
use crate::domain::audit::Source;
use crate::domain::identity::{UserKey, sanitised};

/// Longest token, and longest password of `MAX_CHARS` characters of four bytes.
pub(super) const MAX_SECRET_BYTES: usize = MAX_CHARS * 4;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(login))
        .routes(routes!(logout))
}

/// Who logs in, and by what: a token or a password.
#[derive(serde::Serialize, ToSchema)]
pub struct LoginRequest {
    pub user_id: String,
    /// `default` when absent; of a token, its own.
    pub tenant_id: Option<String>,
    pub token: Option<String>,
    pub password: Option<String>,
    /// Stay logged in when the browser is closed.
    pub remember: Option<bool>,
}

struct Asked {
    user: SmolStr,
    tenant: Option<SmolStr>,
    proof: Proof,
    is_remembered: bool,
}

/// Log in with a browser. Sets two cookies; neither secret is in the body.
///
/// Writes that come by the session show the CSRF cookie's value as `x-abstractgateway-csrf`. Clients without a cookie
/// store send the session cookie's value as `x-abstractgateway-session`.
#[utoipa::path(post, path = "/session/login", tag = "sessions", security(()),
    request_body(content = LoginRequest, example = json!({"user_id": "alice", "password": "correct horse battery", "remember": false})),
    responses((status = 200, body = Object, example = json!({
        "ok": true,
        "principal": {"user_id": "alice", "tenant_id": "default", "roles": ["user"], "scopes": [],
            "token_fingerprint": "75e9c0c51212", "runtime_id": "alice", "source": "user-registry", "admin": false},
        "auth": {"mode": "users", "user_auth_enabled": true, "session": "gateway-browser-session"},
        "routing": {"mode": "per-principal", "one_user_one_runtime": true},
        "session": {"session_id": "ses_0123456789abcdef", "expires_at": "2026-11-21T10:00:00.000120+00:00"}
    })), (status = 401, description = "The login failed: unknown user, wrong token, wrong password"),
        (status = 429, description = "Too many failed logins of this account or address; `Retry-After` tells when")))]
async fn login(
    State(app): State<App>,
    client: Client,
    MaybeTrail(trail): MaybeTrail,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Response, ApiError> {
    csrf::check_site(&headers)?;
    let names = cookies::names(client, &headers)?;
    let asked = read(&body)?;
    let is_remembered = asked.is_remembered;
    let proven = prove_recorded(&app, client, trail.as_ref(), asked).await?;
    let agent = headers.get(header::USER_AGENT);
    let login = Login {
        user: proven.principal.user.clone(),
        basis: proven.basis,
        era: proven.era,
        is_remembered,
        address: client.address,
        user_agent: agent
            .and_then(|agent| agent.to_str().ok())
            .unwrap_or_default()
            .to_owned(),
    };
    let opened = app.logins.sessions.begin(login, now()).await?;
    end_former(&app, client, &headers).await?;
    let principal = proven
        .principal
        .by_session(opened.digest, opened.session.clone());
    let mut answer = described(&principal);
    answer["session"] = json!({
        "session_id": opened.session.id.as_str(),
        "expires_at": opened.session.ends_at,
    });
    let mut response = Json(answer).into_response();
    let max_age_ms = is_remembered.then(|| {
        opened
            .session
            .ends_at
            .millis_since(opened.session.created_at)
    });
    cookies::set(
        response.headers_mut(),
        names,
        &opened.secret,
        &opened.csrf,
        max_age_ms,
    );
    Ok(response)
}

/// Who logs in, within what throttling allows. What was tried and proven is known to the audit when it returns.
async fn prove_recorded(
    app: &App,
    client: Client,
    trail: Option<&Trail>,
    asked: Asked,
) -> Result<Proven, ApiError> {
    let at = now();
    let account = account(&asked);
    if let Some(trail) = trail {
        trail.tried(&account);
    }
    let (throttle, network) = (&app.logins.throttle, client.network());
    let trying = match &asked.proof {
        Proof::Password(_) => Trying::Password {
            account: &account,
            network,
        },
        Proof::Token(_) => Trying::Token { network },
    };
    let attempt = throttle.begin(trying, at).map_err(throttled)?;
    let asking = Asking {
        request_id: trail.map(Trail::request_id),
        at,
        source: &|| trail.map(|trail| Source::clone(&trail.source())),
    };
    let tenant = asked.tenant.as_deref();
    let proven = match prove(app, &asked.user, tenant, asked.proof, &asking).await {
        Ok(Ok(proven)) => proven,
        Ok(Err(wrong)) => {
            counter!("rungate_logins_total", "outcome" => "wrong").increment(1);
            attempt.failed().await?;
            return Err(wrong);
        }
        Err(error) => {
            attempt.withdrawn();
            return Err(error);
        }
    };
    attempt.succeeded();
    throttle.note_home(&proven.principal.user, network, at);
    counter!("rungate_logins_total", "outcome" => "right").increment(1);
    if let Some(trail) = trail {
        trail.proven(&proven.principal.user, proven.fingerprint());
    }
    app.audit.record_first(trail).await?;
    Ok(proven)
}

fn read(body: &JsonBody) -> Result<Asked, ApiError> {
    let fields = body.fields()?;
    fields.forbid_others(&["user_id", "tenant_id", "token", "password", "remember"]);
    let id = |name: &str| {
        let text = fields.text(name, TextRule::name(MAX_ID_CHARS))?;
        Some(sanitised(&text))
    };
    if !fields.has("user_id") {
        // Not `missing`, which tells the whole body back.
        fields.fault("user_id", "missing", "Field required");
    }
    let (user, tenant) = (id("user_id").unwrap_or_default(), id("tenant_id"));
    let proof = read_proof(&fields);
    let is_remembered = fields.boolean("remember").unwrap_or(false);
    fields.finish()?;
    let Some(proof) = proof else {
        return Err(ApiError::internal());
    };
    Ok(Asked {
        user,
        tenant,
        proof,
        is_remembered,
    })
}

/// `None` with the fault recorded.
fn read_proof(fields: &Fields) -> Option<Proof> {
    let secret = |name| fields.secret(name, MAX_SECRET_BYTES);
    match (fields.has("token"), fields.has("password")) {
        (true, false) => secret("token").map(Proof::Token),
        (false, true) => secret("password").map(Proof::Password),
        (false, false) => {
            fields.fault("token", "missing", "A token or a password is required");
            None
        }
        (true, true) => {
            let message = "Value error, a token or a password, not both";
            fields.fault("token", "value_error", message);
            None
        }
    }
}

/// The account that is logged in to, as far as the caller said.
fn account(asked: &Asked) -> UserKey {
    let tenant = asked.tenant.clone();
    UserKey {
        tenant: tenant.unwrap_or(SmolStr::new_static("default")),
        user: asked.user.clone(),
    }
}

/// 429 for who failed too often.
pub fn throttled(locked: Locked) -> ApiError {
    counter!("rungate_logins_total", "outcome" => "throttled").increment(1);
    let seconds = u32::try_from(locked.retry_after_ms.div_ceil(1_000)).unwrap_or(u32::MAX);
    ApiError::new(
        ErrorCode::LoginThrottled,
        "Too Many Requests (auth lockout)",
    )
    .retry_after(seconds.max(1))
}

/// A browser has one session here: the one that it had before is over.
async fn end_former(app: &App, client: Client, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(secret) = cookies::secret(client, headers) else {
        return Ok(());
    };
    let sessions = &app.logins.sessions;
    if let Some((digest, session)) = sessions.find(&secret, now())? {
        sessions.end(&digest, &session).await?;
    }
    Ok(())
}

/// Log out: end the session that this comes by, and take its cookies away.
#[utoipa::path(post, path = "/session/logout", tag = "sessions",
    responses((status = 200, body = Object, example = json!({"ok": true, "deleted": true}))))]
async fn logout(
    State(app): State<App>,
    caller: Caller,
    client: Client,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let live = caller.principal.session.as_deref();
    if let Some(live) = live {
        app.audit.record_first(caller.trail.as_ref()).await?;
        app.logins.sessions.end(&live.digest, &live.session).await?;
    }
    let answer: Value = json!({"ok": true, "deleted": live.is_some()});
    let mut response = Json(answer).into_response();
    if let Ok(names) = cookies::names(client, &headers) {
        cookies::clear(response.headers_mut(), names);
    }
    Ok(response)
}
