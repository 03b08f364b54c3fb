//! Users, for administrators (`contracts/run-gateway.md` section 3.3): a tenant's own see only their tenant.

use axum::Json;
use axum::extract::State;
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde_json::{Value, json};
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::access::lacks_role;
use super::body::{JsonBody, PathOf};
use super::error::ApiError;
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::login::Proof;
use super::query::Query;
use super::reauth::{MEMBERS, confirm, read_current};
use super::routes::Routes;
use super::state::App;
use super::tenants::{UserQuotasView, read_quotas};
use super::tokens::token_id;
use crate::auth::Minted;
use crate::auth::secret::parse_imported;
use crate::domain::command::{Command, Rejection};
use crate::domain::identity::{
    IdentityCommand, IdentityRejection, NewToken, Profile, ProfileChange, Role, Scope, TokenHash,
    User, UserKey, power, sanitised,
};
use crate::domain::tenant::{Quotas, QuotasChange, UserAllowanceChange};
use crate::domain::time::Timestamp;

/// Longest user, tenant and runtime id.
pub(super) const MAX_ID_CHARS: usize = 64;

/// Longest e-mail address (RFC 5321).
const MAX_EMAIL_CHARS: usize = 254;

/// Users of one import at most.
const MAX_IMPORT: usize = 1_000;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(list, create))
        .routes(routes!(import))
        .routes(routes!(read, update, remove))
}

/// A user.
#[derive(Serialize, ToSchema)]
pub struct UserView {
    pub user_id: String,
    pub tenant_id: String,
    pub email: String,
    /// `admin`, `tenant_admin`, `operator`, `user`, `viewer`.
    #[schema(value_type = Vec<String>)]
    pub roles: Vec<Role>,
    /// What all of its tokens are restricted to; empty for no restriction.
    #[schema(value_type = Vec<String>)]
    pub scopes: Vec<Scope>,
    pub enabled: bool,
    pub runtime_id: String,
    /// How much it may have at once; absent where nothing is limited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quotas: Option<UserQuotasView>,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    #[schema(value_type = String)]
    pub updated_at: Timestamp,
}

impl UserView {
    fn read(app: &App, user: User) -> Result<UserView, ApiError> {
        let quotas = app.ledger.quotas(&user.key)?;
        Ok(UserView::of(user, quotas))
    }

    fn of(user: User, quotas: Quotas) -> UserView {
        UserView {
            quotas: UserQuotasView::new(quotas, user.allowance),
            ..UserView::from(user)
        }
    }
}

impl From<User> for UserView {
    fn from(user: User) -> Self {
        UserView {
            quotas: None,
            user_id: user.key.user.to_string(),
            tenant_id: user.key.tenant.to_string(),
            email: user.profile.email,
            roles: user.profile.roles,
            scopes: user.profile.scopes,
            enabled: user.profile.enabled,
            runtime_id: user.profile.runtime.to_string(),
            created_at: user.created_at,
            updated_at: user.updated_at,
        }
    }
}

/// Users.
#[derive(Serialize, ToSchema)]
pub struct UserList {
    pub users: Vec<UserView>,
}

/// A user, and its new token where there is one: it is shown here and never again.
#[derive(Serialize, ToSchema)]
pub struct UserAnswer {
    pub user: UserView,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// Whether a caller sees a tenant's users.
pub(super) fn sees(caller: &Caller, tenant: &str) -> bool {
    let principal = &caller.principal;
    principal.power() == Role::Admin || principal.user.tenant == tenant
}

/// A user that the caller may manage; one of a tenant that it does not see is as good as none.
pub(super) fn find(app: &App, caller: &Caller, key: &UserKey) -> Result<User, ApiError> {
    let user = match sees(caller, &key.tenant) {
        true => app.ledger.user(key)?,
        false => None,
    };
    let user =
        user.ok_or_else(|| ApiError::from(Rejection::from(IdentityRejection::UserNotFound)))?;
    caller.about(&key.tenant);
    Ok(user)
}

/// Nobody grants or takes what it has not itself.
pub(super) fn may_grant(caller: &Caller, role: Role) -> Result<(), ApiError> {
    match role <= caller.principal.power() {
        true => Ok(()),
        false => Err(lacks_role(role)
            .with("resource_class", "admin")
            .with("action", "write")),
    }
}

/// The user of a path and its `tenant_id`.
pub(super) fn named(caller: &Caller, id: &str, query: &Query) -> Result<UserKey, ApiError> {
    let tenant = query.text("tenant_id").map(sanitised);
    query.finish()?;
    Ok(UserKey {
        tenant: tenant.unwrap_or_else(|| default_tenant(caller)),
        user: sanitised(id),
    })
}

/// Whose tokens or sessions a request is about: the caller's, or those of `user_id` and `tenant_id`.
pub(super) fn whose(app: &App, caller: &Caller, query: &Query) -> Result<UserKey, ApiError> {
    let principal = &caller.principal;
    let Some(user) = query.text("user_id") else {
        query.finish()?;
        return Ok(principal.user.clone());
    };
    let key = named(caller, user, query)?;
    if key == principal.user {
        return Ok(key);
    }
    // Who is restricted sees to its own by a session, and to nobody else's.
    if principal.power() < Role::TenantAdmin || !principal.has_scope(Scope::All) {
        return Err(lacks_role(Role::TenantAdmin)
            .with("resource_class", "users")
            .with("action", "read"));
    }
    let user = find(app, caller, &key)?;
    may_grant(caller, user.power())?;
    Ok(key)
}

pub(super) fn default_tenant(caller: &Caller) -> SmolStr {
    match caller.principal.power() {
        Role::Admin => SmolStr::new_static("default"),
        _ => caller.principal.user.tenant.clone(),
    }
}

/// List users.
#[utoipa::path(get, path = "/admin/users", tag = "users", responses((status = 200, body = UserList, example = json!({"users": [{"user_id": "alice", "tenant_id": "default", "email": "", "roles": ["user"], "scopes": [], "enabled": true, "runtime_id": "alice", "created_at": "2026-11-21T02:00:00.000120+00:00", "updated_at": "2026-11-21T02:00:00.000120+00:00"}]}))))]
async fn list(State(app): State<App>, caller: Caller) -> Result<Json<UserList>, ApiError> {
    let mut users = app.scan(|ledger| ledger.users_with_quotas()).await?;
    users.retain(|(user, _)| sees(&caller, &user.key.tenant));
    let view = |(user, quotas)| UserView::of(user, quotas);
    Ok(Json(UserList {
        users: users.into_iter().map(view).collect(),
    }))
}

/// A new user.
#[derive(Serialize, ToSchema)]
pub struct NewUser {
    /// Characters outside `[A-Za-z0-9_.@-]` become `_`.
    pub user_id: String,
    /// `default` when absent.
    pub tenant_id: Option<String>,
    pub email: Option<String>,
    /// `["user"]` when absent.
    pub roles: Option<Vec<String>>,
    /// `runs:read`, `runs:write`, `services:read`, `services:write`, `ledger:read`, `inference`, `*`.
    pub scopes: Option<Vec<String>>,
    pub enabled: Option<bool>,
    /// The user's id when absent.
    pub runtime_id: Option<String>,
    /// A token of the administrator's choice, at least 16 visible characters.
    pub token: Option<String>,
}

/// An id; empty when it is missing or nothing of it is left, with the fault recorded.
pub(super) fn id(fields: &Fields, name: &str) -> Option<SmolStr> {
    let text = fields.text(name, TextRule::name(MAX_ID_CHARS))?;
    let id = sanitised(&text);
    if id.is_empty() {
        fields.fault(
            name,
            "value_error",
            "Value error, no usable character is left",
        );
    }
    Some(id)
}

pub(super) fn named_values<T: Ord>(
    fields: &Fields,
    name: &str,
    of: impl Fn(&str) -> Option<T>,
) -> Option<Vec<T>> {
    let mut values = Vec::new();
    for text in fields.texts(name, 16, TextRule::name(64))? {
        match of(&text) {
            Some(value) if !values.contains(&value) => values.push(value),
            Some(_) => {}
            None => fields.fault(
                name,
                "enum",
                format!("'{text}' is none of the known {name}"),
            ),
        }
    }
    Some(values)
}

pub(super) fn read_scopes(fields: &Fields) -> Option<Vec<Scope>> {
    named_values(fields, "scopes", Scope::from_name)
}

fn read_email(fields: &Fields) -> Option<String> {
    let rule = TextRule {
        min: 0,
        max: MAX_EMAIL_CHARS,
        plain: true,
    };
    let email = fields.text("email", rule)?;
    let parts: Vec<&str> = email.split('@').collect();
    let sound = email.is_empty()
        || (parts.len() == 2
            && !parts[0].is_empty()
            && parts[1].contains('.')
            && !email.contains([' ', ',', ';', '<', '>']));
    if !sound {
        let message = "Value error, not one plain e-mail address";
        fields.fault("email", "value_error", message);
    }
    Some(email.to_lowercase())
}

fn read_profile(fields: &Fields) -> ProfileChange {
    ProfileChange {
        email: read_email(fields),
        roles: named_values(fields, "roles", Role::from_name),
        scopes: read_scopes(fields),
        enabled: fields.boolean("enabled"),
        runtime: id(fields, "runtime_id"),
    }
}

/// A token of the administrator's choice.
fn read_token(app: &App, fields: &Fields) -> Option<Minted> {
    let text = fields.text("token", TextRule::name(512))?;
    let minted = app.auth.adopt(&text);
    if minted.is_none() {
        // The fault must not tell the token back.
        let message = "Value error, a token has 16 to 512 visible characters, and a right checksum if it begins with rgt_";
        fields.fault("token", "value_error", message);
    }
    minted
}

fn first_token(hash: TokenHash) -> NewToken {
    NewToken {
        token: token_id(),
        name: SmolStr::new_static("default"),
        scopes: vec![Scope::All],
        hash,
        expires_at: None,
    }
}

pub(super) async fn submit(
    app: &App,
    caller: &Caller,
    command: IdentityCommand,
) -> Result<(), ApiError> {
    app.submit(caller, Command::Identity(Box::new(command)))
        .await?;
    Ok(())
}

/// Create a user. The answer is the only place where its token is shown.
#[utoipa::path(post, path = "/admin/users", tag = "users",
    request_body(content = NewUser, example = json!({"user_id": "alice", "roles": ["user"]})),
    responses((status = 200, body = UserAnswer, example = json!({"user": {"user_id": "alice", "tenant_id": "default", "email": "", "roles": ["user"], "scopes": [], "enabled": true, "runtime_id": "alice", "created_at": "2026-11-21T02:00:00.000120+00:00", "updated_at": "2026-11-21T02:00:00.000120+00:00"}})), (status = 400, description = "Gateway user already exists: t/u"),
        (status = 409, description = "The chosen token is another's")))]
async fn create(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<UserAnswer>, ApiError> {
    let (key, profile, chosen) = {
        let fields = body.fields()?;
        read_new_user(&app, &caller, &fields)?
    };
    if !sees(&caller, &key.tenant) {
        return Err(lacks_role(Role::Admin)
            .with("resource_class", "admin")
            .with("action", "write"));
    }
    caller.about(&key.tenant);
    may_grant(&caller, power(&profile.roles))?;
    let minted = chosen.unwrap_or_else(|| app.auth.mint());
    let command = IdentityCommand::CreateUser {
        key: key.clone(),
        profile,
        token: first_token(minted.hash),
    };
    submit(&app, &caller, command).await?;
    let user = UserView::read(&app, find(&app, &caller, &key)?)?;
    Ok(Json(UserAnswer {
        user,
        token: Some(shown(minted.secret)),
    }))
}

/// A new token, on its way to the only answer that shows it.
fn shown(secret: SecretString) -> String {
    secret.expose_secret().to_owned()
}

fn read_new_user(
    app: &App,
    caller: &Caller,
    fields: &Fields,
) -> Result<(UserKey, Profile, Option<Minted>), ApiError> {
    fields.forbid_others(&[
        "user_id",
        "tenant_id",
        "email",
        "roles",
        "scopes",
        "enabled",
        "runtime_id",
        "token",
    ]);
    if !fields.has("user_id") {
        fields.missing("user_id");
    }
    let user = id(fields, "user_id").unwrap_or_default();
    let tenant = id(fields, "tenant_id").unwrap_or_else(|| default_tenant(caller));
    let change = read_profile(fields);
    let chosen = read_token(app, fields);
    fields.finish()?;
    let profile = change.of(&plain_profile(&user));
    Ok((UserKey { tenant, user }, profile, chosen))
}

/// Of a user about whom nothing is said.
fn plain_profile(user: &SmolStr) -> Profile {
    Profile {
        email: String::new(),
        roles: vec![Role::User],
        scopes: Vec::new(),
        enabled: true,
        runtime: user.clone(),
    }
}

/// Read a user.
#[utoipa::path(get, path = "/admin/users/{user_id}", tag = "users",
    params(("tenant_id" = Option<String>, Query, description = "`default` when absent")),
    responses((status = 200, body = UserAnswer, example = json!({"user": {"user_id": "alice", "tenant_id": "default", "email": "", "roles": ["user"], "scopes": [], "enabled": true, "runtime_id": "alice", "created_at": "2026-11-21T02:00:00.000120+00:00", "updated_at": "2026-11-21T02:00:00.000120+00:00"}})), (status = 404, description = "Gateway user not found")))]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    query: Query,
) -> Result<Json<UserAnswer>, ApiError> {
    let key = named(&caller, &id, &query)?;
    let user = UserView::read(&app, find(&app, &caller, &key)?)?;
    Ok(Json(UserAnswer { user, token: None }))
}

/// What is to become of a user.
struct Change {
    profile: ProfileChange,
    quotas: QuotasChange,
    allowance: UserAllowanceChange,
    /// The token in place of all others.
    minted: Option<Minted>,
    current: Option<Proof>,
}

fn read_change(app: &App, fields: &Fields) -> Result<Change, ApiError> {
    let [password, token] = MEMBERS;
    fields.forbid_others(&[
        "email",
        "roles",
        "scopes",
        "enabled",
        "runtime_id",
        "token",
        "rotate_token",
        "quotas",
        password,
        token,
    ]);
    let profile = read_profile(fields);
    let (quotas, allowance) = read_quotas(fields);
    let chosen = read_token(app, fields);
    let rotate = fields.boolean("rotate_token").unwrap_or(false);
    let current = read_current(fields);
    fields.finish()?;
    Ok(Change {
        profile,
        quotas,
        allowance,
        minted: chosen.or_else(|| rotate.then(|| app.auth.mint())),
        current,
    })
}

/// Change a user. Absent members stay as they are; a rotation ends all of its tokens, its password and its sessions, and
/// shows the new token.
///
/// A new e-mail address needs a login at most 15 minutes old, a token, `current_password` or `current_token`.
#[utoipa::path(patch, path = "/admin/users/{user_id}", tag = "users",
    params(("tenant_id" = Option<String>, Query, description = "`default` when absent")),
    request_body(content = Object, example = json!({"enabled": true, "rotate_token": true})),
    responses((status = 200, body = UserAnswer, example = json!({"user": {"user_id": "alice", "tenant_id": "default", "email": "", "roles": ["user"], "scopes": [], "enabled": true, "runtime_id": "alice", "created_at": "2026-11-21T02:00:00.000120+00:00", "updated_at": "2026-11-21T02:00:00.000120+00:00"}})), (status = 404, description = "Gateway user not found")))]
async fn update(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    query: Query,
    body: JsonBody,
) -> Result<Json<UserAnswer>, ApiError> {
    let key = named(&caller, &id, &query)?;
    drop(query);
    let Change {
        profile: change,
        quotas,
        allowance,
        minted,
        current,
    } = read_change(&app, &body.fields()?)?;
    let user = find(&app, &caller, &key)?;
    may_grant(&caller, user.power())?;
    may_grant(&caller, change.roles.as_deref().map_or(Role::Viewer, power))?;
    let email = change.email.as_ref();
    if email.is_some_and(|email| *email != user.profile.email) {
        confirm(&app, &caller, current).await?;
    }
    let (hash, secret) = minted.map(|m| (m.hash, m.secret)).unzip();
    let ended = match hash {
        Some(_) => app.ledger.tokens(&key)?,
        None => Vec::new(),
    };
    let command = IdentityCommand::UpdateUser {
        key: key.clone(),
        change,
        quotas,
        allowance,
        rotate: hash.map(first_token),
    };
    submit(&app, &caller, command).await?;
    for token in ended {
        app.auth.uses().forget(&token.key);
    }
    let user = UserView::read(&app, find(&app, &caller, &key)?)?;
    Ok(Json(UserAnswer {
        user,
        token: secret.map(shown),
    }))
}

/// Delete a user. Its tokens end at once; its runtime stays reserved until it is transferred or purged.
#[utoipa::path(delete, path = "/admin/users/{user_id}", tag = "users",
    params(("tenant_id" = Option<String>, Query, description = "`default` when absent")),
    responses((status = 200, body = Object, example = json!({"ok": true, "deleted": true, "user_id": "alice", "tenant_id": "default"})),
        (status = 400, description = "The first administrator cannot be changed"),
        (status = 404, description = "Gateway user not found")))]
async fn remove(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let key = named(&caller, &id, &query)?;
    drop(query);
    let user = find(&app, &caller, &key)?;
    may_grant(&caller, user.power())?;
    let tokens = app.ledger.tokens(&key)?;
    let command = IdentityCommand::DeleteUser { key: key.clone() };
    submit(&app, &caller, command).await?;
    for token in tokens {
        app.auth.uses().forget(&token.key);
    }
    Ok(Json(json!({
        "ok": true, "deleted": true, "user_id": key.user.as_str(), "tenant_id": key.tenant.as_str(),
    })))
}

/// Import users with AbstractGateway's hashes of their tokens.
///
/// Each is created or refused by itself. A token goes on working; its hash becomes a keyed one when it is first used.
#[utoipa::path(post, path = "/admin/users/import", tag = "users",
    request_body(content = Object, example = json!({"users": [{
        "user_id": "alice", "roles": ["user"], "token_fingerprint": "75e9c0c51212",
        "token_hash": "pbkdf2_sha256$260000$00ff$00ff"
    }]})),
    responses((status = 200, body = Object, example = json!({"imported": ["default/alice"], "refused": []}))))]
async fn import(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let parsed = {
        let fields = body.fields()?;
        if !fields.has("users") {
            fields.missing("users");
        }
        let users = fields.objects("users", MAX_IMPORT).unwrap_or_default();
        fields.finish()?;
        users
            .iter()
            .map(|user| read_imported(&caller, user))
            .collect::<Vec<_>>()
    };
    let (mut imported, mut refused) = (Vec::new(), Vec::new());
    for (name, user) in parsed {
        let created = match user {
            Ok(command) => submit(&app, &caller, command).await,
            Err(error) => Err(error),
        };
        match created {
            Ok(()) => imported.push(name),
            Err(error) => refused.push(json!({
                "user": name, "code": error.code.as_str(), "detail": error.detail,
            })),
        }
    }
    Ok(Json(json!({"imported": imported, "refused": refused})))
}

/// One user of a registry file, and how it is called.
fn read_imported(caller: &Caller, fields: &Fields) -> (String, Result<IdentityCommand, ApiError>) {
    let text = |name| fields.text(name, TextRule::name(512));
    let hash = text("token_hash").zip(text("token_fingerprint"));
    let hash = hash.and_then(|(hash, fingerprint)| parse_imported(&hash, &fingerprint));
    if hash.is_none() {
        let message = "Value error, token_hash and token_fingerprint are none of AbstractGateway's";
        fields.fault("token_hash", "value_error", message);
    }
    let user = text("user_id").unwrap_or_default();
    let read = imported_profile(caller, fields);
    let command = read.and_then(|(key, profile)| match hash {
        Some(hash) => Ok(IdentityCommand::CreateUser {
            key,
            profile,
            token: first_token(hash),
        }),
        None => Err(ApiError::internal()),
    });
    (user, command)
}

fn imported_profile(caller: &Caller, fields: &Fields) -> Result<(UserKey, Profile), ApiError> {
    let user = id(fields, "user_id").unwrap_or_default();
    if user.is_empty() {
        fields.missing("user_id");
    }
    let tenant = id(fields, "tenant_id").unwrap_or_else(|| default_tenant(caller));
    let change = read_profile(fields);
    fields.finish()?;
    let profile = change.of(&plain_profile(&user));
    Ok((UserKey { tenant, user }, profile))
}
