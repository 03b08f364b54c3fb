//! The ladder of a service: by which steps its memory is got back, the gentlest first. What a declaration means,
//! and nothing of when: that is `decide` and `scheduler`.
//!
//! Steps of runs (`drain`, `checkpoint`) end what one run does; steps of the instance (`sleep`, `cuda-checkpoint`)
//! take its GPU memory and leave it alive; `stop` and `kill` end a run's call, or the instance.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::event::{JobStopCause, StopCause};
use super::spec::{Grant, ServiceSpec};
use super::time::Timestamp;

/// One step, with its time limit in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The run may finish.
    Drain {
        ms: u64,
    },
    /// The service is asked to save the run's checkpoint.
    Checkpoint {
        ask: Ask,
        ms: u64,
    },
    /// The service gives its GPU memory back and keeps its process.
    Sleep {
        call: SleepCall,
        ms: u64,
    },
    /// The driver takes the GPU memory of its processes to the host.
    CudaCheckpoint {
        ms: u64,
    },
    /// TERM, or the request to stop a run; what is left at the end is killed.
    Stop {
        ms: u64,
    },
    Kill,
}

/// How a checkpoint is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Sent to the process group: `SIGUSR1` or `SIGUSR2`.
    Signal(SmolStr),
    /// Posted to, with the run's id.
    Path(String),
}

/// Where a service is put to sleep, woken, and asked whether it sleeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SleepCall {
    /// 1 keeps what it had on the GPU in host memory, 2 lets go of it.
    pub level: u8,
    pub path: String,
    pub wake_path: String,
    pub is_sleeping_path: Option<String>,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    Done,
    Failed,
    TimedOut,
    /// It was not tried.
    Skipped,
    /// Something else ended what it was about.
    Interrupted,
}

/// A step under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rung {
    /// Its place in the ladder, from 0.
    pub number: u32,
    pub step: Step,
    pub since: Timestamp,
    pub deadline: Timestamp,
}

impl Rung {
    /// A step that begins at `at`.
    pub fn begun(number: u32, step: &Step, at: Timestamp, deadline: Timestamp) -> Rung {
        Rung {
            number,
            step: step.clone(),
            since: at,
            deadline,
        }
    }
}

impl Step {
    /// As a declaration calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Step::Drain { .. } => "drain",
            Step::Checkpoint { .. } => "checkpoint",
            Step::Sleep { .. } => "sleep",
            Step::CudaCheckpoint { .. } => "cuda-checkpoint",
            Step::Stop { .. } => "stop",
            Step::Kill => "kill",
        }
    }

    /// Its time limit.
    pub fn limit_ms(&self) -> u64 {
        match self {
            Step::Drain { ms }
            | Step::Checkpoint { ms, .. }
            | Step::Sleep { ms, .. }
            | Step::CudaCheckpoint { ms }
            | Step::Stop { ms } => *ms,
            Step::Kill => 0,
        }
    }

    /// In which part of a ladder it may stand: runs come to rest before memory is taken, which comes before the end.
    pub fn part(&self) -> u8 {
        match self {
            Step::Drain { .. } | Step::Checkpoint { .. } => 0,
            Step::Sleep { .. } | Step::CudaCheckpoint { .. } => 1,
            Step::Stop { .. } => 2,
            Step::Kill => 3,
        }
    }

    /// Whether an instance lives on without its GPU memory after it.
    pub fn takes_memory(&self) -> bool {
        self.part() == 1
    }

    /// Whether what was on the GPU lies in host memory after it.
    pub fn fills_host(&self) -> bool {
        match self {
            Step::Sleep { call, .. } => call.level < 2,
            Step::CudaCheckpoint { .. } => true,
            _ => false,
        }
    }
}

impl ServiceSpec {
    /// Milliseconds between TERM and KILL, and for a run's stop: those of `stop`; none where the ladder goes straight to
    /// `kill`; else the service's grace.
    pub fn stop_ms(&self) -> u64 {
        let stop = self.ladder.iter().find(|step| step.part() == 2);
        match stop {
            Some(stop) => stop.limit_ms(),
            None if self.ladder.contains(&Step::Kill) => 0,
            None => self.grace_ms,
        }
    }

    /// The steps that end what a run does, in order and with their places; `stop` is the last.
    pub fn steps_of_run(&self, cause: &JobStopCause) -> Vec<(u32, Step)> {
        let wanted = |step: &Step| match (step, cause) {
            // Only who gives way for another may finish; who is cancelled needs no checkpoint.
            (Step::Drain { .. }, JobStopCause::Preempt { .. } | JobStopCause::Yield) => true,
            (Step::Checkpoint { .. }, cause) => !matches!(cause, JobStopCause::Cancel { .. }),
            _ => false,
        };
        let mut steps = self.numbered();
        steps.retain(|(_, step)| wanted(step));
        steps.push(self.stop_step());
        steps
    }

    /// Milliseconds that the stop of a run may take at most.
    pub fn longest_stop_ms(&self) -> u64 {
        let steps = self.steps_of_run(&JobStopCause::Yield);
        steps.iter().map(|(_, step)| step.limit_ms()).sum()
    }

    /// The steps that take an instance's memory, in order and with their places, when it leaves for that cause.
    pub fn steps_of_instance(&self, cause: &StopCause) -> Vec<(u32, Step)> {
        let mut steps = match cause {
            StopCause::Room { .. } | StopCause::Idle => self.numbered(),
            _ => Vec::new(),
        };
        steps.retain(|(_, step)| step.takes_memory());
        steps
    }

    /// `stop` and its place, declared or not.
    pub fn stop_step(&self) -> (u32, Step) {
        let before = self.ladder.iter().filter(|step| step.part() < 2).count();
        let ms = self.stop_ms();
        (u32::try_from(before).unwrap_or(u32::MAX), Step::Stop { ms })
    }

    fn numbered(&self) -> Vec<(u32, Step)> {
        (0..).zip(self.ladder.iter().cloned()).collect()
    }
}

/// MiB that were given back of `granted`, when only `held` is still there. More than granted is never counted.
pub fn freed_mib(granted: &[Grant], held: &[Grant]) -> u64 {
    let total = |grants: &[Grant]| grants.iter().map(|grant| grant.mib).sum::<u64>();
    total(granted).saturating_sub(total(held))
}

/// What of `granted` is still held: nothing where nothing was measured.
pub fn still_held(granted: &[Grant], measured: &[Grant]) -> Vec<Grant> {
    let on = |grant: &Grant| {
        let mut of_gpu = measured.iter().filter(|held| held.gpu == grant.gpu);
        of_gpu.next().map_or(0, |held| held.mib.min(grant.mib))
    };
    let held = granted.iter().map(|grant| Grant {
        gpu: grant.gpu.clone(),
        mib: on(grant),
    });
    held.filter(|grant| grant.mib > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_never_more_than_granted() {
        let grant = |mib| Grant {
            gpu: "g".into(),
            mib,
        };
        let held = still_held(&[grant(10)], &[grant(30)]);
        assert_eq!(held, [grant(10)]);
        assert_eq!(freed_mib(&[grant(10)], &held), 0);
        assert_eq!(still_held(&[grant(10)], &[grant(0)]), []);
        assert_eq!(still_held(&[grant(10)], &[]), []);
    }
}
