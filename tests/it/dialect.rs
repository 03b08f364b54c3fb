//! The peer's dialect, member by member: every JSON member that its clients read is there and of its type, at the
//! root and under `/api/gateway` alike.

use serde_json::{Value, json};

use crate::support::scripted::Scripted;
use crate::support::{Gateway, Options, worker_service};

/// A member's types: `s`tring, `n`umber, `i`nteger, `b`ool, `a`rray, `o`bject, `j`son text, `t`imestamp; with `?` it
/// may be null. Members after a dot are inside, `[]` stands for every item.
struct Row {
    what: &'static str,
    members: &'static str,
}

const GPU: &str = "available:b gpu_name:s gpu_utilization_pct:n? memory_used_mb:i memory_total_mb:i memory_free_mb:i \
    memory_utilization_pct:n temperature_c:n? power_draw_w:n? unified_memory:b processes:a processes[].pid:i \
    processes[].type:s processes[].name:s processes[].memory_mb:i source:s gpus:a gpus[].uuid:s gpus[].index:i \
    gpus[].name:s gpus[].memory_total_mb:i gpus[].reservations:a gpus[].health:s gpus[].source:s";
const SERVICE: &str = "container:s type:s description:s vram_gb:n enabled:b container_running:b healthy:b port:i \
    response_time_ms:n? scheduler_status:s active_job_id:s?";
const RECORD: &str = "name:s container:s port:i health_endpoint:s type:s description:s vram_gb:n progress_mode:s \
    progress_endpoint:s? enabled:b created_at:t updated_at:t";
const JOB: &str = "id:s service_type:s? service_name:s? priority:i status:s payload:j callback_url:s? result:j? \
    created_at:t started_at:t? completed_at:t? paused_at:t? error:s? ttl_seconds:n attempts:i max_attempts:i \
    paused_by_job_id:s? progress_snapshot:j? preempt_count:i";

const ROWS: &[Row] = &[
    Row {
        what: "GET /health",
        members: "status:s version:s timestamp:t",
    },
    Row {
        what: "GET /gpu",
        members: GPU,
    },
    Row {
        what: "GET /vram",
        members: "total_mb:i used_mb:i free_mb:i allocated_services:a allocated_services[].service:s \
            allocated_services[].vram_gb:n allocated_services[].vram_mb:i allocated_services[].container_running:b \
            reserved_mb:i available_for_new_mb:i",
    },
    Row {
        what: "GET /services",
        members: "services:o",
    },
    Row {
        what: "GET /services/w",
        members: SERVICE,
    },
    Row {
        what: "GET /services/w",
        members: RECORD,
    },
    Row {
        what: "POST /services/idle/disable",
        members: RECORD,
    },
    Row {
        what: "POST /services/idle/enable",
        members: RECORD,
    },
    Row {
        what: "PUT /services/idle {\"description\":\"d\"}",
        members: RECORD,
    },
    Row {
        what: "POST /services/idle/start",
        members: "service:s status:s startup_time_s:n healthy:b",
    },
    Row {
        what: "POST /services/idle/start",
        members: "service:s status:s healthy:b",
    },
    Row {
        what: "POST /services/idle/restart",
        members: "service:s status:s startup_time_s:n healthy:b previous_status:s drained:b",
    },
    Row {
        what: "POST /services/idle/stop?drain=true",
        members: "service:s status:s drained:b",
    },
    Row {
        what: "POST /services/idle/stop",
        members: "service:s status:s",
    },
    Row {
        what: "POST /queue/submit {\"service_type\":\"later\",\"payload\":{\"a\":1},\"priority\":2}",
        members: "job_id:s position:i estimated_wait:n?",
    },
    Row {
        what: "GET /queue/stats",
        members: "total_queued:i total_running:i by_type:o by_type.later:i by_priority:o by_priority.P2:i",
    },
    Row {
        what: "GET /queue/RUNNING",
        members: JOB,
    },
    Row {
        what: "GET /queue/QUEUED",
        members: JOB,
    },
    Row {
        what: "GET /queue/QUEUED",
        members: "position:i",
    },
    Row {
        what: "GET /queue/DONE",
        members: JOB,
    },
    Row {
        what: "GET /queue/RUNNING/progress",
        members: "job_id:s status:s progress:o preempt_count:i",
    },
    Row {
        what: "POST /queue/RUNNING/progress {\"percent\":2}",
        members: "ok:b",
    },
    Row {
        what: "GET /preempt/check/s",
        members: "preemptable:b service:s active_job_id:s scheduler_status:s running_job_priority:i \
            running_job_service_type:s highest_queued:o highest_queued.job_id:s highest_queued.priority:i \
            highest_queued.service_type:s",
    },
    Row {
        what: "GET /preempt/check/w",
        members: "preemptable:b reason:s service:s",
    },
    Row {
        what: "POST /preempt/execute {\"service_name\":\"s\",\"preemptor_job_id\":\"QUEUED\"}",
        members: "preempted_job_id:s preemptor_job_id:s service:s progress_saved:b",
    },
    Row {
        what: "POST /preempt/release/s",
        members: "service:s resumed_jobs:a count:i",
    },
    Row {
        what: "GET /available/s",
        members: "available:b service:s recommendation:s gpu_memory_free_mb:i gpu_utilization_pct:n? \
            healthy_services:a queue_depth:i",
    },
    Row {
        what: "GET /available/nothing",
        members: "available:b service:s? recommendation:s gpu_memory_free_mb:i services_registered:a reason:s",
    },
    Row {
        what: "DELETE /queue/CANCEL",
        members: "job_id:s cancelled:b",
    },
    Row {
        what: "DELETE /services/idle",
        members: "deleted:s",
    },
];

/// All values at a path.
fn at<'a>(value: &'a Value, path: &str) -> Vec<Option<&'a Value>> {
    let mut found = vec![Some(value)];
    for part in path.split('.') {
        let (name, each) = part
            .strip_suffix("[]")
            .map_or((part, false), |name| (name, true));
        found = found.into_iter().map(|value| value?.get(name)).collect();
        if each {
            let items = found
                .into_iter()
                .flat_map(|value| match value.and_then(Value::as_array) {
                    Some(items) => items.iter().map(Some).collect::<Vec<_>>(),
                    None => vec![None],
                });
            found = items.collect();
        }
    }
    found
}

fn is_a(value: &Value, kind: &str) -> bool {
    let (kind, nullable) = kind
        .strip_suffix('?')
        .map_or((kind, false), |kind| (kind, true));
    if value.is_null() {
        return nullable;
    }
    match kind {
        "s" => value.is_string(),
        "n" => value.is_number(),
        "i" => value.is_i64() || value.is_u64(),
        "b" => value.is_boolean(),
        "a" => value.is_array(),
        "o" => value.is_object(),
        "j" => value
            .as_str()
            .is_some_and(|text| serde_json::from_str::<Value>(text).is_ok()),
        "t" => value
            .as_str()
            .is_some_and(|text| text.len() == 32 && text.ends_with("+00:00")),
        other => panic!("no such type: {other}"),
    }
}

#[tokio::test]
async fn every_member_that_the_peers_clients_read_is_there() {
    for prefix in ["", "/api/gateway"] {
        let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
        let scripted = Scripted::start().await;
        let mut service = scripted.service("s", "s");
        service["grace_seconds"] = json!(0.2);
        gateway.register(service).await;
        for (name, vram_gb) in [("w", 4), ("idle", 2)] {
            gateway
                .register(worker_service(
                    &gateway,
                    name,
                    name,
                    json!({"vram_gb": vram_gb}),
                ))
                .await;
        }
        gateway
            .post("/services/w/start", json!({}))
            .await
            .expect(200);
        let done = gateway
            .start_job(json!({"service_type": "s", "payload": {"a": 1}}))
            .await;
        gateway.run_becomes(&done, "completed").await;
        let hold = json!({"service_type": "s", "payload": {"hold": true}, "ttl_seconds": 60});
        let running = gateway.start_job(hold.clone()).await;
        gateway.job_becomes(&running, "running").await;
        gateway
            .post(&format!("/queue/{running}/progress"), json!({"percent": 1}))
            .await
            .expect(200);
        let queued = gateway.start_job(hold).await;
        let cancel = gateway
            .start_job(json!({"service_type": "later", "payload": 1}))
            .await;
        let fill = |text: &str| {
            text.replace("RUNNING", &running)
                .replace("QUEUED", &queued)
                .replace("DONE", &done)
                .replace("CANCEL", &cancel)
        };
        let mut wrong = Vec::new();
        for row in ROWS {
            let what = fill(row.what);
            let mut parts = what.splitn(3, ' ');
            let (method, path) = (parts.next().unwrap(), parts.next().unwrap());
            if path == "/health" && !prefix.is_empty() {
                continue;
            }
            let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
            let mut request = gateway.request(method, &format!("{prefix}{path}"));
            if let Some(body) = parts.next() {
                request = request
                    .header("content-type", "application/json")
                    .body(body.to_owned());
            }
            let answer = crate::support::answer(request).await;
            if answer.status != 200 {
                wrong.push(format!("{what}: {} {}", answer.status, answer.text));
                continue;
            }
            // A job that was started without a time to live has none; the dialect's own have an hour.
            let done_without_ttl = what.contains(&done);
            for member in row.members.split_whitespace() {
                let (path, kind) = member.rsplit_once(':').unwrap();
                if done_without_ttl && path == "ttl_seconds" {
                    continue;
                }
                for value in at(&answer.json, path) {
                    if !value.is_some_and(|value| is_a(value, kind)) {
                        wrong.push(format!("{what}: {member} is {value:?}"));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "under '{prefix}':\n{}", wrong.join("\n"));
    }
}

/// Its words for what goes wrong, which its scripts print.
#[tokio::test]
async fn refusals_are_in_the_dialects_words() {
    let gateway = Gateway::start(Options::default()).await;
    gateway
        .register(json!({"name": "c", "container": "c", "port": 9, "type": "t"}))
        .await;
    let detail =
        |answer: crate::support::Answer, status: u16| answer.expect(status)["detail"].clone();
    let unauthorized = crate::support::answer(gateway.bare(reqwest::Method::GET, "/gpu")).await;
    assert_eq!(detail(unauthorized, 401), "Invalid or missing API token");
    assert_eq!(
        detail(gateway.get("/services/x").await, 404),
        "Unknown service: x"
    );
    assert_eq!(
        detail(gateway.get("/queue/x").await, 404),
        "Job not found: x"
    );
    let unnamed = gateway
        .post("/services/register", json!({"type": "t"}))
        .await;
    assert_eq!(detail(unnamed, 400), "'name' is required");
    let untyped = gateway.post("/queue/submit", json!({"payload": {}})).await;
    assert_eq!(detail(untyped, 400), "service_type is required");
    let empty = gateway
        .post("/queue/submit", json!({"service_type": "t"}))
        .await;
    assert_eq!(detail(empty, 400), "payload is required");
    let twice = gateway
        .post(
            "/services/register",
            json!({"name": "c", "container": "c", "port": 9, "type": "t"}),
        )
        .await;
    assert_eq!(detail(twice, 409), "Service 'c' already exists");
    let started = gateway.post("/services/c/start", json!({})).await;
    assert_eq!(detail(started, 503), "Docker not available");
    let run = gateway
        .start_job(json!({"service_type": "t", "payload": {}}))
        .await;
    let body = json!({"service_name": "c", "preemptor_job_id": run});
    let nothing = gateway.post("/preempt/execute", body).await;
    assert_eq!(
        detail(nothing, 409),
        json!({"error": "no_active_job", "service": "c"})
    );
}
