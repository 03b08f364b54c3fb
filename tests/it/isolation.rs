//! Who may call what: every route of the OpenAPI document by every kind of caller. The expected statuses stand in
//! one table; a route without a row fails. What belongs to somebody else answers as what does not exist.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::browser::{Browser, LOGOUT};
use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Answer, Gateway, Options, answer, worker_service};

/// What a caller whom the gateway knows gets, in this order: the owner of what is asked for, another user of
/// its tenant, a user of another tenant, a viewer, an operator, a tenant's administrator, the administrator.
type Row = (&'static str, &'static str, [u16; 7]);

const KNOWN: [&str; 7] = [
    "owner",
    "other user",
    "other tenant's user",
    "viewer",
    "operator",
    "tenant admin",
    "admin",
];

/// Everyone.
const ALL: [u16; 7] = [200; 7];
/// One's own only.
const OWN: [u16; 7] = [200, 404, 404, 404, 404, 404, 404];
/// One's own, and all of the tenant for those who operate it.
const SEEN: [u16; 7] = [200, 404, 404, 404, 200, 200, 200];

const fn writers(status: u16) -> [u16; 7] {
    [status, status, status, 403, status, status, status]
}

const fn operators(status: u16) -> [u16; 7] {
    [403, 403, 403, 403, status, status, status]
}

const fn managers(status: u16) -> [u16; 7] {
    [403, 403, 403, 403, 403, status, status]
}

const fn admin(status: u16) -> [u16; 7] {
    [403, 403, 403, 403, 403, 403, status]
}

/// Paths stand without `/api/gateway`; a route of the dialect is called in both places.
const ROWS: &[Row] = &[
    ("GET", "/health", ALL),
    ("GET", "/api/health", ALL),
    ("GET", "/livez", ALL),
    ("GET", "/readyz", ALL),
    ("GET", "/.well-known/jwks.json", ALL),
    ("GET", "/ping", ALL),
    ("GET", "/me", ALL),
    ("GET", "/metrics", operators(200)),
    ("POST", "/runs/start", writers(400)),
    ("GET", "/runs", ALL),
    ("GET", "/runs/{run_id}", SEEN),
    ("GET", "/runs/{run_id}/input_data", SEEN),
    ("GET", "/runs/{run_id}/why", SEEN),
    (
        "POST",
        "/runs/{run_id}/purge",
        [409, 404, 404, 403, 404, 404, 404],
    ),
    ("GET", "/runs/{run_id}/ledger", SEEN),
    ("GET", "/runs/{run_id}/ledger/stream", SEEN),
    ("POST", "/runs/ledger/batch", ALL),
    ("GET", "/runs/{run_id}/checkpoint", [404; 7]),
    (
        "PUT",
        "/runs/{run_id}/checkpoint",
        [409, 404, 404, 403, 404, 404, 404],
    ),
    ("POST", "/commands", writers(200)),
    ("GET", "/commands/{command_id}", SEEN),
    ("GET", "/plane/ledger/stream", ALL),
    ("POST", "/queue/submit", writers(400)),
    ("GET", "/queue/{job_id}", SEEN),
    // The administrator is asked first; then it is cancelled.
    (
        "DELETE",
        "/queue/{job_id}",
        [409, 404, 404, 403, 409, 409, 200],
    ),
    ("GET", "/queue/{job_id}/progress", SEEN),
    (
        "POST",
        "/queue/{job_id}/progress",
        [409, 404, 404, 403, 404, 404, 404],
    ),
    ("GET", "/preempt/check/{service}", [404; 7]),
    ("POST", "/preempt/execute", writers(404)),
    ("POST", "/preempt/release/{service}", writers(404)),
    ("GET", "/queue/stats", ALL),
    ("GET", "/gpu", ALL),
    ("GET", "/vram", ALL),
    ("GET", "/available/{service_type}", ALL),
    ("GET", "/services", ALL),
    ("GET", "/services/{name}", [404; 7]),
    ("GET", "/services/{name}/logs", operators(404)),
    ("POST", "/services/register", operators(400)),
    ("PUT", "/services/{name}", operators(404)),
    ("DELETE", "/services/{name}", operators(404)),
    ("POST", "/services/{name}/enable", operators(404)),
    ("POST", "/services/{name}/disable", operators(404)),
    ("POST", "/services/{name}/start", operators(404)),
    ("POST", "/services/{name}/stop", operators(404)),
    ("POST", "/services/{name}/restart", operators(404)),
    ("GET", "/ledger", admin(200)),
    ("GET", "/ledger/stream", admin(200)),
    ("GET", "/ledger/verify", admin(200)),
    ("GET", "/ledger/stats", admin(200)),
    ("GET", "/ledger/export", admin(200)),
    ("POST", "/admin/signing-keys/rotate", admin(200)),
    ("GET", "/ledger/checkpoint", admin(200)),
    ("GET", "/audit", managers(200)),
    ("GET", "/audit/tail", admin(200)),
    ("POST", "/session/login", [422; 7]),
    ("POST", "/session/logout", ALL),
    ("GET", "/sessions", ALL),
    ("DELETE", "/sessions/{session_id}", OWN),
    ("POST", "/me/password", [422; 7]),
    ("POST", "/admin/users/{user_id}/password", managers(404)),
    ("GET", "/tokens", ALL),
    ("POST", "/tokens", [422; 7]),
    ("DELETE", "/tokens/{token_id}", OWN),
    ("GET", "/admin/users", managers(200)),
    ("POST", "/admin/users", managers(422)),
    ("POST", "/admin/users/import", admin(422)),
    ("GET", "/admin/users/{user_id}", managers(404)),
    ("PATCH", "/admin/users/{user_id}", managers(404)),
    ("DELETE", "/admin/users/{user_id}", managers(404)),
    ("GET", "/admin/tenants", managers(200)),
    ("POST", "/admin/tenants", admin(422)),
    ("GET", "/admin/tenants/{tenant_id}", managers(404)),
    ("PATCH", "/admin/tenants/{tenant_id}", admin(404)),
    ("GET", "/admin/runtime-reservations", admin(200)),
    (
        "POST",
        "/admin/runtime-reservations/{runtime_id}/transfer",
        admin(404),
    ),
    (
        "POST",
        "/admin/runtime-reservations/{runtime_id}/purge",
        admin(404),
    ),
];

/// What the token of somebody else's job is good for: nothing. The routes that such a token has know its own run.
fn by_job_token(method: &str, path: &str) -> u16 {
    match (method, path) {
        ("GET", "/runs/{run_id}/input_data")
        | ("GET" | "PUT", "/runs/{run_id}/checkpoint")
        | ("POST", "/queue/{job_id}/progress") => 404,
        _ => 403,
    }
}

/// A gateway with one caller of each kind.
struct World {
    gateway: Gateway,
    /// A service that holds a job of the administrator's, and that job's token.
    _holding: Scripted,
    job_token: String,
    /// By `KNOWN`, each with a token.
    known: BTreeMap<&'static str, String>,
    /// Whom the gateway does not let in.
    refused: Vec<(&'static str, Shows)>,
    /// The administrator's browser, whose CSRF token is not shown.
    browser: Browser,
}

/// What a caller shows of itself.
#[derive(Clone)]
enum Shows {
    Nothing,
    Token(String),
    /// The cookies of a browser, and the CSRF token.
    Session(Browser),
    /// The cookies alone.
    Cookies(Browser),
}

impl Shows {
    fn on(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match self {
            Shows::Nothing => request,
            Shows::Token(token) => request.bearer_auth(token),
            Shows::Session(browser) => request
                .header("cookie", &browser.cookie)
                .header("x-abstractgateway-csrf", &browser.csrf),
            Shows::Cookies(browser) => request.header("cookie", &browser.cookie),
        }
    }
}

pub async fn user(gateway: &Gateway, body: Value) -> String {
    let answer = gateway.post("/api/gateway/admin/users", body).await;
    let body = answer.expect(200);
    body["token"].as_str().expect("a token").to_owned()
}

pub async fn call(
    gateway: &Gateway,
    token: &str,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> Answer {
    let request = gateway.bare(method, path).bearer_auth(token);
    answer(match body {
        Some(body) => request.json(&body),
        None => request,
    })
    .await
}

impl World {
    async fn start() -> World {
        let gateway = Gateway::start(Options::default()).await;
        let g = &gateway;
        let mut known = BTreeMap::new();
        known.insert("admin", gateway.token().to_owned());
        for (name, body) in [
            ("owner", json!({"user_id": "owner"})),
            ("other user", json!({"user_id": "other"})),
            (
                "other tenant's user",
                json!({"user_id": "owner", "tenant_id": "acme"}),
            ),
            ("viewer", json!({"user_id": "vera", "roles": ["viewer"]})),
            (
                "operator",
                json!({"user_id": "olga", "roles": ["operator"]}),
            ),
            (
                "tenant admin",
                json!({"user_id": "tara", "roles": ["tenant_admin"]}),
            ),
        ] {
            known.insert(name, user(g, body).await);
        }
        let disabled = user(g, json!({"user_id": "dora"})).await;
        let off = json!({"enabled": false});
        let dora = "/api/gateway/admin/users/dora";
        let admin = gateway.token();
        call(g, admin, Method::PATCH, dora, Some(off))
            .await
            .expect(200);
        let other = known["other user"].clone();
        let new = |name: &str| json!({"name": name, "expires_in_s": 1});
        let tokens = "/api/gateway/tokens";
        let expired = call(g, &other, Method::POST, tokens, Some(new("short")))
            .await
            .expect(200);
        let revoked = call(
            g,
            &other,
            Method::POST,
            tokens,
            Some(json!({"name": "gone"})),
        )
        .await
        .expect(200);
        let id = revoked["token_id"].as_str().unwrap();
        let path = format!("{tokens}/{id}");
        call(g, &other, Method::DELETE, &path, None)
            .await
            .expect(200);
        let text = |body: &Value| body["token"].as_str().unwrap().to_owned();
        let (expired, revoked) = (text(&expired), text(&revoked));
        until("the token has expired", || async {
            call(g, &expired, Method::GET, "/api/gateway/me", None)
                .await
                .status
                == 401
        })
        .await;
        let mut wrong = other.clone();
        let last = if wrong.pop() == Some('0') { '1' } else { '0' };
        wrong.push(last);
        let ended = Browser::by_token(g, "other", &other).await;
        ended.call(g, Method::POST, LOGOUT, None).await.expect(200);
        let browser = Browser::by_token(g, "admin", g.token()).await;
        let refused = vec![
            ("nobody", Shows::Nothing),
            ("wrong token", Shows::Token(wrong)),
            ("disabled user", Shows::Token(disabled)),
            ("revoked token", Shows::Token(revoked)),
            ("expired token", Shows::Token(expired)),
            ("ended session", Shows::Session(ended)),
        ];
        let holding = Scripted::start().await;
        gateway
            .register(holding.service("holding", "holding"))
            .await;
        let job = json!({"service_type": "holding", "payload": {"hold": true}});
        gateway.start_job(job).await;
        until("it is held", || async { !holding.jobs().is_empty() }).await;
        let job_token = holding.jobs()[0].header("x-rungate-token").to_owned();
        World {
            gateway,
            _holding: holding,
            job_token,
            known,
            refused,
            browser,
        }
    }

    /// Something of the owner's for each place of a path, fresh.
    async fn owned(&self, place: &str) -> String {
        let owner = &self.known["owner"];
        let post = async |path: &str, body: Value| {
            call(&self.gateway, owner, Method::POST, path, Some(body))
                .await
                .expect(200)
        };
        let run = async || {
            let body = json!({"job": {"service_type": "t", "payload": {"n": 1}}});
            let started = post("/api/gateway/runs/start", body).await;
            started["run_id"].as_str().unwrap().to_owned()
        };
        match place {
            "run_id" | "job_id" => run().await,
            "command_id" => {
                let id = uuid::Uuid::new_v4().to_string();
                let body = json!({"command_id": id, "run_id": run().await, "type": "pause", "payload": {}});
                post("/api/gateway/commands", body).await;
                id
            }
            "token_id" => {
                let body = json!({"name": uuid::Uuid::new_v4().to_string()});
                let made = post("/api/gateway/tokens", body).await;
                made["token_id"].as_str().unwrap().to_owned()
            }
            "session_id" => {
                let browser = Browser::by_token(&self.gateway, "owner", owner).await;
                let id = browser.body["session"]["session_id"].as_str();
                id.unwrap().to_owned()
            }
            // Shared by all, or the administrators': one that does not exist has no effect.
            _ => "nothing".to_owned(),
        }
    }

    /// The status and body of one call; a stream's body is not waited for.
    async fn status(&self, shows: &Shows, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let method: Method = method.parse().unwrap();
        let mut request = shows.on(self.gateway.bare(method.clone(), path));
        if method == Method::POST || method == Method::PUT || method == Method::PATCH {
            request = request.json(body);
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let body = match status {
            200 => Value::Null,
            _ => response.json().await.unwrap(),
        };
        (status, body)
    }
}

/// A body that names what is the owner's, where the route takes one.
fn body_of(path: &str, run: &str) -> Value {
    match path {
        "/commands" => json!({"command_id": "", "run_id": run, "type": "pause"}),
        "/runs/ledger/batch" => json!({"runs": [{"run_id": run}]}),
        "/preempt/execute" => json!({"service_name": "nothing", "preemptor_job_id": run}),
        _ => json!({}),
    }
}

/// The place of a path that names something.
fn place(path: &str) -> Option<&str> {
    let start = path.find('{')? + 1;
    let end = path.find('}')?;
    Some(&path[start..end])
}

/// What of a refusal must not depend on whether the thing exists.
fn shape(body: &Value, id: &str) -> String {
    let mut body = body.clone();
    if let Some(members) = body.as_object_mut() {
        members.remove("request_id");
    }
    body.to_string().replace(id, "<id>")
}

#[tokio::test]
async fn every_route_answers_every_kind_of_caller_as_the_table_says() {
    let world = World::start().await;
    let api = world.gateway.get("/openapi.json").await.expect(200);
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (path, item) in api["paths"].as_object().unwrap() {
        let short = path.strip_prefix("/api/gateway").unwrap_or(path);
        for method in item.as_object().unwrap().keys() {
            let method = method.to_uppercase();
            let row = ROWS
                .iter()
                .find(|(of, row, _)| *of == method && *row == short);
            let Some((_, _, expected)) = row else {
                wrong.push(format!("{method} {path} has no row"));
                continue;
            };
            seen += 1;
            check(&world, &method, path, short, expected, &mut wrong).await;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen >= ROWS.len());
    world
        .gateway
        .get("/api/gateway/ledger/verify")
        .await
        .expect(200);
}

async fn check(
    world: &World,
    method: &str,
    path: &str,
    short: &str,
    expected: &[u16; 7],
    wrong: &mut Vec<String>,
) {
    // Nobody is asked who it is: all get the same.
    let open = match short {
        "/health" | "/api/health" | "/livez" | "/readyz" | "/.well-known/jwks.json" => Some(200),
        "/session/login" => Some(422),
        _ => None,
    };
    let place = place(path);
    let id = world.owned(place.unwrap_or("run_id")).await;
    let unknown = uuid::Uuid::now_v7().to_string();
    let named = |id: &str| match place {
        Some(place) => path.replace(&format!("{{{place}}}"), id),
        None => path.to_owned(),
    };
    let body = body_of(short, &id);
    // Last of all, who is let in to read and may not write for want of the CSRF token.
    let cookies = ("missing CSRF", Shows::Cookies(world.browser.clone()));
    for (who, shows) in world.refused.iter().chain([&cookies]) {
        let (status, _) = world.status(shows, method, &named(&id), &body).await;
        let expected = match (*who, method) {
            ("missing CSRF", "GET") => expected[6],
            ("missing CSRF", _) => 403,
            _ => 401,
        };
        let expected = open.unwrap_or(expected);
        if status != expected {
            wrong.push(format!(
                "{method} {path} by {who}: {status}, not {expected}"
            ));
        }
    }
    let token = Shows::Token(world.job_token.clone());
    let (status, answer) = world.status(&token, method, &named(&id), &body).await;
    let expected_of_job = open.unwrap_or_else(|| by_job_token(method, short));
    if status != expected_of_job {
        wrong.push(format!(
            "{method} {path} by another run's job token: {status}, not {expected_of_job}: {answer}"
        ));
    }
    // The owner comes last: what it does may be the end of the thing.
    for (who, expected) in KNOWN.iter().zip(expected).rev() {
        let shows = Shows::Token(world.known[who].clone());
        let (status, answer) = world.status(&shows, method, &named(&id), &body).await;
        if status != *expected {
            wrong.push(format!(
                "{method} {path} by {who}: {status}, not {expected}: {answer}"
            ));
        }
        // Those who see the run are told that it has no checkpoint.
        let sees = matches!(*who, "operator" | "tenant admin" | "admin")
            && (method, short) == ("GET", "/runs/{run_id}/checkpoint");
        if status == 404 && *who != "owner" && !sees && !matches!(place, Some("name" | "service")) {
            let body = body_of(short, &unknown);
            let (other, told) = world.status(&shows, method, &named(&unknown), &body).await;
            if other != status || shape(&told, &unknown) != shape(&answer, &id) {
                wrong.push(format!(
                    "{method} {path} tells {who} what exists: {answer}, {told}"
                ));
            }
        }
    }
}

#[tokio::test]
async fn lists_batches_and_streams_hold_ones_own_only() {
    let world = World::start().await;
    let (gateway, other) = (&world.gateway, world.known["other user"].as_str());
    let theirs = world.owned("run_id").await;
    let body = json!({"job": {"service_type": "t", "payload": {}}});
    let started = call(
        gateway,
        other,
        Method::POST,
        "/api/gateway/runs/start",
        Some(body),
    )
    .await;
    let ours = started.expect(200)["run_id"].as_str().unwrap().to_owned();

    let list = call(gateway, other, Method::GET, "/api/gateway/runs", None)
        .await
        .expect(200);
    let ids: Vec<&Value> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|run| &run["run_id"])
        .collect();
    assert_eq!(ids, [&json!(ours)]);

    let asked = json!({"runs": [{"run_id": theirs}, {"run_id": ours}]});
    let path = "/api/gateway/runs/ledger/batch";
    let pages = call(gateway, other, Method::POST, path, Some(asked))
        .await
        .expect(200);
    let pages: Vec<&String> = pages["runs"].as_object().unwrap().keys().collect();
    assert_eq!(pages, [&ours]);

    // A command for a foreign run is taken in and rejected like one for a run that does not exist.
    let mut told = Vec::new();
    for run in [theirs.clone(), uuid::Uuid::now_v7().to_string()] {
        let id = uuid::Uuid::new_v4().to_string();
        let body = json!({"command_id": id, "run_id": run, "type": "cancel"});
        call(
            gateway,
            other,
            Method::POST,
            "/api/gateway/commands",
            Some(body),
        )
        .await
        .expect(200);
        let path = format!("/api/gateway/commands/{id}");
        let view = call(gateway, other, Method::GET, &path, None)
            .await
            .expect(200);
        told.push((view["state"].clone(), view["code"].clone()));
    }
    assert_eq!(told[0], (json!("rejected"), json!("run_not_found")));
    assert_eq!(told[0], told[1]);

    // The same command id and Idempotency-Key mean nothing in another plane.
    let key = |token: &str| {
        let body = json!({"job": {"service_type": "t", "payload": {}}});
        let request = gateway.bare(Method::POST, "/api/gateway/runs/start");
        answer(
            request
                .bearer_auth(token)
                .header("idempotency-key", "k")
                .json(&body),
        )
    };
    let first = key(other).await.expect(200);
    let second = key(&world.known["owner"]).await.expect(200);
    assert_ne!(first["run_id"], second["run_id"]);
    let owner = &world.known["owner"];
    let path = format!("/api/gateway/runs/{theirs}");
    let run = call(gateway, owner, Method::GET, &path, None)
        .await
        .expect(200);
    assert_eq!(run["status"], "waiting");
}

#[tokio::test]
async fn a_denial_says_what_is_lacking() {
    let world = World::start().await;
    let path = "/api/gateway/admin/users";
    let owner = &world.known["owner"];
    let denied = call(&world.gateway, owner, Method::GET, path, None)
        .await
        .expect(403);
    assert_eq!(denied["reason_code"], "admin_required");
    assert_eq!(denied["resource_class"], "admin");
    assert_eq!(denied["action"], "read");
    let path = "/api/gateway/ledger/export";
    let denied = call(&world.gateway, owner, Method::GET, path, None)
        .await
        .expect(403);
    assert_eq!(denied["detail"], "Admin principal required");
    assert_eq!(denied["reason_code"], "admin_required");

    let body = json!({"name": "reader", "scopes": ["runs:read"]});
    let made = call(
        &world.gateway,
        owner,
        Method::POST,
        "/api/gateway/tokens",
        Some(body),
    )
    .await;
    let made = made.expect(200);
    let reader = made["token"].as_str().unwrap();
    call(
        &world.gateway,
        reader,
        Method::GET,
        "/api/gateway/runs",
        None,
    )
    .await
    .expect(200);
    call(&world.gateway, reader, Method::GET, "/api/gateway/me", None)
        .await
        .expect(200);
    for (method, path) in [
        (Method::POST, "/api/gateway/runs/start"),
        (Method::GET, "/api/gateway/services"),
        (Method::POST, "/api/gateway/tokens"),
    ] {
        let denied = call(&world.gateway, reader, method, path, Some(json!({})))
            .await
            .expect(403);
        assert_eq!(denied["reason_code"], "scope_required", "{path}");
    }
}

#[tokio::test]
async fn a_preemptor_of_another_plane_is_not_named() {
    let options = Options::default().set("RUNGATE_MIN_RUNTIME_MS", "0");
    let gateway = Gateway::start(options).await;
    let service = worker_service(&gateway, "w", "w", json!({}));
    gateway.register(service).await;
    let ann = user(&gateway, json!({"user_id": "ann"})).await;
    let bob = user(&gateway, json!({"user_id": "bob"})).await;
    let start = async |token: &str, priority: u8| {
        let payload = json!({"operation": "sleep", "ms": 600_000});
        let job = json!({"service_type": "w", "payload": payload, "priority": priority});
        let path = "/api/gateway/runs/start";
        let started = call(
            &gateway,
            token,
            Method::POST,
            path,
            Some(json!({"job": job})),
        )
        .await;
        started.expect(200)["run_id"].as_str().unwrap().to_owned()
    };
    let read =
        async |token: &str, path: &str| call(&gateway, token, Method::GET, path, None).await.text;
    let becomes = async |token: &str, run: &str, state: &str| {
        let path = format!("/api/gateway/runs/{run}");
        until(state, || async {
            let answer = call(&gateway, token, Method::GET, &path, None).await;
            answer.json["job"]["state"] == state
        })
        .await;
    };
    let victim = start(&ann, 5).await;
    becomes(&ann, &victim, "running").await;

    // Nobody but the scheduler takes a place from another plane's run.
    let waiting = start(&bob, 5).await;
    let body = json!({"service_name": "w", "preemptor_job_id": waiting});
    let refused = call(&gateway, &bob, Method::POST, "/preempt/execute", Some(body)).await;
    assert_eq!(refused.expect(409)["code"], "no_active_job");
    assert!(!read(&bob, "/preempt/check/w").await.contains(&victim));
    assert!(!read(&bob, "/services/w").await.contains(&victim));
    assert!(read(&ann, "/services/w").await.contains(&victim));
    assert!(read(gateway.token(), "/services").await.contains(&victim));

    let urgent = start(&bob, 1).await;
    becomes(&ann, &victim, "preempted").await;
    let released = call(&gateway, &bob, Method::POST, "/preempt/release/w", None).await;
    assert_eq!(released.expect(200)["count"], 0);
    for path in [
        format!("/api/gateway/runs/{victim}"),
        "/api/gateway/runs".to_owned(),
        format!("/api/gateway/runs/{victim}/why"),
        format!("/api/gateway/runs/{victim}/ledger"),
        format!("/queue/{victim}"),
        "/services".to_owned(),
        "/gpu".to_owned(),
        "/queue/stats".to_owned(),
    ] {
        let text = read(&ann, &path).await;
        assert!(!text.contains(&urgent), "{path}: {text}");
    }
    let text = read(&ann, &format!("/api/gateway/runs/{victim}/ledger")).await;
    assert!(text.contains("job_preempted"));
}

#[tokio::test]
async fn a_stream_ends_soon_after_its_readers_token() {
    let gateway = Gateway::start(Options::default()).await;
    let ann = user(&gateway, json!({"user_id": "ann"})).await;
    let path = "/api/gateway/plane/ledger/stream?heartbeat_s=0.2";
    let request = gateway.bare(Method::GET, path).bearer_auth(&ann);
    let mut response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.chunk().await.unwrap().is_some());
    let off = Some(json!({"enabled": false}));
    let user = "/api/gateway/admin/users/ann";
    call(&gateway, gateway.token(), Method::PATCH, user, off)
        .await
        .expect(200);
    // The client's own time limit fails the test when it does not end.
    while response.chunk().await.unwrap().is_some() {}
}
