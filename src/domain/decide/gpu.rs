//! What was seen of GPUs: faults that keep new instances off one, how they were used, and instances that had too
//! little memory.

use super::{Context, Decision};
use crate::domain::command::{Command, Rejection};
use crate::domain::event::Event;
use crate::domain::ids::{Generation, GpuUuid, ServiceName};
use crate::domain::machine::Seen;

impl Context<'_> {
    pub(super) fn of_gpu(&self, command: Command) -> Result<Decision, Rejection> {
        match command {
            Command::ReleaseGpu { gpu } => self.release_gpu(gpu),
            Command::Seen(seen) => Ok(self.seen(seen)),
            _ => Ok(Decision::done(Vec::new())),
        }
    }

    fn seen(&self, seen: Seen) -> Decision {
        let events = match seen {
            Seen::Fault { gpu, cause, detail } => match self.state.gpus.get(&gpu) {
                Some(entry) if entry.quarantine.is_none() => {
                    vec![Event::GpuQuarantined { gpu, cause, detail }]
                }
                _ => Vec::new(),
            },
            Seen::Use { since, gpus } => vec![Event::GpuUseSummed { since, gpus }],
            Seen::OutOfMemory {
                service,
                generation,
            } => self.need_raised(&service, generation).into_iter().collect(),
        };
        Decision::done(events)
    }

    /// One that is not quarantined is left as it is.
    fn release_gpu(&self, gpu: GpuUuid) -> Result<Decision, Rejection> {
        let Some(entry) = self.state.gpus.get(&gpu) else {
            return Err(Rejection::GpuNotFound(gpu));
        };
        let lifted = entry.quarantine.is_some();
        let events = lifted.then_some(Event::GpuQuarantineLifted { gpu });
        Ok(Decision::done(events.into_iter().collect()))
    }

    /// The need of a service whose current instance had too little GPU memory: a quarter more than it was seen to use
    /// or declared, at most what the largest GPU has for instances. Once for each instance, however many of its jobs fail.
    pub(super) fn need_raised(&self, name: &ServiceName, generation: Generation) -> Option<Event> {
        let service = self.state.services.get(name)?;
        let is_current = service.generation == generation && service.instance.is_some();
        if !is_current || service.raised_by == Some(generation) || !service.spec.needs_gpu() {
            return None;
        }
        let need = service.need_mib();
        let gpus = self.state.gpus.values();
        let largest = gpus.map(|gpu| gpu.usable_mib()).max().unwrap_or(0);
        let mib = need.saturating_add(need / 4).min(largest);
        (mib > need).then(|| Event::ServiceNeedRaised {
            service: name.clone(),
            generation,
            mib,
        })
    }
}
