//! A test bed for the pure core: holds State and does with it what the coordinator does (decide, follow up,
//! apply), keeps every event and effect, and checks the invariants after each event.

use std::collections::BTreeMap;
use std::fmt::Write;

use bytes::Bytes;
use rungate::domain::command::{Command, EndedJob, Origin, Rejection, Reply};
use rungate::domain::decide::decide;
use rungate::domain::effect::{Effect, at_start, implied};
use rungate::domain::engine::follow_up;
use rungate::domain::event::Event;
use rungate::domain::ids::{PlaneId, RunId, Seq};
use rungate::domain::settings::Settings;
use rungate::domain::state::State;
use rungate::domain::tenant::Tenancy;
use rungate::domain::time::Timestamp;
use smol_str::SmolStr;

use super::invariants::{self, Watch};
use super::text::{self, Names};

/// Events that a failure shows.
const TAIL: usize = 80;

/// Decisions that may follow by themselves from one command, for each job and service: more is a livelock.
const FOLLOW_UP_EACH: usize = 8;

/// One event as it was applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub seq: Seq,
    pub at: Timestamp,
    pub plane: PlaneId,
    pub event: Event,
}

/// State and all that happened to it.
#[derive(Clone)]
pub struct Bed {
    pub state: State,
    pub settings: Settings,
    pub now: Timestamp,
    pub log: Vec<Entry>,
    /// Not yet taken by whoever plays the executor.
    pub effects: Vec<Effect>,
    /// Ended runs, as the store would know them.
    pub ended: BTreeMap<RunId, EndedJob>,
    /// Whose each run is.
    pub planes: BTreeMap<RunId, PlaneId>,
    pub watch: Watch,
    /// The gateway is leaving: nothing follows any more.
    pub quiet: bool,
}

impl Bed {
    pub fn new(settings: Settings) -> Bed {
        Bed {
            state: State::new(settings.ageing_ms_per_level),
            settings,
            now: Timestamp(0),
            log: Vec::new(),
            effects: Vec::new(),
            ended: BTreeMap::new(),
            planes: BTreeMap::new(),
            watch: Watch::default(),
            quiet: false,
        }
    }

    /// One command, by whose run it is about, then all that follows from it at this instant.
    pub fn submit(&mut self, command: Command) -> Result<Reply, Rejection> {
        let plane = self.plane_of(&command);
        self.submit_as(plane, command)
    }

    /// Whose run a command is about.
    pub fn plane_of(&self, command: &Command) -> PlaneId {
        let plane = run_of(command).and_then(|run| self.planes.get(&run).copied());
        plane.unwrap_or(PlaneId::ROOT)
    }

    /// The same, by the user of a plane.
    pub fn submit_as(&mut self, plane: PlaneId, command: Command) -> Result<Reply, Rejection> {
        let command = self.with_ended(command);
        let started = matches!(command, Command::GatewayStarted { .. });
        self.quiet = matches!(command, Command::GatewayStopped) || (self.quiet && !started);
        let by_hand = matches!(command, Command::Inbox(_) | Command::PreemptExecute { .. });
        self.watch.by_hand = by_hand;
        let origin = Origin {
            plane,
            actor: SmolStr::new_static("test"),
            request_id: None,
            tenancy: Tenancy::All,
            at: self.now,
        };
        let decision = decide(&self.state, &self.settings, &origin, command, self.now)?;
        for (event, _) in decision.events {
            self.apply(plane, event);
        }
        self.watch.by_hand = false;
        if started {
            self.effects.extend(at_start(&self.state));
        }
        self.settle();
        Ok(decision.reply)
    }

    fn with_ended(&self, mut command: Command) -> Command {
        if let Command::Inbox(inbox) = &mut command
            && let Some(run) = inbox.run
            && !self.state.jobs.contains_key(&run)
        {
            inbox.ended = self.ended.get(&run).cloned().map(Box::new);
        }
        command
    }

    /// Applies all that follows by itself now.
    pub fn settle(&mut self) {
        let enough = FOLLOW_UP_EACH * (4 + self.state.jobs.len() + self.state.services.len());
        for round in 0.. {
            if self.quiet {
                return;
            }
            assert!(
                round < enough,
                "the scheduler does not come to rest:\n{}",
                self.story()
            );
            let Some(events) = follow_up(&mut self.state, &self.settings, self.now) else {
                return;
            };
            for event in events {
                self.apply(PlaneId::ROOT, event);
            }
        }
    }

    /// Lets time pass, stopping at each deadline on the way.
    pub fn advance_to(&mut self, until: Timestamp) {
        while let Some(due) = self.next_deadline().filter(|due| *due <= until) {
            self.now = self.now.max(due);
            self.settle();
        }
        self.now = self.now.max(until);
        self.settle();
    }

    /// When something follows from time alone.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.state.timers.next().filter(|_| !self.quiet)
    }

    fn apply(&mut self, plane: PlaneId, event: Event) {
        self.remember_ended(&event);
        let before = self
            .watch
            .before(&self.state, &self.settings, self.now, &event);
        let seq = self.state.seq + 1;
        let job = event.run().and_then(|run| self.state.jobs.get(&run));
        let plane = job.map_or(plane, |job| job.plane);
        if let Event::JobQueued { run, .. } = &event {
            self.planes.insert(*run, plane);
        }
        self.state.apply(seq, self.now, plane, &event);
        if let Some(effect) = implied(&self.state, &event) {
            assert!(
                invariants::is_fenced(&event, &effect),
                "{event:?} implies {effect:?}"
            );
            self.effects.push(effect);
        }
        self.effects.extend(self.state.begun_notices());
        self.log.push(Entry {
            seq,
            at: self.now,
            plane,
            event: event.clone(),
        });
        if let Err(broken) = self
            .watch
            .after(&self.state, &self.settings, self.now, &event, before)
        {
            panic!("{broken}, at {event:?}\n{}", self.story());
        }
    }

    fn remember_ended(&mut self, event: &Event) {
        if let Some(run) = event.run().filter(|_| event.ends_run())
            && let Some(job) = self.state.jobs.get(&run)
        {
            let ended = EndedJob {
                status: "completed",
                spec: job.spec.clone(),
                session: None,
                payload: job.payload,
                attempt: job.attempt,
                checkpoint: job.checkpoint,
                container: job.container.clone(),
                preempt_count: job.preempt_count,
                purged: false,
            };
            self.ended.insert(run, ended);
        }
    }

    /// The last events in words and what is live, for a failure's message.
    pub fn story(&self) -> String {
        let names = Names::new();
        let from = self.log.len().saturating_sub(TAIL);
        let mut text = String::new();
        for entry in &self.log[from..] {
            if let Some(line) = text::event(&names, &entry.event) {
                let _ = writeln!(text, "{:>4} {:>9}  {line}", entry.seq, text::time(entry.at));
            }
        }
        let _ = writeln!(text, "now {}", text::time(self.now));
        for (run, job) in &self.state.jobs {
            let _ = writeln!(
                text,
                "{run} {:?} {:?} {:?}",
                job.spec.target, job.spec.priority, job.phase
            );
        }
        for (name, service) in &self.state.services {
            let spec = &service.spec;
            let _ = writeln!(
                text,
                "{name} {} {} MiB, {} GPUs, {} places, enabled {}, wanted {}, {:?}",
                spec.service_type,
                service.need_mib(),
                spec.gpus,
                spec.concurrency,
                service.enabled,
                service.wanted,
                service.instance
            );
        }
        let _ = writeln!(text, "holds {:?}", self.state.holds);
        text
    }

    /// State made anew from the events alone.
    pub fn replayed(&self) -> State {
        replay(State::new(self.settings.ageing_ms_per_level), &self.log)
    }

    /// The same bed with its State read back from a snapshot, indexes made anew.
    pub fn restored(&self) -> Bed {
        let bytes = self.state.to_snapshot().unwrap();
        let mut twin = self.clone();
        twin.state = State::from_snapshot(&bytes, self.settings.ageing_ms_per_level).unwrap();
        twin.settle();
        assert_eq!(
            twin.log.len(),
            self.log.len(),
            "a snapshot read back goes on by itself"
        );
        twin
    }
}

/// Applies a stretch of the log.
pub fn replay(mut state: State, log: &[Entry]) -> State {
    for entry in log {
        state.apply(entry.seq, entry.at, entry.plane, &entry.event);
    }
    state
}

/// The run that somebody says something to.
fn run_of(command: &Command) -> Option<RunId> {
    match command {
        Command::Inbox(inbox) => inbox.run,
        Command::CancelQueued { run }
        | Command::SaveCheckpoint { run, .. }
        | Command::PreemptExecute { preemptor: run, .. } => Some(*run),
        _ => None,
    }
}

/// A job's payload: what it says does not matter here.
pub fn payload() -> Bytes {
    Bytes::from_static(b"{}")
}
