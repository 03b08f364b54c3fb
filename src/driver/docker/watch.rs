//! What becomes of containers: the engine's events say when to look, a look says what there is. Subscribed first and
//! looked at then, and again at intervals: events that the engine repeats, loses or never sends change nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum, EventMessage};
use bollard::query_parameters::EventsOptions;
use futures_util::StreamExt;
use smol_str::{SmolStr, ToSmolStr};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::engine::{Docker, DockerError, LOOK};
use crate::domain::container::{ContainerFacts, ContainerStatus};
use crate::domain::event::Exit;

/// Between looks at all containers, whatever the events say.
const COMPARE_EVERY: Duration = Duration::from_secs(10);
/// Events from before the subscription that are asked for: what happened while it was made.
const LOOK_BACK_S: i64 = 5;
/// After a subscription that ended, so that a broken engine is not asked without a pause.
const SUBSCRIBE_AGAIN: Duration = Duration::from_millis(200);
/// How a process ends that the kernel kills: by signal 9.
const KILLED: i64 = SIGNAL_BASE + 9;
/// What the kernel's signals are added to, as shells do.
const SIGNAL_BASE: i64 = 128;

/// What was seen of one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub facts: ContainerFacts,
    /// Of this machine, 0 while it does not run.
    pub pid: u32,
    /// The engine's time of its last start: another one is another life.
    pub started_at: String,
    /// How it ended, while it does not run.
    pub exit: Exit,
    /// Where its port is published, when it is.
    pub port: Option<u16>,
    /// What it wants to be sent when it is to end.
    pub stop_signal: String,
}

impl Seen {
    pub fn of(found: ContainerInspectResponse) -> Option<Seen> {
        let state = found.state?;
        let stop_signal = found.config.and_then(|config| config.stop_signal);
        let bindings = found.network_settings.and_then(|settings| settings.ports);
        let mut bindings = bindings
            .into_iter()
            .flatten()
            .filter_map(|(_, bindings)| bindings);
        let port = bindings.find_map(|bindings| bindings.first()?.host_port.as_ref()?.parse().ok());
        let status = match state.status? {
            ContainerStateStatusEnum::CREATED | ContainerStateStatusEnum::EMPTY => {
                ContainerStatus::Created
            }
            ContainerStateStatusEnum::PAUSED => ContainerStatus::Paused,
            ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::STOPPING => {
                ContainerStatus::Running
            }
            // One that the engine starts again has ended.
            _ => ContainerStatus::Exited,
        };
        let exit = match state.exit_code {
            Some(KILLED) if state.oom_killed == Some(true) => Exit::OutOfMemory,
            Some(code) if code > SIGNAL_BASE && code <= SIGNAL_BASE + 64 => {
                Exit::Signal(i32::try_from(code - SIGNAL_BASE).unwrap_or(0))
            }
            Some(code) => Exit::Code(i32::try_from(code).unwrap_or(-1)),
            None => Exit::Unknown,
        };
        Some(Seen {
            facts: ContainerFacts {
                id: found.id?.into(),
                name: found.name?.trim_start_matches('/').to_smolstr(),
                status,
            },
            pid: state
                .pid
                .and_then(|pid| u32::try_from(pid).ok())
                .unwrap_or(0),
            started_at: state.started_at.unwrap_or_default(),
            exit,
            port,
            stop_signal: stop_signal
                .filter(|signal| !signal.is_empty())
                .unwrap_or_else(|| "SIGTERM".to_owned()),
        })
    }

    /// Whether the life that began at `started_at` goes on.
    pub fn lives(&self, started_at: &str) -> bool {
        let runs = matches!(
            self.facts.status,
            ContainerStatus::Running | ContainerStatus::Paused
        );
        runs && self.started_at == started_at
    }
}

/// The containers that somebody waits for.
#[derive(Default)]
pub struct Watcher {
    watched: Mutex<HashMap<SmolStr, Arc<watch::Sender<Seen>>>>,
}

impl Watcher {
    fn lock(&self) -> MutexGuard<'_, HashMap<SmolStr, Arc<watch::Sender<Seen>>>> {
        // Nothing panics while it is held.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows a container from what was seen of it.
    pub fn follow(&self, seen: Seen) -> watch::Receiver<Seen> {
        let mut watched = self.lock();
        // Receivers that are gone leave nobody to tell.
        watched.retain(|_, sender| sender.receiver_count() > 0);
        let id = seen.facts.id.clone();
        let sender = watched
            .entry(id)
            .or_insert_with(|| Arc::new(watch::Sender::new(seen)));
        sender.subscribe()
    }

    fn ids(&self) -> Vec<SmolStr> {
        let watched = self.lock();
        let waited_for = watched
            .iter()
            .filter(|(_, sender)| sender.receiver_count() > 0);
        waited_for.map(|(id, _)| id.clone()).collect()
    }

    fn tell(&self, id: &str, change: impl FnOnce(&mut Seen)) {
        let sender = self.lock().get(id).cloned();
        if let Some(sender) = sender {
            sender.send_if_modified(|seen| {
                let before = seen.clone();
                change(seen);
                *seen != before
            });
        }
    }
}

impl Docker {
    /// All that the engine tells of a container, by id or name.
    pub(super) async fn inspect(
        &self,
        container: &str,
    ) -> Result<ContainerInspectResponse, DockerError> {
        self.call("tell of a container", LOOK, |client| async move {
            client.inspect_container(container, None).await
        })
        .await
    }

    /// What there is of a container, by id or name.
    pub(super) async fn look(&self, container: &str) -> Result<Seen, DockerError> {
        let found = self.inspect(container).await?;
        Seen::of(found).ok_or_else(|| {
            DockerError::Refused(format!("it tells nothing of container '{container}'"))
        })
    }

    /// Looks at one that is followed. What cannot be seen now is looked at again later.
    pub(super) async fn look_again(&self, id: &str) {
        match self.look(id).await {
            Ok(now) => self.inner.watcher.tell(id, |seen| *seen = now),
            Err(DockerError::NotFound(_)) => self.inner.watcher.tell(id, |seen| {
                if seen.facts.status != ContainerStatus::Exited {
                    seen.exit = Exit::Unknown;
                }
                seen.facts.status = ContainerStatus::Removed;
            }),
            Err(error) => {
                tracing::debug!(container.id = id, %error, "a container could not be looked at")
            }
        }
    }

    async fn look_at_all(&self) {
        for id in self.inner.watcher.ids() {
            self.look_again(&id).await;
        }
    }
}

/// Follows the engine's events for as long as the gateway runs.
pub async fn run(docker: Docker) {
    loop {
        docker.is_up().await;
        follow_events(&docker).await;
        tokio::time::sleep(SUBSCRIBE_AGAIN).await;
    }
}

/// Until the subscription ends.
async fn follow_events(docker: &Docker) {
    let Ok(client) = docker.client() else {
        return;
    };
    let since = crate::clock::now().0.div_euclid(1_000_000) - LOOK_BACK_S;
    let options = EventsOptions {
        since: Some(since.to_string()),
        until: None,
        filters: Some(HashMap::from([(
            "type".to_owned(),
            vec!["container".to_owned()],
        )])),
    };
    let mut events = std::pin::pin!(client.events(Some(options)));
    let mut compare = interval(COMPARE_EVERY);
    compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick is at once, when the request may not have arrived: what is missed by it comes by `since`.
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(event)) => {
                    if let Some(id) = concerns(docker, event) {
                        docker.look_again(&id).await;
                    }
                }
                Some(Err(error)) => {
                    tracing::warn!(%error, "the container engine's events broke off");
                    docker.judge(error);
                    return;
                }
                None => return,
            },
            _ = compare.tick() => docker.look_at_all().await,
        }
    }
}

/// The followed container that an event may have changed. Health checks and processes that are run inside change none.
fn concerns(docker: &Docker, event: EventMessage) -> Option<SmolStr> {
    let action = event.action?;
    if action.starts_with("exec_") || action.starts_with("health_status") || action == "top" {
        return None;
    }
    let id: SmolStr = event.actor?.id?.into();
    docker.inner.watcher.lock().contains_key(&id).then_some(id)
}

/// Waits on a followed container until `until`, or for ever when nobody follows it any more.
pub async fn wait(seen: &mut watch::Receiver<Seen>, until: impl FnMut(&Seen) -> bool) {
    if seen.wait_for(until).await.is_err() {
        std::future::pending::<()>().await;
    }
}
