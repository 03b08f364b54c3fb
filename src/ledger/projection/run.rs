//! The summary of a run: all that a list or a status page shows of it, and where its bytes lie.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use crate::domain::event::Event;
use crate::domain::ids::{Attempt, Cursor, Generation, PlaneId, RunId, Seq, ServiceName};
use crate::domain::spec::JobSpec;
use crate::domain::time::Timestamp;
use crate::ledger::{keys, record_codec};

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    Queued,
    /// Waits after a failed attempt until `retry_at`.
    Backoff,
    Running,
    /// An attempt is being stopped.
    Stopping,
    /// Held by a person.
    Paused,
    /// Stopped in favour of another run, and waits until that one ends.
    Preempted,
    Completed,
    Failed,
    Cancelled,
}

impl RunStatus {
    pub const ALL: [RunStatus; 9] = [
        RunStatus::Queued,
        RunStatus::Backoff,
        RunStatus::Running,
        RunStatus::Stopping,
        RunStatus::Paused,
        RunStatus::Preempted,
        RunStatus::Completed,
        RunStatus::Failed,
        RunStatus::Cancelled,
    ];

    /// Its stable number in index keys.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            RunStatus::Queued => "queued",
            RunStatus::Backoff => "backoff",
            RunStatus::Running => "running",
            RunStatus::Stopping => "stopping",
            RunStatus::Paused => "paused",
            RunStatus::Preempted => "preempted",
            RunStatus::Completed => "completed",
            RunStatus::Failed => "failed",
            RunStatus::Cancelled => "cancelled",
        }
    }

    /// Whether the run has ended. A `retry` may still put it back.
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            RunStatus::Completed | RunStatus::Failed | RunStatus::Cancelled
        )
    }

    /// Whether an attempt occupies a service.
    pub fn is_on_service(self) -> bool {
        matches!(self, RunStatus::Running | RunStatus::Stopping)
    }
}

/// A run as it stands after its last record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    pub run: RunId,
    pub plane: PlaneId,
    /// With the current priority.
    pub spec: JobSpec,
    /// As given at the start; shown as the run's own id when there is none.
    pub session: Option<SmolStr>,
    pub labels: Vec<(SmolStr, SmolStr)>,
    pub status: RunStatus,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// Start of the latest attempt.
    pub started_at: Option<Timestamp>,
    /// When it ended, however it did.
    pub completed_at: Option<Timestamp>,
    /// When it was last paused or preempted.
    pub paused_at: Option<Timestamp>,
    pub resumed_at: Option<Timestamp>,
    pub pause_reason: Option<String>,
    /// The last failure; cleared by success.
    pub error: Option<String>,
    pub error_code: Option<SmolStr>,
    /// Dispatches so far.
    pub attempt: Attempt,
    /// Failed attempts since it was queued, or since the last `retry`.
    pub failures: u32,
    pub preempt_count: u32,
    /// While preempted: the run that it made room for.
    pub preempted_by: Option<RunId>,
    /// Where the latest attempt runs or ran.
    pub service: Option<ServiceName>,
    pub generation: Option<Generation>,
    /// The record that holds the job's payload, the first of its ledger.
    pub payload: Seq,
    /// The record that holds the result.
    pub result: Option<Seq>,
    /// The record that holds the latest progress object.
    pub progress: Option<Seq>,
    /// The record that holds the latest checkpoint.
    pub checkpoint: Option<Seq>,
    /// How many records its ledger has: the last one's cursor.
    pub ledger_len: Cursor,
    /// Bytes of its records' payloads; 0 once they were removed.
    pub payload_bytes: u64,
    /// While in backoff: when it is tried again.
    pub retry_at: Option<Timestamp>,
    /// Its payloads were removed.
    pub purged: bool,
}

impl RunSummary {
    /// Its row in `runs`. While a run has only been queued, that is the place of its first record, which the rest
    /// follows from (`read::summary`): most of what a start would write besides its record.
    pub fn to_row(&self) -> Vec<u8> {
        match self.ledger_len {
            1 => keys::seq(self.payload).to_vec(),
            _ => record_codec::encode(self),
        }
    }
}

/// What a record contributes besides its event.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub seq: Seq,
    pub cursor: Cursor,
    pub plane: PlaneId,
    pub at: Timestamp,
    /// Bytes of its payload.
    pub payload_len: u32,
}

/// Folds one event into its run's summary. Nothing comes of an event of a run that was never queued.
pub fn apply(summary: Option<RunSummary>, event: &Event, place: Place) -> Option<RunSummary> {
    let mut run = match (summary, event) {
        (Some(run), _) => run,
        (
            None,
            Event::JobQueued {
                run,
                spec,
                session,
                labels,
                ..
            },
        ) => queued(*run, spec, session.clone(), labels, place),
        (None, _) => return None,
    };
    run.updated_at = place.at;
    run.ledger_len = place.cursor;
    run.payload_bytes += u64::from(place.payload_len);
    steer(&mut run, event, place);
    outcome(&mut run, event, place);
    Some(run)
}

fn queued(
    run: RunId,
    spec: &JobSpec,
    session: Option<SmolStr>,
    labels: &[(SmolStr, SmolStr)],
    place: Place,
) -> RunSummary {
    RunSummary {
        run,
        plane: place.plane,
        spec: spec.clone(),
        session,
        labels: labels.to_vec(),
        status: RunStatus::Queued,
        created_at: place.at,
        updated_at: place.at,
        started_at: None,
        completed_at: None,
        paused_at: None,
        resumed_at: None,
        pause_reason: None,
        error: None,
        error_code: None,
        attempt: 0,
        failures: 0,
        preempt_count: 0,
        preempted_by: None,
        service: None,
        generation: None,
        payload: place.seq,
        result: None,
        progress: None,
        checkpoint: None,
        ledger_len: place.cursor,
        payload_bytes: 0,
        retry_at: None,
        purged: false,
    }
}

/// Events that move a live run about.
fn steer(run: &mut RunSummary, event: &Event, place: Place) {
    match event {
        Event::JobDispatched {
            attempt,
            service,
            generation,
            ..
        } => {
            run.status = RunStatus::Running;
            run.attempt = *attempt;
            run.service = Some(service.clone());
            run.generation = Some(*generation);
            run.started_at = Some(place.at);
            run.retry_at = None;
        }
        Event::JobStopRequested { .. } => run.status = RunStatus::Stopping,
        Event::JobPaused { reason, .. } => {
            run.status = RunStatus::Paused;
            run.paused_at = Some(place.at);
            run.resumed_at = None;
            run.pause_reason.clone_from(reason);
            run.retry_at = None;
        }
        Event::JobResumed { .. } => {
            run.status = RunStatus::Queued;
            run.resumed_at = Some(place.at);
            run.pause_reason = None;
        }
        Event::JobPreempted { by, .. } => {
            run.status = RunStatus::Preempted;
            run.paused_at = Some(place.at);
            run.preempted_by = Some(*by);
            run.preempt_count += 1;
            if place.payload_len > 0 {
                run.progress = Some(place.seq);
            }
        }
        Event::JobRequeued { .. } => {
            run.status = RunStatus::Queued;
            run.preempted_by = None;
            run.retry_at = None;
        }
        Event::JobPriorityChanged { priority, .. } => run.spec.priority = *priority,
        Event::JobProgressed { .. } => run.progress = Some(place.seq),
        Event::CheckpointSaved { .. } => run.checkpoint = Some(place.seq),
        _ => {}
    }
}

/// Events that end an attempt or a run, or bring it back.
fn outcome(run: &mut RunSummary, event: &Event, place: Place) {
    match event {
        Event::JobAttemptFailed {
            code,
            error,
            retry_at,
            ..
        } => {
            run.failures += 1;
            run.error = Some(error.clone());
            run.error_code = Some(code.clone());
            run.retry_at = *retry_at;
            if retry_at.is_some() {
                run.status = RunStatus::Backoff;
            }
        }
        Event::JobCompleted { .. } => {
            end(run, RunStatus::Completed, place);
            run.result = Some(place.seq);
            run.error = None;
            run.error_code = None;
        }
        Event::JobFailed { code, error, .. } => {
            end(run, RunStatus::Failed, place);
            run.error = Some(error.clone());
            run.error_code = Some(code.clone());
        }
        Event::JobCancelled { reason, .. } => {
            end(run, RunStatus::Cancelled, place);
            run.error = Some(reason.clone());
            run.error_code = Some(SmolStr::new_static("cancelled"));
        }
        Event::JobRevived {
            spec,
            attempt,
            checkpoint,
            preempt_count,
            ..
        } => {
            run.status = RunStatus::Queued;
            run.spec = spec.clone();
            run.attempt = *attempt;
            run.checkpoint = *checkpoint;
            run.preempt_count = *preempt_count;
            run.failures = 0;
            run.completed_at = None;
            run.result = None;
            run.error = None;
            run.error_code = None;
        }
        Event::RunPurged { .. } => {
            run.purged = true;
            run.payload_bytes = 0;
        }
        _ => {}
    }
}

fn end(run: &mut RunSummary, status: RunStatus, place: Place) {
    run.status = status;
    run.completed_at = Some(place.at);
    run.retry_at = None;
    run.preempted_by = None;
    run.pause_reason = None;
}
