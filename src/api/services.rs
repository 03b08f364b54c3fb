//! The registry of services (`contracts/gpu-gateway.md` section 3): list, read, register, change, remove,
//! enable and disable. Starting and stopping is in `service_control`.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::body::{JsonBody, PathOf};
use super::containers;
use super::error::ApiError;
use super::examples;
use super::fields::Fields;
use super::guard::Caller;
use super::ladder::LadderStep;
use super::query::Query;
use super::routes::Routes;
use super::run_view::seconds;
use super::service_control::control;
use super::service_owner::{check_program, find, find_owned, owner, sees};
use super::service_spec::{read_changes, read_new};
use super::state::App;
use super::users::id;
use crate::domain::command::Command;
use crate::domain::container::{ContainerStatus, ImageSpec, Ipc, Ulimit, Volume};
use crate::domain::identity::Role;
use crate::domain::ids::ServiceName;
use crate::domain::spec::{GpuSource, Grant, ProgressMode, ServiceSpec, Worker};
use crate::domain::time::Timestamp;
use crate::ledger::{InstancePhase, InstanceView, ServiceView};

/// The routes of this file, at the root and under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(list))
        .routes(routes!(register))
        .routes(routes!(read, update, remove))
        .routes(routes!(enable))
        .routes(routes!(disable))
}

/// `driver` of a service in a container that is there already.
pub const ADOPTED: &str = "container";

/// A service: the contract's members and ours.
#[derive(Serialize, ToSchema)]
pub struct Service {
    pub name: String,
    /// Whose jobs alone it takes; null for everybody's.
    pub tenant: Option<String>,
    pub container: String,
    #[serde(rename = "type")]
    #[schema(rename = "type")]
    pub service_type: String,
    pub description: String,
    pub vram_gb: f64,
    pub enabled: bool,
    /// Its container or process lives, or it runs elsewhere.
    pub container_running: bool,
    pub healthy: bool,
    /// The port it listens on: the instance's when Rungate chose it.
    pub port: u16,
    /// Not measured: always null.
    pub response_time_ms: Option<f64>,
    /// `idle`, `busy`, `starting`, `stopping` or `draining`.
    pub scheduler_status: &'static str,
    pub active_job_id: Option<String>,
    pub health_endpoint: String,
    /// `stateless`, `queue` or `poll`.
    #[schema(value_type = String)]
    pub progress_mode: ProgressMode,
    pub progress_endpoint: Option<String>,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    #[schema(value_type = String)]
    pub updated_at: Timestamp,
    /// `process`, `external`, `container` (one that is there) or `image`.
    pub driver: &'static str,
    /// Of a shared service other tenants are not told this, nor `env`, `working_dir`, `url`, `image` and the instance's
    /// `pid` and `container_id`.
    pub command: Option<Vec<String>>,
    /// Names only: values may be secrets.
    pub env: Option<Vec<String>>,
    pub working_dir: Option<String>,
    pub url: Option<String>,
    /// What its containers are made of.
    pub image: Option<Image>,
    pub gpus: u32,
    pub concurrency: u32,
    pub dispatch_path: String,
    pub cancel_path: Option<String>,
    pub idle_timeout_seconds: Option<f64>,
    pub grace_seconds: f64,
    pub startup_timeout_seconds: f64,
    pub min_runtime_seconds: Option<f64>,
    /// How its memory is got back, step by step; empty stops it at once.
    pub ladder: Vec<LadderStep>,
    /// Percent of a GPU's threads that it may use under MPS.
    pub mps_percent: Option<u8>,
    /// The most that an instance was seen to use, when that is more than `vram_gb`.
    pub learned_vram_gb: Option<f64>,
    pub active_job_ids: Vec<String>,
    /// Why it is not started again by itself: it died too often.
    pub crash_looped: Option<String>,
    /// Unexpected ends in a row.
    pub deaths: u32,
    #[schema(value_type = Option<String>)]
    pub retry_at: Option<Timestamp>,
    pub instance: Option<Instance>,
}

/// One life of a service's process.
#[derive(Serialize, ToSchema)]
pub struct Instance {
    pub generation: u64,
    /// `starting`, `ready`, `unhealthy`, `draining`, `yielding`, `sleeping`, `waking`, `stopping` or `exited`.
    #[schema(value_type = String)]
    pub phase: InstancePhase,
    pub pid: Option<u32>,
    pub port: Option<u16>,
    /// The engine's id of its container.
    pub container_id: Option<String>,
    pub container_name: Option<String>,
    /// `created`, `running`, `paused`, `exited` or `removed`.
    #[schema(value_type = Option<String>)]
    pub container_status: Option<ContainerStatus>,
    #[schema(value_type = String)]
    pub started_at: Timestamp,
    #[schema(value_type = Option<String>)]
    pub ready_at: Option<Timestamp>,
    pub startup_time_s: Option<f64>,
    pub gpus: Vec<GpuGrant>,
    /// Since when it sleeps: it lives, and holds no more GPU memory than `gpus` says.
    #[schema(value_type = Option<String>)]
    pub asleep_since: Option<Timestamp>,
    /// What it has in host memory meanwhile.
    pub host_memory_mb: u64,
}

/// GPU memory that an instance holds.
#[derive(Serialize, ToSchema)]
pub struct GpuGrant {
    pub gpu: String,
    pub memory_mb: u64,
}

impl From<&Grant> for GpuGrant {
    fn from(grant: &Grant) -> Self {
        GpuGrant {
            gpu: grant.gpu.to_string(),
            memory_mb: grant.mib,
        }
    }
}

impl From<&InstanceView> for Instance {
    fn from(view: &InstanceView) -> Self {
        let container = view.container.as_ref();
        Instance {
            generation: view.generation.0,
            phase: view.phase,
            pid: view.process.as_ref().map(|process| process.pid),
            port: view.process.as_ref().map(|process| process.port),
            container_id: container.map(|seen| seen.id.to_string()),
            container_name: container.map(|seen| seen.name.to_string()),
            container_status: container.map(|seen| seen.status),
            started_at: view.started_at,
            ready_at: view.ready_at,
            startup_time_s: view.startup_ms.map(seconds),
            gpus: view.grants.iter().map(GpuGrant::from).collect(),
            asleep_since: view.asleep_since,
            host_memory_mb: view.host_mib,
        }
    }
}

/// Mebibytes as gibibytes, the contract's unit.
pub fn gib(mib: u64) -> f64 {
    mib as f64 / 1_024.0
}

/// Whether its process lives, or it runs elsewhere.
pub fn is_running(view: &ServiceView) -> bool {
    match &view.instance {
        Some(instance) => instance.phase != InstancePhase::Exited,
        None => false,
    }
}

/// Whether its instance answers and takes work.
pub fn is_healthy(view: &ServiceView) -> bool {
    let instance = view.instance.as_ref();
    instance.is_some_and(|i| matches!(i.phase, InstancePhase::Ready | InstancePhase::Draining))
}

/// The contract's `scheduler_status`.
pub fn scheduler_status(view: &ServiceView) -> &'static str {
    match view.instance.as_ref().map(|instance| instance.phase) {
        Some(InstancePhase::Starting | InstancePhase::Waking) => "starting",
        Some(InstancePhase::Stopping | InstancePhase::Yielding) => "stopping",
        Some(InstancePhase::Draining) => "draining",
        _ if !view.active_runs.is_empty() => "busy",
        _ => "idle",
    }
}

impl Service {
    /// As a caller sees it: runs of other planes are counted nowhere and named to the administrator alone; where it
    /// runs is no matter of other tenants.
    pub fn of(view: &ServiceView, caller: &Caller) -> Self {
        let sees_all = caller.principal.power() == Role::Admin;
        let spec = &view.spec;
        let is_ours = caller.tenancy().operates(view.tenant.as_ref());
        let (driver, command, env, working_dir, url) = match worker(spec) {
            told if is_ours => told,
            (driver, ..) => (driver, None, None, None, None),
        };
        let image = match &spec.worker {
            Worker::Image(image) if is_ours => Some(Image::from(&**image)),
            _ => None,
        };
        let active_job_ids: Vec<String> = view
            .active_runs
            .iter()
            .filter(|(plane, _)| sees_all || *plane == caller.plane())
            .map(|(_, run)| run.to_string())
            .collect();
        let mut instance = view.instance.as_ref().map(Instance::from);
        if let Some(instance) = instance.as_mut().filter(|_| !is_ours) {
            instance.pid = None;
            instance.container_id = None;
        }
        Service {
            name: spec.name.to_string(),
            tenant: view.tenant.as_ref().map(ToString::to_string),
            container: spec.container.clone(),
            service_type: spec.service_type.to_string(),
            description: spec.description.clone(),
            vram_gb: gib(spec.vram_mib),
            enabled: view.enabled,
            container_running: is_running(view),
            healthy: is_healthy(view),
            port: instance.as_ref().and_then(|i| i.port).unwrap_or(spec.port),
            response_time_ms: None,
            scheduler_status: scheduler_status(view),
            active_job_id: active_job_ids.first().cloned(),
            health_endpoint: spec.health_endpoint.clone(),
            progress_mode: spec.progress_mode,
            progress_endpoint: spec.progress_endpoint.clone(),
            created_at: view.created_at,
            updated_at: view.updated_at,
            driver,
            command,
            env,
            working_dir,
            url,
            image,
            gpus: spec.gpus,
            concurrency: spec.concurrency,
            dispatch_path: spec.dispatch_path().to_owned(),
            cancel_path: spec.cancel_path.clone(),
            idle_timeout_seconds: spec.idle_timeout_ms.map(seconds),
            grace_seconds: seconds(spec.grace_ms),
            startup_timeout_seconds: seconds(spec.startup_timeout_ms),
            min_runtime_seconds: spec.min_runtime_ms.map(seconds),
            ladder: spec.ladder.iter().map(LadderStep::from).collect(),
            mps_percent: spec.mps_percent,
            learned_vram_gb: view.learned_mib.map(gib),
            active_job_ids,
            crash_looped: view.crash_looped.clone(),
            deaths: view.deaths,
            retry_at: view.retry_at,
            instance,
        }
    }
}

type WorkerMembers = (
    &'static str,
    Option<Vec<String>>,
    Option<Vec<String>>,
    Option<String>,
    Option<String>,
);

fn worker(spec: &ServiceSpec) -> WorkerMembers {
    match &spec.worker {
        Worker::Process {
            command,
            env,
            working_dir,
        } => {
            let names = env.iter().map(|(name, _)| name.clone()).collect();
            (
                "process",
                Some(command.clone()),
                Some(names),
                working_dir.clone(),
                None,
            )
        }
        Worker::External { url } => ("external", None, None, None, Some(url.clone())),
        Worker::Container => (ADOPTED, None, None, None, None),
        Worker::Job { .. } => ("job", None, None, None, None),
        Worker::Image(image) => {
            let names = image.env.iter().map(|(name, _)| name.clone()).collect();
            ("image", None, Some(names), None, None)
        }
    }
}

/// What a service's containers are made of.
#[derive(Serialize, ToSchema)]
pub struct Image {
    pub image: String,
    pub args: Vec<String>,
    /// As they were given: `SOURCE:TARGET`, with `:ro` behind it when nothing may be written.
    pub volumes: Vec<String>,
    pub shm_mb: Option<u64>,
    /// `private` or `host`.
    #[schema(value_type = String)]
    pub ipc: Ipc,
    pub ulimits: BTreeMap<String, [i64; 2]>,
    pub cpus: Option<f64>,
    pub memory_mb: Option<u64>,
    pub user: Option<String>,
    pub networks: Vec<String>,
    /// TCP port that it listens on inside.
    pub container_port: u16,
}

impl From<&ImageSpec> for Image {
    fn from(spec: &ImageSpec) -> Self {
        let volume = |volume: &Volume| {
            let mode = if volume.read_only { ":ro" } else { "" };
            format!("{}:{}{mode}", volume.source, volume.target)
        };
        let bound = |limit: &Ulimit| (limit.name.clone(), [limit.soft, limit.hard]);
        Image {
            image: spec.image.clone(),
            args: spec.args.clone(),
            volumes: spec.volumes.iter().map(volume).collect(),
            shm_mb: spec.shm_mib,
            ipc: spec.ipc,
            ulimits: spec.ulimits.iter().map(bound).collect(),
            cpus: spec.cpus_milli.map(|milli| milli as f64 / 1_000.0),
            memory_mb: spec.memory_mib,
            user: spec.user.clone(),
            networks: spec.networks.clone(),
            container_port: spec.port,
        }
    }
}

/// All services by name.
#[derive(Serialize, ToSchema)]
pub struct ServiceList {
    pub services: BTreeMap<String, Service>,
}

/// List services.
#[utoipa::path(get, path = "/services", tag = "services",
    params(("type" = Option<String>, Query), ("enabled" = Option<bool>, Query)),
    responses((status = 200, body = ServiceList, example = json!(examples::services()))))]
async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<ServiceList>, ApiError> {
    let wanted = query.text("type").map(str::to_owned);
    let enabled = query.boolean("enabled");
    query.finish()?;
    drop(query);
    let views = app.scan(|ledger| ledger.services()).await?;
    let mut services: BTreeMap<String, Service> = views
        .iter()
        .filter(|view| sees(&caller, view))
        .filter(|view| {
            wanted
                .as_deref()
                .is_none_or(|wanted| view.spec.service_type == wanted)
        })
        .filter(|view| enabled.is_none_or(|enabled| view.enabled == enabled))
        .map(|view| (view.spec.name.to_string(), Service::of(view, &caller)))
        .collect();
    containers::tell_running(&app, services.values_mut()).await;
    Ok(Json(ServiceList { services }))
}

/// Read a service.
#[utoipa::path(get, path = "/services/{name}", tag = "services",
    responses((status = 200, body = Service, example = json!(examples::service())), (status = 404, description = "Unknown service: x")))]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
) -> Result<Json<Service>, ApiError> {
    shown(&app, &caller, &name).await
}

/// A service as it is now.
async fn shown(app: &App, caller: &Caller, name: &str) -> Result<Json<Service>, ApiError> {
    let mut service = Service::of(&find(app, caller, name)?, caller);
    containers::tell_running(app, [&mut service]).await;
    Ok(Json(service))
}

/// What a service is registered with. `command` makes it a local process, which is the administrator's to say unless
/// `operators_may_run_commands` is set; `url` something that runs elsewhere, `image` a container of its own, none of these a
/// container that is there already, named by `container`.
#[derive(Serialize, ToSchema)]
pub struct ServiceRequest {
    /// `[A-Za-z0-9][A-Za-z0-9_.-]{0,62}`
    pub name: String,
    #[serde(rename = "type")]
    #[schema(rename = "type")]
    pub service_type: String,
    /// The tenant whose jobs alone it takes. The administrator's to choose, null shares it; of others' services it is
    /// their own.
    pub tenant: Option<String>,
    pub container: Option<String>,
    /// 0 lets Rungate choose one and pass it as `PORT`.
    pub port: Option<u16>,
    pub health_endpoint: Option<String>,
    pub description: Option<String>,
    pub vram_gb: Option<f64>,
    pub progress_mode: Option<String>,
    pub progress_endpoint: Option<String>,
    /// The program and its arguments.
    pub command: Option<Vec<String>>,
    pub env: Option<BTreeMap<String, String>>,
    pub working_dir: Option<String>,
    pub url: Option<String>,
    /// Each instance is a container of its own, made of this image.
    pub image: Option<String>,
    pub args: Option<Vec<String>>,
    /// `SOURCE:TARGET`, with `:ro` behind it when nothing may be written.
    pub volumes: Option<Vec<String>>,
    /// Bytes, or a text such as `512m`.
    #[schema(value_type = Option<String>)]
    pub shm_size: Option<String>,
    /// `private` or `host`.
    pub ipc: Option<String>,
    #[schema(value_type = Option<Object>)]
    pub ulimits: Option<BTreeMap<String, i64>>,
    pub cpus: Option<f64>,
    /// Bytes, or a text such as `16g`.
    pub memory: Option<String>,
    pub user: Option<String>,
    pub networks: Option<Vec<String>>,
    /// TCP port that it listens on inside; told as `PORT`.
    pub container_port: Option<u16>,
    pub gpus: Option<u32>,
    pub concurrency: Option<u32>,
    pub dispatch_path: Option<String>,
    pub cancel_path: Option<String>,
    pub idle_timeout_seconds: Option<f64>,
    pub grace_seconds: Option<f64>,
    pub startup_timeout_seconds: Option<f64>,
    pub min_runtime_seconds: Option<f64>,
    /// How its memory is got back, step by step.
    #[schema(value_type = Option<Vec<Object>>)]
    pub ladder: Option<Vec<LadderStep>>,
    /// Percent of a GPU's threads that it may use under MPS; its grant is the limit of its memory there.
    pub mps_percent: Option<u8>,
}

/// Register a service.
#[utoipa::path(post, path = "/services/register", tag = "services",
    request_body(content = ServiceRequest, example = json!({
        "name": "stats", "type": "text-stats", "port": 0, "command": ["/usr/local/bin/stats-worker"], "vram_gb": 4
    })),
    responses((status = 200, body = Service, example = json!(examples::service())), (status = 400, description = "'name' is required"),
        (status = 409, description = "Service 'x' already exists")))]
async fn register(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Service>, ApiError> {
    let (spec, tenant) = {
        let fields = body.fields()?;
        check_program(&app, &caller, &fields, None)?;
        let tenant = owner(&caller, &fields)?;
        (Box::new(read_new(&fields)?), tenant)
    };
    containers::check(&app, &spec).await?;
    let name = spec.name.clone();
    app.submit(&caller, Command::RegisterService { spec, tenant })
        .await?;
    shown(&app, &caller, &name).await
}

/// Change a service. Absent members stay as they are; it holds for the next instance.
#[utoipa::path(put, path = "/services/{name}", tag = "services",
    request_body(content = Object, example = json!({"vram_gb": 8, "description": "larger model"})),
    responses((status = 200, body = Service, example = json!(examples::service())), (status = 404, description = "Unknown service: x")))]
async fn update(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
    body: JsonBody,
) -> Result<Json<Service>, ApiError> {
    let current = find_owned(&app, &caller, &name)?;
    let spec = {
        let fields = body.fields()?;
        check_program(&app, &caller, &fields, Some(&current.spec))?;
        keeps_tenant(&fields, &current);
        Box::new(read_changes(&fields, &current.spec)?)
    };
    containers::check(&app, &spec).await?;
    app.submit(&caller, Command::UpdateService { spec }).await?;
    shown(&app, &caller, &name).await
}

fn keeps_tenant(fields: &Fields, current: &ServiceView) {
    let named = fields.has("tenant") || fields.is_null("tenant");
    if named && id(fields, "tenant") != current.tenant {
        let message =
            "Value error, a service's tenant cannot change; remove it and register it again";
        fields.fault("tenant", "value_error", message);
    }
}

/// Remove a service.
#[utoipa::path(delete, path = "/services/{name}", tag = "services",
    responses((status = 200, body = Object, example = json!({"deleted": "stats"})),
        (status = 404, description = "Unknown service: x"), (status = 409, description = "It has active jobs")))]
async fn remove(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
) -> Result<Json<Value>, ApiError> {
    let service = ServiceName::from(name.as_str());
    control(&app, &caller, &name, Command::RemoveService { service }).await?;
    Ok(Json(json!({"deleted": name})))
}

/// Let a service take jobs.
#[utoipa::path(post, path = "/services/{name}/enable", tag = "services",
    responses((status = 200, body = Service, example = json!(examples::service())), (status = 404, description = "Unknown service: x")))]
async fn enable(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
) -> Result<Json<Service>, ApiError> {
    let service = ServiceName::from(name.as_str());
    app.submit(&caller, Command::EnableService { service })
        .await?;
    shown(&app, &caller, &name).await
}

/// Let a service take no more jobs.
#[utoipa::path(post, path = "/services/{name}/disable", tag = "services",
    responses((status = 200, body = Service, example = json!(examples::service())), (status = 404, description = "Unknown service: x")))]
async fn disable(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
) -> Result<Json<Service>, ApiError> {
    let service = ServiceName::from(name.as_str());
    app.submit(&caller, Command::DisableService { service })
        .await?;
    shown(&app, &caller, &name).await
}

/// A GPU's source as JSON shows it.
pub fn source_name(source: GpuSource) -> &'static str {
    match source {
        GpuSource::Simulated => "simulated",
        GpuSource::Nvml => "nvml",
        GpuSource::Amdgpu => "amdgpu",
    }
}
