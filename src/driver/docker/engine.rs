//! The connection to the container engine. Every call has a time limit; while the engine does not answer, calls fail at
//! once and one task asks again and again until it does.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bollard::API_DEFAULT_VERSION;
use bollard::errors::Error;
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use super::connect::{self, ConnectError};
use super::rules::ContainerRules;
use super::space::{self, Space};
use super::watch::Watcher;
use crate::causes::with_causes;
use crate::domain::command::Command;
use crate::domain::container::Engine;
use crate::driver::{Outcomes, Tasks, blocking};

/// Where an engine listens unless it is said.
const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";
/// Says that there shall be none.
const NO_ENGINE: &str = "none";
/// The engine's answer to a look: longer means that it hangs.
pub(super) const LOOK: Duration = Duration::from_secs(5);
/// A change, such as a start: images are unpacked, devices prepared, on a slow disk.
pub(super) const CHANGE: Duration = Duration::from_secs(60);
/// Ours are always shorter, but for streams, which wait for their first byte only.
pub(super) const CLIENT_LIMIT_S: u64 = 3_600;
/// Between questions to an engine that answers, and to one that does not.
const ASK_UP: Duration = Duration::from_secs(5);
const ASK_DOWN: Duration = Duration::from_secs(1);

/// Where the engine is and what may be asked of it.
#[derive(Clone, Debug)]
pub struct DockerOptions {
    /// As `DOCKER_HOST` has it; empty takes that, or the usual socket; `none` for no engine at all.
    pub host: String,
    /// Of the engine's machine: where ports are published.
    pub address: IpAddr,
    /// A docker `config.json` with credentials of registries; `None` for none.
    pub credentials: Option<PathBuf>,
    pub rules: ContainerRules,
}

impl DockerOptions {
    /// No engine at all.
    pub fn none() -> DockerOptions {
        DockerOptions {
            host: NO_ENGINE.to_owned(),
            address: Ipv4Addr::LOCALHOST.into(),
            credentials: None,
            rules: ContainerRules::default(),
        }
    }
}

/// Why the engine did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DockerError {
    /// Nothing can be asked of it now.
    #[error("{0}")]
    Down(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// It has not what it takes.
    #[error("{0}")]
    Missing(String),
    /// It says no.
    #[error("the container engine refuses: {0}")]
    Refused(String),
    /// It has no room for that.
    #[error("the container engine's disk is full; free some space there ({0})")]
    Full(String),
}

/// Cloneable handle.
#[derive(Clone)]
pub struct Docker {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub ledger: Uuid,
    pub options: DockerOptions,
    host: String,
    client: Mutex<Option<bollard::Docker>>,
    state: watch::Sender<Engine>,
    /// Something went wrong: ask now.
    doubt: Notify,
    pub watcher: Watcher,
    pub space: Space,
}

impl Docker {
    /// No engine at all.
    pub fn none() -> Docker {
        Docker::idle(DockerOptions::none(), Uuid::nil())
    }

    /// Begins to ask for the engine, if there shall be one.
    pub fn new(options: DockerOptions, ledger: Uuid, outcomes: &Outcomes, tasks: &Tasks) -> Docker {
        let docker = Docker::idle(options, ledger);
        if docker.is_wanted() {
            tasks.spawn("engine", docker.clone().keep_asking(outcomes.clone()));
            tasks.spawn("engine events", super::watch::run(docker.clone()));
        }
        docker
    }

    /// Asks once whether there is an engine that answers, and where.
    pub async fn probe(options: DockerOptions) -> (String, Engine) {
        let docker = Docker::idle(options, Uuid::nil());
        let found = match docker.is_wanted() {
            true => docker.ask().await,
            false => docker.state(),
        };
        (docker.inner.host.clone(), found)
    }

    /// Asks nothing yet.
    fn idle(options: DockerOptions, ledger: Uuid) -> Docker {
        let host = match options.host.as_str() {
            "" => std::env::var("DOCKER_HOST").unwrap_or_else(|_| DEFAULT_HOST.to_owned()),
            said => said.to_owned(),
        };
        let refused = "this gateway is set to use no container engine (docker_host)";
        let error = (host == NO_ENGINE).then(|| refused.to_owned());
        Docker {
            inner: Arc::new(Inner {
                ledger,
                options,
                host,
                client: Mutex::new(None),
                state: watch::Sender::new(Engine { up: false, error }),
                doubt: Notify::new(),
                watcher: Watcher::default(),
                space: Space::default(),
            }),
        }
    }

    /// Whether there shall be an engine.
    pub fn is_wanted(&self) -> bool {
        self.inner.host != NO_ENGINE
    }

    /// Whether paths that are given to it are this machine's.
    pub(super) fn is_local(&self) -> bool {
        self.inner.host.starts_with("unix://")
    }

    /// Whether it answered when last asked.
    pub fn state(&self) -> Engine {
        self.inner.state.borrow().clone()
    }

    /// What the operator allows of containers.
    pub fn rules(&self) -> &ContainerRules {
        &self.inner.options.rules
    }

    /// Returns when the engine answers.
    pub async fn is_up(&self) {
        // The sender lies in `inner`, which we hold.
        let _ = self
            .inner
            .state
            .subscribe()
            .wait_for(|engine| engine.up)
            .await;
    }

    /// One call, within `limit`. `what` ends the sentence "… did not …".
    ///
    /// # Errors
    /// `Down` without asking while the engine does not answer, and when it does not answer this.
    pub(super) async fn call<T, F: Future<Output = Result<T, Error>>>(
        &self,
        what: &str,
        limit: Duration,
        ask: impl FnOnce(bollard::Docker) -> F,
    ) -> Result<T, DockerError> {
        let client = self.client()?;
        match tokio::time::timeout(limit, ask(client)).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.judge(error)),
            Err(_) => {
                self.inner.doubt.notify_one();
                let seconds = limit.as_secs();
                Err(DockerError::Down(format!(
                    "the container engine did not {what} within {seconds} s"
                )))
            }
        }
    }

    /// The connection, if the engine answers.
    pub(super) fn client(&self) -> Result<bollard::Docker, DockerError> {
        let state = self.inner.state.borrow();
        let client = self.kept_client().clone();
        match client.filter(|_| state.up) {
            Some(client) => Ok(client),
            None => Err(DockerError::Down(state.why_down().to_owned())),
        }
    }

    pub(super) fn judge(&self, error: Error) -> DockerError {
        match error {
            Error::DockerResponseServerError {
                status_code: 404,
                message,
            } => DockerError::NotFound(message),
            Error::DockerResponseServerError { message, .. }
            | Error::DockerStreamError { error: message } => match space::is_full(&message) {
                true => DockerError::Full(message),
                false => DockerError::Refused(message),
            },
            error => {
                self.inner.doubt.notify_one();
                DockerError::Down(format!(
                    "the container engine broke off: {}",
                    with_causes(&error)
                ))
            }
        }
    }

    fn kept_client(&self) -> std::sync::MutexGuard<'_, Option<bollard::Docker>> {
        // Nothing panics while it is held.
        self.inner
            .client
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports each change of whether it answers, for as long as the gateway runs.
    async fn keep_asking(self, outcomes: Outcomes) {
        let mut before = None;
        loop {
            let found = self.ask().await;
            let is_new = self.inner.state.send_if_modified(|state| {
                // An engine that refuses in turn in two ways is not told of each time.
                let is_sure = state.error.is_none() || before == found.error;
                let other = !state.up && state.error != found.error;
                let changed = state.up != found.up || (other && is_sure);
                if changed {
                    *state = found.clone();
                }
                changed
            });
            before.clone_from(&found.error);
            if is_new {
                match &found.error {
                    None => tracing::info!(
                        engine.host = self.inner.host,
                        "the container engine answers"
                    ),
                    Some(error) => tracing::warn!(
                        engine.host = self.inner.host,
                        error,
                        "containers cannot be used"
                    ),
                }
                outcomes
                    .report(Command::EngineSeen {
                        engine: found.clone(),
                    })
                    .await;
            }
            let pause = if found.up { ASK_UP } else { ASK_DOWN };
            // A doubt is as good as the end of the pause, except that an engine that is down is not asked without one.
            let _ = tokio::time::timeout(pause, async {
                self.inner.doubt.notified().await;
                if !found.up {
                    std::future::pending::<()>().await;
                }
            })
            .await;
        }
    }

    async fn ask(&self) -> Engine {
        match tokio::time::timeout(LOOK, self.connect()).await {
            Ok(Ok(client)) => {
                *self.kept_client() = Some(client);
                Engine {
                    up: true,
                    error: None,
                }
            }
            Ok(Err(error)) => {
                // The next one may find other certificates.
                *self.kept_client() = None;
                down(&self.inner.host, &error)
            }
            Err(_) => Engine {
                up: false,
                error: Some(format!(
                    "the container engine at {} does not answer; is it stuck?",
                    self.inner.host
                )),
            },
        }
    }

    /// A kept connection that answers, or a new one, in the newest version that both sides know.
    async fn connect(&self) -> Result<bollard::Docker, ConnectError> {
        let kept = self.kept_client().clone();
        if let Some(client) = kept {
            client.ping().await?;
            return Ok(client);
        }
        let inner = self.inner.clone();
        let client = blocking(move || connect::connect(&inner.host)).await?;
        debug_assert!(client.client_version() == *API_DEFAULT_VERSION);
        Ok(client.negotiate_version().await?)
    }
}

/// In words that end a sentence, and say what to do.
fn down(host: &str, error: &ConnectError) -> Engine {
    let error = match error {
        ConnectError::Unusable(why) => {
            format!("the container engine at {host} cannot be asked: {why}")
        }
        ConnectError::Engine(error) => unanswered(host, error),
    };
    Engine {
        up: false,
        error: Some(error),
    }
}

fn unanswered(host: &str, error: &Error) -> String {
    let text = with_causes(error);
    if matches!(error, Error::SocketNotFoundError(_)) || text.contains("No such file") {
        format!("no container engine was found at {host}; start it, or set docker_host")
    } else if host.starts_with("unix://") && text.contains("ermission denied") {
        format!(
            "the container engine at {host} lets this user in no more than others; add the gateway's user to its group"
        )
    } else {
        format!(
            "the container engine at {host} does not answer ({text}); start it, or set docker_host"
        )
    }
}
