//! The caller: who it is (`contracts/run-gateway.md` section 3.1), and its own tokens.

use axum::Json;
use axum::extract::State;
use secrecy::ExposeSecret;
use serde::Serialize;
use serde_json::{Value, json};
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::body::{JsonBody, PathOf};
use super::error::{ApiError, FieldError};
use super::fields::TextRule;
use super::guard::Caller;
use super::query::Query;
use super::reauth::{MEMBERS, confirm, latest_end, read_current};
use super::routes::Routes;
use super::state::App;
use super::users::{read_scopes, whose};
use crate::auth::Principal;
use crate::domain::command::Command;
use crate::domain::identity::{IdentityCommand, NewToken, Role, Scope, Token, TokenHash, TokenKey};
use crate::domain::time::Timestamp;

/// Longest name of a token.
const MAX_NAME_CHARS: usize = 64;

/// Longest life that may be asked for, in seconds: ten years.
const MAX_LIFE_S: u64 = 315_576_000;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(me))
        .routes(routes!(list, create))
        .routes(routes!(revoke))
}

/// A token's id: public, and tells nothing of the token.
pub fn token_id() -> SmolStr {
    let id = Uuid::new_v4().simple().to_string();
    SmolStr::new(format!("tok_{}", &id[..16]))
}

/// Say who is calling.
#[utoipa::path(get, path = "/me", tag = "users", responses((status = 200, body = Object, example = json!({
    "ok": true,
    "principal": {"user_id": "alice", "tenant_id": "default", "roles": ["user"], "scopes": [],
        "token_fingerprint": "75e9c0c51212", "runtime_id": "alice", "source": "user-registry", "admin": false},
    "auth": {"mode": "users", "user_auth_enabled": true},
    "routing": {"mode": "per-principal", "one_user_one_runtime": true}
}))))]
async fn me(caller: Caller) -> Json<Value> {
    Json(described(&caller.principal))
}

/// Who a principal is, in the contract's words.
pub fn described(principal: &Principal) -> Value {
    let scopes = match principal.token_scopes.contains(&Scope::All) {
        true => &principal.user_scopes,
        false => &principal.token_scopes,
    };
    let mut auth = json!({"mode": "users", "user_auth_enabled": true});
    if principal.session.is_some() {
        auth["session"] = "gateway-browser-session".into();
    }
    json!({
        "ok": true,
        "principal": {
            "user_id": principal.user.user.as_str(),
            "tenant_id": principal.user.tenant.as_str(),
            "roles": principal.roles,
            "scopes": scopes,
            "token_fingerprint": principal.fingerprint,
            "runtime_id": principal.runtime.as_str(),
            "source": "user-registry",
            "admin": principal.power() == Role::Admin,
        },
        "auth": auth,
        "routing": {"mode": "per-principal", "one_user_one_runtime": true},
    })
}

/// A token, without its secret.
#[derive(Serialize, ToSchema)]
pub struct TokenView {
    pub token_id: String,
    pub name: String,
    #[schema(value_type = Vec<String>)]
    pub scopes: Vec<Scope>,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>)]
    pub expires_at: Option<Timestamp>,
    /// To the minute; null when it was not used, or not for as long as that is remembered.
    #[schema(value_type = Option<String>)]
    pub last_used_at: Option<Timestamp>,
    /// It came from another gateway and was not used here yet.
    pub imported: bool,
}

impl TokenView {
    fn of(app: &App, token: Token) -> TokenView {
        TokenView {
            last_used_at: app.auth.uses().last(&token.key),
            imported: matches!(token.hash, TokenHash::Pbkdf2 { .. }),
            token_id: token.key.token.to_string(),
            name: token.name.to_string(),
            scopes: token.scopes,
            created_at: token.created_at,
            expires_at: token.expires_at,
        }
    }
}

/// A user's tokens.
#[derive(Serialize, ToSchema)]
pub struct TokenList {
    pub tokens: Vec<TokenView>,
}

/// List one's own tokens; as an administrator, anybody's.
#[utoipa::path(get, path = "/tokens", tag = "users", params(
        ("user_id" = Option<String>, Query, description = "Whose, for administrators; one's own when absent"),
        ("tenant_id" = Option<String>, Query, description = "`default` when absent"),
    ), responses((status = 200, body = TokenList, example = json!({"tokens": [{"token_id": "tok_0123456789abcdef", "name": "ci", "scopes": ["runs:read"], "created_at": "2026-11-21T02:00:00.000120+00:00", "expires_at": null, "last_used_at": null, "imported": false}]})),
        (status = 404, description = "Gateway user not found")))]
async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<TokenList>, ApiError> {
    let user = whose(&app, &caller, &query)?;
    let tokens = app.ledger.tokens(&user)?;
    let tokens = tokens.into_iter().map(|token| TokenView::of(&app, token));
    Ok(Json(TokenList {
        tokens: tokens.collect(),
    }))
}

/// A new token of one's own.
#[derive(Serialize, ToSchema)]
pub struct TokenRequest {
    /// Unique among one's tokens.
    pub name: String,
    /// `runs:read`, `runs:write`, `services:read`, `services:write`, `ledger:read`, `inference`, `*`; all when absent.
    pub scopes: Option<Vec<String>>,
    /// Up to ten years; for good when absent. Asked for with a token that expires, or by a session that began with one,
    /// at most until then, unless `current_password` is shown.
    pub expires_in_s: Option<u64>,
    /// One of these, where the session that asks began more than 15 minutes ago.
    pub current_password: Option<String>,
    pub current_token: Option<String>,
}

/// A new token and its secret, which is shown here and never again.
#[derive(Serialize, ToSchema)]
pub struct TokenAnswer {
    pub token: String,
    #[serde(flatten)]
    pub described: TokenView,
}

/// Make a token for oneself. The answer is the only place where it is shown.
#[utoipa::path(post, path = "/tokens", tag = "users",
    request_body(content = TokenRequest, example = json!({"name": "ci", "scopes": ["runs:read", "runs:write"], "expires_in_s": 7776000})),
    responses((status = 200, body = TokenAnswer, example = json!({"token": "rgt_user_…", "token_id": "tok_0123456789abcdef", "name": "ci", "scopes": ["runs:read"], "created_at": "2026-11-21T02:00:00.000120+00:00", "expires_at": null, "last_used_at": null, "imported": false})), (status = 409, description = "A token named 'x' exists already")))]
async fn create(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<TokenAnswer>, ApiError> {
    let minted = app.auth.mint();
    let (mut new, current) = {
        let fields = body.fields()?;
        let [password, token] = MEMBERS;
        fields.forbid_others(&["name", "scopes", "expires_in_s", password, token]);
        let name = fields.required_text("name", TextRule::name(MAX_NAME_CHARS));
        let scopes = read_scopes(&fields).filter(|scopes| !scopes.is_empty());
        let life_s = fields.int("expires_in_s", 1..=MAX_LIFE_S);
        let current = read_current(&fields);
        fields.finish()?;
        let new = NewToken {
            token: token_id(),
            name: name.into(),
            scopes: scopes.unwrap_or_else(|| vec![Scope::All]),
            hash: minted.hash,
            expires_at: life_s.map(|life_s| caller.at + life_s * 1_000),
        };
        (new, current)
    };
    let shown = confirm(&app, &caller, current).await?;
    if let Some(latest) = latest_end(&app, &caller.principal, shown)? {
        new.expires_at = Some(within(latest, new.expires_at)?);
    }
    let id = new.token.clone();
    let command = IdentityCommand::IssueToken {
        owner: caller.principal.user.clone(),
        token: new,
    };
    app.submit(&caller, Command::Identity(Box::new(command)))
        .await?;
    let tokens = app.ledger.tokens(&caller.principal.user)?;
    let made = tokens.into_iter().find(|token| token.key.token == id);
    // It can be gone again only when somebody revoked it in this very moment.
    let made = made.ok_or_else(ApiError::internal)?;
    Ok(Json(TokenAnswer {
        token: minted.secret.expose_secret().to_owned(),
        described: TokenView::of(&app, made),
    }))
}

/// When a token ends that is made with one that ends at `latest`.
fn within(latest: Timestamp, asked: Option<Timestamp>) -> Result<Timestamp, ApiError> {
    match asked {
        Some(asked) if asked > latest => {
            let loc = vec!["body".to_owned(), "expires_in_s".to_owned()];
            let message = "Input should end no later than the token that asks; show current_password to ask for more";
            let fault = FieldError::new(loc, "less_than_equal", message);
            Err(ApiError::validation(vec![fault]))
        }
        asked => Ok(asked.unwrap_or(latest)),
    }
}

/// Revoke a token of one's own, or as an administrator of anybody's: the next request that shows it is refused.
#[utoipa::path(delete, path = "/tokens/{token_id}", tag = "users",
    params(
        ("user_id" = Option<String>, Query, description = "Whose, for administrators; one's own when absent"),
        ("tenant_id" = Option<String>, Query, description = "`default` when absent"),
    ),
    responses((status = 200, body = Object, example = json!({"ok": true, "deleted": true, "token_id": "tok_0123456789abcdef"})),
        (status = 404, description = "Token not found")))]
async fn revoke(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let owner = whose(&app, &caller, &query)?;
    drop(query);
    let key = TokenKey {
        owner,
        token: SmolStr::new(&id),
    };
    let command = IdentityCommand::RevokeToken { key: key.clone() };
    app.submit(&caller, Command::Identity(Box::new(command)))
        .await?;
    app.auth.uses().forget(&key);
    Ok(Json(json!({"ok": true, "deleted": true, "token_id": id})))
}
