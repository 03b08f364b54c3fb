//! One life of a service: started or found again, probed, stopped, buried, released. Each step is reported
//! as it happens; when to stop is asked from outside.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use smol_str::SmolStr;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::body::Body;
use super::contained;
use super::health::{Prober, Verdict};
use super::meter::{StillHeld, until_ended};
use super::out_of_memory::ended_out_of_memory;
use super::outcome::InOrder;
use super::process::{self, Process, Spawn};
use super::procfs::Mark;
use super::table::{Endpoint, Slot};
use super::{Shared, blocking, http, until};
use crate::causes::with_causes;
use crate::clock::now;
use crate::domain::command::Command;
use crate::domain::effect::ProcessIdentity;
use crate::domain::event::Exit;
use crate::domain::ids::{Generation, ServiceName};
use crate::domain::machine::Seen;
use crate::domain::scheduler::container::run_of;
use crate::domain::spec::{Grant, ServiceSpec, Worker};
use crate::domain::time::Timestamp;

/// How long the answer to a signal is waited for when its receiver has ended already.
const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// Of a job's container, when it is looked for and nothing of it has run: held against nobody.
const NEVER_BEGUN: &str = "the gateway ended before the container was started";

/// What a restarted gateway remembers of an instance.
pub(super) struct Found {
    /// `None` when the gateway died between the spawn and its record.
    pub process: Option<ProcessIdentity>,
    /// The engine's id of its container.
    pub container: Option<SmolStr>,
    /// It was being stopped.
    pub stop_at: Option<Timestamp>,
    /// It sleeps, or is on its way to or from sleep.
    pub asleep: bool,
}

/// What the first good health answer means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum First {
    Healthy,
    /// Found again: healthy in time is adopted, not healthy in time is stopped.
    Adopted {
        pid: u32,
    },
    /// It was told already.
    Told,
    /// It is a job's container: that it runs is all there is to tell.
    Running,
}

/// The task that owns an instance's place in the table.
pub(super) struct Instance {
    pub(super) shared: Arc<Shared>,
    pub(super) service: ServiceName,
    pub(super) generation: Generation,
    pub(super) slot: Arc<Slot>,
    pub(super) stop: watch::Receiver<Option<Timestamp>>,
    pub(super) outcomes: InOrder,
    /// When its start, or the search for it, began: what making it takes is part of its start-up.
    began: Instant,
    /// How many bytes its service's log had before it.
    pub(super) said_before: u64,
    /// Tells who copies its container's output that the container has ended; and the end of the copying.
    pub(super) copied: Option<(oneshot::Sender<()>, oneshot::Receiver<()>)>,
}

impl Instance {
    /// Takes the place of this generation; `None` when it has one already.
    pub fn enter(
        shared: &Arc<Shared>,
        service: &ServiceName,
        generation: Generation,
    ) -> Option<Instance> {
        let slot = shared.table.enter(service, generation)?;
        Some(Instance {
            shared: shared.clone(),
            service: service.clone(),
            generation,
            stop: slot.stop.subscribe(),
            slot,
            outcomes: shared.outcomes.in_order(&shared.tasks),
            began: Instant::now(),
            said_before: 0,
            copied: None,
        })
    }

    /// From nothing to released.
    pub async fn start(mut self, spec: Arc<ServiceSpec>, grants: Vec<Grant>) {
        if self.stop.borrow().is_some() {
            let why = "it was stopped before it started".to_owned();
            return self.never_started(Exit::NotStarted(why));
        }
        self.said_before = self.said().await;
        let body = match &spec.worker {
            Worker::External { url } => return self.external(url, &spec, First::Healthy).await,
            Worker::Process { .. } => {
                let spawned = self.spawn(&spec, grants).await;
                spawned.map(Body::process).map_err(Exit::NotStarted)
            }
            Worker::Container | Worker::Image(_) => self.contain(&spec, &grants, None).await,
            Worker::Job { .. } => Err(Exit::NotStarted(
                "a job's container needs its job".to_owned(),
            )),
        };
        match body {
            Ok(body) => {
                self.report_spawned(&body);
                self.live(body, &spec, First::Healthy).await;
            }
            Err(exit) => self.broke_off(exit).await,
        }
    }

    /// From what an earlier gateway process left to released.
    pub async fn find(mut self, spec: Arc<ServiceSpec>, found: Found) {
        if let Some(stop_at) = found.stop_at {
            self.slot.stop.send_replace(Some(stop_at));
        }
        if let Worker::External { url } = &spec.worker {
            let first = self.first(found.asleep, 0);
            return self.external(url, &spec, first).await;
        }
        let body = match spec.worker.is_container() {
            true => self
                .look_for_container(&spec, &found)
                .await
                .map(Body::Container),
            false => self
                .look_for(found.process.clone())
                .await
                .map(Body::process),
        };
        let Some(body) = body else {
            self.report_exited(match spec.worker.is_job() && found.process.is_none() {
                true => Exit::NoEngine(NEVER_BEGUN.to_owned()),
                false => Exit::Unknown,
            });
            return self.release().await;
        };
        if found.process.is_none() {
            self.report_spawned(&body);
        }
        // What a job's container does, nobody else has to see.
        let at_once = found.asleep || spec.worker.is_job();
        let first = self.first(at_once, body.pid());
        self.said_before = self.said().await;
        self.live(body, &spec, first).await;
    }

    /// Bytes of its service's log.
    pub(super) async fn said(&self) -> u64 {
        let (logs, name) = (self.shared.logs.clone(), self.service.clone());
        blocking(move || logs.end(&name)).await.unwrap_or(0)
    }

    /// What is found asleep is adopted at once: it need not answer.
    fn first(&self, asleep: bool, pid: u32) -> First {
        if !asleep {
            return First::Adopted { pid };
        }
        self.outcomes.report(Command::InstanceAdopted {
            service: self.service.clone(),
            generation: self.generation,
            pid,
        });
        First::Told
    }

    /// Stops what bears this generation's mark, if anything does.
    pub async fn stop_unknown(mut self, kill_at: Timestamp) {
        if let Some(process) = self.look_for(None).await {
            let body = Body::process(process);
            self.slot
                .stop
                .send_if_modified(|stop| stop.replace(kill_at).is_none());
            self.end(&body).await;
            return self.bury(body, false).await;
        }
        self.report_exited(Exit::Unknown);
        self.release().await;
    }

    /// Reports the release once no process bears the mark, killing what still does, and its memory was seen free.
    pub async fn release(self) {
        self.ended(process::killed_and_gone(&self.mark())).await;
        self.shared.revoke(&self.service, self.generation).await;
        let (meter, service) = (&self.shared.meter, &self.service);
        // Before the release, so that nothing else is started there.
        for held in meter.freed(service, self.generation).await {
            self.outcomes.report(held.into_outcome());
        }
        self.report_released();
    }

    /// Awaits the end of what was killed. Its GPUs are told of when that takes too long: what it holds there may stay.
    async fn ended(&self, ending: impl Future<Output = ()>) {
        let stuck = self.shared.meter.stuck(&self.service, self.generation);
        let told = |held: StillHeld| self.outcomes.report(held.into_outcome());
        until_ended(ending, stuck, told).await;
    }

    async fn look_for(&self, recorded: Option<ProcessIdentity>) -> Option<Process> {
        let mark = self.mark();
        let boot_id = self.shared.boot_id.clone();
        blocking(move || match recorded {
            Some(known) if known.boot_id == boot_id => {
                Process::open(known.pid, known.start_ticks, known.port, mark)
            }
            Some(_) => None,
            None => Process::find(&mark),
        })
        .await
    }

    async fn spawn(&self, spec: &Arc<ServiceSpec>, grants: Vec<Grant>) -> Result<Process, String> {
        let (shared, slot) = (self.shared.clone(), self.slot.clone());
        let (spec, mark) = (spec.clone(), self.mark());
        blocking(move || {
            let Worker::Process {
                command,
                env,
                working_dir,
            } = &spec.worker
            else {
                return Err("it is no process service".into());
            };
            let port = shared.table.choose_port(&slot, spec.port)?;
            let log = shared
                .logs
                .open(&spec.name)
                .map_err(|error| with_causes(&error))?;
            let working_dir = working_dir.as_deref().map(Path::new);
            let token_file = shared
                .credentials
                .write(&spec.name, mark.generation)
                .map_err(|error| format!("cannot write its token: {error}"))?;
            let spawn = Spawn {
                mark,
                command,
                env,
                working_dir,
                port,
                grants: &grants,
                mps_percent: spec.mps_percent,
                token_file: &token_file,
                log,
            };
            Process::spawn(spawn).map_err(|error| with_causes(&error))
        })
        .await
    }

    /// A process or container from its start on, or from where it was found.
    pub(super) async fn live(mut self, body: Body, spec: &Arc<ServiceSpec>, mut first: First) {
        let mut changes = body.changes();
        // Until its memory is free.
        let _occupied = self.occupy(&body);
        let probed = !spec.worker.is_job();
        let mut prober = probed.then(|| self.prober(body.base_url(), spec));
        if first == First::Running {
            self.report_healthy();
            first = First::Told;
        }
        let mut renewals = self.shared.renewals(first == First::Healthy);
        let ended = loop {
            tokio::select! {
                biased;
                seen = contained::changed(&mut changes) => self.report_container(&seen),
                () = body.exited() => break true,
                () = asked(&mut self.stop) => break false,
                _ = renewals.tick(), if probed => self.shared.renew(&self.service, self.generation).await,
                verdict = judged(&mut prober) => {
                    if self.judge(verdict, &mut first).is_break() {
                        self.shared.table.stop(&self.service, self.generation, now() + spec.grace_ms);
                    }
                }
            }
        };
        if !ended {
            self.end(&body).await;
        }
        if let Some(changes) = changes {
            self.report_container(&changes.borrow());
        }
        self.bury(body, ended).await;
    }

    /// Something that runs elsewhere: there is nothing to start or kill.
    async fn external(mut self, url: &str, spec: &Arc<ServiceSpec>, mut first: First) {
        let mut prober = self.prober(url.trim_end_matches('/').to_owned(), spec);
        loop {
            tokio::select! {
                biased;
                () = asked(&mut self.stop) => break,
                verdict = prober.next() => if self.judge(verdict, &mut first).is_break() { break },
            }
        }
        self.report_exited(Exit::Unknown);
        self.report_released();
    }

    fn prober(&self, base_url: String, spec: &Arc<ServiceSpec>) -> Prober {
        let url = http::join(&base_url, &spec.health_endpoint);
        let _ = self.slot.endpoint.set(Arc::new(Endpoint {
            base_url,
            spec: spec.clone(),
        }));
        let startup = Duration::from_millis(spec.startup_timeout_ms);
        Prober::new(
            self.shared.probe_client.clone(),
            url,
            self.shared.probes,
            (self.began, startup),
        )
    }

    /// Reports a change of health. Breaks when a found instance is not fit to be adopted.
    fn judge(&self, verdict: Verdict, first: &mut First) -> ControlFlow<()> {
        let (service, generation) = (self.service.clone(), self.generation);
        let told = std::mem::replace(first, First::Told);
        let outcome = match (verdict, told) {
            (Verdict::Healthy, First::Adopted { pid }) => Command::InstanceAdopted {
                service,
                generation,
                pid,
            },
            (Verdict::Healthy, _) => Command::InstanceHealthy {
                service,
                generation,
            },
            (Verdict::Unhealthy(error), First::Adopted { .. }) => {
                tracing::warn!(
                    service.name = %service, instance.generation = generation.0, error,
                    "an instance that was found again is stopped"
                );
                return ControlFlow::Break(());
            }
            (Verdict::Unhealthy(error), _) => Command::InstanceUnhealthy {
                service,
                generation,
                error,
            },
        };
        self.outcomes.report(outcome);
        ControlFlow::Continue(())
    }

    /// TERM now, KILL when the time is over; returns when it has ended.
    async fn end(&mut self, body: &Body) {
        let mut unsent = Some(Signal::TERM);
        loop {
            let kill_at = self.stop.borrow_and_update().unwrap_or_default();
            let mut is_lost = false;
            if let Some(signal) = unsent {
                // A container engine that does not answer must not keep the KILL from being tried.
                let late = signal == Signal::TERM && matches!(body, Body::Container(_));
                tokio::select! {
                    biased;
                    reached = body.signal(signal) => match reached {
                        true => self.report_signalled(signal),
                        false => is_lost = signal == Signal::KILL,
                    },
                    // The engine's answer may come after the end that it is about.
                    () = async { body.exited().await; tokio::time::sleep(ANSWER_WAIT).await } => return,
                    () = tokio::time::sleep(until(kill_at)), if late => {}
                }
            }
            let is_killed = unsent == Some(Signal::KILL);
            unsent = None;
            if is_killed && !is_lost {
                return self.ended(body.exited()).await;
            }
            tokio::select! {
                biased;
                () = body.exited() => return,
                _ = self.stop.changed(), if !is_killed => {}
                () = tokio::time::sleep(until(kill_at)), if !is_killed => unsent = Some(Signal::KILL),
                // The engine did not take it, and is waited for before it is asked again.
                () = tokio::time::sleep(ANSWER_WAIT), if is_lost => unsent = Some(Signal::KILL),
            }
        }
    }

    /// After its end: kill its rest, take it off the process table or remove it, report, and wait for the memory.
    /// `by_itself` tells that nobody had asked for it.
    async fn bury(mut self, body: Body, by_itself: bool) {
        let (killed, exit) = body.bury().await;
        if killed {
            self.report_signalled(Signal::KILL);
        }
        let from = self.said_before;
        if by_itself && ended_out_of_memory(&self.shared.logs, &self.service, from, &exit).await {
            self.outcomes.report(Command::Seen(Seen::OutOfMemory {
                service: self.service.clone(),
                generation: self.generation,
            }));
        }
        // What a job has said is there when the job is over; others wait for the end of a service.
        let is_job = run_of(&self.service).is_some();
        if is_job {
            self.output_copied().await;
        }
        self.report_exited(exit);
        if body.container().is_some() {
            self.output_copied().await;
            // A gateway that is killed before its end is on disk finds it again, and how it ended.
            if !self.outcomes.taken().await {
                return;
            }
            body.clear().await;
        }
        self.release().await;
    }

    pub(super) fn mark(&self) -> Mark {
        self.shared.mark(&self.service, self.generation)
    }

    /// What an engine went away from may have run; what was refused has not.
    pub(super) async fn broke_off(self, exit: Exit) {
        if !matches!(exit, Exit::NoEngine(_)) {
            return self.never_started(exit);
        }
        self.report_exited(exit);
        self.release().await;
    }

    pub(super) fn never_started(self, exit: Exit) {
        self.report_exited(exit);
        self.report_released();
    }

    fn report_healthy(&self) {
        let (service, generation) = (self.service.clone(), self.generation);
        self.outcomes.report(Command::InstanceHealthy {
            service,
            generation,
        });
    }

    pub(super) fn report_spawned(&self, body: &Body) {
        self.outcomes.report(Command::InstanceSpawned {
            service: self.service.clone(),
            generation: self.generation,
            pid: body.pid(),
            start_ticks: body.start_ticks(),
            boot_id: self.shared.boot_id.clone(),
            port: body.port(),
        });
    }

    fn report_signalled(&self, signal: Signal) {
        let signal = SmolStr::new_static(if signal == Signal::TERM {
            "TERM"
        } else {
            "KILL"
        });
        let (service, generation) = (self.service.clone(), self.generation);
        self.outcomes.report(Command::InstanceSignalled {
            service,
            generation,
            signal,
        });
    }

    fn report_exited(&self, exit: Exit) {
        let (service, generation) = (self.service.clone(), self.generation);
        self.outcomes.report(Command::InstanceExited {
            service,
            generation,
            exit,
        });
    }

    /// The last report: the place is given up before it, so that a next generation never meets this one's port.
    fn report_released(&self) {
        self.shared.table.leave(&self.service, self.generation);
        let (service, generation) = (self.service.clone(), self.generation);
        self.outcomes.report(Command::InstanceReleased {
            service,
            generation,
        });
    }
}

/// The next change of health; never of what is not probed.
async fn judged(prober: &mut Option<Prober>) -> Verdict {
    match prober {
        Some(prober) => prober.next().await,
        None => std::future::pending().await,
    }
}

/// Returns once a stop was asked for.
pub(super) async fn asked(stop: &mut watch::Receiver<Option<Timestamp>>) {
    // The sender lies in the slot, which the instance holds: it cannot be gone.
    let _ = stop.wait_for(Option::is_some).await;
}
