//! Reserved runtimes, for the administrator (`contracts/run-gateway.md` section 3.4): who had them, giving them
//! to somebody else, and removing what is in them.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};
use smol_str::SmolStr;
use tokio::time::Instant;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::body::{JsonBody, PathOf};
use super::error::{ApiError, ErrorCode};
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::reauth::{confirm, read_current};
use super::routes::Routes;
use super::state::App;
use super::users::{UserView, submit};
use crate::coordinator::SubmitError;
use crate::domain::command::{Command, Rejection};
use crate::domain::identity::{
    IdentityCommand, IdentityRejection, ReserveReason, Runtime, RuntimeKey, UserKey, sanitised,
};
use crate::domain::ids::PlaneId;
use crate::domain::time::Timestamp;
use crate::ledger::{Ledger, ReadError, RunFilter};

/// How long one request waits for runs to end and for all to be removed; that goes on without it.
const PATIENCE: Duration = Duration::from_secs(30);

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
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
    /// Something is in it.
    pub data_exists: bool,
    /// Where: the plane's number in the ledger.
    pub data_path: String,
    /// A purge began and has not ended. While its runs end, ask for it again; from then on it goes on by itself.
    pub purging: bool,
    /// While they are being removed: runs that are left, counted up to 100,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runs_left: Option<u64>,
    /// And records of runs whose payloads are left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records_left: Option<u64>,
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
    let left = match reservation.purging {
        true => ledger.purge_left(runtime.plane)?,
        false => None,
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
        runs_left: left.map(|left| left.runs),
        records_left: left.map(|left| left.records),
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
/// Runs that have not ended are cancelled. From then on nobody sees what is in it, and it is removed bit by bit, over
/// restarts too; the ledger's chain stays whole. It can be asked for again at any time.
/// `deleted_data` tells whether runs were in it. Needs a login at most 15 minutes old, a token, `current_password` or
/// `current_token`.
#[utoipa::path(post, path = "/admin/runtime-reservations/{runtime_id}/purge", tag = "users",
    request_body(content = Object, example = json!({"confirm_runtime_id": "alice"})),
    responses((status = 200, body = Object, example = json!({"ok": true, "purged": true, "deleted_data": true, "runtime_id": "alice", "tenant_id": "default", "data_path": "ledger.redb#plane=1"})),
        (status = 202, description = "It goes on; the reservation tells what is left", body = Object, example = json!({"ok": true, "purged": false, "deleted_data": false, "purging": true, "runs_left": 1204, "records_left": 5120, "runtime_id": "alice", "tenant_id": "default", "data_path": "ledger.redb#plane=1"})),
        (status = 400, description = "The confirmation differs"), (status = 404, description = "No such reservation"),
        (status = 409, description = "A user has it, or runs are still ending")))]
async fn purge(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
    body: JsonBody,
) -> Result<Response, ApiError> {
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
    confirm(&app, &caller, current).await?;
    let has_data = has_runs(&app.ledger, runtime.plane)?;
    let deadline = Instant::now() + PATIENCE;
    end_runs(&app, &caller, &runtime.key, deadline).await?;
    let answer = json!({
        "ok": true,
        "purged": true,
        "deleted_data": has_data,
        "runtime_id": runtime.key.runtime.as_str(),
        "tenant_id": runtime.key.tenant.as_str(),
        "data_path": data_path(runtime.plane),
    });
    if is_released(&app, &runtime, deadline).await? {
        return Ok(Json(answer).into_response());
    }
    let plane = runtime.plane;
    let left = app.scan(move |ledger| ledger.purge_left(plane)).await?;
    let mut answer = answer;
    answer["purged"] = json!(false);
    answer["deleted_data"] = json!(false);
    answer["purging"] = json!(true);
    answer["runs_left"] = json!(left.map_or(0, |left| left.runs));
    answer["records_left"] = json!(left.map_or(0, |left| left.records));
    Ok((StatusCode::ACCEPTED, Json(answer)).into_response())
}

/// Ends all runs of a runtime, and hides what is in it.
async fn end_runs(
    app: &App,
    caller: &Caller,
    key: &RuntimeKey,
    deadline: Instant,
) -> Result<(), ApiError> {
    let mut commits = app.ledger.watch();
    let mut before = u64::MAX;
    let begin = || IdentityCommand::BeginPurge { key: key.clone() };
    submit(app, caller, begin()).await?;
    loop {
        commits.borrow_and_update();
        let finish = IdentityCommand::FinishPurge { key: key.clone() };
        let finish = Command::Identity(Box::new(finish));
        let rejection = match app.put(caller, finish, None).await {
            Ok(_) => return Ok(()),
            Err(SubmitError::Rejected(rejection)) => rejection,
            Err(error) => return Err(error.into()),
        };
        let Rejection::Identity(IdentityRejection::RunsEnding { runs }) = rejection else {
            return Err(rejection.into());
        };
        // It ends many at once, but not all. Those that work end when their calls do.
        if runs < before {
            before = runs;
            submit(app, caller, begin()).await?;
            continue;
        }
        before = 0;
        tokio::select! {
            _ = commits.changed() => {}
            () = tokio::time::sleep_until(deadline) => return Err(rejection.into()),
        }
    }
}

/// Whether a runtime is forgotten by `deadline`: all that was in it is removed.
async fn is_released(app: &App, runtime: &Runtime, deadline: Instant) -> Result<bool, ApiError> {
    let mut commits = app.ledger.watch();
    loop {
        commits.borrow_and_update();
        let found = app.ledger.runtime(&runtime.key)?;
        if found.is_none_or(|found| found.plane != runtime.plane) {
            return Ok(true);
        }
        tokio::select! {
            _ = commits.changed() => {}
            () = tokio::time::sleep_until(deadline) => return Ok(false),
        }
    }
}
