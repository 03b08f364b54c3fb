//! Examples of the OpenAPI document that several routes share, or that are long. A test compares their members with
//! what a running gateway answers.

use serde_json::{Value, json};

const RUN: &str = "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b";
const AT: &str = "2026-11-21T02:00:00.000120+00:00";

/// A run's stream, to its end.
pub const RUN_STREAM: &str = "retry: 1000\n\nid: 1\nevent: step\ndata: {\"cursor\":1,\"record\":{\"cursor\":1,\"seq\":42,…}}\n\n\
    : keep-alive\n\nevent: done\ndata: {\"run_id\":\"0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b\",\"cursor\":5,\"status\":\"terminal\"}\n\n";

/// The gateway's stream.
pub const GATEWAY_STREAM: &str = "retry: 1000\n\nid: 42\nevent: step\ndata: {\"seq\":42,\"record\":{\"cursor\":1,\"seq\":42,…}}\n\n\
    : keep-alive\n\n";

/// The first line of an export and the beginning of the next.
pub const EXPORT: &str = "{\"format\":1,…}\n{\"seq\":1,…}\n";

/// A run that has completed.
pub fn run() -> Value {
    let mut run = summary();
    run["output"] = json!({"words": 1204});
    run
}

fn summary() -> Value {
    let contract = json!({
        "run_id": RUN, "workflow_id": "job:text-stats", "status": "completed", "current_node": null,
        "created_at": AT, "updated_at": AT, "actor_id": "gateway", "session_id": RUN, "parent_run_id": null,
        "error": null, "flow_warnings": null, "paused": false, "pause_reason": null, "paused_at": null
    });
    let more = json!({
        "resumed_at": null, "waiting": null, "is_scheduled": false, "schedule": null, "limits": null,
        "run_lifecycle": null, "is_draft": false, "output": null, "ledger_len": 5
    });
    let state = json!({
        "state": "completed", "service_type": "text-stats", "service_name": null, "service": "stats",
        "generation": 1, "priority": 3, "attempt": 1, "failures": 0, "max_attempts": 3,
        "timeout_seconds": 300.0, "ttl_seconds": null, "callback_url": null, "preempt_count": 0
    });
    let ends = json!({
        "preempted_by": null, "retry_at": null, "started_at": AT, "completed_at": AT, "error_code": null,
        "has_checkpoint": false, "purged": false, "labels": {"team": "search"}
    });
    let job = json!({"job": merge([state, ends])});
    merge([contract, more, job])
}

/// One object of the members of several: a single `json!` with all of them is too long for the compiler.
fn merge(objects: impl IntoIterator<Item = Value>) -> Value {
    let members = objects.into_iter().filter_map(|object| match object {
        Value::Object(members) => Some(members),
        _ => None,
    });
    Value::Object(members.flatten().collect())
}

/// A page of runs.
pub fn runs() -> Value {
    json!({"items": [summary()], "next_cursor": "AZnzonweffCcVW8PDR8qO1zq5rM8i0YzXG1Y2m0m3d8"})
}

/// What a run was started with.
pub fn input_data() -> Value {
    json!({
        "run_id": RUN, "workflow_id": "job:text-stats", "bundle_id": null, "flow_id": null, "pin_ids": [],
        "input_data": {"text": "to be or not to be"}, "workspace": null
    })
}

/// A purge's answer.
pub fn purged() -> Value {
    json!({"run_id": RUN, "purged": true})
}

/// A checkpoint's receipt.
pub fn saved() -> Value {
    json!({"ok": true, "run_id": RUN, "size_bytes": 2048})
}

/// A record (design section 6).
fn record() -> Value {
    json!({
        "cursor": 1, "seq": 42, "at": AT, "run_id": RUN, "step_id": "0b7f5c1e-6a3d-8f42-9d10-3c2b1a0f9e8d",
        "node_id": null, "status": "waiting",
        "effect": {"type": "job_queued", "payload": {"run": RUN, "payload": {"text": "to be"}}, "result_key": null},
        "result": null, "error": null, "started_at": AT, "ended_at": null, "actor_id": "admin",
        "request_id": "0f4e1d3c2b5a49788796a5b4c3d2e1f0", "session_id": RUN, "attempt": 1, "idempotency_key": null,
        "purged": false, "prev_hash": "5f1d…", "record_hash": "9b1f…", "signature": null
    })
}

/// A page of records.
pub fn page() -> Value {
    json!({"items": [record()], "next_after": 1})
}

/// Pages of several runs.
pub fn batch() -> Value {
    json!({"runs": {RUN: page()}})
}

/// A command that was applied.
pub fn command() -> Value {
    json!({
        "command_id": "d3e05ae3-f3c3-4600-93a5-8905f6ca3a03", "run_id": RUN, "type": "pause", "state": "applied",
        "seq": 42, "accepted_at": AT, "decided_at": AT, "code": null, "reason": null
    })
}

/// A job in the dialect's form.
pub fn job() -> Value {
    json!({
        "id": RUN, "service_type": "llm", "service_name": null, "priority": 2, "status": "queued",
        "payload": "{\"prompt\":\"hello\"}", "callback_url": null, "result": null, "created_at": AT,
        "started_at": null, "completed_at": null, "paused_at": null, "error": null, "ttl_seconds": 3600.0,
        "attempts": 0, "max_attempts": 3, "paused_by_job_id": null, "progress_snapshot": null, "preempt_count": 0,
        "position": 1
    })
}

/// A process service that is ready.
pub fn service() -> Value {
    let contract = json!({
        "name": "stats", "tenant": null, "container": "stats", "type": "text-stats", "description": "", "vram_gb": 4.0,
        "enabled": true, "container_running": true, "healthy": true, "port": 40123, "response_time_ms": null,
        "scheduler_status": "idle", "active_job_id": null, "health_endpoint": "/health",
        "progress_mode": "stateless", "progress_endpoint": null, "created_at": AT, "updated_at": AT
    });
    let ours = json!({
        "driver": "process", "command": ["/usr/local/bin/stats-worker"], "env": ["MODEL_DIR"],
        "working_dir": null, "url": null, "image": null, "gpus": 0, "concurrency": 1, "dispatch_path": "/process",
        "cancel_path": "/cancel", "idle_timeout_seconds": null, "grace_seconds": 10.0,
        "startup_timeout_seconds": 120.0, "min_runtime_seconds": null, "ladder": [{"step": "sleep", "seconds": 60.0, "level": 1, "path": "/sleep?level=1",
        "wake_path": "/wake_up", "is_sleeping_path": "/is_sleeping"}, {"step": "stop", "seconds": 10.0}],
        "mps_percent": null, "learned_vram_gb": null
    });
    let state = json!({
        "active_job_ids": [], "crash_looped": null, "deaths": 0, "retry_at": null,
        "instance": {
            "generation": 1, "phase": "ready", "pid": 4711, "port": 40123, "container_id": null, "container_name": null, "container_status": null, "started_at": AT, "ready_at": AT,
            "startup_time_s": 0.4, "gpus": [{"gpu": "GPU-sim-0", "memory_mb": 4096}], "asleep_since": null,
            "host_memory_mb": 0
        }
    });
    merge([contract, ours, state])
}

/// All services.
pub fn services() -> Value {
    json!({"services": {"stats": service()}})
}
