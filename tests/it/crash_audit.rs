//! The books of the crash test: what was acknowledged is held against the ledger, the ledger against itself, and
//! State made in two ways against each other and against the projections.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use rungate::coordinator::recover;
use rungate::domain::event::Event;
use rungate::domain::ids::{PlaneId, RunId};
use rungate::domain::record::Record;
use rungate::domain::state::State;
use rungate::domain::state::job::Phase;
use rungate::ledger::{Ledger, OpenOptions, RunFilter, RunStatus, Scope};
use serde_json::Value;

use crate::crash_clients::{Client, Sent, Start};
use crate::support::Gateway;

/// Any value: the queue's order is an index that equality leaves out.
const AGEING_MS: u64 = 600_000;

/// What clients and follower were told.
#[derive(Default)]
pub struct Acknowledged {
    pub starts: Vec<Start>,
    pub commands: Vec<Sent>,
    /// Record hashes by seq, as a follower saw them.
    pub frames: BTreeMap<u64, String>,
}

impl Acknowledged {
    pub fn add(&mut self, client: &Client) {
        self.starts.extend_from_slice(&client.starts);
        self.commands.extend_from_slice(&client.commands);
    }

    /// Each run and each command is there for who asks.
    pub async fn check_over_http(&self, gateway: &Gateway) {
        for start in &self.starts {
            let run = start.run.as_deref().unwrap();
            let path = format!("/api/gateway/runs/{run}/input_data");
            let input = gateway.get(&path).await.expect(200);
            assert!(
                input.to_string().contains(&format!("\"{}\"", start.key)),
                "{run} has another payload: {input}"
            );
        }
        for command in &self.commands {
            let path = format!("/api/gateway/commands/{}", command.id);
            let entry = gateway.get(&path).await.expect(200);
            let state = entry["state"].as_str().unwrap_or_default();
            assert!(matches!(state, "applied" | "rejected"), "{entry}");
        }
    }
}

/// All of it, on the files of a gateway that was killed.
pub fn check(data_dir: &Path, acknowledged: &Acknowledged) {
    let (ledger, _writer) = Ledger::open(data_dir, &OpenOptions::default()).unwrap();
    let verified = ledger.verify(&mut |_| {}).expect("the chain is whole");
    let records = all_records(&ledger);
    eprintln!(
        "{} records, {} runs, {} commands",
        verified.records, verified.runs, verified.commands
    );
    assert_eq!(records.len() as u64, verified.records);
    frames_are_records(&records, acknowledged);
    starts_happened_once(&records, acknowledged);
    commands_happened_once(&records, acknowledged);
    attempts_have_one_outcome(&records);
    let state = replayed(&ledger);
    let (snapshot_seq, _) = ledger.load_snapshot().unwrap().expect("a snapshot");
    assert!(snapshot_seq < state.seq, "the snapshot has a suffix");
    let recovered = recover(&ledger, AGEING_MS).unwrap();
    assert!(
        recovered == state,
        "snapshot and suffix differ from a full replay"
    );
    projections_tell_the_same(&ledger, &state);
}

fn all_records(ledger: &Ledger) -> Vec<Record> {
    let mut all: Vec<Record> = Vec::new();
    loop {
        let after = all.last().map_or(0, |record| record.seq);
        let page = ledger.records(Scope::All, after, 4_096).unwrap();
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

/// Nothing was shown that did not stay.
fn frames_are_records(records: &[Record], acknowledged: &Acknowledged) {
    for (seq, hash) in &acknowledged.frames {
        let record = &records[usize::try_from(*seq).unwrap() - 1];
        assert_eq!(*hash, rungate::ledger::view::hex(&record.hash), "{seq}");
    }
}

fn starts_happened_once(records: &[Record], acknowledged: &Acknowledged) {
    let mut runs: HashMap<String, RunId> = HashMap::new();
    for record in records {
        if let Event::JobQueued { run, .. } = &record.event {
            let payload: Value = serde_json::from_slice(&record.payload).unwrap();
            let key = payload["key"].as_str().expect("ours").to_owned();
            assert!(
                runs.insert(key.clone(), *run).is_none(),
                "{key} was started twice"
            );
        }
    }
    assert_eq!(runs.len(), acknowledged.starts.len());
    for start in &acknowledged.starts {
        assert_eq!(runs[&start.key].to_string(), *start.run.as_ref().unwrap());
    }
}

fn commands_happened_once(records: &[Record], acknowledged: &Acknowledged) {
    let mut accepted: HashMap<&str, u64> = HashMap::new();
    let mut decided: HashSet<&str> = HashSet::new();
    for record in records {
        match &record.event {
            Event::CommandAccepted { command, .. } => {
                let earlier = accepted.insert(command, record.seq);
                assert_eq!(earlier, None, "{command} was accepted twice");
            }
            Event::CommandApplied { command, .. } | Event::CommandRejected { command, .. } => {
                assert!(decided.insert(command), "{command} was decided twice");
                assert!(
                    accepted.contains_key(command.as_str()),
                    "{command} was never accepted"
                );
            }
            _ => {}
        }
    }
    assert_eq!(
        accepted.len(),
        decided.len(),
        "every command was applied or rejected"
    );
    for command in &acknowledged.commands {
        assert_eq!(
            accepted.get(command.id.as_str()).copied(),
            command.seq,
            "{}",
            command.id
        );
    }
}

/// Each attempt is dispatched once, ends once, and an ended run takes no step but a revival.
fn attempts_have_one_outcome(records: &[Record]) {
    let mut open: HashMap<RunId, u32> = HashMap::new();
    let mut last: HashMap<RunId, u32> = HashMap::new();
    let mut ended: HashSet<RunId> = HashSet::new();
    for record in records {
        let event = &record.event;
        let Some(run) = event.run() else { continue };
        let silent = matches!(
            event,
            Event::JobRevived { .. }
                | Event::JobOutcomeStale { .. }
                | Event::CommandAccepted { .. }
                | Event::CommandApplied { .. }
                | Event::CommandRejected { .. }
        );
        assert!(silent || !ended.contains(&run), "{run} went on: {event:?}");
        match event {
            Event::JobDispatched { attempt, .. } => {
                let before = last.insert(run, *attempt).unwrap_or(0);
                assert_eq!(*attempt, before + 1, "{run}");
                assert_eq!(open.insert(run, *attempt), None, "{run} runs twice");
            }
            Event::JobStopped { attempt, .. }
            | Event::JobAttemptFailed { attempt, .. }
            | Event::JobCompleted { attempt, .. } => {
                assert_eq!(open.remove(&run), Some(*attempt), "{run} at {}", record.seq);
            }
            _ => {}
        }
        match event {
            Event::JobCompleted { .. } | Event::JobFailed { .. } | Event::JobCancelled { .. } => {
                assert!(!open.contains_key(&run), "{run} ended at work");
                ended.insert(run);
            }
            Event::JobRevived { .. } => {
                assert!(ended.remove(&run), "{run}");
            }
            _ => {}
        }
    }
}

/// A full replay, looking at every prefix whether more was promised than there is.
fn replayed(ledger: &Ledger) -> State {
    let mut state = State::new(AGEING_MS);
    let replay = ledger.replay(0, |seq, at, plane, (event, payload_bytes)| {
        assert!(at >= state.now, "time ran backwards at {seq}");
        state.fold(seq, at, plane, (&event, payload_bytes));
        for gpu in state.gpus.values() {
            let granted: u64 = state
                .services
                .values()
                .filter_map(|service| service.instance.as_ref())
                .flat_map(|instance| &instance.grants)
                .filter(|grant| grant.gpu == gpu.facts.uuid)
                .map(|grant| grant.mib)
                .sum();
            assert_eq!(granted, gpu.reserved_mib, "at {seq}");
            assert!(
                granted <= gpu.facts.memory_mib,
                "over-promised at {seq}: {granted}"
            );
        }
    });
    assert_eq!(replay.unwrap(), ledger.tail());
    state
}

fn projections_tell_the_same(ledger: &Ledger, state: &State) {
    let mut before = None;
    let mut live = 0;
    loop {
        let page = ledger.runs(PlaneId::ROOT, &RunFilter::default(), before, 500);
        let page = page.unwrap();
        for run in &page.items {
            let Some(job) = state.jobs.get(&run.run) else {
                assert!(run.status.is_terminal(), "{} is lost", run.run);
                continue;
            };
            live += 1;
            let status = match job.phase {
                Phase::Queued => RunStatus::Queued,
                Phase::Backoff { .. } => RunStatus::Backoff,
                Phase::Paused => RunStatus::Paused,
                Phase::Preempted { .. } => RunStatus::Preempted,
                Phase::Running { .. } => RunStatus::Running,
                Phase::Stopping { .. } => RunStatus::Stopping,
            };
            assert_eq!(run.status, status, "{}", run.run);
            assert_eq!(
                (run.attempt, run.failures, run.checkpoint, &run.spec),
                (job.attempt, job.failures, job.checkpoint, &job.spec)
            );
        }
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(live, state.jobs.len());
    let services = ledger.services().unwrap();
    assert_eq!(services.len(), state.services.len());
    for view in &services {
        let service = &state.services[&view.spec.name];
        assert_eq!(view.spec, *service.spec);
        assert_eq!(view.enabled, service.enabled);
        let seen = view
            .instance
            .as_ref()
            .map(|instance| (instance.generation, &instance.process));
        let known = service
            .instance
            .as_ref()
            .map(|instance| (instance.generation, &instance.process));
        assert_eq!(seen, known, "{}", view.spec.name);
    }
}
