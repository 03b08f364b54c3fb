//! The ladder of a service as callers declare it, and as they are shown it.

use serde::Serialize;
use utoipa::ToSchema;

use super::fields::{Fields, TextRule};
use super::job::MAX_NAME_CHARS;
use super::run_view::seconds;
use super::service_spec::read_path;
use crate::domain::ladder::{Ask, SleepCall, Step};
use crate::domain::spec::ServiceSpec;

const MAX_STEPS: usize = 8;
/// Longest step, in seconds.
pub const MAX_STEP_S: f64 = 3_600.0;
const DRAIN_MS: u64 = 30_000;
const CHECKPOINT_MS: u64 = 10_000;
const MEMORY_MS: u64 = 60_000;

/// One step by which a service's memory is got back.
#[derive(Serialize, ToSchema)]
pub struct LadderStep {
    /// `drain`, `checkpoint`, `sleep`, `cuda-checkpoint`, `stop` or `kill`.
    #[schema(value_type = String)]
    pub step: &'static str,
    /// Its time limit; `kill` has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Of `checkpoint`: `SIGUSR1` or `SIGUSR2`, sent to the process group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Of `checkpoint` and `sleep`: what is posted to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Of `sleep`: 1 keeps what was on the GPU in host memory, 2 lets go of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<u8>,
    /// Of `sleep`: what is posted to for the opposite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wake_path: Option<String>,
    /// Of `sleep`: tells by `true`, `false` or a member `is_sleeping` whether it does; not asked when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_sleeping_path: Option<String>,
}

impl From<&Step> for LadderStep {
    fn from(step: &Step) -> Self {
        let mut told = LadderStep {
            step: step.name(),
            seconds: (*step != Step::Kill).then(|| seconds(step.limit_ms())),
            signal: None,
            path: None,
            level: None,
            wake_path: None,
            is_sleeping_path: None,
        };
        match step {
            Step::Checkpoint { ask, .. } => match ask {
                Ask::Signal(signal) => told.signal = Some(signal.to_string()),
                Ask::Path(path) => told.path = Some(path.clone()),
            },
            Step::Sleep { call, .. } => {
                told.level = Some(call.level);
                told.path = Some(call.path.clone());
                told.wake_path = Some(call.wake_path.clone());
                told.is_sleeping_path.clone_from(&call.is_sleeping_path);
            }
            _ => {}
        }
        told
    }
}

/// `ladder` and `mps_percent`: absent they stay, null unsets them.
pub fn apply(fields: &Fields, spec: &mut ServiceSpec) {
    if fields.is_null("mps_percent") {
        spec.mps_percent = None;
    }
    if let Some(percent) = fields.int("mps_percent", 1..=100) {
        spec.mps_percent = u8::try_from(percent).ok();
    }
    if fields.is_null("ladder") {
        spec.ladder = Vec::new();
    }
    let Some(steps) = fields.objects("ladder", MAX_STEPS) else {
        return;
    };
    let steps: Vec<Step> = steps
        .iter()
        .filter_map(|step| read_step(step, spec.grace_ms))
        .collect();
    let parts: Vec<u8> = steps.iter().map(Step::part).collect();
    let once = |part| parts.iter().filter(|other| **other == part).count() <= 1;
    if !parts.is_sorted() || !once(2) || !once(3) {
        let message = "Value error, drain and checkpoint come first, then sleep and cuda-checkpoint, then one stop, then kill";
        fields.fault("ladder", "value_error", message);
    }
    spec.ladder = steps;
}

fn read_step(fields: &Fields, grace_ms: u64) -> Option<Step> {
    let name = fields.required_text("step", TextRule::name(MAX_NAME_CHARS));
    let limit = |default: u64| {
        let given = fields.seconds_as_ms("seconds", 0.0..=MAX_STEP_S);
        given.unwrap_or(default)
    };
    let (members, step): (&[&str], Option<Step>) = match name.as_str() {
        "drain" => (
            &["seconds"],
            Some(Step::Drain {
                ms: limit(DRAIN_MS),
            }),
        ),
        "checkpoint" => {
            let ms = limit(CHECKPOINT_MS);
            let ask = read_ask(fields);
            let step = ask.map(|ask| Step::Checkpoint { ask, ms });
            (&["seconds", "signal", "path"], step)
        }
        "sleep" => {
            let (call, ms) = (read_sleep(fields), limit(MEMORY_MS));
            let members = &["seconds", "level", "path", "wake_path", "is_sleeping_path"];
            (members, Some(Step::Sleep { call, ms }))
        }
        "cuda-checkpoint" => {
            let ms = limit(MEMORY_MS);
            (&["seconds"], Some(Step::CudaCheckpoint { ms }))
        }
        "stop" => (
            &["seconds"],
            Some(Step::Stop {
                ms: limit(grace_ms),
            }),
        ),
        "kill" => (&[], Some(Step::Kill)),
        "" => return None,
        _ => {
            let message = "Input should be 'drain', 'checkpoint', 'sleep', 'cuda-checkpoint', 'stop' or 'kill'";
            fields.fault("step", "literal_error", message);
            return None;
        }
    };
    let mut known = vec!["step"];
    known.extend(members);
    fields.forbid_others(&known);
    step
}

fn read_ask(fields: &Fields) -> Option<Ask> {
    let signal = fields.text("signal", TextRule::name(MAX_NAME_CHARS));
    let path = read_path(fields, "path");
    match (signal.as_deref(), path) {
        (Some(signal @ ("SIGUSR1" | "SIGUSR2")), None) => Some(Ask::Signal(signal.into())),
        (Some(_), None) => {
            let message = "Input should be 'SIGUSR1' or 'SIGUSR2'";
            fields.fault("signal", "literal_error", message);
            None
        }
        (None, Some(path)) => Some(Ask::Path(path)),
        _ => {
            let message = "Value error, a checkpoint is asked for by a signal or by a path";
            fields.fault("signal", "value_error", message);
            None
        }
    }
}

/// Without a path it is vLLM's.
fn read_sleep(fields: &Fields) -> SleepCall {
    let level = fields.int("level", 1..=2).unwrap_or(1);
    let path = read_path(fields, "path");
    let wake_path = read_path(fields, "wake_path");
    let is_sleeping_path = read_path(fields, "is_sleeping_path");
    match (&path, &wake_path) {
        (Some(_), None) | (None, Some(_)) => {
            let message = "Value error, path and wake_path come together";
            fields.fault("path", "value_error", message);
        }
        _ => {}
    }
    let is_ours = path.is_some();
    SleepCall {
        level: if level == 2 { 2 } else { 1 },
        path: path.unwrap_or_else(|| format!("/sleep?level={level}")),
        wake_path: wake_path.unwrap_or_else(|| "/wake_up".to_owned()),
        is_sleeping_path: is_sleeping_path
            .or_else(|| (!is_ours).then(|| "/is_sleeping".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::error::ApiError;
    use crate::api::service_spec::read_new;

    fn read(members: &str) -> Result<ServiceSpec, ApiError> {
        let body = format!(r#"{{"name":"a","type":"t","command":["/bin/true"],{members}}}"#);
        read_new(&Fields::of_body(&body).unwrap())
    }

    #[test]
    fn a_ladder_is_read_and_shown_again() {
        let spec = read(
            r#""grace_seconds":7,"mps_percent":30,"ladder":[{"step":"drain"},{"step":"checkpoint","signal":"SIGUSR1","seconds":1},
            {"step":"sleep","level":2},{"step":"sleep","path":"/s","wake_path":"/w","seconds":0.5},{"step":"stop"},{"step":"kill"}]"#,
        )
        .unwrap();
        assert_eq!(spec.mps_percent, Some(30));
        let shown: Vec<LadderStep> = spec.ladder.iter().map(LadderStep::from).collect();
        assert_eq!(
            serde_json::to_value(shown).unwrap(),
            json!([
                {"step": "drain", "seconds": 30.0},
                {"step": "checkpoint", "seconds": 1.0, "signal": "SIGUSR1"},
                {"step": "sleep", "seconds": 60.0, "level": 2, "path": "/sleep?level=2", "wake_path": "/wake_up",
                 "is_sleeping_path": "/is_sleeping"},
                {"step": "sleep", "seconds": 0.5, "level": 1, "path": "/s", "wake_path": "/w"},
                {"step": "stop", "seconds": 7.0},
                {"step": "kill"},
            ])
        );
    }

    #[test]
    fn a_ladder_that_makes_no_sense_is_refused() {
        for wrong in [
            r#"{"step":"dance"}"#,
            r#"{"seconds":1}"#,
            r#"{"step":"checkpoint"}"#,
            r#"{"step":"checkpoint","signal":"SIGKILL"}"#,
            r#"{"step":"checkpoint","signal":"SIGUSR1","path":"/x"}"#,
            r#"{"step":"checkpoint","path":"//evil"}"#,
            r#"{"step":"sleep","level":3}"#,
            r#"{"step":"sleep","path":"/s"}"#,
            r#"{"step":"drain","signal":"SIGUSR1"}"#,
            r#"{"step":"kill","seconds":1}"#,
            r#"{"step":"drain","seconds":-1}"#,
            r#"{"step":"stop"},{"step":"drain"}"#,
            r#"{"step":"stop"},{"step":"stop"}"#,
            r#"{"step":"sleep"},{"step":"checkpoint","path":"/c"}"#,
        ] {
            let error = read(&format!(r#""ladder":[{wrong}]"#)).err();
            let error = error.unwrap_or_else(|| panic!("accepted {wrong}"));
            assert_eq!(error.code.as_str(), "validation_failed", "{wrong}");
        }
        for wrong in ["0", "101", "\"5\"", "2.5"] {
            assert!(
                read(&format!(r#""mps_percent":{wrong}"#)).is_err(),
                "{wrong}"
            );
        }
    }
}
