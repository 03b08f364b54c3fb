//! Jobs: starting them, and what the outcomes of their attempts come to.

use bytes::Bytes;
use smol_str::SmolStr;

use super::{Context, Decision};
use crate::domain::command::{JobFailure, OUT_OF_MEMORY, Rejection, Reply};
use crate::domain::event::{Event, JobStopCause, RequeueCause};
use crate::domain::identity::{IdentityRejection, RuntimeKey};
use crate::domain::ids::{Attempt, PlaneId, RunId};
use crate::domain::ladder::StepOutcome;
use crate::domain::scheduler::ladder::stop_job;
use crate::domain::spec::JobSpec;
use crate::domain::state::job::{Job, Phase};
use crate::domain::time::Timestamp;

impl Context<'_> {
    /// The answer to a job's start, its payload so long, if it may be queued.
    pub(super) fn start_job(
        &self,
        plane: PlaneId,
        run: RunId,
        spec: &JobSpec,
        payload_bytes: usize,
    ) -> Result<Reply, Rejection> {
        self.is_owned(plane)?;
        self.may_queue(plane)?;
        self.may_keep(plane, payload_bytes)?;
        let queue = &self.state.queue;
        let key = queue.key(run, self.now, spec.priority);
        let shape = queue.shape(&spec.target);
        let lane = shape.and_then(|shape| shape.lane(&self.state.lane_of(plane)));
        let ahead = lane.map_or(0, |lane| lane.waiting.rank(&key));
        let position = u64::try_from(ahead).unwrap_or(u64::MAX - 1) + 1;
        Ok(Reply::Started {
            run,
            position,
            duplicate: false,
        })
    }

    /// A request that was let in before its plane was purged comes too late.
    pub(super) fn check_open(&self, plane: PlaneId) -> Result<(), Rejection> {
        match self.state.is_open(plane) {
            true => Ok(()),
            false => Err(IdentityRejection::UserNotFound.into()),
        }
    }

    /// Whether a plane has a user, whose runs may begin: a purge is not outrun by what was asked before it.
    pub(super) fn is_owned(&self, plane: PlaneId) -> Result<(), Rejection> {
        let Some(opened) = self.state.planes.get(&plane) else {
            return self.check_open(plane);
        };
        let key = RuntimeKey {
            tenant: opened.tenant.clone(),
            runtime: opened.runtime.clone(),
        };
        let runtime = self.state.people.runtimes.get(&key);
        match runtime.is_some_and(|now| now.plane == plane && now.reservation.is_none()) {
            true => Ok(()),
            false => Err(IdentityRejection::RuntimeLeft(key).into()),
        }
    }

    /// Whether quotas let one run more of a plane wait.
    pub(super) fn may_queue(&self, plane: PlaneId) -> Result<(), Rejection> {
        match self.state.limits_of_plane(plane).queued_hit() {
            Some(hit) => Err(Rejection::QuotaExceeded(Box::new(hit))),
            None => Ok(()),
        }
    }

    /// Whether quotas let so many bytes more be kept of a plane's runs.
    pub(super) fn may_keep(&self, plane: PlaneId, bytes: usize) -> Result<(), Rejection> {
        match self.state.ledger_hit(plane, bytes) {
            Some(hit) => Err(Rejection::QuotaExceeded(Box::new(hit))),
            None => Ok(()),
        }
    }

    /// The live job, or why there is none.
    pub(super) fn live(&self, plane: PlaneId, run: RunId) -> Result<&Job, Rejection> {
        self.state
            .job(plane, run)
            .ok_or_else(|| Rejection::RunNotFound(SmolStr::new(run.to_string())))
    }

    pub(super) fn cancel_queued(&self, plane: PlaneId, run: RunId) -> Result<Decision, Rejection> {
        let job = self.live(plane, run)?;
        if job.place().is_some() {
            return Err(Rejection::CancelWhileRunning(run));
        }
        Ok(Decision::done(vec![cancelled(run, "Cancelled".to_owned())]))
    }

    /// A pusher must work on the attempt that is current.
    fn working(
        &self,
        plane: PlaneId,
        run: RunId,
        given: Option<Attempt>,
    ) -> Result<&Job, Rejection> {
        let job = self.live(plane, run)?;
        if job.place().is_none() {
            return Err(Rejection::NotRunning(run));
        }
        match given {
            Some(given) if given != job.attempt => Err(Rejection::StaleAttempt {
                run,
                given,
                current: job.attempt,
            }),
            _ => Ok(job),
        }
    }

    pub(super) fn push_progress(
        &self,
        plane: PlaneId,
        run: RunId,
        attempt: Option<Attempt>,
        body: Bytes,
    ) -> Result<Decision, Rejection> {
        let attempt = self.working(plane, run, attempt)?.attempt;
        self.may_keep(plane, body.len())?;
        Ok(Decision::with(
            Event::JobProgressed { run, attempt },
            body,
            Reply::Done,
        ))
    }

    pub(super) fn save_checkpoint(
        &self,
        plane: PlaneId,
        run: RunId,
        attempt: Option<Attempt>,
        content_type: SmolStr,
        body: Bytes,
    ) -> Result<Decision, Rejection> {
        let job = self.working(plane, run, attempt)?;
        let attempt = job.attempt;
        self.may_keep(plane, body.len())?;
        let size_bytes = u64::try_from(body.len()).unwrap_or(u64::MAX);
        let event = Event::CheckpointSaved {
            run,
            attempt,
            content_type,
            size_bytes,
        };
        Ok(self.with_checkpoint(run, job, event, body))
    }

    /// The store refuses a run that it does not know, and fills in the numbers; a live one keeps its payloads.
    pub(super) fn purge(&self, plane: PlaneId, run: RunId) -> Result<Decision, Rejection> {
        if self.state.job(plane, run).is_some() {
            return Err(Rejection::RunNotEnded(run));
        }
        self.check_open(plane)?;
        let (bytes, records) = (0, 0);
        Ok(Decision::done(vec![
            Event::RunPurged { run, records },
            Event::PayloadsPurged { run, bytes },
        ]))
    }

    /// The job, if `attempt` is its current one and holds a place.
    pub(super) fn current(&self, run: RunId, attempt: Attempt) -> Option<&Job> {
        let job = self.state.jobs.get(&run)?;
        (job.attempt == attempt && job.place().is_some()).then_some(job)
    }

    pub(super) fn job_answered(
        &self,
        run: RunId,
        attempt: Attempt,
        outcome: Result<Bytes, JobFailure>,
    ) -> Decision {
        let Some(job) = self.current(run, attempt) else {
            let outcome = match outcome {
                Ok(_) => SmolStr::new_static("completed"),
                Err(failure) => failure.code,
            };
            return Decision::done(vec![Event::JobOutcomeStale {
                run,
                attempt,
                outcome,
            }]);
        };
        let is_draining = job.rung.as_ref().is_some_and(|r| r.step.name() == "drain");
        match (&job.phase, outcome) {
            // It was to finish, and did so badly.
            (Phase::Stopping { .. }, Err(failure)) if is_draining => {
                let mut events = self.step_cut_off(run, job, StepOutcome::Failed);
                events.extend(self.failed(run, job, failure, None));
                Decision::done(events)
            }
            // Asked to end and it has ended: the stop's cause says what it comes to.
            (Phase::Stopping { cause, .. }, Err(_)) => {
                Decision::done(self.stopped(run, job, cause, false))
            }
            (
                Phase::Stopping {
                    cause: cause @ JobStopCause::Cancel { .. },
                    ..
                },
                Ok(_),
            ) => Decision::done(self.stopped(run, job, cause, true)),
            // It was done before it could be stopped: the work counts.
            (_, Ok(result)) => {
                let ended = self.step_cut_off(run, job, StepOutcome::Done);
                let mut decision = Decision::done(ended);
                let completed = Event::JobCompleted { run, attempt };
                decision.events.push((completed, result));
                decision
            }
            (_, Err(failure)) => {
                let place = job.place().filter(|_| failure.code == OUT_OF_MEMORY);
                let raised =
                    place.and_then(|(name, generation)| self.need_raised(name, generation));
                let failed = self.failed(run, job, failure, None);
                Decision::done(raised.into_iter().chain(failed).collect())
            }
        }
    }

    /// An attempt failed: again later, or for good. `retry_at` overrides the backoff.
    pub(super) fn failed(
        &self,
        run: RunId,
        job: &Job,
        failure: JobFailure,
        retry_at: Option<Timestamp>,
    ) -> Vec<Event> {
        let failures = job.failures + 1;
        let retry_at = (failures < job.spec.max_attempts)
            .then(|| retry_at.unwrap_or_else(|| self.now + self.retry_delay_ms(run, failures)));
        let JobFailure { code, error } = failure;
        let mut events = vec![Event::JobAttemptFailed {
            run,
            attempt: job.attempt,
            code: code.clone(),
            error: error.clone(),
            retry_at,
        }];
        if retry_at.is_none() {
            events.push(Event::JobFailed { run, code, error });
        }
        events
    }

    /// Exponential backoff with jitter in [½, 1]. The jitter comes from the run's id, so that runs which
    /// failed together do not come back together, and a decision needs no randomness.
    fn retry_delay_ms(&self, run: RunId, failures: u32) -> u64 {
        let full = backoff_ms(
            self.settings.retry_base_ms,
            self.settings.retry_max_ms,
            failures,
        );
        let spread =
            run.0.as_u128() as u64 ^ u64::from(failures).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        full / 2 + spread % (full / 2 + 1)
    }

    pub(super) fn job_stop_done(&self, run: RunId, attempt: Attempt, confirmed: bool) -> Decision {
        match self.current(run, attempt).map(|job| (job, &job.phase)) {
            Some((job, Phase::Stopping { cause, .. })) => {
                Decision::done(self.stopped(run, job, cause, confirmed))
            }
            _ => Decision::done(Vec::new()),
        }
    }

    /// What a stopped attempt comes to, by the cause of its stop.
    pub(super) fn stopped(
        &self,
        run: RunId,
        job: &Job,
        cause: &JobStopCause,
        confirmed: bool,
    ) -> Vec<Event> {
        let ended = match &job.rung {
            Some(rung) if rung.step.part() > 0 && self.now <= rung.deadline => StepOutcome::Done,
            Some(rung) if rung.step.part() > 0 => StepOutcome::TimedOut,
            // Its container has ended as it was asked.
            Some(rung) if job.container.is_some() && rung.step.name() == "checkpoint" => {
                StepOutcome::Done
            }
            _ => StepOutcome::Interrupted,
        };
        let mut events = self.step_cut_off(run, job, ended);
        events.push(Event::JobStopped {
            run,
            attempt: job.attempt,
            confirmed,
        });
        match cause {
            JobStopCause::Pause { reason } => {
                events.push(Event::JobPaused {
                    run,
                    reason: reason.clone(),
                });
            }
            JobStopCause::Cancel { reason } => events.push(cancelled(run, reason.clone())),
            JobStopCause::Preempt { by } => {
                let service = job
                    .place()
                    .map_or(SmolStr::default(), |(name, _)| name.clone());
                events.push(Event::JobPreempted {
                    run,
                    by: *by,
                    service,
                });
            }
            JobStopCause::Yield => {
                events.push(Event::JobRequeued {
                    run,
                    cause: RequeueCause::Yielded,
                });
            }
            JobStopCause::InstanceStopping => {
                events.push(Event::JobRequeued {
                    run,
                    cause: RequeueCause::InstanceStopped,
                });
            }
            JobStopCause::TimedOut => {
                let timed_out = JobFailure {
                    code: SmolStr::new_static("timeout"),
                    error: format!("not over within {} ms", job.spec.timeout_ms),
                };
                events.extend(self.failed(run, job, timed_out, None));
            }
        }
        events
    }

    /// The request to stop a job that holds a place.
    pub(super) fn request_stop(&self, run: RunId, job: &Job, cause: JobStopCause) -> Vec<Event> {
        match self.spec_of(job) {
            Some(spec) => stop_job(run, job, spec, cause, self.now),
            None => Vec::new(),
        }
    }

    pub(super) fn callback_tried(
        &self,
        run: RunId,
        number: u32,
        status: Option<u16>,
        error: Option<String>,
    ) -> Decision {
        let Some(callback) = self.state.callbacks.get(&run).filter(|c| c.number < number) else {
            return Decision::done(Vec::new());
        };
        let delivered = status.is_some_and(|status| (200..300).contains(&status));
        let settings = self.settings;
        let delay_ms = backoff_ms(
            settings.callback_base_ms,
            settings.callback_max_delay_ms,
            number,
        );
        let next_at = self.now + delay_ms;
        let give_up_at = callback.ended_at + settings.callback_give_up_ms;
        let next_at = (!delivered && next_at <= give_up_at).then_some(next_at);
        let event = Event::CallbackAttempted {
            run,
            number,
            status,
            error,
            delivered,
            next_at,
        };
        Decision::done(vec![event])
    }
}

/// `base × 2^(n−1)`, at most `max`; `n` counts from 1.
pub(super) fn backoff_ms(base: u64, max: u64, n: u32) -> u64 {
    let factor = 1u64.checked_shl(n.saturating_sub(1)).unwrap_or(u64::MAX);
    base.saturating_mul(factor).min(max)
}

pub(super) fn cancelled(run: RunId, reason: String) -> Event {
    Event::JobCancelled { run, reason }
}
