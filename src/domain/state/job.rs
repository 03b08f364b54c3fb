//! A live job run, and how its events change it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::State;
use super::account::Amount;
use super::service::Service;
use crate::domain::container::JobContainer;
use crate::domain::event::{Event, JobStopCause};
use crate::domain::ids::{Attempt, Generation, PlaneId, RunId, Seq, ServiceName};
use crate::domain::ladder::{Rung, Step};
use crate::domain::scheduler::queue::{LaneKey, OrderKey};
use crate::domain::spec::{JobSpec, Priority, Target};
use crate::domain::time::Timestamp;

/// A job run that has not ended. Ended ones live in the projections only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub plane: PlaneId,
    pub spec: JobSpec,
    pub phase: Phase,
    /// When it entered its phase.
    pub since: Timestamp,
    /// When it was submitted or retried: its age in the queue, whatever happens in between.
    pub queued_at: Timestamp,
    /// Where its payload lies.
    pub payload: Seq,
    /// The last dispatch's number, 0 before the first.
    pub attempt: Attempt,
    /// Attempts that failed; preempted, paused and yielded ones do not count.
    pub failures: u32,
    pub preempt_count: u32,
    /// The last saved checkpoint.
    pub checkpoint: Option<Seq>,
    /// When that checkpoint was saved: work since then is lost if the job is stopped now.
    pub checkpoint_at: Option<Timestamp>,
    /// The last progress.
    pub progress: Option<Seq>,
    /// When it fails as expired if it was never dispatched.
    pub expires_at: Option<Timestamp>,
    /// What it holds since its last dispatch, for as long as it has a place.
    pub charge: Amount,
    /// Milliseconds that it had waited when it was last dispatched and no other run of its tenant and shape was.
    pub waited_ms: u64,
    /// The step of its service's ladder that is under way while it is being stopped.
    pub rung: Option<Rung>,
    /// It gets a container of its own.
    pub container: Option<Box<JobContainer>>,
}

/// Where a live run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    Queued,
    /// A failed attempt waits before the next.
    Backoff {
        until: Timestamp,
    },
    /// Held by a person.
    Paused,
    /// Stopped in favour of `by`.
    Preempted {
        by: RunId,
    },
    Running {
        service: ServiceName,
        generation: Generation,
    },
    /// Its call is being ended; it holds its place until it has.
    Stopping {
        service: ServiceName,
        generation: Generation,
        cause: JobStopCause,
        deadline: Timestamp,
    },
}

/// How long after a stop's deadline the executor's word is waited for: it reports at the deadline itself.
const STOP_SLACK_MS: u64 = 5_000;

impl Job {
    /// When time alone changes something for it.
    pub fn due_at(&self) -> Option<Timestamp> {
        match &self.phase {
            Phase::Queued if self.attempt == 0 => self.expires_at,
            Phase::Backoff { until } => Some(*until),
            Phase::Running { .. } if self.container.is_some() => {
                Some(self.since + self.spec.timeout_ms)
            }
            Phase::Stopping { deadline, .. } => match &self.rung {
                Some(rung) if rung.step.part() == 0 => Some(rung.deadline),
                // It has ended when its container has.
                _ if self.container.is_some() => None,
                Some(rung) => Some(rung.deadline + STOP_SLACK_MS),
                None => Some(*deadline + STOP_SLACK_MS),
            },
            _ => None,
        }
    }

    /// The instance whose place it holds.
    pub fn place(&self) -> Option<(&ServiceName, Generation)> {
        match &self.phase {
            Phase::Running {
                service,
                generation,
            }
            | Phase::Stopping {
                service,
                generation,
                ..
            } => Some((service, *generation)),
            _ => None,
        }
    }

    /// What it holds now.
    fn holds(&self) -> Amount {
        match self.place() {
            Some(_) => self.charge,
            None => Amount::default(),
        }
    }

    /// Whether it waits outside the queue for its turn to come again.
    fn is_held(&self) -> bool {
        matches!(
            self.phase,
            Phase::Backoff { .. } | Phase::Paused | Phase::Preempted { .. }
        )
    }

    /// Milliseconds of work that would be lost if it were stopped at `now`.
    pub fn unsaved_ms(&self, now: Timestamp) -> u64 {
        now.millis_since(
            self.checkpoint_at
                .map_or(self.since, |at| at.max(self.since)),
        )
    }
}

impl State {
    /// Changes one job and keeps every index over jobs true.
    fn edit_job(&mut self, run: RunId, at: Timestamp, edit: impl FnOnce(&mut Job)) {
        let Some(mut job) = self.unindex_job(run) else {
            return;
        };
        let before = std::mem::discriminant(&job.phase);
        let held = job.holds();
        edit(&mut job);
        if !matches!(job.phase, Phase::Stopping { .. }) {
            job.rung = None;
        }
        if std::mem::discriminant(&job.phase) != before {
            job.since = at;
        }
        self.change_holding(job.plane, held, job.holds(), at);
        let (plane, target) = (job.plane, job.spec.target.clone());
        self.index_job(run, job);
        self.forget_served(plane, &target);
        self.look_at_served(plane, &target);
    }

    /// The tenant of a plane, or nobody at all, wants this shape any more: services that were kept up for it may be
    /// idle now.
    fn look_at_served(&mut self, plane: PlaneId, target: &Target) {
        let tenant = self.tenant_of(plane);
        let shape = self.queue.shape(target);
        if shape.is_some_and(|shape| shape.wants(tenant)) {
            return;
        }
        let concerned = |service: &&Service| {
            let nobodys = service.tenant.is_none() && shape.is_none();
            service.serves(target) && (nobodys || service.tenant.as_ref() == Some(tenant))
        };
        let served: Vec<ServiceName> = match target {
            Target::Service(name) => self
                .services
                .get(name)
                .into_iter()
                .filter(concerned)
                .map(|s| s.spec.name.clone())
                .collect(),
            Target::Type(_) => self
                .services
                .values()
                .filter(concerned)
                .map(|s| s.spec.name.clone())
                .collect(),
            Target::Container(_) => Vec::new(),
        };
        self.touched.extend(served);
    }

    /// Takes a job out, with all that indexes it.
    pub(super) fn unindex_job(&mut self, run: RunId) -> Option<Box<Job>> {
        let job = self.jobs.remove(&run)?;
        if let Some(at) = job.due_at() {
            self.timers.disarm_job(at, run);
        }
        if job.is_held() {
            let tenant = self.tenant_of(job.plane).clone();
            self.queue.unhold(&job.spec.target, &tenant);
        }
        match &job.phase {
            Phase::Queued => {
                let key = self.queue.key(run, job.queued_at, job.spec.priority);
                let lane = self.lane_of(job.plane);
                let target = &job.spec.target;
                self.queue.take(target, &lane, &key, job.spec.priority);
            }
            Phase::Preempted { by } => {
                if let Some(victims) = self.preempted_by.get_mut(by) {
                    victims.remove(&run);
                    if victims.is_empty() {
                        self.preempted_by.remove(by);
                    }
                }
            }
            Phase::Running { service, .. } | Phase::Stopping { service, .. } => {
                self.leave_place(&service.clone(), run);
            }
            Phase::Backoff { .. } | Phase::Paused => {}
        }
        Some(job)
    }

    /// Puts a job in, with all that indexes it.
    pub(super) fn index_job(&mut self, run: RunId, job: Box<Job>) {
        if let Some(at) = job.due_at() {
            self.timers.arm_job(at, run);
        }
        if job.is_held() {
            let tenant = self.tenant_of(job.plane).clone();
            self.queue.hold(&job.spec.target, &tenant);
        }
        let mut waits_or_works = true;
        match &job.phase {
            Phase::Queued => {
                let key = self.queue.key(run, job.queued_at, job.spec.priority);
                let lane = self.lane_of(job.plane);
                self.queue
                    .push(&job.spec.target, &lane, key, job.spec.priority);
            }
            Phase::Preempted { by } => {
                self.preempted_by.entry(*by).or_default().insert(run);
                self.check_preemptor(*by);
                waits_or_works = false;
            }
            Phase::Running {
                service,
                generation,
            }
            | Phase::Stopping {
                service,
                generation,
                ..
            } => {
                self.take_place(&service.clone(), *generation, run);
            }
            Phase::Paused => waits_or_works = false,
            Phase::Backoff { .. } => {}
        }
        let queued = matches!(job.phase, Phase::Queued);
        self.jobs.insert(run, job);
        if !queued {
            self.drop_promises(run);
        }
        if !waits_or_works {
            self.check_preemptor(run);
        }
    }

    /// Makes the indexes of all jobs anew, as a snapshot has none. Waiting jobs, which may be a million, are
    /// sorted and laid down in order; the others go the usual way.
    pub(super) fn index_all_jobs(&mut self) {
        let mut planes: BTreeMap<(&Target, PlaneId), Vec<(OrderKey, Priority)>> = BTreeMap::new();
        let (mut due, mut others) = (Vec::new(), Vec::new());
        for (run, job) in &self.jobs {
            if matches!(job.phase, Phase::Queued) {
                due.extend(job.due_at().map(|at| (at, *run)));
                let key = self.queue.key(*run, job.queued_at, job.spec.priority);
                let same = planes.entry((&job.spec.target, job.plane)).or_default();
                same.push((key, job.spec.priority));
            } else {
                others.push(*run);
            }
        }
        let mut waiting: BTreeMap<(&Target, LaneKey), Vec<(OrderKey, Priority)>> = BTreeMap::new();
        for ((target, plane), mut jobs) in planes {
            let same = waiting.entry((target, self.lane_of(plane))).or_default();
            match same.is_empty() {
                true => *same = jobs,
                false => same.append(&mut jobs),
            }
        }
        for ((target, lane), jobs) in waiting {
            self.queue.fill(target, &lane, &jobs);
        }
        self.timers.arm_jobs(due);
        for run in others {
            if let Some(job) = self.jobs.remove(&run) {
                self.index_job(run, job);
            }
        }
    }

    /// Notes a run that has victims and no longer waits or works: the victims go back to the queue.
    fn check_preemptor(&mut self, run: RunId) {
        let active = self
            .jobs
            .get(&run)
            .is_some_and(|job| !matches!(job.phase, Phase::Paused | Phase::Preempted { .. }));
        if !active && self.preempted_by.contains_key(&run) {
            self.idle_preemptors.insert(run);
        }
    }

    /// Ends a run: it leaves State.
    fn end_job(&mut self, run: RunId, at: Timestamp) {
        let Some(job) = self.unindex_job(run) else {
            return;
        };
        self.change_holding(job.plane, job.holds(), Amount::default(), at);
        self.count_live(job.plane, false);
        self.forget_served(job.plane, &job.spec.target);
        if let Some(url) = job.spec.callback_url.clone() {
            // A try for an earlier end of this run may still be under way: its number is not used again.
            let number = self.callbacks.get(&run).map_or(0, |last| last.number + 1);
            self.callbacks
                .insert(run, Callback::new(job.plane, url, at, number));
        }
        self.look_at_served(job.plane, &job.spec.target);
        self.drop_promises(run);
        self.check_preemptor(run);
    }

    /// A job comes, or comes back.
    fn queue_job(&mut self, seq: Seq, at: Timestamp, plane: PlaneId, event: &Event) {
        match event {
            Event::JobQueued {
                run,
                spec,
                container,
                ..
            } => {
                let expires_at = spec.ttl_ms.map(|ms| at + ms);
                let mut job = Job::queued(plane, spec.clone(), at, seq, expires_at);
                job.container = container.clone();
                self.count_live(plane, true);
                self.index_job(*run, Box::new(job));
            }
            Event::JobRevived {
                run,
                spec,
                payload,
                attempt,
                checkpoint,
                preempt_count,
                queued_at,
                container,
                ..
            } => {
                let expires_at = spec.ttl_ms.map(|ms| at + ms);
                let mut job = Job::queued(plane, spec.clone(), *queued_at, *payload, expires_at);
                job.since = at;
                job.attempt = *attempt;
                job.checkpoint = *checkpoint;
                job.preempt_count = *preempt_count;
                job.container = container.clone();
                self.count_live(plane, true);
                self.index_job(*run, Box::new(job));
            }
            _ => {}
        }
    }

    /// Applies an event about one job.
    pub(super) fn apply_job(&mut self, seq: Seq, at: Timestamp, plane: PlaneId, event: &Event) {
        match event {
            Event::JobQueued { .. } | Event::JobRevived { .. } => {
                self.queue_job(seq, at, plane, event);
            }
            Event::JobDispatched {
                run,
                attempt,
                service,
                generation,
                ..
            } => {
                let charge = self.services.get(service).map(Amount::of_run);
                let waited_ms = self.jobs.get(run).map(|job| self.waited_ms(job, at));
                self.edit_job(*run, at, |job| {
                    job.attempt = *attempt;
                    job.charge = charge.unwrap_or_default();
                    job.waited_ms = waited_ms.unwrap_or_default();
                    job.phase = Phase::Running {
                        service: service.clone(),
                        generation: *generation,
                    };
                });
                if let Some(job) = self.jobs.get(run) {
                    let (plane, target, charge) = (job.plane, job.spec.target.clone(), job.charge);
                    self.serve(plane, &target, charge, at);
                }
                self.trim_promises(service);
            }
            Event::JobProgressed { run, .. } => {
                if let Some(job) = self.jobs.get_mut(run) {
                    job.progress = Some(seq);
                }
            }
            Event::CheckpointSaved { run, .. } => {
                if let Some(job) = self.jobs.get_mut(run) {
                    job.checkpoint = Some(seq);
                    job.checkpoint_at = Some(at);
                }
            }
            Event::JobPriorityChanged { run, priority } => {
                self.edit_job(*run, at, |job| job.spec.priority = *priority);
                // Others may preempt it now.
                self.queue.unpark_all();
            }
            Event::JobCompleted { run, .. }
            | Event::JobFailed { run, .. }
            | Event::JobCancelled { run, .. } => self.end_job(*run, at),
            _ => self.apply_job_phase(at, event),
        }
    }

    /// Applies an event that moves a job from one phase to another.
    fn apply_job_phase(&mut self, at: Timestamp, event: &Event) {
        match event {
            Event::JobStopRequested {
                run,
                cause,
                deadline,
                ..
            } => {
                if let JobStopCause::Preempt { by } = cause {
                    self.promise_place(*run, *by);
                }
                self.edit_job(*run, at, |job| {
                    if let Some((service, generation)) = job.place() {
                        job.phase = Phase::Stopping {
                            service: service.clone(),
                            generation,
                            cause: cause.clone(),
                            deadline: *deadline,
                        };
                    }
                });
            }
            Event::LadderStepBegan { .. } | Event::LadderStepEnded { .. } => {
                self.step_job(at, event);
            }
            Event::JobPaused { run, .. } => {
                self.edit_job(*run, at, |job| job.phase = Phase::Paused)
            }
            Event::JobResumed { run } => self.edit_job(*run, at, |job| {
                // Time spent on hold does not count against the job's time to live.
                let held_ms = at.millis_since(job.since);
                job.expires_at = job.expires_at.map(|expiry| expiry + held_ms);
                job.phase = Phase::Queued;
            }),
            Event::JobPreempted { run, by, .. } => self.edit_job(*run, at, |job| {
                job.preempt_count += 1;
                job.phase = Phase::Preempted { by: *by };
            }),
            Event::JobRequeued { run, .. } => {
                self.edit_job(*run, at, |job| job.phase = Phase::Queued);
            }
            Event::JobAttemptFailed {
                run,
                retry_at: Some(until),
                ..
            } => {
                self.edit_job(*run, at, |job| {
                    job.failures += 1;
                    job.phase = Phase::Backoff { until: *until };
                });
            }
            _ => {}
        }
    }
}

impl State {
    /// Applies an event about a step of a ladder, for a run that is being stopped.
    fn step_job(&mut self, at: Timestamp, event: &Event) {
        match event {
            Event::LadderStepBegan {
                run: Some(run),
                number,
                step,
                deadline,
                ..
            } => {
                let rung = Rung::begun(*number, step, at, *deadline);
                self.edit_job(*run, at, |job| {
                    // From here on its call is being ended.
                    if let (Phase::Stopping { deadline, .. }, Step::Stop { .. }) =
                        (&mut job.phase, &rung.step)
                    {
                        *deadline = rung.deadline;
                    }
                    job.rung = Some(rung);
                });
            }
            Event::LadderStepEnded { run: Some(run), .. } => {
                self.edit_job(*run, at, |job| job.rung = None);
            }
            _ => {}
        }
    }
}

impl Job {
    fn queued(
        plane: PlaneId,
        spec: JobSpec,
        queued_at: Timestamp,
        payload: Seq,
        expires_at: Option<Timestamp>,
    ) -> Job {
        Job {
            plane,
            spec,
            phase: Phase::Queued,
            since: queued_at,
            queued_at,
            payload,
            attempt: 0,
            failures: 0,
            preempt_count: 0,
            checkpoint: None,
            checkpoint_at: None,
            progress: None,
            expires_at,
            charge: Amount::default(),
            waited_ms: 0,
            rung: None,
            container: None,
        }
    }
}

/// The outcome of an ended run that is still to be delivered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Callback {
    pub plane: PlaneId,
    pub url: SmolStr,
    pub ended_at: Timestamp,
    /// Tries so far.
    pub number: u32,
    pub next_at: Timestamp,
}

impl Callback {
    fn new(plane: PlaneId, url: SmolStr, at: Timestamp, number: u32) -> Callback {
        Callback {
            plane,
            url,
            ended_at: at,
            number,
            next_at: at,
        }
    }
}
