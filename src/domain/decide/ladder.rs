//! How the steps of ladders end, and what follows: the next step, sleep, or the end. A report about an older
//! generation, attempt or step changes nothing.

use bytes::Bytes;

use super::{Context, Decision};
use crate::domain::command::{Command, Reply};
use crate::domain::event::{Event, StopCause};
use crate::domain::ids::{Attempt, Generation, RunId, ServiceName};
use crate::domain::ladder::{StepOutcome, freed_mib, still_held};
use crate::domain::scheduler::ladder::{
    again, ended_of_instance, ended_of_run, next_of_instance, next_of_run,
};
use crate::domain::scheduler::upkeep;
use crate::domain::spec::{Grant, ServiceSpec};
use crate::domain::state::job::{Job, Phase};
use crate::domain::state::service::{Instance, InstancePhase, Service};

impl Context<'_> {
    /// What the executor reports of ladders.
    pub(super) fn ladder_outcome(&self, command: Command) -> Vec<Event> {
        match command {
            Command::LadderStepTried {
                run: Some(run),
                attempt,
                number,
                outcome,
                error,
                ..
            } => self.step_of_run(run, attempt, number, (outcome, error)),
            Command::LadderStepTried {
                service,
                generation,
                run: None,
                number,
                outcome,
                error,
                held,
                ..
            } => self.step_of_instance(&service, (generation, number), (outcome, error), held),
            Command::InstanceWoken {
                service,
                generation,
                error,
            } => self.woken(service, generation, error),
            _ => Vec::new(),
        }
    }

    fn step_of_run(
        &self,
        run: RunId,
        attempt: Attempt,
        number: u32,
        ended: (StepOutcome, Option<String>),
    ) -> Vec<Event> {
        let Some(job) = self.current(run, attempt) else {
            return Vec::new();
        };
        match &job.rung {
            // How a run's call ended is told by `JobStopDone`.
            Some(rung) if rung.number == number && rung.step.part() == 0 => {
                self.next_step(run, job, ended)
            }
            _ => Vec::new(),
        }
    }

    /// The step under way for a run is over, and the next begins.
    pub(super) fn next_step(
        &self,
        run: RunId,
        job: &Job,
        ended: (StepOutcome, Option<String>),
    ) -> Vec<Event> {
        match self.spec_of(job) {
            Some(spec) => next_of_run(spec, run, job, ended, self.now),
            None => Vec::new(),
        }
    }

    /// The service that a job is on.
    pub(super) fn spec_of(&self, job: &Job) -> Option<&ServiceSpec> {
        let (name, _) = job.place()?;
        Some(&self.state.services.get(name)?.spec)
    }

    /// The end of the step under way for a run whose attempt is over.
    pub(super) fn step_cut_off(&self, run: RunId, job: &Job, outcome: StepOutcome) -> Vec<Event> {
        let ended = ended_of_run(run, job, outcome, None, self.now);
        ended.into_iter().collect()
    }

    /// A checkpoint that was asked for has come: the step is done.
    pub(super) fn with_checkpoint(
        &self,
        run: RunId,
        job: &Job,
        saved: Event,
        body: Bytes,
    ) -> Decision {
        let asked = matches!(&job.phase, Phase::Stopping { .. })
            && job
                .rung
                .as_ref()
                .is_some_and(|rung| rung.step.name() == "checkpoint");
        let mut decision = Decision::with(saved, body, Reply::Done);
        if asked {
            let next = self.next_step(run, job, (StepOutcome::Done, None));
            let next = next.into_iter().map(|event| (event, Bytes::new()));
            decision.events.extend(next);
        }
        decision
    }

    fn step_of_instance(
        &self,
        service: &ServiceName,
        (generation, number): (Generation, u32),
        (outcome, error): (StepOutcome, Option<String>),
        held: Option<Vec<Grant>>,
    ) -> Vec<Event> {
        let Some((entry, instance)) = self.instance(service, generation) else {
            return Vec::new();
        };
        let InstancePhase::Yielding { cause } = &instance.phase else {
            return Vec::new();
        };
        let Some(rung) = instance.rung.as_ref().filter(|rung| rung.number == number) else {
            return Vec::new();
        };
        let held = match (&held, outcome) {
            (Some(measured), _) => still_held(&instance.grants, measured),
            (None, StepOutcome::Done) => Vec::new(),
            (None, _) => instance.grants.clone(),
        };
        let (outcome, error) = match outcome {
            StepOutcome::Done if upkeep::spoils_room(self.state, service, &held) => {
                let mib: u64 = held.iter().map(|grant| grant.mib).sum();
                let error = format!("the {mib} MiB that it still holds are needed too");
                (StepOutcome::Failed, Some(error))
            }
            outcome => (outcome, error),
        };
        let ended = ended_of_instance(entry, instance, outcome, error, &held, self.now);
        let mut events: Vec<Event> = ended.into_iter().collect();
        if outcome == StepOutcome::Done {
            let host_mib = match rung.step.fills_host() {
                true => freed_mib(&instance.grants, &held),
                false => 0,
            };
            events.push(Event::InstanceSlept {
                service: service.clone(),
                generation,
                step: rung.step.clone(),
                grants: held,
                host_mib,
            });
            return events;
        }
        let of = (entry, instance);
        events.extend(next_of_instance(
            self.state,
            self.settings,
            of,
            cause,
            rung.number,
            self.now,
        ));
        events
    }

    fn woken(
        &self,
        service: ServiceName,
        generation: Generation,
        error: Option<String>,
    ) -> Vec<Event> {
        let Some((entry, instance)) = self.instance(&service, generation) else {
            return Vec::new();
        };
        if !matches!(instance.phase, InstancePhase::Waking { .. }) {
            return Vec::new();
        }
        let Some(error) = error else {
            let startup_ms = self.now.millis_since(instance.since);
            return vec![Event::InstanceReady {
                service,
                generation,
                startup_ms,
            }];
        };
        let seen = Event::InstanceUnhealthy {
            service,
            generation,
            error,
        };
        let stop = upkeep::stop(entry, instance, StopCause::StartupTimeout, self.now);
        vec![seen, stop]
    }

    /// What was under way for instances when the last gateway process ended begins anew.
    pub(super) fn begin_steps_anew(&self) -> Vec<Event> {
        let services = self.state.services.values();
        let all = services.filter_map(|service| Some((service, service.instance.as_ref()?)));
        all.flat_map(|(service, instance)| self.begin_step_anew(service, instance))
            .collect()
    }

    fn begin_step_anew(&self, service: &Service, instance: &Instance) -> Vec<Event> {
        match (&instance.phase, &instance.asleep) {
            (InstancePhase::Yielding { cause }, _) => {
                let (outcome, held) = (StepOutcome::Interrupted, &instance.grants);
                let ended = ended_of_instance(service, instance, outcome, None, held, self.now);
                let began = again(service, instance, cause, self.now);
                ended.into_iter().chain(began).collect()
            }
            (InstancePhase::Waking { deadline }, Some(_)) => {
                let deadline = (*deadline).max(self.now + service.spec.startup_timeout_ms);
                vec![Event::InstanceWakeRequested {
                    service: service.spec.name.clone(),
                    generation: instance.generation,
                    grants: instance.grants.clone(),
                    cause: instance.cause,
                    deadline,
                }]
            }
            _ => Vec::new(),
        }
    }
}
