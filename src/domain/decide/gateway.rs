//! The gateway's own coming and going: what a restart finds unfinished is tried again.

use smol_str::SmolStr;

use super::{Context, Decision};
use crate::domain::command::JobFailure;
use crate::domain::event::{Event, JobStopCause};
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::state::job::Phase;

impl Context<'_> {
    /// Calls that were open when the last process ended: an answer may have been lost with it, so they are
    /// tried again within their attempts; stops that were under way are over, as the calls are gone.
    pub(super) fn gateway_started(&self, epoch: u64, version: SmolStr) -> Decision {
        let mut events = vec![Event::GatewayStarted { epoch, version }];
        if !self.state.planes.contains_key(&PlaneId::ROOT) {
            events.push(Event::PlaneOpened {
                plane: PlaneId::ROOT,
                tenant: SmolStr::new_static("default"),
                runtime: SmolStr::new_static("default"),
            });
        }
        events.extend(self.first_admin());
        let half_life_ms = self.settings.share_half_life_ms;
        if half_life_ms != self.state.accounts.half_life_ms {
            events.push(Event::ShareHalfLifeChanged { half_life_ms });
        }
        events.extend(self.notify_by_settings());
        for run in self.active_runs() {
            let Some(job) = self.state.jobs.get(run) else {
                continue;
            };
            match &job.phase {
                Phase::Stopping { cause, .. } => {
                    events.extend(self.stopped(*run, job, cause, false))
                }
                _ => {
                    let failure = JobFailure {
                        code: SmolStr::new_static("interrupted"),
                        error: "the gateway ended while the call was open".to_owned(),
                    };
                    events.extend(self.failed(*run, job, failure, Some(self.now)));
                }
            }
        }
        events.extend(self.begin_steps_anew());
        Decision::done(events)
    }

    /// What still runs goes back to the queue with its checkpoint; that is nobody's failure. The caller has
    /// made sure that nothing is dispatched any more.
    pub(super) fn gateway_stopped(&self) -> Decision {
        let mut events = Vec::new();
        for run in self.active_runs() {
            if let Some(job) = self.state.jobs.get(run) {
                let cause = match &job.phase {
                    Phase::Stopping { cause, .. } => cause,
                    _ => &JobStopCause::Yield,
                };
                events.extend(self.stopped(*run, job, cause, false));
            }
        }
        events.push(Event::GatewayStopped {
            epoch: self.state.epoch,
        });
        Decision::done(events)
    }

    /// Every run that holds a place, but for those whose containers go on without a gateway.
    fn active_runs(&self) -> impl Iterator<Item = &RunId> {
        self.state
            .services
            .values()
            .filter(|service| !service.spec.worker.is_job())
            .filter_map(|service| service.instance.as_ref())
            .flat_map(|instance| &instance.active)
    }
}
