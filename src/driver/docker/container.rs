//! One container of an instance: made and started, or there already, or found again; stopped, and removed if it is ours.
//! Acts go by the engine's id, which never names another container, and only after its labels were seen to be ours.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use bollard::models::ContainerInspectResponse;
use bollard::query_parameters::{
    CreateContainerOptions, CreateImageOptions, KillContainerOptions, RemoveContainerOptions,
};
use futures_util::StreamExt;
use rustix::process::Signal;
use smol_str::SmolStr;
use tokio::sync::watch;
use tokio::time::Instant;

use super::ASK_AGAIN;
use super::engine::{CHANGE, Docker, DockerError, LOOK};
use super::position::Piece;
use super::recipe::{GpuWay, JobParts, Recipe, owner_labels};
use super::space::is_full;
use super::watch::{Seen, wait};
use crate::domain::container::{ContainerStatus, ImageSpec};
use crate::domain::event::Exit;
use crate::domain::spec::Grant;
use crate::driver::procfs::Mark;

/// How long an image may be pulled.
const PULL: Duration = Duration::from_secs(3_600);

/// Between tries to remove one that must not be left running.
const REMOVE_AGAIN: Duration = Duration::from_secs(1);

/// Why no container came to be.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Held against nobody.
    #[error("{0}")]
    NoEngine(String),
    #[error("{0}")]
    Refused(String),
}

impl From<DockerError> for StartError {
    fn from(error: DockerError) -> Self {
        match error {
            DockerError::Down(why) => StartError::NoEngine(why),
            error @ DockerError::Full(_) => StartError::NoEngine(error.to_string()),
            error => StartError::Refused(error.to_string()),
        }
    }
}

impl Docker {
    /// Returns at once, unless its disk was full a short while ago.
    pub async fn may_be_tried(&self) {
        if let Some(at) = self.inner.space.next_try() {
            tokio::time::sleep_until(at).await;
        }
    }

    /// From what became of a try.
    pub fn learn_space(&self, tried: &Result<Container, StartError>) {
        let space = &self.inner.space;
        match tried {
            Ok(_) => space.found(),
            Err(StartError::NoEngine(why)) if is_full(why) => space.failed(Instant::now()),
            Err(_) => {}
        }
    }
}

impl StartError {
    /// As it is recorded.
    pub fn exit(self) -> Exit {
        match self {
            StartError::NoEngine(why) => Exit::NoEngine(why),
            StartError::Refused(why) => Exit::NotStarted(why),
        }
    }
}

/// A container that runs, or has run.
pub struct Container {
    docker: Docker,
    pub id: SmolStr,
    /// Of the engine's address.
    pub port: u16,
    pub pid: u32,
    /// This life of it, as the engine tells its beginning.
    started_at: String,
    /// Made by us: removed when it has ended.
    is_ours: bool,
    /// The last that one of others had said when it was adopted.
    pub said_before: Option<Piece>,
    seen: watch::Receiver<Seen>,
}

/// What a container of an image is made with.
pub struct Making<'a> {
    pub mark: &'a Mark,
    pub image: &'a ImageSpec,
    /// 0 lets the engine choose.
    pub port: u16,
    pub grants: &'a [Grant],
    pub grace_ms: u64,
    pub mps_percent: Option<u8>,
    pub job: Option<&'a JobParts>,
}

impl Docker {
    /// Makes sure that a container may be made of an image, and that the image is there. May take long, and can be dropped.
    /// `say` is told how pulling it goes on.
    pub async fn prepare(
        &self,
        image: &ImageSpec,
        say: impl Fn(String) + Send,
    ) -> Result<(), StartError> {
        let allowed = self.inner.options.rules.check(image);
        allowed.map_err(|forbidden| StartError::Refused(forbidden.message))?;
        self.need_image(&image.image, say).await
    }

    /// Makes a container of a prepared image, without starting it.
    pub async fn create(&self, making: Making<'_>) -> Result<Seen, StartError> {
        let rules = &self.inner.options.rules;
        let is_granted = making.grants.iter().any(|grant| !grant.is_simulated());
        let gpu_way = match is_granted {
            true => Some(self.gpu_way().await?),
            false => None,
        };
        let recipe = Recipe {
            mark: making.mark,
            spec: making.image,
            rules,
            address: self.inner.options.address,
            host_port: making.port,
            grants: making.grants,
            gpu_way,
            mps_percent: making.mps_percent,
            is_local: self.is_local(),
            grace_ms: making.grace_ms,
            job: making.job,
        };
        let body = recipe
            .body()
            .map_err(|forbidden| StartError::Refused(forbidden.message))?;
        let options = CreateContainerOptions {
            name: Some(recipe.name()),
            ..CreateContainerOptions::default()
        };
        let made = self
            .call("make a container", CHANGE, |client| async move {
                client.create_container(Some(options), body).await
            })
            .await?;
        if making.job.is_some()
            && let Err(error) = self.make_folder(&made.id).await
        {
            self.remove_surely(&made.id).await;
            return Err(error.into());
        }
        match self.look(&made.id).await {
            Ok(seen) => Ok(seen),
            Err(error) => {
                self.remove_surely(&made.id).await;
                Err(error.into())
            }
        }
    }

    /// Starts it. When the engine goes away meanwhile it is waited for: whoever hears that a container did not start takes its
    /// memory for free. One of ours is removed then.
    pub async fn run(&self, seen: Seen, port: u16, is_ours: bool) -> Result<Container, StartError> {
        let id = seen.facts.id.clone();
        let started = self
            .call("start a container", CHANGE, |client| {
                let id = id.clone();
                async move { client.start_container(&id, None).await }
            })
            .await;
        let running = match started {
            Ok(()) => self.look(&id).await,
            Err(error) => Err(error),
        };
        match running {
            Ok(seen) => Ok(self.hold(seen, port, is_ours)),
            Err(error) if is_ours => {
                self.remove_surely(&id).await;
                Err(error.into())
            }
            Err(error @ DockerError::Down(_)) => match self.look_surely(&id).await? {
                seen if seen.facts.status == ContainerStatus::Running => {
                    Ok(self.hold(seen, port, is_ours))
                }
                _ => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Looks at a container, waiting for an engine that does not answer.
    async fn look_surely(&self, id: &str) -> Result<Seen, DockerError> {
        loop {
            self.is_up().await;
            match self.look(id).await {
                Err(DockerError::Down(_)) => tokio::time::sleep(ASK_AGAIN).await,
                seen => return seen,
            }
        }
    }

    /// The container of that name, started if it does not run.
    pub async fn adopt(&self, name: &str, port: u16) -> Result<Container, StartError> {
        let seen = match self.look(name).await {
            Err(DockerError::NotFound(_)) => {
                return Err(StartError::Refused(format!(
                    "there is no container '{name}'; make it (docker create), or correct the service's 'container'"
                )));
            }
            seen => seen?,
        };
        let said_before = self.last_said(&seen.facts.id).await;
        let container = match seen.facts.status {
            ContainerStatus::Running => self.hold(seen, port, false),
            ContainerStatus::Paused => {
                return Err(StartError::Refused(format!(
                    "container '{name}' is paused; unpause it (docker unpause {name})"
                )));
            }
            _ => self.run(seen, port, false).await?,
        };
        Ok(Container {
            said_before,
            ..container
        })
    }

    /// `port` is the one that was asked for; 0 takes the one that the engine chose.
    fn hold(&self, seen: Seen, port: u16, is_ours: bool) -> Container {
        let port = match port {
            0 => seen.port.unwrap_or(0),
            asked => asked,
        };
        Container {
            docker: self.clone(),
            id: seen.facts.id.clone(),
            port,
            pid: seen.pid,
            started_at: seen.started_at.clone(),
            is_ours,
            said_before: None,
            seen: self.inner.watcher.follow(seen),
        }
    }

    /// Finds a container again by its id, whatever became of it. `None` when there is none, or it is another's.
    pub async fn find(
        &self,
        id: &str,
        port: u16,
        mark: Option<&Mark>,
    ) -> Result<Option<Container>, DockerError> {
        let found = match self.inspect(id).await {
            Err(DockerError::NotFound(_)) => return Ok(None),
            found => found?,
        };
        if mark.is_some_and(|mark| !bears(&found, mark)) {
            return Ok(None);
        }
        Ok(Seen::of(found).map(|seen| self.hold(seen, port, mark.is_some())))
    }

    /// The container that bears a mark, by its id.
    pub async fn marked(&self, mark: &Mark) -> Result<Option<SmolStr>, DockerError> {
        let found = self.labelled(&owner_labels(mark)).await?;
        let first = found.into_iter().find_map(|container| container.id);
        Ok(first.map(SmolStr::from))
    }

    /// Sends a signal, by its name, to the first process of a container.
    ///
    /// # Errors
    /// It does not run, or the engine does not answer.
    pub async fn signal(&self, id: &str, signal: &str) -> Result<(), DockerError> {
        let options = KillContainerOptions {
            signal: signal.to_owned(),
        };
        self.call("signal a container", CHANGE, |client| async move {
            client.kill_container(id, Some(options)).await
        })
        .await
    }

    /// Removes one of ours as `remove` does, waiting for an engine that does not answer, and as long as it runs.
    async fn remove_surely(&self, id: &str) {
        loop {
            self.is_up().await;
            if self.remove(id).await.is_ok() {
                return;
            }
            let runs = |seen: &Seen| {
                let status = seen.facts.status;
                matches!(status, ContainerStatus::Running | ContainerStatus::Paused)
            };
            match self.look(id).await {
                Ok(seen) if !runs(&seen) => return,
                _ => tokio::time::sleep(REMOVE_AGAIN).await,
            }
        }
    }

    /// Removes one of ours, killing it if it runs, with the volumes that have no name. What cannot be removed now, the
    /// orphans' sweep removes.
    ///
    /// # Errors
    /// It is there still.
    pub async fn remove(&self, id: &str) -> Result<(), DockerError> {
        let options = RemoveContainerOptions {
            force: true,
            v: true,
            ..RemoveContainerOptions::default()
        };
        let removed = self
            .call("remove a container", CHANGE, |client| async move {
                client.remove_container(id, Some(options)).await
            })
            .await;
        match removed {
            Ok(()) | Err(DockerError::NotFound(_)) => Ok(()),
            Err(error) => {
                tracing::warn!(container.id = id, %error, "a container could not be removed yet");
                Err(error)
            }
        }
    }

    /// Makes sure that an image is there, pulling it where that is allowed.
    async fn need_image(&self, image: &str, say: impl Fn(String) + Send) -> Result<(), StartError> {
        let named = image.to_owned();
        let found = self
            .call("tell of an image", LOOK, |client| async move {
                client.inspect_image(&named).await
            })
            .await;
        match found {
            Ok(_) => Ok(()),
            Err(DockerError::NotFound(_)) if self.inner.options.rules.pull => {
                self.pull(image, say).await
            }
            Err(DockerError::NotFound(_)) => Err(StartError::Refused(format!(
                "there is no image '{image}' on this machine; pull it (docker pull {image}), or set docker_pull"
            ))),
            Err(error) => Err(error.into()),
        }
    }

    async fn pull(&self, image: &str, say: impl Fn(String) + Send) -> Result<(), StartError> {
        tracing::info!(image.name = image, "pulling an image");
        say(format!("pulling {image}"));
        let client = self.client()?;
        let credentials =
            super::registry::credentials(self.inner.options.credentials.as_deref(), image)
                .map_err(StartError::Refused)?;
        let options = CreateImageOptions {
            from_image: Some(image.to_owned()),
            ..CreateImageOptions::default()
        };
        let pulling = async {
            let mut steps = std::pin::pin!(client.create_image(Some(options), None, credentials));
            let mut told = HashMap::new();
            while let Some(step) = steps.next().await {
                let step = step.map_err(|error| self.judge(error))?;
                let (layer, status) =
                    (step.id.unwrap_or_default(), step.status.unwrap_or_default());
                // Each layer's bytes are counted many times a second.
                if told.get(&layer) != Some(&status) {
                    say(format!("pulling {image}: {layer} {status}"));
                    told.insert(layer, status);
                }
            }
            say(format!("pulled {image}"));
            Ok::<(), DockerError>(())
        };
        match tokio::time::timeout(PULL, pulling).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error @ (DockerError::Down(_) | DockerError::Full(_)))) => Err(error.into()),
            Ok(Err(error)) => Err(StartError::Refused(format!(
                "image '{image}' could not be pulled: {error}"
            ))),
            Err(_) => Err(StartError::Refused(format!(
                "image '{image}' was not pulled within an hour"
            ))),
        }
    }

    /// Whether there is a container of that name.
    ///
    /// # Errors
    /// The engine does not answer.
    pub async fn exists(&self, name: &str) -> Result<bool, DockerError> {
        match self.look(name).await {
            Ok(_) => Ok(true),
            Err(DockerError::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether this engine can give real GPUs to containers.
    ///
    /// # Errors
    /// `Refused` says what is to be done.
    pub async fn gives_gpus(&self) -> Result<(), DockerError> {
        self.gpu_way().await.map(drop)
    }

    /// How this engine gives GPUs to containers.
    async fn gpu_way(&self) -> Result<GpuWay, DockerError> {
        let info = self
            .call("tell of itself", LOOK, |client| async move {
                client.info().await
            })
            .await?;
        GpuWay::of(&info).ok_or_else(|| {
            DockerError::Missing(
                "the container engine cannot give GPUs to containers: install the NVIDIA Container Toolkit and \
                 configure its runtime (nvidia-ctk runtime configure), or its device interface (CDI)"
                    .to_owned(),
            )
        })
    }
}

fn bears(found: &ContainerInspectResponse, mark: &Mark) -> bool {
    let labels = found
        .config
        .as_ref()
        .and_then(|config| config.labels.as_ref());
    let is = |label: &str, value: &str| {
        labels
            .and_then(|labels| labels.get(label))
            .is_some_and(|found| found == value)
    };
    owner_labels(mark)
        .iter()
        .all(|(label, value)| is(label, value))
}

impl Container {
    /// Changes of it from now on; the first is what it is now.
    pub fn changes(&self) -> watch::Receiver<Seen> {
        let mut changes = self.seen.clone();
        changes.mark_changed();
        changes
    }

    /// Returns when this life of it has ended.
    pub async fn exited(&self) {
        wait(&mut self.seen.clone(), |seen| !seen.lives(&self.started_at)).await;
    }

    /// Where it is called.
    pub fn base_url(&self) -> String {
        let address = SocketAddr::new(self.docker.inner.options.address, self.port);
        format!("http://{address}")
    }

    /// TERM, or what its image wants instead, or KILL, as soon as the engine answers; one that is paused is unpaused by it.
    /// Tells whether the engine took it.
    pub async fn signal(&self, signal: Signal) -> bool {
        self.docker.is_up().await;
        let named = match signal {
            Signal::KILL => "SIGKILL".to_owned(),
            _ => self.seen.borrow().stop_signal.clone(),
        };
        let sent = self.docker.signal(&self.id, &named).await;
        self.docker.look_again(&self.id).await;
        sent.is_ok()
    }

    /// After its end: how it ended.
    pub fn exit(&self) -> Exit {
        let seen = self.seen.borrow();
        match seen.started_at == self.started_at {
            true => seen.exit.clone(),
            // It was started again by others.
            false => Exit::Unknown,
        }
    }

    /// Whether it was ever started.
    pub fn has_begun(&self) -> bool {
        self.seen.borrow().facts.status != ContainerStatus::Created
    }

    /// Removes it, waiting for an engine that does not answer.
    pub async fn remove_surely(&self) {
        self.docker.remove_surely(&self.id).await;
    }

    /// Removes one of ours.
    pub async fn clear(&self) {
        if self.is_ours {
            // What stays, the orphans' sweep removes.
            let _ = self.docker.remove(&self.id).await;
        }
    }
}
