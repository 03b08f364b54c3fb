//! Services and their instances, GPUs and planes, as the API shows them.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use crate::domain::container::ContainerFacts;
use crate::domain::effect::ProcessIdentity;
use crate::domain::event::{Event, StartCause};
use crate::domain::ids::{Generation, PlaneId, RunId, ServiceName};
use crate::domain::spec::{Grant, ServiceSpec};
use crate::domain::time::Timestamp;

use super::run::RunSummary;

/// A registered service and what it does now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceView {
    pub spec: ServiceSpec,
    /// Whose it is; `None` is shared by all.
    pub tenant: Option<SmolStr>,
    pub enabled: bool,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// The last error of a service that died too often in a row and is left alone.
    pub crash_looped: Option<String>,
    /// MiB that an instance was seen to use beyond what is declared.
    pub learned_mib: Option<u64>,
    /// The current instance, until its memory is seen to be free.
    pub instance: Option<InstanceView>,
    /// Unexpected ends since the last good start.
    pub deaths: u32,
    /// Earliest restart after a death.
    pub retry_at: Option<Timestamp>,
    /// Runs whose attempt occupies it.
    pub active_runs: Vec<(PlaneId, RunId)>,
}

/// Where an instance stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstancePhase {
    Starting,
    Ready,
    Unhealthy,
    Draining,
    Stopping,
    /// Gone, its memory not yet seen to be free.
    Exited,
    /// Its memory is being taken by a step of its ladder.
    Yielding,
    /// It lives without its GPU memory.
    Sleeping,
    Waking,
}

/// One life of a service's process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceView {
    pub generation: Generation,
    pub phase: InstancePhase,
    pub grants: Vec<Grant>,
    pub cause: StartCause,
    pub started_at: Timestamp,
    pub ready_at: Option<Timestamp>,
    /// Milliseconds from the start's request to the first good health answer.
    pub startup_ms: Option<u64>,
    pub process: Option<ProcessIdentity>,
    pub container: Option<ContainerFacts>,
    /// Since when it sleeps.
    pub asleep_since: Option<Timestamp>,
    /// MiB of it that lie in host memory meanwhile.
    pub host_mib: u64,
}

/// A data plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaneView {
    pub plane: PlaneId,
    pub tenant: SmolStr,
    pub runtime: SmolStr,
    pub opened_at: Timestamp,
}

/// The service whose view an event changes by itself.
pub fn service_of(event: &Event) -> Option<&ServiceName> {
    match event {
        Event::ServiceRegistered { spec } | Event::ServiceUpdated { spec } => Some(&spec.name),
        Event::ServiceEnabled { service }
        | Event::ServiceDisabled { service }
        | Event::ServiceRemoved { service }
        | Event::ServiceAssigned { service, .. }
        | Event::ServiceCrashLooped { service, .. }
        | Event::ServicePeakLearned { service, .. }
        | Event::ServiceNeedRaised { service, .. } => Some(service),
        event => event.instance().map(|(service, _)| service),
    }
}

/// Folds one event into its service's view; `None` when the service is gone.
pub fn apply(view: Option<ServiceView>, event: &Event, at: Timestamp) -> Option<ServiceView> {
    if let Event::ServiceRegistered { spec } = event {
        return Some(ServiceView {
            spec: (**spec).clone(),
            tenant: None,
            enabled: true,
            created_at: at,
            updated_at: at,
            crash_looped: None,
            learned_mib: None,
            instance: None,
            deaths: 0,
            retry_at: None,
            active_runs: Vec::new(),
        });
    }
    let mut view = view?;
    match event {
        Event::ServiceRemoved { .. } => return None,
        Event::ServiceUpdated { spec } => {
            if !spec.needs_memory_as(&view.spec) {
                view.learned_mib = None;
            }
            view.spec = (**spec).clone();
            view.updated_at = at;
            forgive(&mut view);
        }
        Event::ServiceEnabled { .. } => {
            view.enabled = true;
            view.updated_at = at;
        }
        Event::ServiceDisabled { .. } => {
            view.enabled = false;
            view.updated_at = at;
        }
        Event::ServiceCrashLooped {
            deaths, last_error, ..
        } => {
            view.crash_looped = Some(last_error.clone());
            view.deaths = *deaths;
            view.retry_at = None;
        }
        Event::ServiceAssigned { tenant, .. } => view.tenant = Some(tenant.clone()),
        Event::ServicePeakLearned { mib, .. } | Event::ServiceNeedRaised { mib, .. } => {
            view.learned_mib = Some(*mib);
        }
        event => instance(&mut view, event, at),
    }
    Some(view)
}

fn forgive(view: &mut ServiceView) {
    view.crash_looped = None;
    view.deaths = 0;
    view.retry_at = None;
}

/// Events of instances. One of an older generation than the current changes nothing.
fn instance(view: &mut ServiceView, event: &Event, at: Timestamp) {
    if let Event::InstanceStartRequested {
        generation,
        grants,
        cause,
        ..
    } = event
    {
        if *cause == StartCause::Manual {
            forgive(view);
        }
        view.retry_at = None;
        view.instance = Some(InstanceView {
            generation: *generation,
            phase: InstancePhase::Starting,
            grants: grants.clone(),
            cause: *cause,
            started_at: at,
            ready_at: None,
            startup_ms: None,
            process: None,
            container: None,
            asleep_since: None,
            host_mib: 0,
        });
        return;
    }
    let generation = event.instance().map(|(_, generation)| generation);
    let Some(current) = view.instance.as_mut() else {
        return;
    };
    if generation != Some(current.generation) {
        return;
    }
    match event {
        Event::InstanceSpawned {
            pid,
            start_ticks,
            boot_id,
            port,
            ..
        } => {
            current.process = Some(ProcessIdentity {
                pid: *pid,
                start_ticks: *start_ticks,
                boot_id: boot_id.clone(),
                port: *port,
            });
        }
        Event::ContainerChanged { container, .. } => current.container = Some(container.clone()),
        Event::InstanceReady { startup_ms, .. } => {
            current.phase = InstancePhase::Ready;
            current.ready_at = Some(at);
            current.startup_ms = Some(*startup_ms);
            current.asleep_since = None;
            current.host_mib = 0;
        }
        Event::InstanceAdopted { .. } => adopted(current, at),
        Event::InstanceUnhealthy { .. } => current.phase = InstancePhase::Unhealthy,
        Event::InstanceDraining { .. } => current.phase = InstancePhase::Draining,
        Event::InstanceStopRequested { .. } => current.phase = InstancePhase::Stopping,
        Event::InstanceExited {
            deaths, retry_at, ..
        } => {
            current.phase = InstancePhase::Exited;
            view.retry_at = *retry_at;
            view.deaths = *deaths;
        }
        Event::InstanceReleased { .. } => view.instance = None,
        _ => sleep(current, event, at),
    }
}

/// One that sleeps, or is on its way there, is found as that.
fn adopted(current: &mut InstanceView, at: Timestamp) {
    if current.asleep_since.is_none() && current.phase != InstancePhase::Yielding {
        current.phase = InstancePhase::Ready;
        current.ready_at = current.ready_at.or(Some(at));
    }
}

/// Steps of ladders, sleep and waking.
fn sleep(current: &mut InstanceView, event: &Event, at: Timestamp) {
    match event {
        Event::LadderStepBegan {
            run: None, step, ..
        } if step.takes_memory() => {
            current.phase = InstancePhase::Yielding;
        }
        Event::InstanceSlept {
            grants, host_mib, ..
        } => {
            current.phase = InstancePhase::Sleeping;
            current.grants = grants.clone();
            current.asleep_since = Some(at);
            current.host_mib = *host_mib;
        }
        Event::InstanceWakeRequested { grants, cause, .. } => {
            current.phase = InstancePhase::Waking;
            current.grants = grants.clone();
            current.cause = *cause;
        }
        _ => {}
    }
}

/// Where a run's attempt occupies a service.
pub fn occupied(run: Option<&RunSummary>) -> Option<&ServiceName> {
    run.filter(|run| run.status.is_on_service())?
        .service
        .as_ref()
}

/// Moves a run from one service's active runs to another's.
pub fn occupy(view: &mut ServiceView, run: (PlaneId, RunId), active: bool) {
    view.active_runs.retain(|other| *other != run);
    if active {
        view.active_runs.push(run);
    }
}
