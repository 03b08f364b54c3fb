//! What a container adds to an instance's life: how it comes to be, how it is found again, and what is told of it.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::body::Body;
use super::docker::{Container, Copied, DockerError, JobParts, Making, Seen, StartError};
use super::instance::{First, Instance, asked};
use super::logs::LogError;
use super::{Shared, blocking, docker};
use crate::causes::with_causes;
use crate::domain::command::Command;
use crate::domain::container::ImageSpec;
use crate::domain::event::Exit;
use crate::domain::ids::{Generation, ServiceName};
use crate::domain::spec::{Grant, ServiceSpec, Worker};

/// How long the rest of a container's output is read when it has ended.
const LAST_WORDS: Duration = Duration::from_secs(30);
const STOPPED: &str = "it was stopped before it started";

impl Instance {
    /// Makes and starts a container, of a job's attempt if there is one, or starts the one that is there.
    pub(super) async fn contain(
        &mut self,
        spec: &ServiceSpec,
        grants: &[Grant],
        job: Option<&(Box<ImageSpec>, JobParts)>,
    ) -> Result<Body, Exit> {
        let docker = self.shared.docker.clone();
        tokio::select! {
            biased;
            () = asked(&mut self.stop) => return Err(Exit::NotStarted(STOPPED.to_owned())),
            () = docker.may_be_tried() => {}
        }
        let container = match (job, &spec.worker) {
            (Some((image, parts)), _) => self.make(spec, image, grants, Some(parts)).await,
            (None, Worker::Image(image)) => self.make(spec, image, grants, None).await,
            _ => docker.adopt(&spec.container, spec.port).await,
        };
        docker.learn_space(&container);
        let container = container.map_err(StartError::exit)?;
        self.copy_output(&container, false).await;
        Ok(Body::Container(container))
    }

    /// From nothing to the end of the container of one attempt of a job.
    pub(super) async fn run_job(
        mut self,
        spec: Arc<ServiceSpec>,
        grants: Vec<Grant>,
        job: (Box<ImageSpec>, JobParts),
    ) {
        self.said_before = self.said().await;
        match self.contain(&spec, &grants, Some(&job)).await {
            Ok(body) => {
                self.report_spawned(&body);
                self.live(body, &spec, First::Running).await;
            }
            Err(exit) => self.broke_off(exit).await,
        }
    }

    async fn make(
        &mut self,
        spec: &ServiceSpec,
        image: &ImageSpec,
        grants: &[Grant],
        job: Option<&JobParts>,
    ) -> Result<Container, StartError> {
        let docker = self.shared.docker.clone();
        let log = self.shared.logs.open(&self.service);
        let log = log.map_err(|error| StartError::Refused(with_causes(&error)))?;
        // A handful of lines: not worth a thread of its own.
        let say = move |line: String| drop(writeln!(&log, "{line}"));
        tokio::select! {
            biased;
            prepared = docker.prepare(image, say) => prepared?,
            () = asked(&mut self.stop) => {
                return Err(StartError::Refused(STOPPED.to_owned()));
            }
        }
        let mark = self.mark();
        let making = Making {
            mark: &mark,
            image,
            port: spec.port,
            grants,
            grace_ms: spec.grace_ms,
            mps_percent: spec.mps_percent,
            job,
        };
        let made = docker.create(making).await?;
        self.report_container(&made);
        docker.run(made, spec.port, true).await
    }

    /// The container of an earlier gateway process, whether it lives or has ended meanwhile; the engine is waited for.
    pub(super) async fn look_for_container(
        &mut self,
        spec: &ServiceSpec,
        found: &super::instance::Found,
    ) -> Option<Container> {
        let docker = self.shared.docker.clone();
        if !docker.is_wanted() {
            return None;
        }
        let mark = self.mark();
        let is_ours = matches!(spec.worker, Worker::Image(_) | Worker::Job { .. });
        let port = found
            .process
            .as_ref()
            .map_or(spec.port, |process| process.port);
        loop {
            docker.is_up().await;
            let known = match &found.container {
                Some(id) => Ok(Some(id.clone())),
                None if is_ours => docker.marked(&mark).await,
                // It was not told that it runs: whether it does is not ours to say.
                None => return None,
            };
            let container = match known {
                Ok(Some(id)) => docker.find(&id, port, is_ours.then_some(&mark)).await,
                Ok(None) => return None,
                Err(error) => Err(error),
            };
            match container {
                Ok(container) => {
                    let container = container?;
                    if spec.worker.is_job() && !container.has_begun() {
                        // It would tell an exit code all the same. A start that is under way over there ends with it.
                        container.remove_surely().await;
                        return None;
                    }
                    self.copy_output(&container, true).await;
                    return Some(container);
                }
                Err(DockerError::Down(_)) => tokio::time::sleep(docker::ASK_AGAIN).await,
                Err(error) => {
                    tracing::warn!(service.name = %self.service, %error, "a container could not be found again");
                    return None;
                }
            }
        }
    }

    /// Who looks at GPUs knows whose the container is.
    pub(super) fn occupy(&self, body: &Body) -> Option<docker::Occupied> {
        let owner = (self.service.clone(), self.generation);
        let id = body.container()?;
        Some(self.shared.container_owners.enter(id.into(), owner))
    }

    /// From its start on, or from where the gateway was with it when it ended.
    async fn copy_output(&mut self, container: &Container, found: bool) {
        let (logs, service) = (self.shared.logs.clone(), self.service.clone());
        let (id, before) = (container.id.clone(), container.said_before.clone());
        let opened = blocking(move || {
            let (log, kept) = (logs.open(&service)?, logs.open_position(&service)?);
            Ok::<_, LogError>(match found {
                true => Copied::resume(&id, log, kept)
                    .unwrap_or_else(|(log, kept)| Copied::after(before, &id, log, kept)),
                false => Copied::after(before, &id, log, kept),
            })
        })
        .await;
        match opened {
            Ok(copied) => {
                let (docker, id) = (self.shared.docker.clone(), container.id.clone());
                let (ended, is_over) = oneshot::channel();
                let (done, copied_all) = oneshot::channel::<()>();
                self.copied = Some((ended, copied_all));
                self.shared.tasks.spawn("container output", async move {
                    docker::copy(docker, id, copied, is_over).await;
                    drop(done);
                });
            }
            Err(error) => {
                let error = with_causes(&error);
                tracing::warn!(service.name = %self.service, error, "a container's output is not kept");
            }
        }
    }

    /// Returns when all that a container said before its end is in the log, as its removal takes it away.
    pub(super) async fn output_copied(&mut self) {
        let Some((ended, copied_all)) = self.copied.take() else {
            return;
        };
        // One who copies no more needs not be told.
        let _ = ended.send(());
        if tokio::time::timeout(LAST_WORDS, copied_all).await.is_err() {
            tracing::warn!(service.name = %self.service, "the end of a container's output is lost");
        }
        // What the next attempt says begins a line, and a follower is told lines.
        let (logs, name) = (self.shared.logs.clone(), self.service.clone());
        if let Err(error) = blocking(move || logs.end_line(&name)).await {
            let error = with_causes(&error);
            tracing::warn!(service.name = %self.service, error, "a log could not be written");
        }
    }

    /// Told once for each change; the coordinator knows what it was told before.
    pub(super) fn report_container(&self, seen: &Seen) {
        self.outcomes.report(Command::ContainerSeen {
            service: self.service.clone(),
            generation: self.generation,
            container: seen.facts.clone(),
        });
    }
}

/// The next change of a container; never for a process.
pub(super) async fn changed(changes: &mut Option<watch::Receiver<Seen>>) -> Seen {
    if let Some(changes) = changes
        && changes.changed().await.is_ok()
    {
        return changes.borrow_and_update().clone();
    }
    std::future::pending().await
}

/// Removes orphans when the engine answers first, and looks for more now and then.
pub(super) async fn sweep_first(shared: Arc<Shared>, live: Vec<(ServiceName, Generation)>) {
    shared.docker.is_up().await;
    sweep(&shared, |service, generation| {
        live.iter()
            .any(|live| live.0 == *service && live.1 == generation)
    })
    .await;
    loop {
        tokio::time::sleep(docker::SWEEP_EVERY).await;
        sweep(&shared, |_, _| false).await;
    }
}

/// Removes containers of this ledger that are neither live nor known to the driver.
async fn sweep(shared: &Arc<Shared>, is_live: impl Fn(&ServiceName, Generation) -> bool) {
    let known = |service: &_, generation| {
        is_live(service, generation) || shared.table.holds(service, generation)
    };
    match shared.docker.sweep(known).await {
        Ok(()) | Err(DockerError::Down(_)) => {}
        Err(error) => tracing::warn!(%error, "orphaned containers could not be looked for"),
    }
}
