//! Reserved runtimes, for the administrator (`contracts/run-gateway.md` section 3.4): who had them, giving them
//! to somebody else, and removing what is in them.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use futures_util::future::try_join_all;
use serde::Serialize;
use serde_json::{Value, json};
use smol_str::SmolStr;
use tokio::time::Instant;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::body::{JsonBody, PathOf};
use super::client::Client;
use super::error::{ApiError, ErrorCode};
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::reauth::{confirm, read_current};
use super::state::App;
use super::users::UserView;
use crate::coordinator::SubmitError;
use crate::domain::command::{Command, Origin, Rejection};
use crate::domain::identity::{
    IdentityCommand, IdentityRejection, ReserveReason, Runtime, RuntimeKey, UserKey, sanitised,
};
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::time::Timestamp;
use crate::ledger::{Ledger, ReadError, RunFilter, RunPage};

/// Runs looked at in one read, and purged in one go.
const PAGE: usize = 256;

/// How long one request waits for runs that are being stopped; the next one goes on from there.
const STOP_WAIT: Duration = Duration::from_secs(30);

/// The routes of this file, under `/api/gateway`.
pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(transfer))
        .routes(routes!(purge))
}

/// A runtime that nobody has.
#[derive(Clone, Serialize, ToSchema)]
pub struct ReservationView {
    pub tenant_id: String,
    pub runtime_id: String,
    pub owner_key: String,
    pub owner_user_id: String,
    /// `deleted-user`, `runtime-reassigned` or `runtime-transferred`.
    #[schema(value_type = String)]
    pub reason: ReserveReason,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    #[schema(value_type = String)]
    pub updated_at: Timestamp,
    /// Runs are in it.
    pub data_exists: bool,
    /// Where: the plane's number in the ledger.
    pub data_path: String,
    /// A purge began and has not ended; ask for it again and it goes on.
    pub purging: bool,
}

/// Reserved runtimes.
#[derive(Serialize, ToSchema)]
pub struct ReservationList {
    pub runtime_reservations: Vec<ReservationView>,
}

fn view(ledger: &Ledger, runtime: &Runtime) -> Result<Option<ReservationView>, ReadError> {
    let Some(reservation) = &runtime.reservation else {
        return Ok(None);
    };
    Ok(Some(ReservationView {
        tenant_id: runtime.key.tenant.to_string(),
        runtime_id: runtime.key.runtime.to_string(),
        owner_key: format!("{}:{}", runtime.key.tenant, reservation.owner),
        owner_user_id: reservation.owner.to_string(),
        reason: reservation.reason,
        created_at: reservation.created_at,
        updated_at: reservation.updated_at,
        data_exists: has_runs(ledger, runtime.plane)?,
        data_path: data_path(runtime.plane),
        purging: reservation.purging,
    }))
}

fn has_runs(ledger: &Ledger, plane: PlaneId) -> Result<bool, ReadError> {
    let runs = ledger.runs(plane, &RunFilter::default(), None, 1)?;
    Ok(!runs.items.is_empty())
}

fn data_path(plane: PlaneId) -> String {
    format!("ledger.redb#plane={}", plane.0)
}

fn not_found() -> ApiError {
    Rejection::from(IdentityRejection::RuntimeNotFound).into()
}

/// List reserved runtimes.
#[utoipa::path(get, path = "/admin/runtime-reservations", tag = "users",
    responses((status = 200, body = ReservationList, example = json!({"runtime_reservations": [{"tenant_id": "default", "runtime_id": "alice", "owner_key": "default:alice", "owner_user_id": "alice", "reason": "deleted-user", "created_at": "2026-11-21T02:00:00.000120+00:00", "updated_at": "2026-11-21T02:00:00.000120+00:00", "data_exists": true, "data_path": "ledger.redb#plane=1", "purging": false}]}))))]
async fn list(State(app): State<App>, _caller: Caller) -> Result<Json<ReservationList>, ApiError> {
    let views = app.scan(|ledger| {
        let mut views = Vec::new();
        for runtime in ledger.runtimes()? {
            views.extend(view(ledger, &runtime)?);
        }
        Ok(views)
    });
    Ok(Json(ReservationList {
        runtime_reservations: views.await?,
    }))
}

/// The runtime of a path and of a body that confirms it; one that does not exist is told first.
fn confirmed(app: &App, caller: &Caller, id: &str, fields: &Fields) -> Result<Runtime, ApiError> {
    let rule = TextRule::name(64);
    let tenant = fields.text("tenant_id", rule);
    let runtime = sanitised(id);
    let key = RuntimeKey {
        tenant: tenant.map_or(SmolStr::new_static("default"), |tenant| sanitised(&tenant)),
        runtime: runtime.clone(),
    };
    let found = app.ledger.runtime(&key)?.ok_or_else(not_found)?;
    caller.about(&found.key.tenant);
    let confirmation = fields.required_text("confirm_runtime_id", rule);
    fields.finish()?;
    if sanitised(&confirmation) != runtime {
        return Err(ApiError::new(
            ErrorCode::ConfirmationRequired,
            "confirm_runtime_id must equal the runtime's id",
        ));
    }
    Ok(found)
}

/// Give a reserved runtime to a user, with all that is in it. The user's own becomes reserved.
#[utoipa::path(post, path = "/admin/runtime-reservations/{runtime_id}/transfer", tag = "users",
    request_body(content = Object, example = json!({"target_user_id": "bob", "confirm_runtime_id": "alice"})),
    responses((status = 200, body = Object, example = json!({"ok": true, "transferred": true, "previous_runtime_id": "bob"})),
        (status = 400, description = "The confirmation differs"), (status = 404, description = "No such reservation or user")))]
async fn transfer(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let (before, to) = {
        let fields = body.fields()?;
        let to = fields.required_text("target_user_id", TextRule::name(64));
        (confirmed(&app, &caller, &id, &fields)?, sanitised(&to))
    };
    let reservation = view(&app.ledger, &before)?;
    let key = before.key;
    let target = UserKey {
        tenant: key.tenant.clone(),
        user: to.clone(),
    };
    let previous = app.ledger.user(&target)?.map(|user| user.profile.runtime);
    let command = IdentityCommand::TransferRuntime { key, to };
    app.submit(&caller, Command::Identity(Box::new(command)))
        .await?;
    let user = app.ledger.user(&target)?.map(UserView::from);
    Ok(Json(json!({
        "ok": true,
        "transferred": true,
        "user": user,
        "reservation": reservation,
        "previous_runtime_id": previous,
    })))
}

/// Remove what is in a reserved runtime, and forget it.
///
/// Runs that have not ended are cancelled. It can be interrupted and asked for again; the ledger's chain stays whole.
/// `deleted_data` tells whether runs were in it. Needs a login at most 15 minutes old, a token, `current_password` or
/// `current_token`.
#[utoipa::path(post, path = "/admin/runtime-reservations/{runtime_id}/purge", tag = "users",
    request_body(content = Object, example = json!({"confirm_runtime_id": "alice"})),
    responses((status = 200, body = Object, example = json!({"ok": true, "purged": true, "deleted_data": true, "runtime_id": "alice", "tenant_id": "default", "data_path": "ledger.redb#plane=1"})),
        (status = 400, description = "The confirmation differs"), (status = 404, description = "No such reservation"),
        (status = 409, description = "A user has it, or runs are still ending")))]
async fn purge(
    State(app): State<App>,
    caller: Caller,
    client: Client,
    PathOf(id): PathOf<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let (runtime, delete, current) = {
        let fields = body.fields()?;
        let delete = fields.boolean("delete_data").unwrap_or(true);
        let current = read_current(&fields);
        (confirmed(&app, &caller, &id, &fields)?, delete, current)
    };
    if !delete {
        return Err(ApiError::new(
            ErrorCode::ConfirmationRequired,
            "delete_data must be true: a purge removes the data",
        ));
    }
    confirm(&app, &caller, client, current).await?;
    let Runtime { key, plane, .. } = runtime;
    let has_data = has_runs(&app.ledger, plane)?;
    let begin = IdentityCommand::BeginPurge { key: key.clone() };
    app.submit(&caller, Command::Identity(Box::new(begin)))
        .await?;
    let deadline = Instant::now() + STOP_WAIT;
    let mut live = purge_runs(&app, &caller, plane).await?;
    let mut commits = app.ledger.watch();
    while !live.is_empty() {
        commits.borrow_and_update();
        live = purge_ended(&app, &caller, plane, live).await?;
        if live.is_empty() {
            break;
        }
        tokio::select! {
            _ = commits.changed() => {}
            () = tokio::time::sleep_until(deadline) => {
                let runs = live.len();
                return Err(Rejection::from(IdentityRejection::RunsEnding { runs }).into());
            }
        }
    }
    let finish = IdentityCommand::FinishPurge { key: key.clone() };
    app.submit(&caller, Command::Identity(Box::new(finish)))
        .await?;
    Ok(Json(json!({
        "ok": true,
        "purged": true,
        "deleted_data": has_data,
        "runtime_id": key.runtime.as_str(),
        "tenant_id": key.tenant.as_str(),
        "data_path": data_path(plane),
    })))
}

/// Purges every ended run of a plane that was not purged before; answers those that have not ended.
async fn purge_runs(app: &App, caller: &Caller, plane: PlaneId) -> Result<Vec<RunId>, ApiError> {
    let (mut live, mut before) = (Vec::new(), None);
    loop {
        let page: RunPage = app
            .scan(move |ledger| ledger.runs(plane, &RunFilter::default(), before, PAGE))
            .await?;
        let mut ended = Vec::new();
        for run in &page.items {
            match (run.status.is_terminal(), run.purged) {
                (false, _) => live.push(run.run),
                (true, false) => ended.push(run.run),
                (true, true) => {}
            }
        }
        purge_each(app, caller, plane, &ended).await?;
        before = page.next;
        if before.is_none() {
            return Ok(live);
        }
    }
}

/// Purges those of some runs that have ended; answers the others.
async fn purge_ended(
    app: &App,
    caller: &Caller,
    plane: PlaneId,
    runs: Vec<RunId>,
) -> Result<Vec<RunId>, ApiError> {
    let (mut ended, mut live) = (Vec::new(), Vec::new());
    for run in runs {
        let summary = app.ledger.run(plane, run)?;
        match summary.is_none_or(|summary| summary.status.is_terminal()) {
            true => ended.push(run),
            false => live.push(run),
        }
    }
    for page in ended.chunks(PAGE) {
        purge_each(app, caller, plane, page).await?;
    }
    Ok(live)
}

/// Together, so that they share commits.
async fn purge_each(
    app: &App,
    caller: &Caller,
    plane: PlaneId,
    runs: &[RunId],
) -> Result<(), SubmitError> {
    let purge = |run: &RunId| {
        let origin = Origin {
            plane,
            ..caller.origin()
        };
        app.handle.submit(origin, Command::PurgeRun { run: *run })
    };
    try_join_all(runs.iter().map(purge)).await?;
    Ok(())
}
