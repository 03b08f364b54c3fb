//! Sessions of browsers, for those whose they are and for their administrators: listing and ending them.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::authenticate::principal_of;
use super::body::PathOf;
use super::error::{ApiError, ErrorCode};
use super::guard::Caller;
use super::query::Query;
use super::routes::Routes;
use super::state::App;
use super::users::whose;
use crate::auth::session::{Basis, Digest, Session};
use crate::clock::now;
use crate::domain::identity::UserKey;
use crate::domain::time::Timestamp;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default().routes(routes!(list)).routes(routes!(end))
}

/// A session, without its secrets.
#[derive(Serialize, ToSchema)]
pub struct SessionView {
    pub session_id: String,
    pub user_id: String,
    pub tenant_id: String,
    /// What its user logged in with: `password` or `token`.
    pub login: &'static str,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    #[schema(value_type = String)]
    pub last_used_at: Timestamp,
    /// The latest that it ends; earlier when it is not used.
    #[schema(value_type = String)]
    pub expires_at: Timestamp,
    pub remember: bool,
    /// Where the login came from.
    pub address: String,
    pub user_agent: String,
    /// The one that this request came by.
    pub current: bool,
}

impl SessionView {
    fn of(app: &App, caller: &Caller, digest: &Digest, session: &Session) -> SessionView {
        let current = caller.principal.session.as_ref();
        SessionView {
            session_id: session.id.to_string(),
            user_id: session.user.user.to_string(),
            tenant_id: session.user.tenant.to_string(),
            login: match session.basis {
                Basis::Password => "password",
                Basis::Token(_) | Basis::FirstAdmin(_) => "token",
            },
            created_at: session.created_at,
            last_used_at: app.logins.sessions.last_use(digest, session),
            expires_at: session.ends_at,
            remember: session.is_remembered,
            address: session.address.to_string(),
            user_agent: session.user_agent.clone(),
            current: current.is_some_and(|live| live.digest == *digest),
        }
    }
}

/// A user's sessions.
#[derive(Serialize, ToSchema)]
pub struct SessionList {
    pub sessions: Vec<SessionView>,
}

/// Those that count now.
fn live(app: &App, user: &UserKey) -> Result<Vec<(Digest, Session)>, ApiError> {
    let at = now();
    let mut live = Vec::new();
    for (digest, session) in app.logins.sessions.of_user(user)? {
        let in_time = app.logins.sessions.by_digest(&digest, at)?.is_some();
        if in_time && principal_of(app, &digest, session.clone(), at)?.is_some() {
            live.push((digest, session));
        }
    }
    live.sort_by_key(|(_, session)| session.created_at);
    Ok(live)
}

/// List one's own sessions; as an administrator, anybody's.
#[utoipa::path(get, path = "/sessions", tag = "sessions",
    params(
        ("user_id" = Option<String>, Query, description = "Whose, for administrators; one's own when absent"),
        ("tenant_id" = Option<String>, Query, description = "`default` when absent"),
    ),
    responses((status = 200, body = SessionList, example = json!({"sessions": [{"session_id": "ses_0123456789abcdef", "user_id": "alice", "tenant_id": "default", "login": "password", "created_at": "2026-11-21T02:00:00.000120+00:00", "last_used_at": "2026-11-21T02:10:00.000120+00:00", "expires_at": "2026-11-21T10:00:00.000120+00:00", "remember": false, "address": "192.0.2.7", "user_agent": "Mozilla/5.0", "current": true}]})),
        (status = 404, description = "Gateway user not found")))]
async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<SessionList>, ApiError> {
    let user = whose(&app, &caller, &query)?;
    let live = live(&app, &user)?;
    let view =
        |(digest, session): &(Digest, Session)| SessionView::of(&app, &caller, digest, session);
    Ok(Json(SessionList {
        sessions: live.iter().map(view).collect(),
    }))
}

/// End one of one's own sessions; as an administrator, anybody's.
#[utoipa::path(delete, path = "/sessions/{session_id}", tag = "sessions",
    params(
        ("user_id" = Option<String>, Query, description = "Whose, for administrators; one's own when absent"),
        ("tenant_id" = Option<String>, Query, description = "`default` when absent"),
    ),
    responses((status = 200, body = Object, example = json!({"ok": true, "deleted": true, "session_id": "ses_0123456789abcdef"})),
        (status = 404, description = "Session not found")))]
async fn end(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let user = whose(&app, &caller, &query)?;
    drop(query);
    let live = live(&app, &user)?;
    let Some((digest, session)) = live.iter().find(|(_, session)| session.id == id) else {
        let gone = ApiError::new(ErrorCode::SessionNotFound, "Session not found");
        return Err(gone);
    };
    app.audit.record_first(caller.trail.as_ref()).await?;
    app.logins.sessions.end(digest, session).await?;
    Ok(Json(
        json!({"ok": true, "deleted": true, "session_id": session.id.as_str()}),
    ))
}
