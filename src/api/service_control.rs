//! Start, stop and restart of a service: the command, then waiting for its outcome by the ledger's commits.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::body::PathOf;
use super::containers;
use super::error::{ApiError, ErrorCode};
use super::guard::Caller;
use super::query::Query;
use super::routes::Routes;
use super::run_view::seconds;
use super::runs::unexpected;
use super::service_owner::{find, sees};
use super::services::{is_healthy, is_running};
use super::state::App;
use crate::coordinator::SubmitError;
use crate::domain::command::{Command, Rejection, Reply};
use crate::domain::event::{Event, Exit};
use crate::domain::ids::{Generation, PlaneId, RunId, Seq, ServiceName};
use crate::ledger::{InstancePhase, InstanceView, Ledger, Scope, ServiceView};

/// The routes of this file, at the root and under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(start))
        .routes(routes!(stop))
        .routes(routes!(restart))
}

/// The answer to a start.
#[derive(Debug, Serialize, ToSchema)]
pub struct StartAnswer {
    pub service: String,
    /// `started` or `already_running`.
    pub status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub startup_time_s: Option<f64>,
    pub healthy: bool,
    /// Why it is not healthy yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Of a restart: `running` or `stopped`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous_status: Option<&'static str>,
    /// Of a restart: its jobs ended before it was stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drained: Option<bool>,
}

/// Start a service, and wait up to 120 s for its health.
#[utoipa::path(post, path = "/services/{name}/start", tag = "services",
    responses(
        (status = 200, body = StartAnswer, example = json!({"service": "stats", "status": "started", "startup_time_s": 1.2, "healthy": true})),
        (status = 404, description = "Unknown service: x"),
        (status = 409, description = "Not enough GPU memory, or disabled"),
        (status = 502, description = "It ended before it was healthy"),
    ))]
async fn start(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
) -> Result<Json<StartAnswer>, ApiError> {
    let before = find(&app, &caller, &name)?;
    if before.instance.is_none() {
        containers::must_exist(&app, &before.spec).await?;
    }
    // An instance that is gone holds its memory until that is seen free: a start waits for it.
    wait(&app, &name, app.config.service_stop_wait, |view| {
        let left = view.and_then(|view| view.instance.as_ref());
        (left.is_none_or(|instance| instance.phase != InstancePhase::Exited)).then_some(())
    })
    .await?;
    let tail = app.ledger.tail();
    let service = ServiceName::from(name.as_str());
    let (generation, already) =
        control(&app, &caller, &name, Command::StartService { service }).await?;
    if already && is_healthy(&before) {
        return Ok(Json(answer(&name, "already_running", None, true)));
    }
    let mut started = wait_for_health(&app, &name, generation, tail).await?;
    if already {
        started.status = "already_running";
    }
    Ok(Json(started))
}

/// The answer to a stop.
#[derive(Serialize, ToSchema)]
pub struct StopAnswer {
    pub service: String,
    /// `stopped`, `already_stopped`, or `stopping` when it takes longer than we wait.
    pub status: &'static str,
    /// Its jobs ended before it was stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drained: Option<bool>,
}

/// Stop a service, and wait for its end.
#[utoipa::path(post, path = "/services/{name}/stop", tag = "services",
    params(("drain" = Option<bool>, Query, description = "Let running jobs end first, for up to 30 s; true when absent")),
    responses(
        (status = 200, body = StopAnswer, example = json!({"service": "stats", "status": "stopped", "drained": true})),
        (status = 404, description = "Unknown service: x"),
    ))]
async fn stop(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
    query: Query,
) -> Result<Json<StopAnswer>, ApiError> {
    let drain = read_drain(&query)?;
    drop(query);
    let before = find(&app, &caller, &name)?;
    let service = ServiceName::from(name.as_str());
    let (_, already) = control(
        &app,
        &caller,
        &name,
        Command::StopService { service, drain },
    )
    .await?;
    if already && !is_running(&before) {
        return Ok(Json(StopAnswer {
            service: name,
            status: "already_stopped",
            drained: None,
        }));
    }
    let generation = before.instance.as_ref().map(|instance| instance.generation);
    let gone = wait(&app, &name, app.config.service_stop_wait, |view| {
        let current = view.and_then(|view| view.instance.as_ref());
        (current.map(|instance| instance.generation) != generation || current.is_none())
            .then_some(())
    });
    let status = if gone.await?.is_some() {
        "stopped"
    } else {
        "stopping"
    };
    let drained = drain && all_ended(&app, &before.active_runs)?;
    Ok(Json(StopAnswer {
        service: name,
        status,
        drained: Some(drained),
    }))
}

/// Stop a service and start it again.
#[utoipa::path(post, path = "/services/{name}/restart", tag = "services",
    params(("drain" = Option<bool>, Query, description = "Let running jobs end first, for up to 30 s; true when absent")),
    responses(
        (status = 200, body = StartAnswer, example = json!({"service": "stats", "status": "started", "startup_time_s": 1.2, "healthy": true, "previous_status": "running", "drained": true})),
        (status = 404, description = "Unknown service: x"),
        (status = 502, description = "It ended before it was healthy"),
    ))]
async fn restart(
    State(app): State<App>,
    caller: Caller,
    PathOf(name): PathOf<String>,
    query: Query,
) -> Result<Json<StartAnswer>, ApiError> {
    let drain = read_drain(&query)?;
    drop(query);
    let before = find(&app, &caller, &name)?;
    let tail = app.ledger.tail();
    let service = ServiceName::from(name.as_str());
    let restart = Command::RestartService { service, drain };
    let (next, _) = control(&app, &caller, &name, restart).await?;
    let started = wait_for_health(&app, &name, next, tail).await?;
    Ok(Json(StartAnswer {
        previous_status: Some(if is_running(&before) {
            "running"
        } else {
            "stopped"
        }),
        drained: Some(drain && all_ended(&app, &before.active_runs)?),
        ..started
    }))
}

fn read_drain(query: &Query) -> Result<bool, ApiError> {
    let drain = query.boolean("drain").unwrap_or(true);
    query.finish()?;
    Ok(drain)
}

/// Submits; while the service is on its way out, once more when it is gone.
pub async fn control(
    app: &App,
    caller: &Caller,
    name: &str,
    command: Command,
) -> Result<(Option<Generation>, bool), ApiError> {
    let leaving = match submit(app, caller, command.clone()).await {
        Err(error) if error.code == ErrorCode::ServiceStopping => error,
        answer => return answer,
    };
    let gone = wait(app, name, app.config.service_stop_wait, |view| {
        let instance = view.and_then(|view| view.instance.as_ref());
        // One that has fallen asleep, or another that took its place in the same commit, leaves no more.
        let leaves = |i: &InstanceView| {
            matches!(
                i.phase,
                InstancePhase::Draining
                    | InstancePhase::Stopping
                    | InstancePhase::Exited
                    | InstancePhase::Yielding
            )
        };
        (!instance.is_some_and(leaves)).then_some(())
    });
    match gone.await? {
        Some(()) => submit(app, caller, command).await,
        None => Err(leaving),
    }
}

/// Submits; on too little memory tells who holds it.
async fn submit(
    app: &App,
    caller: &Caller,
    command: Command,
) -> Result<(Option<Generation>, bool), ApiError> {
    match app.put(caller, command, None).await {
        Ok(Reply::Service {
            generation,
            already,
        }) => Ok((generation, already)),
        Ok(reply) => Err(unexpected(&reply)),
        Err(SubmitError::Rejected(rejection @ Rejection::InsufficientVram { .. })) => {
            Err(insufficient_vram(app, caller, rejection)?)
        }
        Err(error) => Err(error.into()),
    }
}

/// All that is held is counted; services that do not exist for the caller are not named.
fn insufficient_vram(
    app: &App,
    caller: &Caller,
    rejection: Rejection,
) -> Result<ApiError, ApiError> {
    let mut running_services = Vec::new();
    let mut running_vram_mb = 0;
    for view in app.ledger.services()? {
        let Some(instance) = &view.instance else {
            continue;
        };
        let held: u64 = instance.grants.iter().map(|grant| grant.mib).sum();
        running_vram_mb += held;
        if held > 0 && sees(caller, &view) {
            running_services.push(view.spec.name.to_string());
        }
    }
    let mut error = ApiError::from(rejection);
    error.detail["running_services"] = json!(running_services);
    error.detail["running_vram_mb"] = json!(running_vram_mb);
    Ok(error)
}

fn answer(
    service: &str,
    status: &'static str,
    startup_ms: Option<u64>,
    healthy: bool,
) -> StartAnswer {
    StartAnswer {
        service: service.to_owned(),
        status,
        startup_time_s: startup_ms.map(seconds),
        healthy,
        warning: None,
        previous_status: None,
        drained: None,
    }
}

/// How a start came out.
enum Outcome {
    Healthy(Option<u64>),
    Ended(String),
}

/// Waits until an instance of at least `generation` is healthy, or has ended, or will not come.
async fn wait_for_health(
    app: &App,
    name: &str,
    generation: Option<Generation>,
    after: Seq,
) -> Result<StartAnswer, ApiError> {
    let since = Instant::now();
    let limit = app.config.service_start_wait;
    match started(app, name, limit, generation).await? {
        Some(Outcome::Healthy(startup_ms)) => Ok(answer(name, "started", startup_ms, true)),
        Some(Outcome::Ended(why)) => {
            let why = match generation {
                Some(generation) => last_words(app, name, generation, after)
                    .await?
                    .unwrap_or(why),
                None => why,
            };
            Err(ApiError::new(
                ErrorCode::StartFailed,
                format!("Service '{name}' ended before it was healthy: {why}"),
            )
            .with("service", name))
        }
        None => {
            let waited_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
            Ok(StartAnswer {
                warning: Some(format!(
                    "not healthy after {} s; it is still being waited for",
                    limit.as_secs()
                )),
                ..answer(name, "started", Some(waited_ms), false)
            })
        }
    }
}

/// Most records that are looked through for the reason of a failed start.
const MAX_SEARCHED: usize = 2_000;

/// Why an instance came to nothing, from its records after `after`.
async fn last_words(
    app: &App,
    name: &str,
    of: Generation,
    after: Seq,
) -> Result<Option<String>, ApiError> {
    let name = ServiceName::from(name);
    let read = move |ledger: &Ledger| {
        let records = ledger.records(Scope::All, after, MAX_SEARCHED)?;
        let about = |event: &Event| event.instance().is_some_and(|i| i == (&name, of));
        let words = records
            .into_iter()
            .filter(|record| about(&record.event))
            .filter_map(|record| match record.event {
                Event::InstanceUnhealthy { error, .. }
                | Event::InstanceExited {
                    exit: Exit::NotStarted(error) | Exit::NoEngine(error),
                    ..
                } => Some(error),
                Event::InstanceExited {
                    exit: Exit::Code(code),
                    ..
                } => Some(format!("exit code {code}; its log tells more")),
                _ => None,
            });
        // The first is the cause, what follows comes of it.
        Ok(words.into_iter().next())
    };
    app.scan(read).await
}

/// The outcome of a start, if there is one in time.
async fn started(
    app: &App,
    name: &str,
    limit: Duration,
    generation: Option<Generation>,
) -> Result<Option<Outcome>, ApiError> {
    let mut looks = Looks::new(app, name, limit);
    while let Some(view) = looks.next().await? {
        let outcome = start_outcome(view.as_ref(), generation);
        if outcome.is_some() {
            return Ok(outcome);
        }
        let is_there = view.is_none_or(|view| view.instance.is_some());
        if !is_there && !is_to_come(app, name, generation).await? {
            return Ok(Some(Outcome::Ended("it was stopped".to_owned())));
        }
    }
    Ok(None)
}

/// Whether a service without an instance gets one of `generation` yet. That one may have come and gone between two
/// looks; a stop calls off what a restart has promised.
async fn is_to_come(
    app: &App,
    name: &str,
    generation: Option<Generation>,
) -> Result<bool, ApiError> {
    let name = ServiceName::from(name);
    let asked = app.handle.ask(move |state, _, _| {
        state.services.get(&name).is_some_and(|service| {
            let is_ahead = generation.is_some_and(|wanted| service.generation < wanted);
            service.instance.is_some() || (is_ahead && service.wanted && service.enabled)
        })
    });
    Ok(asked.await?)
}

fn start_outcome(view: Option<&ServiceView>, generation: Option<Generation>) -> Option<Outcome> {
    let Some(view) = view else {
        return Some(Outcome::Ended("it was removed".to_owned()));
    };
    if let Some(error) = &view.crash_looped {
        return Some(Outcome::Ended(error.clone()));
    }
    let ours = view
        .instance
        .as_ref()
        .filter(|i| generation.is_none_or(|g| i.generation >= g));
    match ours.map(|instance| (instance.phase, instance.startup_ms)) {
        Some((InstancePhase::Ready | InstancePhase::Draining, startup_ms)) => {
            Some(Outcome::Healthy(startup_ms))
        }
        Some((InstancePhase::Exited, _)) => Some(Outcome::Ended(
            "its process exited; its log tells why".to_owned(),
        )),
        Some((InstancePhase::Stopping, _)) => {
            Some(Outcome::Ended("it is being stopped".to_owned()))
        }
        _ => None,
    }
}

/// Looks at a service after each commit until `seen` says what it wanted; `None` when time is up.
async fn wait<T>(
    app: &App,
    name: &str,
    limit: Duration,
    mut seen: impl FnMut(Option<&ServiceView>) -> Option<T>,
) -> Result<Option<T>, ApiError> {
    let mut looks = Looks::new(app, name, limit);
    while let Some(view) = looks.next().await? {
        if let Some(found) = seen(view.as_ref()) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// A service as it is, and after each commit from then on.
struct Looks<'a> {
    app: &'a App,
    name: &'a str,
    deadline: Instant,
    commits: watch::Receiver<Seq>,
    has_looked: bool,
}

impl<'a> Looks<'a> {
    fn new(app: &'a App, name: &'a str, limit: Duration) -> Looks<'a> {
        Looks {
            app,
            name,
            deadline: Instant::now() + limit,
            commits: app.ledger.watch(),
            has_looked: false,
        }
    }

    /// Its view, `None` in it when there is no such service; `None` when time is up.
    async fn next(&mut self) -> Result<Option<Option<ServiceView>>, ApiError> {
        if self.has_looked {
            tokio::select! {
                () = self.app.stopping.cancelled() => return Ok(None),
                changed = self.commits.changed() => if changed.is_err() { return Ok(None) },
                () = tokio::time::sleep_until(self.deadline) => return Ok(None),
            }
        }
        self.has_looked = true;
        // Marked as seen before reading, so that a commit in between wakes us again.
        self.commits.borrow_and_update();
        Ok(Some(self.app.ledger.service(self.name)?))
    }
}

/// Whether runs that were active have ended by themselves.
fn all_ended(app: &App, runs: &[(PlaneId, RunId)]) -> Result<bool, ApiError> {
    for (plane, run) in runs {
        let summary = app.ledger.run(*plane, *run)?;
        if summary.is_some_and(|summary| !summary.status.is_terminal()) {
            return Ok(false);
        }
    }
    Ok(true)
}
