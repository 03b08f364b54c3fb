//! Clients' commands for one run: accepted into the inbox, then applied or rejected in the same decision.

use bytes::Bytes;
use smol_str::SmolStr;

use super::job::cancelled;
use super::{Context, Decision};
use crate::domain::command::{EndedJob, InboxAction, InboxCommand, Rejection, Reply};
use crate::domain::event::{CommandKind, Event, JobStopCause};
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::scheduler::candidates;
use crate::domain::scheduler::fair::Fair;
use crate::domain::state::job::{Job, Phase};

impl Context<'_> {
    /// A command that cannot be applied is accepted, and rejected with its reason; only one for a purged plane, or that brings
    /// more along than quotas let it, is refused. The coordinator has already refused a reused id. The reply's `seq` is
    /// filled in when it is appended.
    pub(super) fn inbox(
        &self,
        plane: PlaneId,
        command: InboxCommand,
    ) -> Result<Decision, Rejection> {
        self.check_open(plane)?;
        if !command.is_small() {
            self.may_keep(plane, command.payload.len())?;
        }
        let kind = command.action.kind();
        let known = command
            .run
            .filter(|run| command.ended.is_some() || self.state.job(plane, *run).is_some());
        let accepted = Event::CommandAccepted {
            command: command.command.clone(),
            run: known,
            run_text: command.run_text.clone(),
            kind,
            client_id: command.client_id.clone(),
        };
        let mut events = vec![(accepted, command.payload.clone())];
        let outcome = match known {
            None => Err(Rejection::RunNotFound(command.run_text.clone())),
            Some(run) => self.act(plane, run, &command),
        };
        let id = command.command;
        match outcome {
            Ok(follow) => {
                events.extend(follow.into_iter().map(|event| (event, Bytes::new())));
                events.push((
                    Event::CommandApplied {
                        command: id,
                        run: known,
                        kind,
                    },
                    Bytes::new(),
                ));
            }
            Err(rejection) => {
                let event = Event::CommandRejected {
                    command: id,
                    run: known,
                    kind,
                    code: SmolStr::new_static(rejection.code()),
                    reason: rejection.to_string(),
                };
                events.push((event, Bytes::new()));
            }
        }
        let reply = Reply::Inbox {
            seq: 0,
            duplicate: false,
        };
        Ok(Decision { events, reply })
    }

    fn act(
        &self,
        plane: PlaneId,
        run: RunId,
        command: &InboxCommand,
    ) -> Result<Vec<Event>, Rejection> {
        let Some(job) = self.state.job(plane, run) else {
            let ended = command.ended.as_deref();
            return self.act_on_ended(plane, run, ended, command.action.kind());
        };
        match &command.action {
            InboxAction::Pause { reason } => pause(self, run, job, reason.clone()),
            InboxAction::Resume => resume(self, run, job),
            InboxAction::Cancel { reason } => cancel(self, run, job, reason.clone()),
            InboxAction::Preempt { by } => self.preempt(plane, run, job, *by),
            InboxAction::SetPriority { priority } => {
                let priority = *priority;
                Ok(vec![Event::JobPriorityChanged { run, priority }])
            }
            InboxAction::Retry => Err(Rejection::RunNotEnded(run)),
        }
    }

    fn act_on_ended(
        &self,
        plane: PlaneId,
        run: RunId,
        ended: Option<&EndedJob>,
        kind: CommandKind,
    ) -> Result<Vec<Event>, Rejection> {
        let ended = ended.ok_or_else(|| Rejection::RunNotFound(SmolStr::new(run.to_string())))?;
        if kind != CommandKind::Retry {
            return Err(Rejection::RunEnded(run, ended.status));
        }
        if ended.purged {
            return Err(Rejection::Purged(run));
        }
        self.is_owned(plane)?;
        self.may_queue(plane)?;
        Ok(vec![Event::JobRevived {
            run,
            spec: ended.spec.clone(),
            session: ended.session.clone(),
            payload: ended.payload,
            attempt: ended.attempt,
            checkpoint: ended.checkpoint,
            preempt_count: ended.preempt_count,
            queued_at: self.now,
            container: ended.container.clone(),
        }])
    }

    /// In favour of `by`, else of the first waiting run that could take the place, else back to the queue.
    fn preempt(
        &self,
        plane: PlaneId,
        run: RunId,
        job: &Job,
        by: Option<RunId>,
    ) -> Result<Vec<Event>, Rejection> {
        let Phase::Running { service, .. } = &job.phase else {
            let stopping = matches!(job.phase, Phase::Stopping { .. });
            return Err(if stopping {
                Rejection::AlreadyStopping(run)
            } else {
                Rejection::NotRunning(run)
            });
        };
        let by = match by {
            Some(by) => {
                // Ended and unknown runs are not in State: of all others it is only said that they do not wait.
                let preemptor = self
                    .state
                    .job(plane, by)
                    .filter(|job| matches!(job.phase, Phase::Queued))
                    .ok_or(Rejection::NotQueued(by))?;
                let fits = candidates(self.state, &preemptor.spec.target)
                    .iter()
                    .filter(|candidate| self.state.serves(candidate, preemptor))
                    .any(|candidate| candidate.spec.name == *service);
                if !fits {
                    let service = service.clone();
                    return Err(Rejection::WrongService { run: by, service });
                }
                Some(by)
            }
            None => self.first_waiting_for(plane, service),
        };
        let cause = by.map_or(JobStopCause::Yield, |by| JobStopCause::Preempt { by });
        Ok(self.request_stop(run, job, cause))
    }

    /// The run that would be served next on a service, if it is one of the plane.
    pub(super) fn first_waiting_for(&self, plane: PlaneId, service: &SmolStr) -> Option<RunId> {
        let service = self.state.services.get(service)?;
        let fair = Fair::new(self.state, self.settings, self.now);
        service
            .targets()
            .iter()
            .filter_map(|target| {
                let mut serving = fair.serving(target);
                serving.first_of(|lane| service.admits(&lane.tenant))
            })
            .map(|(_, key)| key)
            .min()
            .map(|(_, run)| run)
            .filter(|run| self.state.job(plane, *run).is_some())
    }
}

fn pause(
    cx: &Context,
    run: RunId,
    job: &Job,
    reason: Option<String>,
) -> Result<Vec<Event>, Rejection> {
    match &job.phase {
        Phase::Paused
        | Phase::Stopping {
            cause: JobStopCause::Pause { .. },
            ..
        } => Err(Rejection::AlreadyPaused(run)),
        Phase::Stopping {
            cause: JobStopCause::Cancel { .. },
            ..
        } => Err(Rejection::AlreadyStopping(run)),
        Phase::Running { .. } | Phase::Stopping { .. } => {
            Ok(cx.request_stop(run, job, JobStopCause::Pause { reason }))
        }
        Phase::Queued | Phase::Backoff { .. } | Phase::Preempted { .. } => {
            Ok(vec![Event::JobPaused { run, reason }])
        }
    }
}

fn resume(cx: &Context, run: RunId, job: &Job) -> Result<Vec<Event>, Rejection> {
    match &job.phase {
        Phase::Paused | Phase::Preempted { .. } => Ok(vec![Event::JobResumed { run }]),
        Phase::Stopping {
            cause: JobStopCause::Pause { .. },
            ..
        } => Ok(cx.request_stop(run, job, JobStopCause::Yield)),
        _ => Err(Rejection::NotPaused(run)),
    }
}

fn cancel(
    cx: &Context,
    run: RunId,
    job: &Job,
    reason: Option<String>,
) -> Result<Vec<Event>, Rejection> {
    let reason = reason.unwrap_or_else(|| "Cancelled".to_owned());
    match &job.phase {
        Phase::Stopping {
            cause: JobStopCause::Cancel { .. },
            ..
        } => Err(Rejection::AlreadyStopping(run)),
        Phase::Running { .. } | Phase::Stopping { .. } => {
            Ok(cx.request_stop(run, job, JobStopCause::Cancel { reason }))
        }
        _ => Ok(vec![cancelled(run, reason)]),
    }
}
