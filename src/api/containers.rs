//! Services in containers: whether they may be as they are described, and whether the engine has what they need, before
//! anything is written; and the containers of this gateway, as the engine has them.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::error::{ApiError, ErrorCode, FieldError};
use super::guard::Caller;
use super::routes::Routes;
use super::services::{ADOPTED, Service};
use super::state::App;
use crate::domain::container::ImageSpec;
use crate::domain::scheduler::container::run_of;
use crate::domain::spec::{GpuSource, ServiceSpec, Worker};
use crate::driver::{DockerError, Forbidden};

/// The routes of this file, at the root and under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default().routes(routes!(list))
}

/// Whether a service may be registered so.
///
/// # Errors
/// 403 for what the operator's settings do not allow; 409 when it needs a GPU that the engine cannot give.
pub async fn check(app: &App, spec: &ServiceSpec) -> Result<(), ApiError> {
    let Worker::Image(image) = &spec.worker else {
        return Ok(());
    };
    check_image(app, image, spec.needs_gpu(), &["body"]).await
}

/// Whether containers may be made of an image so, which is described at `loc` of the request.
///
/// # Errors
/// As those of `check`.
pub async fn check_image(
    app: &App,
    image: &ImageSpec,
    needs_gpu: bool,
    loc: &[&str],
) -> Result<(), ApiError> {
    let allowed = app.docker.rules().check(image);
    allowed.map_err(|why| forbidden(why, loc))?;
    if !needs_gpu || !app.docker.state().up {
        return Ok(());
    }
    let gpus = app.handle.gpu_status().await?;
    let is_real = gpus
        .iter()
        .any(|gpu| gpu.facts.source != GpuSource::Simulated);
    match app.docker.gives_gpus().await {
        Err(DockerError::Missing(why)) if is_real => {
            Err(ApiError::new(ErrorCode::GpuRuntimeMissing, why))
        }
        _ => Ok(()),
    }
}

fn forbidden(forbidden: Forbidden, loc: &[&str]) -> ApiError {
    let loc = loc.iter().chain([&forbidden.member]);
    let loc = loc.map(|part| (*part).to_owned()).collect();
    let mut error = ApiError::new(ErrorCode::ContainerForbidden, forbidden.message.clone());
    error.errors = vec![FieldError::new(
        loc,
        "container_forbidden",
        forbidden.message,
    )];
    error
}

/// Tells of containers that are there already and run, although it was not this gateway that started them. While the
/// engine does not answer, nothing is told of those.
pub async fn tell_running(app: &App, services: impl IntoIterator<Item = &mut Service>) {
    let mut others: Vec<&mut Service> = services
        .into_iter()
        .filter(|service| service.driver == ADOPTED && !service.container_running)
        .collect();
    if others.is_empty() || !app.docker.state().up {
        return;
    }
    match app.docker.running().await {
        Ok(running) => {
            for service in &mut others {
                service.container_running = running.has(&service.container);
            }
        }
        Err(error) => tracing::debug!(%error, "it is not known which containers run"),
    }
}

/// Whether the container that a service names is there (`contracts/gpu-gateway.md` section 3).
///
/// # Errors
/// 404 `container_not_found`, 503 when the engine does not answer.
pub async fn must_exist(app: &App, spec: &ServiceSpec) -> Result<(), ApiError> {
    if spec.worker != Worker::Container {
        return Ok(());
    }
    match app.docker.exists(&spec.container).await {
        Ok(true) => Ok(()),
        Ok(false) => {
            let container = &spec.container;
            let hint = format!(
                "make container '{container}' (docker create --name {container} …), or correct the service"
            );
            let detail = json!({"error": "container_not_found", "hint": hint});
            Err(ApiError::new(ErrorCode::ContainerNotFound, detail)
                .with("container", container.as_str()))
        }
        Err(error) => {
            let refused = ApiError::new(ErrorCode::NoEngine, "Docker not available");
            Err(refused.with("hint", error.to_string()))
        }
    }
}

/// A container that bears this gateway's label.
#[derive(Serialize, ToSchema)]
pub struct Container {
    pub id: String,
    pub name: String,
    /// Null for the container of a job.
    pub service: Option<String>,
    /// The job whose own container it is.
    pub run_id: Option<String>,
    pub generation: u64,
    /// As the engine has it: `created`, `running`, `paused`, `exited`, …
    pub state: String,
    /// No instance of that generation lives: it is removed when it is older than 15 s.
    pub orphan: bool,
}

/// The container engine.
#[derive(Serialize, ToSchema)]
pub struct Engine {
    /// It answered when last asked.
    pub up: bool,
    /// Why it is not up.
    pub error: Option<String>,
}

/// The containers of this gateway.
#[derive(Serialize, ToSchema)]
pub struct ContainerList {
    pub engine: Engine,
    /// None while the engine does not answer.
    pub containers: Vec<Container>,
}

/// List the containers that bear this gateway's label, and tell which are orphans.
#[utoipa::path(get, path = "/containers", tag = "services",
    responses((status = 200, body = ContainerList, example = json!({"engine": {"up": true, "error": null}, "containers": [{
        "id": "4c01db0b339c", "name": "rungate-0199a7c2-stats-3", "service": "stats", "run_id": null, "generation": 3, "state": "running", "orphan": false
    }]}))))]
async fn list(State(app): State<App>, _caller: Caller) -> Result<Json<ContainerList>, ApiError> {
    let (kept, error) = match app.docker.kept().await {
        Ok(kept) => (kept, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let services = app.scan(|ledger| ledger.services()).await?;
    let containers = kept.into_iter().map(|kept| {
        let lives = services.iter().any(|view| {
            let generation = view.instance.as_ref().map(|instance| instance.generation);
            view.spec.name == kept.service && generation == Some(kept.generation)
        });
        let job = run_of(&kept.service);
        Container {
            id: kept.id.to_string(),
            name: kept.name,
            service: job.is_none().then(|| kept.service.to_string()),
            run_id: job.map(|(_, run)| run.to_string()),
            generation: kept.generation.0,
            state: kept.state,
            orphan: !lives,
        }
    });
    Ok(Json(ContainerList {
        engine: Engine {
            up: error.is_none(),
            error,
        },
        containers: containers.collect(),
    }))
}
