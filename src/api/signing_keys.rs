//! The keys that sign job tokens: their public halves, open to all, and their rotation.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, header};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::error::{ApiError, ErrorCode};
use super::guard::Caller;
use super::routes::Routes;
use super::state::App;
use crate::auth::jwt::work::WorkTokens;
use crate::clock::now;

/// How long a service may go without asking again. A token that names a key which it does not know is a reason to
/// ask at once.
const CACHE_CONTROL: &str = "public, max-age=300";

/// The open route of this file, at the root.
pub fn open_router() -> Routes {
    Routes::default().routes(routes!(jwks))
}

/// The route of this file under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default().routes(routes!(rotate))
}

fn tokens(app: &App) -> Result<&WorkTokens, ApiError> {
    let none = || ApiError::new(ErrorCode::NotFound, "Not Found");
    app.auth.work().ok_or_else(none)
}

/// List the public keys of job tokens (RFC 7517).
#[utoipa::path(get, path = "/.well-known/jwks.json", tag = "health", security(()), responses((status = 200, body = Object, example = json!({
    "keys": [{"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": "3f1c9a0b7d52e864", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]
}))))]
async fn jwks(State(app): State<App>) -> Result<Response, ApiError> {
    let keys: Json<Value> = Json(tokens(&app)?.jwks(now()));
    let mut response = keys.into_response();
    let kept = HeaderValue::from_static(CACHE_CONTROL);
    response.headers_mut().insert(header::CACHE_CONTROL, kept);
    Ok(response)
}

/// Job tokens are signed with a new key.
#[derive(Serialize, ToSchema)]
pub struct Rotated {
    pub ok: bool,
    /// The new key's id.
    pub kid: String,
}

/// Sign job tokens with a new key from now on.
///
/// Earlier keys verify until the last token that they signed has expired.
#[utoipa::path(post, path = "/admin/signing-keys/rotate", tag = "users",
    responses((status = 200, body = Rotated, example = json!({"ok": true, "kid": "3f1c9a0b7d52e864"}))))]
async fn rotate(State(app): State<App>, caller: Caller) -> Result<Json<Rotated>, ApiError> {
    let keys = tokens(&app)?.clone();
    app.audit.record_first(caller.trail.as_ref()).await?;
    let rotated = tokio::task::spawn_blocking(move || keys.rotate(now())).await;
    let failed = |error: &dyn std::fmt::Display| {
        tracing::error!(%error, "the signing key could not be rotated");
        ApiError::internal()
    };
    let kid = rotated
        .map_err(|error| failed(&error))?
        .map_err(|error| failed(&error))?;
    tracing::info!(actor = %caller.principal.actor, kid, "the signing key was rotated");
    Ok(Json(Rotated { ok: true, kid }))
}
