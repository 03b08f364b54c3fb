//! A run as it is shown: the members of `contracts/run-gateway.md` section 4.4 and our `job` beside them.

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::error::ApiError;
use super::state::App;
use crate::domain::spec::Target;
use crate::domain::time::Timestamp;
use crate::ledger::{RunStatus, RunSummary};

/// Largest output that a summary carries; the ledger's completion record has any.
const MAX_INLINE_OUTPUT_BYTES: usize = 256 << 10;

/// A run. Members of flows are null for a job run.
#[derive(Serialize, ToSchema)]
pub struct RunView {
    pub run_id: String,
    /// `job:<type>`, or `job:@<service>` when one was named.
    pub workflow_id: String,
    /// `running`, `waiting`, `completed`, `failed` or `cancelled`; `job.state` tells more.
    pub status: &'static str,
    pub current_node: Option<String>,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    #[schema(value_type = String)]
    pub updated_at: Timestamp,
    pub actor_id: &'static str,
    /// Whose it is, where the runs of a whole tenant are listed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime_id: Option<String>,
    pub session_id: String,
    pub parent_run_id: Option<String>,
    pub error: Option<String>,
    #[schema(value_type = Option<Object>)]
    pub flow_warnings: Option<Value>,
    pub paused: bool,
    pub pause_reason: Option<String>,
    #[schema(value_type = Option<String>)]
    pub paused_at: Option<Timestamp>,
    #[schema(value_type = Option<String>)]
    pub resumed_at: Option<Timestamp>,
    /// What it waits for.
    #[schema(value_type = Option<Object>)]
    pub waiting: Option<Value>,
    pub is_scheduled: bool,
    #[schema(value_type = Option<Object>)]
    pub schedule: Option<Value>,
    #[schema(value_type = Option<Object>)]
    pub limits: Option<Value>,
    #[schema(value_type = Option<Object>)]
    pub run_lifecycle: Option<Value>,
    pub is_draft: bool,
    /// A completed run's result, up to 256 KiB; only where one run is asked for.
    #[schema(value_type = Option<Object>)]
    pub output: Option<Box<RawValue>>,
    /// How many records its ledger has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ledger_len: Option<u64>,
    /// With `include_metrics`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub metrics: Option<Value>,
    pub job: JobView,
}

/// What a job run has beyond the contract's members.
#[derive(Serialize, ToSchema)]
pub struct JobView {
    /// `queued`, `backoff`, `running`, `stopping`, `paused`, `preempted`, `completed`, `failed`, `cancelled`.
    pub state: &'static str,
    pub service_type: Option<String>,
    /// As asked for.
    pub service_name: Option<String>,
    /// Where the latest attempt runs or ran.
    pub service: Option<String>,
    pub generation: Option<u64>,
    pub priority: u8,
    /// Dispatches so far.
    pub attempt: u32,
    /// Failed attempts since it was queued or retried.
    pub failures: u32,
    pub max_attempts: u32,
    pub timeout_seconds: f64,
    pub ttl_seconds: Option<f64>,
    pub callback_url: Option<String>,
    pub preempt_count: u32,
    /// The run that it made room for.
    pub preempted_by: Option<String>,
    /// While in backoff: when it is tried again.
    #[schema(value_type = Option<String>)]
    pub retry_at: Option<Timestamp>,
    #[schema(value_type = Option<String>)]
    pub started_at: Option<Timestamp>,
    #[schema(value_type = Option<String>)]
    pub completed_at: Option<Timestamp>,
    pub error_code: Option<String>,
    pub has_checkpoint: bool,
    /// Its payloads were removed.
    pub purged: bool,
    #[schema(value_type = Object)]
    pub labels: std::collections::BTreeMap<String, String>,
}

/// The contract's status of ours.
pub fn contract_status(status: RunStatus) -> &'static str {
    match status {
        RunStatus::Queued | RunStatus::Backoff | RunStatus::Preempted | RunStatus::Paused => {
            "waiting"
        }
        RunStatus::Running | RunStatus::Stopping => "running",
        RunStatus::Completed => "completed",
        RunStatus::Failed => "failed",
        RunStatus::Cancelled => "cancelled",
    }
}

/// The statuses that a filter names, the contract's names and ours; `None` for no such name.
pub fn statuses_named(name: &str) -> Option<Vec<RunStatus>> {
    let matching = |test: &dyn Fn(RunStatus) -> bool| {
        let found: Vec<_> = RunStatus::ALL.into_iter().filter(|s| test(*s)).collect();
        (!found.is_empty()).then_some(found)
    };
    matching(&|status| contract_status(status) == name)
        .or_else(|| matching(&|status| status.name() == name))
}

/// The workflow's name in the contract's terms.
pub fn workflow_id(target: &Target) -> String {
    match target {
        Target::Type(service_type) => format!("job:{service_type}"),
        Target::Service(service) => format!("job:@{service}"),
        Target::Container(_) => "job:container".to_owned(),
    }
}

/// Milliseconds as seconds.
pub fn seconds(ms: u64) -> f64 {
    ms as f64 / 1_000.0
}

impl RunView {
    /// Without its output.
    pub fn of(run: &RunSummary) -> RunView {
        let paused = run.status == RunStatus::Paused;
        RunView {
            run_id: run.run.to_string(),
            workflow_id: workflow_id(&run.spec.target),
            status: contract_status(run.status),
            current_node: None,
            created_at: run.created_at,
            updated_at: run.updated_at,
            actor_id: "gateway",
            runtime_id: None,
            session_id: run
                .session
                .as_ref()
                .map_or_else(|| run.run.to_string(), ToString::to_string),
            parent_run_id: None,
            error: run.error.clone(),
            flow_warnings: None,
            paused,
            pause_reason: run.pause_reason.clone().filter(|_| paused),
            paused_at: run.paused_at,
            resumed_at: run.resumed_at,
            waiting: waiting(run),
            is_scheduled: false,
            schedule: None,
            limits: None,
            run_lifecycle: None,
            is_draft: false,
            output: None,
            ledger_len: Some(run.ledger_len),
            metrics: None,
            job: JobView::of(run),
        }
    }

    /// With the output of a completed run, when it is kept and not too large.
    pub fn with_output(app: &App, run: &RunSummary) -> Result<RunView, ApiError> {
        let output = match run.result {
            Some(seq) if run.status == RunStatus::Completed => app.ledger.payload(seq)?,
            _ => None,
        };
        let output = output
            .filter(|bytes| bytes.len() <= MAX_INLINE_OUTPUT_BYTES)
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok(RunView {
            output,
            ..RunView::of(run)
        })
    }
}

impl JobView {
    fn of(run: &RunSummary) -> JobView {
        let text = |value: &smol_str::SmolStr| value.to_string();
        JobView {
            state: run.status.name(),
            service_type: run.spec.service_type.as_ref().map(text),
            service_name: match &run.spec.target {
                Target::Service(service) => Some(text(service)),
                Target::Type(_) | Target::Container(_) => None,
            },
            service: match &run.spec.target {
                // Its own is nobody else's to know.
                Target::Container(_) => None,
                _ => run.service.as_ref().map(text),
            },
            generation: run.generation.map(|generation| generation.0),
            priority: run.spec.priority.get(),
            attempt: run.attempt,
            failures: run.failures,
            max_attempts: run.spec.max_attempts,
            timeout_seconds: seconds(run.spec.timeout_ms),
            ttl_seconds: run.spec.ttl_ms.map(seconds),
            callback_url: run.spec.callback_url.as_ref().map(text),
            preempt_count: run.preempt_count,
            preempted_by: run.preempted_by.map(|by| by.to_string()),
            retry_at: run.retry_at,
            started_at: run.started_at,
            completed_at: run.completed_at,
            error_code: run.error_code.as_ref().map(text),
            has_checkpoint: run.checkpoint.is_some(),
            purged: run.purged,
            labels: run.labels.iter().map(|(k, v)| (text(k), text(v))).collect(),
        }
    }
}

/// The contract's wait of a run that waits; null while it runs or when it has ended.
fn waiting(run: &RunSummary) -> Option<Value> {
    let id = run.run;
    let (reason, wait_key, until, prompt, details) = match run.status {
        RunStatus::Queued => (
            "job",
            Some(format!("job:{id}")),
            None,
            None,
            json!({"kind": "queued"}),
        ),
        RunStatus::Backoff => (
            "until",
            None,
            run.retry_at,
            None,
            json!({"kind": "backoff"}),
        ),
        RunStatus::Preempted => {
            let by = run.preempted_by.map(|by| by.to_string());
            let details = json!({"kind": "preempted", "preempted_by": by});
            ("job", Some(format!("job:{id}")), None, None, details)
        }
        RunStatus::Paused => {
            let details = json!({"kind": "pause"});
            (
                "user",
                Some(format!("pause:{id}")),
                None,
                Some("Paused"),
                details,
            )
        }
        _ => return None,
    };
    Some(json!({
        "reason": reason, "wait_key": wait_key, "until": until, "prompt": prompt,
        "choices": null, "allow_free_text": false, "details": details,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_takes_the_contracts_statuses_and_ours() {
        assert_eq!(
            statuses_named("running"),
            Some(vec![RunStatus::Running, RunStatus::Stopping])
        );
        assert_eq!(statuses_named("waiting").map(|s| s.len()), Some(4));
        assert_eq!(statuses_named("paused"), Some(vec![RunStatus::Paused]));
        assert_eq!(
            statuses_named("completed"),
            Some(vec![RunStatus::Completed])
        );
        assert_eq!(statuses_named("zap"), None);
    }
}
