//! Deadlines that have passed.

use smol_str::SmolStr;

use super::Context;
use crate::domain::event::{Event, JobStopCause, RequeueCause};
use crate::domain::ids::RunId;
use crate::domain::ladder::StepOutcome;
use crate::domain::settings::Settings;
use crate::domain::state::State;
use crate::domain::state::job::Phase;
use crate::domain::state::timers::TimerKey;
use crate::domain::tenant::Tenancy;
use crate::domain::time::Timestamp;

/// What the earliest deadline that is due at `now` comes to; `None` when none is due. An empty list when
/// it turned out to be nothing.
pub fn due(state: &mut State, settings: &Settings, now: Timestamp) -> Option<Vec<Event>> {
    let key = state.timers.pop(now)?;
    match key {
        TimerKey::Job(run) => {
            let events = Context {
                state,
                tenancy: &Tenancy::All,
                settings,
                now,
            }
            .job_due(run);
            Some(events)
        }
        TimerKey::Shape(target) => {
            state.queue.unpark(&target);
            Some(Vec::new())
        }
        TimerKey::Service(name) => {
            // The scheduler's upkeep knows what is due.
            state.touched.insert(name);
            Some(Vec::new())
        }
    }
}

impl Context<'_> {
    fn job_due(&self, run: RunId) -> Vec<Event> {
        let Some(job) = self.state.jobs.get(&run) else {
            return Vec::new();
        };
        match &job.phase {
            Phase::Backoff { .. } => {
                vec![Event::JobRequeued {
                    run,
                    cause: RequeueCause::BackoffOver,
                }]
            }
            Phase::Queued => vec![Event::JobFailed {
                run,
                code: SmolStr::new_static("expired"),
                error: "expired".to_owned(),
            }],
            Phase::Running { .. } => self.request_stop(run, job, JobStopCause::TimedOut),
            Phase::Stopping { .. } if job.rung.as_ref().is_some_and(|r| r.step.part() == 0) => {
                self.next_step(run, job, (StepOutcome::TimedOut, None))
            }
            // The executor's word is overdue: the place is given free without it.
            Phase::Stopping { cause, .. } => self.stopped(run, job, cause, false),
            _ => Vec::new(),
        }
    }
}
