//! The way in: everything that changes anything is submitted here, and answered when it is on disk.

use std::sync::Arc;

use crossbeam_channel::{Sender, TrySendError};
use smol_str::SmolStr;
use tokio::sync::oneshot;

use crate::domain::audit::Source;
use crate::domain::command::{Command, Origin, Rejection, Reply};
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::machine::Seen;
use crate::domain::scheduler::status::{self, GpuStatus, QueueStats};
use crate::domain::scheduler::why::{self, Why};
use crate::domain::settings::Settings;
use crate::domain::state::State;
use crate::domain::time::Timestamp;

/// Messages that wait for the coordinator at most: a full inbox is answered `Overloaded` at once rather
/// than with a wait that nobody can see. Sixteen batches of work.
pub(super) const INBOX: usize = 65_536;

/// What the coordinator's thread is sent.
pub(super) enum Message {
    Submit(Box<Submission>),
    /// A question about State, answered between commits, when State is what the disk has.
    Ask(Question),
    /// Begin nothing new from now on: the gateway is stopping.
    Quiet,
    /// Write a last snapshot and end.
    Stop,
}

/// Whether they are the sum of a minute's samples of the GPUs, and nothing else but questions.
pub(super) fn only_measured(messages: &[Message]) -> bool {
    let is_sum = |message: &Message| match message {
        Message::Submit(submission) => {
            matches!(submission.command, Command::Seen(Seen::Use { .. }))
        }
        _ => false,
    };
    messages.iter().any(is_sum)
        && messages
            .iter()
            .all(|message| is_sum(message) || matches!(message, Message::Ask(_)))
}

/// Called with State, the settings and the time between two commits.
pub(super) type Question = Box<dyn FnOnce(&State, &Settings, Timestamp) + Send>;

pub(super) struct Submission {
    pub origin: Origin,
    pub command: Command,
    pub once: Option<Once>,
    /// The request to be audited by the first record that comes of it.
    pub source: Option<Arc<Source>>,
    pub answer: oneshot::Sender<Result<Answered, Rejection>>,
}

/// A reply, and whether a record of what was asked is on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Answered {
    pub reply: Reply,
    pub recorded: bool,
}

/// An Idempotency-Key with what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Once {
    /// The operation: one key may be used once for each.
    pub route: &'static str,
    pub key: SmolStr,
    /// blake3 of the request's body.
    pub body_hash: [u8; 32],
}

/// Why there is no reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// More is waiting than can be remembered; nothing was changed.
    #[error("the gateway has too much to do; try again in a second")]
    Overloaded,
    /// The coordinator has ended: the gateway is stopping, or its disk failed. Whether the command took
    /// effect is not known; the same id or key tells after a restart.
    #[error("the gateway is stopping")]
    Stopped,
}

/// A cloneable way to the coordinator.
#[derive(Clone)]
pub struct Handle {
    pub(super) inbox: Sender<Message>,
}

impl Handle {
    /// Decided, committed, then answered.
    pub async fn submit(&self, origin: Origin, command: Command) -> Result<Reply, SubmitError> {
        Ok(self.put(origin, command, None, None).await?.reply)
    }

    /// The same, with an Idempotency-Key done once and answered alike ever after, the first record to carry the
    /// request that it came of. Submits at once, so that what waits for the answer holds no more than the way for it.
    pub fn put(
        &self,
        origin: Origin,
        command: Command,
        once: Option<Once>,
        source: Option<Arc<Source>>,
    ) -> impl Future<Output = Result<Answered, SubmitError>> + use<> {
        let (answer, reply) = oneshot::channel();
        let submission = Submission {
            origin,
            command,
            once,
            source,
            answer,
        };
        let posted = self.post(Message::Submit(Box::new(submission)));
        async {
            posted?;
            Ok(reply.await.map_err(|_| SubmitError::Stopped)??)
        }
    }

    /// Submits and waits for nothing: it will be decided, unless the process ends first.
    pub fn tell(&self, origin: Origin, command: Command) -> Result<(), SubmitError> {
        let (answer, _) = oneshot::channel();
        self.post(Message::Submit(Box::new(Submission {
            origin,
            command,
            once: None,
            source: None,
            answer,
        })))
    }

    fn post(&self, message: Message) -> Result<(), SubmitError> {
        self.inbox.try_send(message).map_err(|error| match error {
            TrySendError::Full(_) => SubmitError::Overloaded,
            TrySendError::Disconnected(_) => SubmitError::Stopped,
        })
    }

    /// Puts a question to State as it is between two commits.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&State, &Settings, Timestamp) -> T + Send + 'static,
    ) -> Result<T, SubmitError> {
        let (answer, reply) = oneshot::channel();
        self.post(Message::Ask(Box::new(move |state, settings, now| {
            // A caller that left does not want the answer any more.
            let _ = answer.send(question(state, settings, now));
        })))?;
        reply.await.map_err(|_| SubmitError::Stopped)
    }

    /// Position and blocking causes of a live run; `None` when it has ended or is unknown to the plane.
    pub async fn why(&self, plane: PlaneId, run: RunId) -> Result<Option<Why>, SubmitError> {
        self.ask(move |state, settings, now| {
            state.job(plane, run)?;
            why::why(state, settings, run, now)
        })
        .await
    }

    /// Of one tenant's jobs, or of all.
    pub async fn queue_stats(&self, tenant: Option<SmolStr>) -> Result<QueueStats, SubmitError> {
        self.ask(move |state, _, _| status::queue_stats(state, tenant.as_ref()))
            .await
    }

    pub async fn gpu_status(&self) -> Result<Vec<GpuStatus>, SubmitError> {
        self.ask(|state, _, _| status::gpu_status(state)).await
    }

    /// Nothing new is begun from now on, neither by the scheduler nor by a deadline; what is under way may end.
    pub async fn quiet(&self) {
        self.deliver(Message::Quiet).await;
    }

    /// Lets the coordinator write a last snapshot and end.
    pub async fn stop(&self) {
        self.deliver(Message::Stop).await;
    }

    /// Waits for a place in the inbox, off the runtime's threads.
    async fn deliver(&self, message: Message) {
        let inbox = self.inbox.clone();
        // It has ended already when nobody receives.
        let _ = tokio::task::spawn_blocking(move || inbox.send(message)).await;
    }
}
