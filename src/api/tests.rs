//! The routes against a real ledger and coordinator, without an executor: what is submitted stays where the
//! scheduler puts it. Logins, and who is gone, are in `people`; starts and stops in `service_control`.

mod people;
mod service_control;

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::access::{NEEDS, Need};
use super::listen::{ListenConfig, serve};
use super::{ApiConfig, App, Parts, router};
use crate::auth::Authenticator;
use crate::auth::checkpoint_key::CheckpointKey;
use crate::auth::logins::Logins;
use crate::auth::secret::TokenKey;
use crate::auth::session::SessionRules;
use crate::auth::throttle::ThrottleRules;
use crate::auth::uses::Uses;
use crate::coordinator;
use crate::domain::audit::AuditMode;
use crate::domain::command::{Command, Origin};
use crate::domain::identity::{IdentityCommand, Scope, UserKey};
use crate::domain::ids::PlaneId;
use crate::domain::settings::Settings;
use crate::domain::tenant::Tenancy;
use crate::driver::{Docker, Logs};
use crate::ledger::{Ledger, OpenOptions, Space};
use crate::telemetry::Metrics;

const TOKEN: &str = "rgt_admin_for_tests_only";

/// A gateway's HTTP side over a fresh ledger.
struct Gateway {
    router: Router,
    app: App,
    ledger: Ledger,
    handle: coordinator::Handle,
    logins: Logins,
    stopping: CancellationToken,
    coordinator: coordinator::Running,
    _data: tempfile::TempDir,
}

fn gateway_with(change: impl FnOnce(&mut ApiConfig)) -> Gateway {
    let data = tempfile::tempdir().unwrap();
    let (ledger, writer) = Ledger::open(data.path(), &OpenOptions::default()).unwrap();
    let settings = Settings::default();
    let (effects, _unperformed) = tokio::sync::mpsc::unbounded_channel();
    let state = coordinator::recover(&ledger, settings.ageing_ms_per_level).unwrap();
    let space = Space::new(data.path(), 0);
    let parts = coordinator::Parts {
        writer,
        state,
        settings,
        effects,
        snapshots: coordinator::SnapshotRules::after(Duration::from_secs(60)),
        space: space.clone(),
    };
    let running = coordinator::start(parts).unwrap();
    let mut config = ApiConfig::for_listener("127.0.0.1:8080".parse().unwrap());
    change(&mut config);
    let stopping = CancellationToken::new();
    let key = TokenKey::random();
    let logins = Logins::open(
        data.path(),
        &key,
        SessionRules::default(),
        ThrottleRules::default(),
    );
    let logins = logins.unwrap();
    let app = App::new(Parts {
        config,
        handle: running.handle.clone(),
        ledger: ledger.clone(),
        space,
        auth: Authenticator::new(&TOKEN.into(), key.clone(), Uses::forgotten()),
        checkpoint_key: CheckpointKey::random().unwrap(),
        logins: logins.clone(),
        ntfy_tokens: crate::auth::ntfy_token::NtfyTokens::new(data.path()),
        metrics: Metrics::install(),
        logs: Logs::new(data.path().to_owned()),
        docker: Docker::none(),
        gpus: crate::gpu::Samples::new(1),
        stopping: stopping.clone(),
    });
    Gateway {
        router: router(app.clone()),
        app,
        ledger,
        handle: running.handle.clone(),
        logins,
        stopping,
        coordinator: running,
        _data: data,
    }
}

fn gateway() -> Gateway {
    gateway_with(|_| {})
}

struct Answer {
    status: StatusCode,
    headers: http::HeaderMap,
    json: Value,
}

impl Gateway {
    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Answer {
            status: parts.status,
            headers: parts.headers,
            json: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        }
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let body = body.map_or(Body::empty(), |body| Body::from(body.to_string()));
        self.send(request(method, path).body(body).unwrap()).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, None).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.call(Method::POST, path, Some(body)).await
    }

    async fn start_run(&self) -> String {
        let body = json!({"job": {"service_type": "t", "payload": {"n": 1}}});
        let answer = self.post("/api/gateway/runs/start", body).await;
        assert_eq!(answer.status, 200, "{}", answer.json);
        answer.json["run_id"].as_str().unwrap().to_owned()
    }
}

fn request(method: Method, path: &str) -> http::request::Builder {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost")
        .header("authorization", format!("Bearer {TOKEN}"))
        .header("content-type", "application/json")
}

#[tokio::test]
async fn only_probes_and_docs_are_open() {
    let gateway = gateway();
    let bare = |path: &str| {
        Request::get(path)
            .header("host", "localhost")
            .body(Body::empty())
            .unwrap()
    };
    for path in [
        "/health",
        "/api/health",
        "/api/gateway/health",
        "/livez",
        "/readyz",
        "/openapi.json",
        "/docs/",
    ] {
        assert_eq!(gateway.send(bare(path)).await.status, 200, "{path}");
    }
    for (path, detail) in [
        ("/gpu", "Invalid or missing API token"),
        ("/metrics", "Invalid or missing API token"),
        ("/nowhere", "Invalid or missing API token"),
        ("/api/gateway/runs", "Unauthorized"),
        ("/api/gateway/nowhere", "Unauthorized"),
    ] {
        let answer = gateway.send(bare(path)).await;
        assert_eq!(answer.status, 401, "{path}");
        assert_eq!(answer.json["detail"], detail, "{path}");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
        assert_eq!(answer.headers["content-type"], "application/problem+json");
    }
}

#[tokio::test]
async fn an_answer_carries_the_request_id_and_an_error_repeats_it() {
    let gateway = gateway();
    let request = request(Method::GET, "/api/gateway/runs/nope").header("x-request-id", "abc");
    let answer = gateway.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(answer.headers["x-request-id"], "abc");
    assert_eq!(answer.json["request_id"], "abc");
    assert_eq!(answer.json["detail"], "Run 'nope' not found");
    assert_eq!(answer.json["code"], "run_not_found");
    assert_eq!(answer.json["instance"], "/api/gateway/runs/nope");
}

#[tokio::test]
async fn a_run_is_shown_as_it_was_started() {
    let gateway = gateway();
    let id = gateway.start_run().await;
    let run = gateway.get(&format!("/api/gateway/runs/{id}")).await.json;
    assert_eq!(
        (&run["status"], &run["job"]["state"]),
        (&json!("waiting"), &json!("queued"))
    );
    assert_eq!(run["session_id"], id.as_str());
    for member in [
        "current_node",
        "parent_run_id",
        "flow_warnings",
        "schedule",
        "limits",
        "run_lifecycle",
        "output",
    ] {
        assert!(run.get(member).is_some_and(Value::is_null), "{member}");
    }
    let input = gateway
        .get(&format!("/api/gateway/runs/{id}/input_data"))
        .await
        .json;
    assert_eq!(input["input_data"], json!({"n": 1}));
    let why = gateway
        .get(&format!("/api/gateway/runs/{id}/why"))
        .await
        .json;
    assert_eq!(why["blocking"][0]["cause"], "no_service", "{why}");
    let job = gateway.get(&format!("/queue/{id}")).await.json;
    assert_eq!(
        (&job["status"], &job["payload"]),
        (&json!("queued"), &json!("{\"n\":1}"))
    );
    assert_eq!(job["position"], 1);
}

#[tokio::test]
async fn starts_without_a_job_answer_as_the_contract_does() {
    let gateway = gateway();
    let start = |body: Value| gateway.post("/api/gateway/runs/start", body);
    let answer = start(json!({"bundle_id": "nope", "input_data": {}})).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json["detail"]),
        (404, &json!("Bundle 'nope' not found"))
    );
    let answer = start(json!({"flow_id": "b@1.0:f"})).await;
    assert_eq!(answer.json["detail"], "Bundle 'b' not found");
    let answer = start(json!({"bundle_id": "b", "input_data": "x"})).await;
    assert_eq!(answer.status, 422);
    assert_eq!(answer.json["detail"][0]["type"], "dict_type");
    let answer = start(json!({})).await;
    assert_eq!(answer.status, 400);
    let detail = answer.json["detail"].as_str().unwrap();
    assert!(
        detail
            .starts_with("flow_id is required (or provide bundle_id to start a bundle entrypoint)")
    );
}

#[tokio::test]
async fn an_idempotency_key_starts_once() {
    let gateway = gateway();
    let send = |text: &'static str| {
        let request =
            request(Method::POST, "/api/gateway/runs/start").header("idempotency-key", "k1");
        gateway.send(request.body(Body::from(text)).unwrap())
    };
    let first = send(r#"{"job":{"service_type":"t","payload":{"a":1,"b":2}}}"#).await;
    let again = send(r#"{ "job": {"payload":{"b":2,"a":1}, "service_type":"t"} }"#).await;
    assert_eq!(first.json, again.json);
    assert!(first.headers.get("idempotency-replayed").is_none());
    assert_eq!(again.headers["idempotency-replayed"], "true");
    let other = send(r#"{"job":{"service_type":"u","payload":{}}}"#).await;
    assert_eq!(
        (other.status.as_u16(), &other.json["code"]),
        (422, &json!("idempotency_key_reused"))
    );
}

#[tokio::test]
async fn a_command_is_accepted_once_and_tells_what_became_of_it() {
    let gateway = gateway();
    let run = gateway.start_run().await;
    let body =
        json!({"command_id": "c1", "run_id": run, "type": "pause", "payload": {"reason": "x"}});
    let first = gateway
        .post("/api/gateway/commands", body.clone())
        .await
        .json;
    assert_eq!(
        (&first["accepted"], &first["duplicate"]),
        (&json!(true), &json!(false))
    );
    let again = gateway.post("/api/gateway/commands", body).await.json;
    assert_eq!(
        (&again["accepted"], &again["duplicate"], &again["seq"]),
        (&json!(false), &json!(true), &first["seq"])
    );
    let other = json!({"command_id": "c1", "run_id": run, "type": "cancel"});
    let other = gateway.post("/api/gateway/commands", other).await;
    assert_eq!(
        (other.status.as_u16(), &other.json["code"]),
        (409, &json!("command_reused"))
    );
    let state = gateway.get("/api/gateway/commands/c1").await.json;
    assert_eq!(
        (&state["state"], &state["type"]),
        (&json!("applied"), &json!("pause"))
    );
    let view = gateway.get(&format!("/api/gateway/runs/{run}")).await.json;
    assert_eq!(
        (&view["paused"], &view["pause_reason"]),
        (&json!(true), &json!("x"))
    );
    assert_eq!(view["waiting"]["wait_key"], format!("pause:{run}"));

    let unknown = json!({"command_id": "c2", "run_id": "nope", "type": "pause"});
    assert_eq!(
        gateway.post("/api/gateway/commands", unknown).await.status,
        200
    );
    let state = gateway.get("/api/gateway/commands/c2").await.json;
    assert_eq!(
        (&state["state"], &state["code"]),
        (&json!("rejected"), &json!("run_not_found"))
    );
}

#[tokio::test]
async fn listings_go_on_where_they_stopped() {
    let gateway = gateway();
    let mut started = Vec::new();
    for _ in 0..5 {
        started.push(gateway.start_run().await);
    }
    started.reverse();
    let mut seen = Vec::new();
    let mut path = "/api/gateway/runs?limit=2&status=waiting&workflow_id=job:t".to_owned();
    loop {
        let page = gateway.get(&path).await;
        let items = page.json["items"].as_array().unwrap();
        seen.extend(
            items
                .iter()
                .map(|run| run["run_id"].as_str().unwrap().to_owned()),
        );
        let Some(link) = page.headers.get("link") else {
            break;
        };
        let link = link.to_str().unwrap();
        path = link[1..link.find('>').unwrap()].to_owned();
    }
    assert_eq!(seen, started);
    let page = gateway.get("/api/gateway/runs?limit=2").await.json;
    let cursor = page["next_cursor"].as_str().unwrap();
    let foreign = gateway
        .get(&format!("/api/gateway/runs?status=failed&after={cursor}"))
        .await;
    assert_eq!(foreign.json["code"], "invalid_cursor");
    let none = gateway
        .get("/api/gateway/runs?workflow_id=job:other")
        .await
        .json;
    assert_eq!(none["items"], json!([]));
    assert_eq!(
        gateway.get("/api/gateway/runs?status=zap").await.json["code"],
        "invalid_status"
    );
}

#[tokio::test]
async fn a_runs_ledger_reads_by_cursor_alone_and_in_a_batch() {
    let gateway = gateway();
    let run = gateway.start_run().await;
    let body = json!({"command_id": "c", "run_id": run, "type": "cancel", "payload": {}});
    gateway.post("/api/gateway/commands", body).await;
    let all = gateway
        .get(&format!("/api/gateway/runs/{run}/ledger"))
        .await
        .json;
    let total = all["items"].as_array().unwrap().len();
    assert!(total >= 3, "{all}");
    assert_eq!(all["next_after"], total);
    let rest = gateway
        .get(&format!("/api/gateway/runs/{run}/ledger?after=1&limit=1"))
        .await
        .json;
    assert_eq!(rest["items"][0], all["items"][1]);
    let asked = json!({"runs": [{"run_id": run, "after": 1}, {"run_id": "nope"}], "limit": 2000});
    let batch = gateway
        .post("/api/gateway/runs/ledger/batch", asked)
        .await
        .json;
    assert_eq!(batch["runs"].as_object().unwrap().len(), 1);
    assert_eq!(batch["runs"][&run]["items"][0], all["items"][1]);
    let whole = gateway.get("/api/gateway/ledger?after_seq=0").await.json;
    assert_eq!(whole["next_after"], gateway.ledger.tail());
    assert_eq!(
        gateway.get("/api/gateway/ledger/verify").await.json["ok"],
        true
    );
    assert_eq!(
        gateway.get("/api/gateway/ledger/stats").await.json["runs"],
        1
    );
}

#[tokio::test]
async fn a_stream_of_an_ended_run_is_whole_and_ends() {
    let gateway = gateway();
    let run = gateway.start_run().await;
    let body = json!({"command_id": "c", "run_id": run, "type": "cancel", "payload": {}});
    gateway.post("/api/gateway/commands", body).await;
    let last = gateway.get(&format!("/api/gateway/runs/{run}")).await.json["ledger_len"]
        .as_u64()
        .unwrap();
    let path = format!("/api/gateway/runs/{run}/ledger/stream?after=0");
    let request = request(Method::GET, &path)
        .header("last-event-id", "1")
        .body(Body::empty())
        .unwrap();
    let response = gateway.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(text.starts_with("retry: 1000\n\n"), "{text}");
    let ids: Vec<u64> = text
        .lines()
        .filter_map(|l| l.strip_prefix("id: ")?.parse().ok())
        .collect();
    assert_eq!(ids, (2..=last).collect::<Vec<_>>());
    let done = format!(
        "event: done\ndata: {{\"cursor\":{last},\"run_id\":\"{run}\",\"status\":\"terminal\"}}\n\n"
    );
    assert!(text.ends_with(&done), "{text}");
}

#[tokio::test]
async fn a_cursor_beyond_the_end_is_told() {
    let gateway = gateway();
    gateway.start_run().await;
    let tail = gateway.ledger.tail();
    let path = "/api/gateway/ledger/stream?after_seq=999";
    let response = gateway
        .router
        .clone()
        .oneshot(request(Method::GET, path).body(Body::empty()).unwrap())
        .await
        .unwrap();
    gateway.stopping.cancel();
    let text = String::from_utf8(
        response
            .into_body()
            .collect()
            .await
            .unwrap()
            .to_bytes()
            .to_vec(),
    )
    .unwrap();
    let gap = format!(
        "id: {tail}\nevent: gap\ndata: {{\"after\":999,\"reason\":\"after_is_beyond_the_end\",\"resumed_after\":{tail}}}\n\n"
    );
    assert_eq!(text, format!("retry: 1000\n\n{gap}retry: 1000\n\n"));
}

#[tokio::test]
async fn too_many_streams_are_told_to_come_back() {
    let gateway = gateway_with(|config| config.limits.streams = 1);
    let path = "/api/gateway/ledger/stream";
    let open = || {
        gateway
            .router
            .clone()
            .oneshot(request(Method::GET, path).body(Body::empty()).unwrap())
    };
    let first = open().await.unwrap();
    assert_eq!(first.status(), 200);
    let second = open().await.unwrap();
    assert_eq!(
        (
            second.status().as_u16(),
            second.headers()["retry-after"].to_str().unwrap()
        ),
        (429, "1")
    );
    drop(first);
    assert_eq!(open().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_service_is_registered_changed_and_removed() {
    let gateway = gateway();
    let spec = json!({"name": "s", "type": "t", "command": ["/bin/false"], "env": {"SECRET": "xyz"}, "vram_gb": 0});
    let made = gateway.post("/services/register", spec.clone()).await;
    assert_eq!(made.status, 200, "{}", made.json);
    assert!(!made.json.to_string().contains("xyz"));
    let again = gateway.post("/services/register", spec).await;
    assert_eq!(
        (again.status.as_u16(), &again.json["detail"]),
        (409, &json!("Service 's' already exists"))
    );
    let body = Some(json!({"description": "d"}));
    let changed = gateway
        .call(Method::PUT, "/api/gateway/services/s", body)
        .await
        .json;
    assert_eq!(
        (&changed["description"], &changed["command"]),
        (&json!("d"), &json!(["/bin/false"]))
    );
    assert_eq!(
        gateway.post("/services/s/disable", json!({})).await.json["enabled"],
        false
    );
    let listed = gateway.get("/services?enabled=true").await.json;
    assert_eq!(listed["services"], json!({}));
    let refused = gateway.post("/services/s/start", json!({})).await;
    assert_eq!(refused.json["code"], "service_disabled");
    assert_eq!(
        gateway.post("/services/s/stop", json!({})).await.json["status"],
        "already_stopped"
    );
    assert_eq!(
        gateway.get("/services/s/logs?tail=5").await.json["lines"],
        json!([])
    );
    assert_eq!(
        gateway.call(Method::DELETE, "/services/s", None).await.json,
        json!({"deleted": "s"})
    );
    assert_eq!(
        gateway.get("/services/s").await.json["detail"],
        "Unknown service: s"
    );
}

#[tokio::test]
async fn refused_bodies_change_nothing() {
    let gateway = gateway_with(|config| {
        config.max_body_bytes = 1_000;
        config.audit = AuditMode::Off;
    });
    let deep = format!("{}{}", "[".repeat(70), "]".repeat(70));
    let large = format!("\"{}\"", "x".repeat(2_000));
    let cases = [
        ("application/json", "{", 400, "invalid_json"),
        ("application/json", "", 422, "validation_failed"),
        ("application/json", "[]", 422, "validation_failed"),
        (
            "application/json",
            "{\"a\":1,\"a\":2}",
            400,
            "duplicate_member",
        ),
        ("application/json", &deep, 400, "json_too_deep"),
        ("application/json", &large, 413, "body_too_large"),
        ("text/plain", "{}", 415, "unsupported_media_type"),
        (
            "application/x-www-form-urlencoded",
            "{}",
            415,
            "unsupported_media_type",
        ),
    ];
    let before = gateway.ledger.tail();
    for path in [
        "/api/gateway/runs/start",
        "/queue/submit",
        "/api/gateway/commands",
        "/services/register",
    ] {
        for (kind, body, status, code) in cases {
            let request = Request::post(path)
                .header("host", "localhost")
                .header("authorization", format!("Bearer {TOKEN}"))
                .header("content-type", kind);
            let answer = gateway
                .send(request.body(Body::from(body.to_owned())).unwrap())
                .await;
            assert_eq!(
                (answer.status.as_u16(), &answer.json["code"]),
                (status, &json!(code)),
                "{path} {body}"
            );
        }
    }
    assert_eq!(gateway.ledger.tail(), before);
}

#[tokio::test]
async fn the_largest_positions_are_only_far_ahead() {
    let gateway = gateway();
    let run = gateway.start_run().await;
    let last = u64::MAX;
    for path in [
        format!("/api/gateway/runs/{run}/ledger?after={last}"),
        format!("/api/gateway/ledger?after_seq={last}"),
        format!("/api/gateway/ledger/export?after_seq={last}"),
    ] {
        assert_eq!(gateway.get(&path).await.status, 200, "{path}");
        let beyond = path.replace(&last.to_string(), "18446744073709551616");
        assert_eq!(gateway.get(&beyond).await.status, 422, "{beyond}");
    }
    let asked = json!({"runs": [{"run_id": run, "after": last}]});
    let batch = gateway
        .post("/api/gateway/runs/ledger/batch", asked)
        .await
        .json;
    assert_eq!(batch["runs"][&run]["next_after"], last);
}

#[tokio::test]
async fn the_wrong_method_says_which_are_allowed() {
    let answer = gateway()
        .call(Method::DELETE, "/api/gateway/runs/start", None)
        .await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json["code"]),
        (405, &json!("method_not_allowed"))
    );
    assert!(answer.headers["allow"].to_str().unwrap().contains("POST"));
}

#[tokio::test]
async fn metrics_and_gpu_answer_without_a_gpu() {
    let gateway = gateway();
    assert_eq!(gateway.get("/gpu").await.json["available"], false);
    assert_eq!(gateway.get("/vram").await.json["total_mb"], 0);
    assert_eq!(
        gateway.get("/available/t").await.json["recommendation"],
        "use_cloud"
    );
    assert_eq!(gateway.get("/queue/stats").await.json["total_queued"], 0);
    assert_eq!(gateway.get("/metrics").await.status, 200);
}

#[tokio::test]
async fn the_server_serves_and_stops_in_good_order() {
    let gateway = gateway();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(serve(
        listener,
        gateway.router.clone(),
        ListenConfig::default(),
        gateway.stopping.clone(),
    ));
    let mut connection = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "GET /api/gateway/ledger/stream HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("retry:") {
        assert!(connection.read_buf(&mut text).await.unwrap() > 0);
    }
    gateway.stopping.cancel();
    connection.read_to_end(&mut text).await.unwrap();
    assert!(String::from_utf8_lossy(&text).ends_with("0\r\n\r\n"));
    serving.await.unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

/// A reader that took nothing held its connection, and its place among the streams, for as long as it liked.
#[tokio::test]
async fn a_reader_that_stands_still_is_cut_off() {
    let (begun, mut open) = tokio::sync::watch::channel(0_i32);
    let endless = move || {
        let begun = begun.clone();
        begun.send_modify(|open| *open += 1);
        async move {
            let held = Held(begun);
            Body::from_stream(async_stream::stream! {
                let _held = held;
                loop {
                    yield Ok::<_, std::convert::Infallible>(Bytes::from_static(&[0; 1 << 16]));
                }
            })
        }
    };
    let router = Router::new().route("/", axum::routing::get(endless));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = ListenConfig {
        stall_timeout: Duration::from_millis(500),
        ..ListenConfig::default()
    };
    let stopping = CancellationToken::new();
    let serving = tokio::spawn(serve(listener, router, config, stopping.clone()));
    let mut connection = TcpStream::connect(address).await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";
    connection.write_all(request).await.unwrap();
    open.wait_for(|open| *open == 1).await.unwrap();
    let cut = tokio::time::timeout(Duration::from_secs(60), open.wait_for(|open| *open == 0));
    cut.await.expect("it is cut off").unwrap();
    stopping.cancel();
    serving.await.unwrap();
}

/// Tells when an answer has ended.
struct Held(tokio::sync::watch::Sender<i32>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

#[tokio::test]
async fn a_write_that_cannot_be_recorded_is_refused_when_that_is_required() {
    for (audit, status) in [(AuditMode::On, 401), (AuditMode::Required, 503)] {
        let gateway = gateway_with(|config| config.audit = audit)
            .without_coordinator()
            .await;
        let bare = Request::post("/api/gateway/commands").header("host", "localhost");
        let answer = gateway.send(bare.body(Body::empty()).unwrap()).await;
        assert_eq!(answer.status, status);
        if status == 503 {
            assert_eq!(answer.json["code"], "audit_unavailable");
        }
        let body = json!({"job": {"service_type": "t", "payload": {}}});
        let started = gateway.post("/api/gateway/runs/start", body).await;
        assert_eq!(started.status, 503, "{}", started.json);
    }
}

#[tokio::test]
async fn a_weaker_hash_is_renewed_at_the_next_login() {
    let gateway = gateway();
    let users = "/api/gateway/admin/users";
    let made = gateway.post(users, json!({"user_id": "ann"})).await;
    assert_eq!(made.status, 200);
    let ann = UserKey {
        tenant: "default".into(),
        user: "ann".into(),
    };
    let weak = gateway.logins.passwords.hash_weakly("horse");
    let set = IdentityCommand::SetPassword {
        key: ann.clone(),
        password: Some(weak.clone()),
        replaces: None,
    };
    let origin = Origin {
        plane: PlaneId::ROOT,
        actor: "test".into(),
        request_id: None,
        tenancy: Tenancy::All,
        at: crate::clock::now(),
    };
    let set = Command::Identity(Box::new(set));
    gateway.handle.submit(origin, set).await.unwrap();
    let owner = || gateway.ledger.session_owner(&ann, None).unwrap().unwrap();
    let before = owner();
    assert_eq!(before.password, Some(weak.clone()));
    let login = async |password: &str| {
        let body = json!({"user_id": "ann", "password": password});
        gateway.post("/api/gateway/session/login", body).await
    };
    assert_eq!(login("wrong").await.status, 401);
    assert_eq!(owner().password, Some(weak));
    let answer = login("horse").await;
    assert_eq!(answer.status, 200, "{}", answer.json);
    let after = owner();
    let kept = after.password.unwrap().0;
    assert!(
        kept.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
        "{kept}"
    );
    // It is the same password: nobody is logged out.
    assert_eq!(after.era, before.era);
    assert_eq!(login("horse").await.status, 200);
}

/// A gateway's listener, and where it is; both end with the gateway's `stopping`.
async fn listening(gateway: &Gateway, config: ListenConfig) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (router, stopping) = (gateway.router.clone(), gateway.stopping.clone());
    tokio::spawn(serve(listener, router, config, stopping));
    address
}

/// What comes back for these bytes, until the other side closes.
async fn told(address: std::net::SocketAddr, bytes: &[u8]) -> String {
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(bytes).await.unwrap();
    let mut text = Vec::new();
    let read = connection.read_to_end(&mut text);
    let read = tokio::time::timeout(Duration::from_secs(60), read).await;
    read.expect("it is closed").unwrap();
    String::from_utf8(text).unwrap()
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_refused() {
    let gateway = gateway_with(|config| config.body_timeout = Duration::from_millis(200));
    let address = listening(&gateway, ListenConfig::default()).await;
    let head = "POST /api/gateway/session/login HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
        content-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    let answer = told(address, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("\"code\":\"body_timeout\""), "{answer}");
    gateway.stopping.cancel();
}

#[tokio::test]
async fn a_header_that_does_not_arrive_ends_its_connection() {
    let gateway = gateway();
    let config = ListenConfig {
        header_timeout: Duration::from_millis(200),
        ..ListenConfig::default()
    };
    let address = listening(&gateway, config).await;
    for bytes in ["", "GET /livez HTTP/1.1\r\nhost: loc"] {
        let answer = told(address, bytes.as_bytes()).await;
        assert!(!answer.contains(" 200 "), "{answer}");
    }
    gateway.stopping.cancel();
}

/// Anybody may ask, and each asked the coordinator and read a whole table.
#[tokio::test]
async fn probes_share_what_one_of_them_found() {
    let mut gateway = gateway();
    assert_eq!(gateway.get("/readyz").await.status, 200);
    gateway.coordinator.handle.stop().await;
    let ended = std::mem::replace(
        &mut gateway.coordinator.thread,
        std::thread::spawn(|| Ok(())),
    );
    ended.join().unwrap().unwrap();
    assert_eq!(gateway.get("/readyz").await.status, 200);
    let noticed = async {
        while gateway.get("/readyz").await.status != 503 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let noticed = tokio::time::timeout(Duration::from_secs(30), noticed);
    noticed.await.expect("it is told after a second");
}

/// Whoever asked for a long read and left got its place back while the read went on.
#[tokio::test]
async fn a_read_holds_its_place_when_its_caller_has_left() {
    let gateway = gateway_with(|config| config.limits.streams = 1);
    let path = "/api/gateway/ledger/stats";
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let auth = &gateway.app.auth;
    let principal = auth.first_admin(&auth.admin_digest()).unwrap();
    let place = gateway.app.limits.stream(&principal).unwrap();
    let read = gateway.app.scan_in(place, move |_| {
        let _ = wait.recv();
        Ok(())
    });
    let left = tokio::time::timeout(Duration::from_millis(1), read).await;
    assert!(left.is_err());
    assert_eq!(gateway.get(path).await.status, 429);
    drop(go);
    let freed = async {
        while gateway.get(path).await.status != 200 {
            tokio::task::yield_now().await;
        }
    };
    let freed = tokio::time::timeout(Duration::from_secs(30), freed);
    freed.await.expect("its place is free");
}

#[tokio::test]
async fn so_many_reads_go_on_at_once_whoever_has_left() {
    let gateway = gateway();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
    let begun = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    for _ in 0..40 {
        let (wait, begun) = (wait.clone(), begun.clone());
        let read = gateway.app.scan(move |_| {
            begun.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let _ = wait.lock().unwrap().recv();
            Ok(())
        });
        let left = tokio::time::timeout(Duration::from_millis(1), read).await;
        assert!(left.is_err());
    }
    let listed = gateway.get("/api/gateway/ledger?after_seq=0");
    let waits = tokio::time::timeout(Duration::from_millis(50), listed).await;
    assert!(waits.is_err(), "it waits for a place");
    assert!(begun.load(std::sync::atomic::Ordering::SeqCst) <= 32);
    drop(go);
    let listed = gateway.get("/api/gateway/ledger?after_seq=0").await;
    assert_eq!(listed.status, 200);
}

#[tokio::test]
async fn a_stop_comes_before_the_frames_that_are_ready() {
    let gateway = gateway();
    for _ in 0..10 {
        gateway.start_run().await;
    }
    let stream = request(Method::GET, "/api/gateway/ledger/stream");
    let stream = stream.body(Body::empty()).unwrap();
    let response = gateway.router.clone().oneshot(stream).await.unwrap();
    let mut body = response.into_body();
    let is_step = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains("event: step");
    while !is_step(&body.frame().await.unwrap().unwrap().into_data().unwrap()) {}
    gateway.stopping.cancel();
    assert!(!is_step(&body.collect().await.unwrap().to_bytes()));
}

/// A token with one scope is refused by exactly the routes that need another.
#[tokio::test]
async fn a_scope_opens_the_routes_that_need_it_and_no_other() {
    let gateway = gateway();
    let users = "/api/gateway/admin/users";
    let root = json!({"user_id": "root", "roles": ["admin"]});
    let root = gateway.call(Method::POST, users, Some(root)).await;
    let root = root.json["token"].as_str().unwrap().to_owned();
    let by = async |token: &str, method: &str, path: &str, body: Value| {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("authorization", format!("Bearer {token}"))
            .header("content-type", "application/json");
        let request = request.body(Body::from(body.to_string())).unwrap();
        // The body of a stream has no end.
        let response = gateway.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        match parts.status {
            StatusCode::OK if path != "/api/gateway/tokens" => (parts.status, Value::Null),
            status => {
                let bytes = body.collect().await.unwrap().to_bytes();
                (status, serde_json::from_slice(&bytes).unwrap_or_default())
            }
        }
    };
    for scope in Scope::ALL {
        let body = json!({"name": scope.name(), "scopes": [scope.name()]});
        let (_, made) = by(&root, "POST", "/api/gateway/tokens", body).await;
        let token = made["token"].as_str().unwrap();
        for (method, pattern, need) in NEEDS {
            let is_ours = matches!(need, Need::Role(..) | Need::Machine(..) | Need::Own);
            let at_root = ["/metrics"].contains(pattern);
            let prefix = if is_ours && !at_root {
                "/api/gateway"
            } else {
                ""
            };
            let plain: Vec<&str> = pattern
                .split('/')
                .map(|part| {
                    if part.starts_with('{') {
                        "nothing"
                    } else {
                        part
                    }
                })
                .collect();
            let path = format!("{prefix}{}", plain.join("/"));
            let (status, told) = by(token, method, &path, json!({})).await;
            let needed = match need {
                Need::Role(_, needed) | Need::Machine(_, needed) => Some(*needed),
                Need::Own => Some(Scope::All),
                Need::Open | Need::Anyone => None,
            };
            let opens = scope == Scope::All || needed.is_none_or(|needed| needed == scope);
            let refused = told["code"] == "scope_required";
            assert_eq!(
                refused, !opens,
                "{method} {path} with {scope:?}: {status} {told}"
            );
            assert_eq!(
                refused,
                status == StatusCode::FORBIDDEN,
                "{method} {path}: {told}"
            );
            if refused {
                assert_eq!(told["required_scope"], needed.unwrap().name());
            }
        }
    }
}
