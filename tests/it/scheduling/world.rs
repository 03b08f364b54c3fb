//! The world that effects act on: processes, calls and callbacks that have begun and whose outcomes are still to
//! come, in any order. It keeps what it reported, so that it can be reported again.

use bytes::Bytes;
use rungate::domain::command::{Command, JobFailure};
use rungate::domain::effect::Effect;
use rungate::domain::event::Exit;
use rungate::domain::ids::{Attempt, Generation, RunId, ServiceName};
use rungate::domain::ladder::StepOutcome;
use rungate::domain::scheduler::container::run_of;
use rungate::domain::spec::Grant;
use smol_str::SmolStr;

/// Something under way.
#[derive(Clone, Debug, PartialEq)]
pub enum Pending {
    Instance {
        service: ServiceName,
        generation: Generation,
        stage: Stage,
    },
    Call {
        run: RunId,
        attempt: Attempt,
    },
    StopCall {
        run: RunId,
        attempt: Attempt,
    },
    Callback {
        run: RunId,
        number: u32,
    },
    /// A checkpoint was asked for.
    Ask {
        run: RunId,
        attempt: Attempt,
        number: u32,
    },
}

/// What an instance's process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Starting,
    /// Up and answering: nothing has to come of it.
    Live,
    /// A restarted gateway looks for it.
    Lost,
    Stopping,
    /// Gone, its memory not yet seen free.
    Gone,
    /// A step of its ladder takes its memory.
    Yielding(u32),
    Waking,
}

/// How something under way goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Luck {
    Good,
    Bad,
}

#[derive(Clone, Debug, Default)]
pub struct World {
    pub pending: Vec<Pending>,
    /// Every outcome reported so far.
    pub reported: Vec<Command>,
}

impl World {
    pub fn absorb(&mut self, effects: &mut Vec<Effect>) {
        for effect in effects.drain(..) {
            match effect {
                Effect::StartInstance {
                    spec, generation, ..
                } => self.enter(&spec.name, generation, Stage::Starting),
                Effect::StartJob { spec, job, .. } => {
                    self.enter(&spec.name, job.generation, Stage::Starting);
                }
                Effect::StopInstance {
                    service,
                    generation,
                    ..
                } => self.enter(&service, generation, Stage::Stopping),
                Effect::FindInstance {
                    spec,
                    generation,
                    stop_at,
                    asleep,
                    ..
                } => match (stop_at, asleep) {
                    (Some(_), _) => self.enter(&spec.name, generation, Stage::Stopping),
                    (None, false) => self.enter(&spec.name, generation, Stage::Lost),
                    // What was asked of it since the restart goes on when it is found.
                    (None, true) if self.has(&spec.name, generation) => {}
                    (None, true) => self.enter(&spec.name, generation, Stage::Live),
                },
                Effect::SweepOrphans { .. } => {}
                Effect::WatchRelease {
                    service,
                    generation,
                    ..
                } => self.enter(&service, generation, Stage::Gone),
                Effect::Dispatch(call) => self.pending.push(Pending::Call {
                    run: call.run,
                    attempt: call.attempt,
                }),
                Effect::StopCall { run, attempt, .. } => {
                    self.pending.push(Pending::StopCall { run, attempt });
                }
                Effect::AskCheckpoint(ask) => self.pending.push(Pending::Ask {
                    run: ask.run,
                    attempt: ask.attempt,
                    number: ask.number,
                }),
                Effect::TakeMemory(take) => {
                    let stage = Stage::Yielding(take.number);
                    self.enter(&take.service, take.generation, stage);
                }
                Effect::WakeInstance(wake) => {
                    self.enter(&wake.service, wake.generation, Stage::Waking);
                }
                Effect::SendCallback { run, number, .. } => {
                    self.pending.push(Pending::Callback { run, number });
                }
                // Nobody is told here.
                Effect::SendNotice(_) => {}
            }
        }
    }

    /// The gateway's process died, and what it had under way with it.
    pub fn forget(&mut self) {
        self.pending.clear();
    }

    fn has(&self, name: &ServiceName, of: Generation) -> bool {
        self.pending.iter().any(|pending| {
            matches!(pending, Pending::Instance { service, generation, .. }
                if service == name && *generation == of)
        })
    }

    /// An instance has one thing under way at a time: the last asked for.
    fn enter(&mut self, name: &ServiceName, of: Generation, stage: Stage) {
        self.pending.retain(|pending| match pending {
            Pending::Instance {
                service,
                generation,
                ..
            } => service != name || *generation != of,
            _ => true,
        });
        self.pending.push(Pending::Instance {
            service: name.clone(),
            generation: of,
            stage,
        });
    }

    /// Lets one thing go on, and gives what is reported of it. Good luck ends everything well.
    pub fn go_on(&mut self, index: usize, luck: Luck) -> Option<Command> {
        if self.pending.is_empty() {
            return None;
        }
        let index = index % self.pending.len();
        let pending = self.pending.swap_remove(index);
        let command = self.outcome(pending, luck)?;
        self.reported.push(command.clone());
        Some(command)
    }

    fn outcome(&mut self, pending: Pending, luck: Luck) -> Option<Command> {
        Some(match pending {
            Pending::Instance {
                service,
                generation,
                stage,
            } => return self.instance(service, generation, stage, luck),
            Pending::Call { run, attempt } => {
                let failure = || JobFailure {
                    code: SmolStr::new_static("http_status"),
                    error: "500".to_owned(),
                };
                let good = luck == Luck::Good;
                let outcome = good.then(|| Bytes::from_static(b"{}")).ok_or_else(failure);
                Command::JobAnswered {
                    run,
                    attempt,
                    outcome,
                }
            }
            Pending::StopCall { run, attempt } => Command::JobStopDone {
                run,
                attempt,
                confirmed: luck == Luck::Good,
            },
            Pending::Ask {
                run,
                attempt,
                number,
            } => Command::LadderStepTried {
                service: ServiceName::default(),
                generation: Generation::default(),
                run: Some(run),
                attempt,
                number,
                outcome: outcome_of(luck),
                error: None,
                held: None,
            },
            Pending::Callback { run, number } => {
                let status = if luck == Luck::Good { 200 } else { 503 };
                Command::CallbackTried {
                    run,
                    number,
                    status: Some(status),
                    error: None,
                }
            }
        })
    }

    fn instance(
        &mut self,
        service: ServiceName,
        generation: Generation,
        stage: Stage,
        luck: Luck,
    ) -> Option<Command> {
        let tried = |number| Command::LadderStepTried {
            service: service.clone(),
            generation,
            run: None,
            attempt: 0,
            number,
            outcome: outcome_of(luck),
            error: None,
            // Some keep a little of it.
            held: generation.0.is_multiple_of(3).then(|| {
                let little = |gpu: &str| Grant {
                    gpu: gpu.into(),
                    mib: 1,
                };
                ["g0", "g1", "g2"].map(little).to_vec()
            }),
        };
        match stage {
            Stage::Yielding(number) => {
                self.enter(&service, generation, Stage::Live);
                return Some(tried(number));
            }
            Stage::Waking => {
                self.enter(&service, generation, Stage::Live);
                let error = (luck == Luck::Bad).then(|| "no answer".to_owned());
                return Some(Command::InstanceWoken {
                    service,
                    generation,
                    error,
                });
            }
            _ => {}
        }
        let next = match (stage, luck) {
            // Its work ends, well or badly.
            (Stage::Live, _) if run_of(&service).is_some() => Stage::Gone,
            (Stage::Starting | Stage::Live | Stage::Lost, Luck::Good) => Stage::Live,
            // Half of those that fail stay up and fail their probes.
            (Stage::Live, Luck::Bad) if generation.0.is_multiple_of(2) => Stage::Live,
            _ => Stage::Gone,
        };
        if stage != Stage::Gone {
            self.enter(&service, generation, next);
        }
        Some(match (stage, next) {
            (Stage::Gone, _) => Command::InstanceReleased {
                service,
                generation,
            },
            (_, Stage::Gone) => Command::InstanceExited {
                service,
                generation,
                exit: match stage {
                    Stage::Starting if generation.0.is_multiple_of(2) => {
                        Exit::NoEngine("away".to_owned())
                    }
                    _ => Exit::Code(i32::from(luck == Luck::Bad)),
                },
            },
            (Stage::Starting, _) => Command::InstanceHealthy {
                service,
                generation,
            },
            (Stage::Lost, _) => Command::InstanceAdopted {
                service,
                generation,
                pid: 1,
            },
            _ if luck == Luck::Good => return None,
            _ => Command::InstanceUnhealthy {
                service,
                generation,
                error: "no answer".to_owned(),
            },
        })
    }

    /// The first thing of which something has to come soon.
    pub fn next_but_calls(&self) -> Option<usize> {
        let soon = |pending: &Pending| {
            !is_live(pending) && !matches!(pending, Pending::Call { .. }) && !is_work(pending)
        };
        self.pending.iter().position(soon)
    }

    /// The call that is open for the longest: attempts and runs are numbered in order.
    pub fn oldest_call(&self) -> Option<usize> {
        let calls = self
            .pending
            .iter()
            .enumerate()
            .filter_map(|(index, pending)| match pending {
                Pending::Call { run, attempt } => Some((*attempt, *run, index)),
                _ => None,
            });
        calls.min().map(|(_, _, index)| index)
    }

    /// The first thing of which something has to come.
    pub fn next_due(&self) -> Option<usize> {
        self.pending.iter().position(|pending| !is_live(pending))
    }
}

fn outcome_of(luck: Luck) -> StepOutcome {
    match luck {
        Luck::Good => StepOutcome::Done,
        Luck::Bad => StepOutcome::Failed,
    }
}

fn is_live(pending: &Pending) -> bool {
    let live = matches!(
        pending,
        Pending::Instance {
            stage: Stage::Live,
            ..
        }
    );
    live && !is_work(pending)
}

/// The container of a job at work, of which something comes like of a call.
fn is_work(pending: &Pending) -> bool {
    matches!(pending, Pending::Instance { service, stage: Stage::Live, .. } if run_of(service).is_some())
}
