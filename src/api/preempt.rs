//! Preemption by hand (`contracts/gpu-gateway.md` section 5).

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::body::{JsonBody, PathOf};
use super::error::ApiError;
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::job::MAX_ID_CHARS;
use super::queue::{find_job, job_not_found};
use super::routes::Routes;
use super::runs::unexpected;
use super::service_owner::find;
use super::services::scheduler_status;
use super::state::App;
use crate::domain::command::{Command, Reply};
use crate::domain::ids::{PlaneId, RunId, ServiceName};
use crate::ledger::{Ledger, ReadError, RunFilter, RunStatus, RunSummary};

/// Pages of waiting jobs, newest first, that a check looks through for the most urgent.
const MAX_PAGES: usize = 20;
const PAGE: usize = 500;

/// The routes of this file, at the root and under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(check))
        .routes(routes!(execute))
        .routes(routes!(release))
}

/// Say what could be preempted on a service, and for whom.
#[utoipa::path(get, path = "/preempt/check/{service}", tag = "preempt",
    responses((status = 200, body = Object, example = json!({
        "preemptable": true, "service": "stats", "active_job_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b",
        "scheduler_status": "busy", "running_job_priority": 4, "running_job_service_type": "text-stats",
        "highest_queued": {"job_id": "0199f3a2-8a00-7d0a-9c55-6f0f0d1f2a3b", "priority": 1, "service_type": "text-stats"}
    })), (status = 404, description = "Unknown service: x")))]
async fn check(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
) -> Result<Json<Value>, ApiError> {
    let view = find(&app, &caller, &name)?;
    let plane = caller.plane();
    let active = view
        .active_runs
        .iter()
        .find(|(of, _)| *of == plane)
        .map(|(_, run)| *run);
    let running = match active {
        Some(run) => app.ledger.run(plane, run)?,
        None => None,
    };
    let Some(running) = running else {
        return Ok(Json(
            json!({"preemptable": false, "reason": "service_not_busy", "service": name}),
        ));
    };
    let (service_type, service) = (view.spec.service_type.clone(), view.spec.name.clone());
    let highest = app
        .scan(move |ledger| most_urgent(ledger, plane, &service_type, &service))
        .await?;
    let type_of = |run: &RunSummary| run.spec.service_type.as_ref().map(ToString::to_string);
    Ok(Json(json!({
        "preemptable": true,
        "service": name,
        "active_job_id": running.run.to_string(),
        "scheduler_status": scheduler_status(&view),
        "running_job_priority": running.spec.priority.get(),
        "running_job_service_type": type_of(&running),
        "highest_queued": highest.map(|run| json!({
            "job_id": run.run.to_string(),
            "priority": run.spec.priority.get(),
            "service_type": type_of(&run),
        })),
    })))
}

/// The most urgent waiting job that the service could take, the oldest of several.
fn most_urgent(
    ledger: &Ledger,
    plane: PlaneId,
    service_type: &str,
    service: &str,
) -> Result<Option<RunSummary>, ReadError> {
    use crate::domain::spec::Target;
    let filter = RunFilter {
        statuses: vec![RunStatus::Queued],
        ..RunFilter::default()
    };
    let mut best: Option<RunSummary> = None;
    let mut before = None;
    for _ in 0..MAX_PAGES {
        let page = ledger.runs(plane, &filter, before, PAGE)?;
        let fitting = page.items.into_iter().filter(|run| match &run.spec.target {
            Target::Type(wanted) => wanted == service_type,
            Target::Service(wanted) => wanted == service,
            Target::Container(_) => false,
        });
        let order = |run: &RunSummary| (run.spec.priority, run.run);
        best = best.into_iter().chain(fitting).min_by_key(order);
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    Ok(best)
}

/// Who is to make room for whom.
#[derive(Serialize, ToSchema)]
pub struct ExecuteRequest {
    pub service_name: String,
    /// A queued job that the service can take.
    pub preemptor_job_id: String,
}

impl ExecuteRequest {
    fn read(fields: &Fields) -> Result<ExecuteRequest, ApiError> {
        for name in ["service_name", "preemptor_job_id"] {
            if fields.raw(name).is_none_or(|raw| raw.get() == "\"\"") {
                return Err(ApiError::missing_field(name, format!("{name} is required")));
            }
        }
        let request = ExecuteRequest {
            service_name: fields.required_text("service_name", TextRule::name(MAX_ID_CHARS)),
            preemptor_job_id: fields
                .required_text("preemptor_job_id", TextRule::name(MAX_ID_CHARS)),
        };
        fields.finish()?;
        Ok(request)
    }
}

/// Preempt what runs on a service.
#[utoipa::path(post, path = "/preempt/execute", tag = "preempt",
    request_body(content = ExecuteRequest, example = json!({"service_name": "stats", "preemptor_job_id": "0199f3a2-8a00-7d0a-9c55-6f0f0d1f2a3b"})),
    responses((status = 200, body = Object, example = json!({
        "preempted_job_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b", "preemptor_job_id": "0199f3a2-8a00-7d0a-9c55-6f0f0d1f2a3b",
        "service": "stats", "progress_saved": true
    })), (status = 404, description = "Unknown"), (status = 409, description = "The preemptor is not queued, or nothing runs there")))]
async fn execute(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let request = ExecuteRequest::read(&body.fields()?)?;
    let service = find(&app, &caller, &request.service_name)?.spec.name;
    let preemptor: RunId = request
        .preemptor_job_id
        .parse()
        .map_err(|_| job_not_found(&request.preemptor_job_id))?;
    find_job(&app, &caller, &request.preemptor_job_id)?;
    let command = Command::PreemptExecute {
        service: service.clone(),
        preemptor,
    };
    match app.submit(&caller, command).await? {
        Reply::Preempted {
            run,
            progress_saved,
        } => Ok(Json(json!({
            "preempted_job_id": run.to_string(),
            "preemptor_job_id": preemptor.to_string(),
            "service": service.as_str(),
            "progress_saved": progress_saved,
        }))),
        reply => Err(unexpected(&reply)),
    }
}

/// Queue again what was preempted on services of this one's type.
#[utoipa::path(post, path = "/preempt/release/{service}", tag = "preempt",
    responses((status = 200, body = Object, example = json!({"service": "stats", "resumed_jobs": [], "count": 0})),
        (status = 404, description = "Unknown service: x")))]
async fn release(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
) -> Result<Json<Value>, ApiError> {
    let service = ServiceName::from(name.as_str());
    match app
        .submit(&caller, Command::PreemptRelease { service })
        .await?
    {
        Reply::Released { runs } => {
            let resumed: Vec<String> = runs.iter().map(ToString::to_string).collect();
            Ok(Json(
                json!({"service": name, "count": resumed.len(), "resumed_jobs": resumed}),
            ))
        }
        reply => Err(unexpected(&reply)),
    }
}
