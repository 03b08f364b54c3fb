//! Performs what committed events imply and reports each outcome as a command. Decides nothing: an effect
//! carries all that it needs, and whether an outcome still matters is the coordinator's to say.
//!
//! `calls` jobs' calls and their stopping, `jobs` those with containers of their own, `answer` what counts as an answer, `progress` polling, `ladder` checkpoints, sleep and waking, `callback`
//! telling others how a run ended, `notify` telling tenants of their runs, `owed` when that is due, `webhook` signing it.

mod answer;
mod callback;
mod calls;
mod jobs;
mod ladder;
mod notify;
mod owed;
mod progress;
mod webhook;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

pub use answer::ANSWER_MAX_BYTES;
pub use callback::{CallbackBody, CallbackStatus};
pub use jobs::RunEnd;
pub use notify::{NoticeFacts, NtfyToken};
pub use webhook::{Secret, SecretError};

use crate::domain::container::ImageSpec;
use crate::domain::effect::{Dispatch, Effect, SendNotice};
use crate::domain::ids::{PlaneId, RunId, Seq};
use crate::domain::notify::Notify;
use crate::domain::spec::ServiceSpec;
use crate::driver::{Driver, Outcomes, Tasks};
use crate::outbound::{GuardedClient, Rules};
use calls::Calls;

/// What effects need of the ledger. Both calls block and are made off the asynchronous threads.
pub trait Source: Send + Sync + 'static {
    /// The payload at `seq`; `None` when it was purged.
    fn payload(&self, seq: Seq) -> Result<Option<bytes::Bytes>, SourceError>;
    /// How an ended run ended; `None` when it is unknown or has not ended.
    fn callback_body(
        &self,
        plane: PlaneId,
        run: RunId,
    ) -> Result<Option<CallbackBody>, SourceError>;
    /// Where a tenant is told of its runs.
    fn notify(&self, tenant: &str) -> Result<Notify, SourceError>;
    /// Where a run stands.
    fn run_end(&self, plane: PlaneId, run: RunId) -> Result<RunEnd, SourceError>;
    /// What is told of a run; `None` when it is not known any more.
    fn notice_facts(&self, plane: PlaneId, run: RunId) -> Result<Option<NoticeFacts>, SourceError>;
}

/// Why the ledger could not be read.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// Makes the token that a dispatch carries, to last that long; `None` when it cannot be signed.
pub type JobToken = Arc<dyn Fn(&Dispatch, Duration) -> Option<String> + Send + Sync>;

/// Reads what a job's own container is made of from the job's payload; an error is a sentence.
pub type ReadContainer = Arc<dyn Fn(&[u8]) -> Result<ImageSpec, String> + Send + Sync>;

/// What an executor is made of.
pub struct ExecutorOptions {
    /// How services reach this gateway, as `http://127.0.0.1:8080`: for progress and checkpoints.
    pub gateway_url: String,
    /// How services in containers do; empty when as all others.
    pub container_gateway_url: String,
    /// The ledger's own id: the source of callbacks.
    pub ledger: uuid::Uuid,
    /// Which addresses callbacks may go to.
    pub callbacks: Rules,
    /// Which addresses notifications may go to.
    pub notices: Rules,
    pub ntfy_token: NtfyToken,
    /// Which addresses services may have.
    pub services: Rules,
    pub secret: Secret,
    pub job_token: JobToken,
    pub read_container: ReadContainer,
    /// How long the output of an ended job, and the checkpoint of a failed one, are kept.
    pub jobs_kept: Duration,
    /// Between questions for progress where a service wants to be asked.
    pub progress_every: Duration,
}

impl ExecutorOptions {
    /// How a service reaches this gateway.
    fn gateway_for(&self, spec: &ServiceSpec) -> &str {
        match spec.worker.is_container() && !self.container_gateway_url.is_empty() {
            true => &self.container_gateway_url,
            false => &self.gateway_url,
        }
    }
}

/// The contract's pace of asking for progress (`contracts/gpu-gateway.md` section 4).
pub const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Cloneable handle.
#[derive(Clone)]
pub struct Executor {
    inner: Arc<Inner>,
}

struct Inner {
    driver: Driver,
    outcomes: Outcomes,
    source: Arc<dyn Source>,
    tasks: Tasks,
    options: ExecutorOptions,
    call_client: GuardedClient,
    callback_client: GuardedClient,
    notice_client: GuardedClient,
    /// To `owed`.
    callbacks: mpsc::UnboundedSender<callback::Try>,
    notices: mpsc::UnboundedSender<Box<SendNotice>>,
    calls: Calls,
}

impl Executor {
    /// Fails when no HTTP client can be made. To be called on the runtime.
    pub fn new(
        driver: Driver,
        outcomes: Outcomes,
        source: Arc<dyn Source>,
        tasks: Tasks,
        options: ExecutorOptions,
    ) -> Result<Executor, reqwest::Error> {
        let (callbacks, owed) = mpsc::unbounded_channel();
        let (notices, untold) = mpsc::unbounded_channel();
        let inner = Arc::new(Inner {
            driver,
            outcomes,
            source,
            tasks,
            call_client: GuardedClient::for_jobs(options.services.clone())?,
            callback_client: GuardedClient::for_callbacks(options.callbacks.clone())?,
            notice_client: GuardedClient::for_notifications(options.notices.clone())?,
            callbacks,
            notices,
            calls: Calls::default(),
            options,
        });
        let keeping = owed::keep(Arc::downgrade(&inner), owed);
        inner.tasks.spawn("callbacks", keeping);
        let telling = owed::keep(Arc::downgrade(&inner), untold);
        inner.tasks.spawn("notifications", telling);
        let clearing = jobs::clear(Arc::downgrade(&inner));
        inner.tasks.spawn("leavings of jobs", clearing);
        Ok(Executor { inner })
    }

    /// Performs effects until the coordinator ends.
    pub async fn run(&self, mut effects: mpsc::UnboundedReceiver<Vec<Effect>>) {
        while let Some(batch) = effects.recv().await {
            for effect in batch {
                self.perform(effect);
            }
        }
    }

    /// Begins one effect and returns at once. Effects begin in the order of the calls.
    pub fn perform(&self, effect: Effect) {
        let driver = &self.inner.driver;
        match effect {
            Effect::StartInstance {
                spec,
                generation,
                grants,
            } => driver.start(*spec, generation, grants),
            Effect::StartJob { spec, grants, job } => jobs::run(&self.inner, *spec, grants, *job),
            Effect::StopInstance {
                service,
                generation,
                kill_at,
            } => {
                driver.stop(&service, generation, kill_at);
            }
            Effect::FindInstance {
                spec,
                generation,
                grants: _,
                process,
                container,
                stop_at,
                asleep,
            } => match asleep {
                true => driver.find_asleep(*spec, generation, process, container),
                false => driver.find(*spec, generation, process, container, stop_at),
            },
            Effect::SweepOrphans { live } => driver.sweep_orphans(live),
            // On which GPUs it was, the meter knows.
            Effect::WatchRelease {
                service,
                generation,
                grants: _,
            } => {
                driver.watch_release(&service, generation);
            }
            Effect::Dispatch(dispatch) => calls::dispatch(&self.inner, *dispatch),
            Effect::StopCall {
                run,
                attempt,
                service,
                generation,
                reason,
                deadline,
            } => {
                let stop = calls::Stop { reason, deadline };
                calls::stop(&self.inner, (run, attempt), &(service, generation), stop);
            }
            Effect::SendCallback {
                plane,
                tenant,
                run,
                number,
                url,
                not_before,
            } => self.send_callback(callback::Try {
                plane,
                tenant,
                run,
                number,
                url,
                not_before,
            }),
            // As of callbacks.
            Effect::SendNotice(notice) => drop(self.inner.notices.send(notice)),
            Effect::AskCheckpoint(asking) => ladder::ask_checkpoint(&self.inner, *asking),
            Effect::TakeMemory(taking) => ladder::take_memory(&self.inner, *taking),
            Effect::WakeInstance(waking) => ladder::wake(&self.inner, *waking),
        }
    }

    fn send_callback(&self, try_: callback::Try) {
        // Nobody sends any more when the gateway stops; it is owed after the next start.
        let _ = self.inner.callbacks.send(try_);
    }

    /// Waits until no job's call is open, at most for `limit`. Answers how many still are.
    pub async fn finish_calls(&self, limit: Duration) -> usize {
        self.inner.calls.finish(limit).await
    }
}

impl Inner {
    /// Reads the ledger off the asynchronous threads.
    async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&dyn Source) -> Result<T, SourceError> + Send + 'static,
    ) -> Result<T, SourceError> {
        let source = self.source.clone();
        tokio::task::spawn_blocking(move || read(&*source)).await?
    }
}
