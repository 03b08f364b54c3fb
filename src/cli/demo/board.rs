//! The state of the demo as the ledger tells it: pure, record after record.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::cli::output::text;
use crate::cli::watch;

/// A run's place in its life.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    pub name: String,
    pub priority: u64,
    pub state: &'static str,
    pub percent: f64,
}

/// Everything shown.
#[derive(Debug, Default)]
pub struct Board {
    /// Run id to name.
    pub names: BTreeMap<String, String>,
    /// In the order of submission.
    pub rows: Vec<(String, Row)>,
    /// MiB reserved by service.
    pub reserved: BTreeMap<String, u64>,
    /// Phase of each service's instance.
    pub services: BTreeMap<String, &'static str>,
    /// A job has saved something that it can be resumed from.
    pub has_checkpoint: bool,
    first_us: Option<i64>,
}

impl Board {
    /// Takes a record in; answers it as a line for people, if it is worth one.
    pub fn apply(&mut self, record: &Value) -> Option<String> {
        let kind = watch::kind(record);
        let payload = record
            .get("effect")
            .and_then(|effect| effect.get("payload"))
            .cloned()
            .unwrap_or_default();
        self.runs(&kind, record, &payload);
        self.instances(&kind, &payload);
        self.line(&kind, record, &payload)
    }

    pub fn count(&self, states: &[&str]) -> usize {
        let is_in = |(_, row): &&(String, Row)| states.contains(&row.state);
        self.rows.iter().filter(is_in).count()
    }

    pub fn ended(&self) -> usize {
        self.count(&["completed", "failed", "cancelled"])
    }

    pub fn reserved_mib(&self) -> u64 {
        self.reserved.values().sum()
    }

    fn runs(&mut self, kind: &str, record: &Value, payload: &Value) {
        let run = match text(payload, "run") {
            own if own.is_empty() => text(record, "run_id"),
            own => own,
        };
        if kind == "job_queued" {
            let name = label(payload).unwrap_or_else(|| run.clone());
            self.names.insert(run.clone(), name.clone());
            let priority = payload.get("spec").and_then(|spec| spec.get("priority"));
            let row = Row {
                name,
                priority: priority.and_then(Value::as_u64).unwrap_or_default(),
                state: "queued",
                percent: 0.0,
            };
            self.rows.push((run, row));
            return;
        }
        self.has_checkpoint |= kind == "checkpoint_saved";
        let Some((_, row)) = self.rows.iter_mut().find(|(id, _)| *id == run) else {
            return;
        };
        match kind {
            "job_dispatched" => row.state = "running",
            "job_progressed" => row.percent = watch::percent(record).unwrap_or(row.percent),
            "job_stop_requested" => row.state = "stopping",
            "job_preempted" => row.state = "preempted",
            "job_requeued" | "job_resumed" => row.state = "queued",
            "job_attempt_failed" => row.state = "backoff",
            "job_completed" => (row.state, row.percent) = ("completed", 100.0),
            "job_failed" => row.state = "failed",
            "job_cancelled" => row.state = "cancelled",
            _ => {}
        }
    }

    fn instances(&mut self, kind: &str, payload: &Value) {
        let service = text(payload, "service");
        let phase = match kind {
            "instance_start_requested" => {
                let grants = payload["grants"].as_array().into_iter().flatten();
                let mib = grants.filter_map(|grant| grant["mib"].as_u64()).sum();
                self.reserved.insert(service.clone(), mib);
                "starting"
            }
            "instance_ready" | "instance_adopted" => "ready",
            "instance_draining" => "draining",
            "instance_stop_requested" => "stopping",
            "instance_exited" => "exited",
            "instance_released" => {
                self.reserved.remove(&service);
                "stopped"
            }
            _ => return,
        };
        self.services.insert(service, phase);
    }

    /// `  3.2 s  URGENT     preempts stats-1`
    fn line(&mut self, kind: &str, record: &Value, payload: &Value) -> Option<String> {
        let seconds = self.seconds(record);
        let name = |key: &str| {
            let id = text(payload, key);
            self.names.get(&id).cloned().unwrap_or(id)
        };
        let service = text(payload, "service");
        let attempt = text(payload, "attempt");
        let (who, what) = match kind {
            "job_queued" => (name("run"), "queued".to_owned()),
            "job_dispatched" => {
                let resumed = match payload.get("checkpoint") {
                    None | Some(Value::Null) => "",
                    Some(_) => ", from its checkpoint",
                };
                (
                    name("run"),
                    format!("attempt {attempt} runs on {service}{resumed}"),
                )
            }
            // The others are many, and nothing comes of them.
            "checkpoint_saved" if self.is_stopping(&text(payload, "run")) => {
                (name("run"), "saves a last checkpoint".to_owned())
            }
            "job_preempted" => (name("run"), format!("is preempted by {}", name("by"))),
            "job_requeued" => (name("run"), "is back in the queue".to_owned()),
            "job_completed" => (name("run"), "completed".to_owned()),
            "job_attempt_failed" | "job_failed" => {
                (name("run"), format!("failed: {}", text(payload, "error")))
            }
            "job_cancelled" => (name("run"), "cancelled".to_owned()),
            "instance_start_requested" => {
                let mib = self.reserved.get(&service).copied().unwrap_or_default();
                (
                    service,
                    format!("starts with {} GiB of the GPU", mib / 1_024),
                )
            }
            "instance_ready" => (
                service,
                format!("is ready after {} ms", text(payload, "startup_ms")),
            ),
            "instance_stop_requested" => (service, "stops".to_owned()),
            "instance_released" => (service, "has freed its memory".to_owned()),
            _ => return None,
        };
        Some(format!("{seconds:5.1} s  {who:<12} {what}"))
    }

    fn is_stopping(&self, run: &str) -> bool {
        let mut rows = self.rows.iter();
        rows.any(|(id, row)| id == run && row.state == "stopping")
    }

    /// Since the first record.
    fn seconds(&mut self, record: &Value) -> f64 {
        let at: Option<crate::domain::time::Timestamp> = record
            .get("at")
            .and_then(|at| serde_json::from_value(at.clone()).ok());
        let Some(at) = at else {
            return 0.0;
        };
        let first = *self.first_us.get_or_insert(at.0);
        // A demo's length in microseconds is far below 2^52.
        (at.0 - first) as f64 / 1e6
    }
}

/// The label `name`, as pairs or as an object.
fn label(payload: &Value) -> Option<String> {
    match payload.get("labels")? {
        Value::Array(pairs) => pairs
            .iter()
            .find(|pair| pair.get(0).and_then(Value::as_str) == Some("name"))
            .and_then(|pair| Some(pair.get(1)?.as_str()?.to_owned())),
        labels => Some(text(labels, "name")).filter(|name| !name.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(kind: &str, payload: Value) -> Value {
        json!({"at": "2025-11-21T02:00:00.000000+00:00", "effect": {"type": kind, "payload": payload}})
    }

    #[test]
    fn the_board_follows_the_records() {
        let mut board = Board::default();
        let queued = json!({"run": "r1", "spec": {"priority": 4}, "labels": [["name", "stats-1"]]});
        board.apply(&record("job_queued", queued));
        let grants = json!({"service": "s", "grants": [{"gpu": "SIM-0", "mib": 16384}]});
        let line = board.apply(&record("instance_start_requested", grants));
        assert_eq!(
            line.unwrap(),
            "  0.0 s  s            starts with 16 GiB of the GPU"
        );
        assert_eq!(board.reserved_mib(), 16_384);
        board.apply(&record(
            "job_dispatched",
            json!({"run": "r1", "service": "s", "attempt": 1}),
        ));
        assert_eq!((board.count(&["running"]), board.ended()), (1, 0));
        let line = board.apply(&record("job_completed", json!({"run": "r1"})));
        assert_eq!(line.unwrap(), "  0.0 s  stats-1      completed");
        assert_eq!(board.ended(), 1);
        board.apply(&record("instance_released", json!({"service": "s"})));
        assert_eq!(board.reserved_mib(), 0);
    }
}
