//! One life of a service: started or found again, probed, stopped, buried, released. Each step is reported
//! as it happens; when to stop is asked from outside.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use rustix::process::Signal;
use smol_str::SmolStr;
use tokio::sync::watch;

use super::health::{Prober, Verdict};
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
use crate::domain::spec::{Grant, ServiceSpec, Worker};
use crate::domain::time::Timestamp;

/// What a restarted gateway remembers of an instance.
pub(super) struct Found {
    /// `None` when the gateway died between the spawn and its record.
    pub process: Option<ProcessIdentity>,
    /// It was being stopped.
    pub stop_at: Option<Timestamp>,
}

/// What the first good health answer means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Healthy,
    /// Found again: healthy in time is adopted, not healthy in time is stopped.
    Adopted {
        pid: u32,
    },
    /// It was told already.
    Told,
}

/// The task that owns an instance's place in the table.
pub(super) struct Instance {
    shared: Arc<Shared>,
    service: ServiceName,
    generation: Generation,
    slot: Arc<Slot>,
    stop: watch::Receiver<Option<Timestamp>>,
    outcomes: InOrder,
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
        })
    }

    /// From nothing to released.
    pub async fn start(self, spec: Arc<ServiceSpec>, grants: Vec<Grant>) {
        if self.stop.borrow().is_some() {
            return self.never_started("it was stopped before it started".into());
        }
        match &spec.worker {
            Worker::Process { .. } => match self.spawn(&spec, grants).await {
                Ok((process, said_before)) => {
                    self.report_spawned(&process);
                    self.live(process, &spec, First::Healthy, said_before).await;
                }
                Err(error) => self.never_started(error),
            },
            Worker::External { url } => self.external(url, &spec, First::Healthy).await,
            Worker::Container => self.never_started("this gateway has no container engine".into()),
        }
    }

    /// From what an earlier gateway process left to released.
    pub async fn find(self, spec: Arc<ServiceSpec>, found: Found) {
        if let Some(stop_at) = found.stop_at {
            self.slot.stop.send_replace(Some(stop_at));
        }
        if let Worker::External { url } = &spec.worker {
            return self.external(url, &spec, First::Adopted { pid: 0 }).await;
        }
        let Some(process) = self.look_for(found.process.clone()).await else {
            self.report_exited(Exit::Unknown);
            return self.release().await;
        };
        if found.process.is_none() {
            self.report_spawned(&process);
        }
        let pid = process.pid;
        let (logs, name) = (self.shared.logs.clone(), self.service.clone());
        let said_before = blocking(move || logs.end(&name)).await.unwrap_or(0);
        self.live(process, &spec, First::Adopted { pid }, said_before)
            .await;
    }

    /// Stops what bears this generation's mark, if anything does.
    pub async fn stop_unknown(mut self, kill_at: Timestamp) {
        if let Some(process) = self.look_for(None).await {
            let process = Arc::new(process);
            self.slot
                .stop
                .send_if_modified(|stop| stop.replace(kill_at).is_none());
            self.end(&process).await;
            return self.bury(process, None).await;
        }
        self.report_exited(Exit::Unknown);
        self.release().await;
    }

    /// Reports the release once no process bears the mark, killing what still does, and its memory was seen free.
    pub async fn release(self) {
        process::killed_and_gone(&self.mark()).await;
        self.shared.revoke(&self.service, self.generation).await;
        let (meter, service) = (&self.shared.meter, &self.service);
        // Before the release, so that nothing else is started there.
        for held in meter.freed(service, self.generation).await {
            self.outcomes.report(held.into_outcome());
        }
        self.report_released();
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

    /// The process, and where its output begins.
    async fn spawn(
        &self,
        spec: &Arc<ServiceSpec>,
        grants: Vec<Grant>,
    ) -> Result<(Process, u64), String> {
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
            let said_before = shared.logs.end(&spec.name).unwrap_or(0);
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
                token_file: &token_file,
                log,
            };
            let process = Process::spawn(spawn).map_err(|error| with_causes(&error))?;
            Ok((process, said_before))
        })
        .await
    }

    /// A process from its spawn on, or from where it was found; its output begins at `said_before`.
    async fn live(
        mut self,
        process: Process,
        spec: &Arc<ServiceSpec>,
        mut first: First,
        said_before: u64,
    ) {
        let process = Arc::new(process);
        let base_url = format!("http://127.0.0.1:{}", process.port);
        let mut prober = self.prober(base_url, spec);
        let mut renewals = self.shared.renewals(first == First::Healthy);
        let ended = loop {
            tokio::select! {
                biased;
                () = process.exited() => break true,
                () = asked(&mut self.stop) => break false,
                _ = renewals.tick() => self.shared.renew(&self.service, self.generation).await,
                verdict = prober.next() => {
                    if self.judge(verdict, &mut first).is_break() {
                        self.shared.table.stop(&self.service, self.generation, now() + spec.grace_ms);
                    }
                }
            }
        };
        if !ended {
            self.end(&process).await;
        }
        self.bury(process, ended.then_some(said_before)).await;
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
        let startup = std::time::Duration::from_millis(spec.startup_timeout_ms);
        Prober::new(
            self.shared.probe_client.clone(),
            url,
            self.shared.probes,
            startup,
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
            (Verdict::Healthy, First::Healthy | First::Told) => Command::InstanceHealthy {
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
            (Verdict::Unhealthy(error), First::Healthy | First::Told) => {
                Command::InstanceUnhealthy {
                    service,
                    generation,
                    error,
                }
            }
        };
        self.outcomes.report(outcome);
        ControlFlow::Continue(())
    }

    /// TERM now, KILL when the time is over; returns when the leader has ended.
    async fn end(&mut self, process: &Arc<Process>) {
        self.signal(process, Signal::TERM).await;
        let mut killed = false;
        loop {
            let kill_at = self.stop.borrow_and_update().unwrap_or_default();
            tokio::select! {
                biased;
                () = process.exited() => return,
                _ = self.stop.changed() => {}
                () = tokio::time::sleep(until(kill_at)), if !killed => {
                    self.signal(process, Signal::KILL).await;
                    killed = true;
                }
            }
        }
    }

    async fn signal(&self, process: &Arc<Process>, signal: Signal) {
        let target = process.clone();
        if blocking(move || target.signal(signal)).await {
            self.report_signalled(signal);
        }
    }

    /// After the leader's end: kill its rest, take it off the process table, report, and wait for the memory.
    /// `said_before` is where its output began, when it ended by itself.
    async fn bury(self, process: Arc<Process>, said_before: Option<u64>) {
        let (killed, exit) = blocking(move || (process.kill_rest(), process.reap())).await;
        if killed {
            self.report_signalled(Signal::KILL);
        }
        if let Some(from) = said_before
            && ended_out_of_memory(&self.shared.logs, &self.service, from, &exit).await
        {
            self.outcomes.report(Command::Seen(Seen::OutOfMemory {
                service: self.service.clone(),
                generation: self.generation,
            }));
        }
        self.report_exited(exit);
        self.release().await;
    }

    fn mark(&self) -> Mark {
        self.shared.mark(&self.service, self.generation)
    }

    fn never_started(self, error: String) {
        self.report_exited(Exit::NotStarted(error));
        self.report_released();
    }

    fn report_spawned(&self, process: &Process) {
        self.outcomes.report(Command::InstanceSpawned {
            service: self.service.clone(),
            generation: self.generation,
            pid: process.pid,
            start_ticks: process.start_ticks,
            boot_id: self.shared.boot_id.clone(),
            port: process.port,
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

/// Returns once a stop was asked for.
async fn asked(stop: &mut watch::Receiver<Option<Timestamp>>) {
    // The sender lies in the slot, which the instance holds: it cannot be gone.
    let _ = stop.wait_for(Option::is_some).await;
}
