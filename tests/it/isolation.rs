//! Who may call what: every route of the OpenAPI document by every kind of caller. The expected statuses stand in
//! one table; a route without a row fails. What belongs to somebody else answers as what does not exist.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::browser::{Browser, LOGOUT};
use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Answer, Gateway, Options, answer, worker_service};

/// What a caller whom the gateway knows gets, by `KNOWN`. Who asks for something of the owner's, or of the tenant
/// `globex`, where nobody of them is at home.
type Row = (&'static str, &'static str, [u16; 10]);

const KNOWN: [&str; 10] = [
    "owner",
    "other user",
    "viewer",
    "operator",
    "tenant admin",
    "other tenant's user",
    "other tenant's viewer",
    "other tenant's operator",
    "other tenant's admin",
    "admin",
];

/// Everyone.
const ALL: [u16; 10] = [200; 10];
/// One's own only.
const OWN: [u16; 10] = [200, 404, 404, 404, 404, 404, 404, 404, 404, 404];
/// One's own, and all of the tenant for those who operate it.
const SEEN: [u16; 10] = [200, 404, 404, 200, 200, 404, 404, 404, 404, 200];
/// The same, of what has none.
const NO_OUTPUT: [u16; 10] = [409, 404, 404, 409, 409, 404, 404, 404, 404, 409];
/// Of a tenant that none of them is of: the administrator's.
const FOREIGN: [u16; 10] = [404, 404, 404, 404, 404, 404, 404, 404, 404, 200];

/// Whoever may write at all.
const fn writers(others: u16, admin: u16) -> [u16; 10] {
    let n = others;
    [n, n, 403, n, n, n, 403, n, n, admin]
}

const fn operators(others: u16, admin: u16) -> [u16; 10] {
    let n = others;
    [403, 403, 403, n, n, 403, 403, n, n, admin]
}

const fn managers(others: u16, admin: u16) -> [u16; 10] {
    [403, 403, 403, 403, others, 403, 403, 403, others, admin]
}

const fn admin(status: u16) -> [u16; 10] {
    [403, 403, 403, 403, 403, 403, 403, 403, 403, status]
}

/// One's own to change: not the operators'.
const fn own_write(status: u16) -> [u16; 10] {
    [status, 404, 403, 404, 404, 404, 403, 404, 404, 404]
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
    // Numbers of all planes: for those who run the machine.
    (
        "GET",
        "/metrics",
        [403, 403, 403, 200, 200, 403, 403, 403, 403, 200],
    ),
    ("POST", "/runs/start", writers(200, 200)),
    ("GET", "/runs", ALL),
    ("GET", "/runs/{run_id}", SEEN),
    ("GET", "/runs/{run_id}/input_data", SEEN),
    ("GET", "/runs/{run_id}/why", SEEN),
    ("POST", "/runs/{run_id}/purge", own_write(409)),
    // Of a run without a container of its own; of others `docker::jobs` has it.
    ("GET", "/runs/{run_id}/output", NO_OUTPUT),
    ("GET", "/runs/{run_id}/output/content", NO_OUTPUT),
    ("GET", "/runs/{run_id}/ledger", SEEN),
    ("GET", "/runs/{run_id}/ledger/stream", SEEN),
    ("POST", "/runs/ledger/batch", ALL),
    ("GET", "/runs/{run_id}/checkpoint", [404; 10]),
    ("PUT", "/runs/{run_id}/checkpoint", own_write(409)),
    ("POST", "/commands", writers(200, 200)),
    ("GET", "/commands/{command_id}", SEEN),
    ("GET", "/plane/ledger/stream", ALL),
    ("POST", "/queue/submit", writers(200, 200)),
    ("GET", "/queue/{job_id}", SEEN),
    // The administrator is asked first; then it is cancelled.
    (
        "DELETE",
        "/queue/{job_id}",
        [409, 404, 403, 409, 409, 404, 403, 404, 404, 200],
    ),
    ("GET", "/queue/{job_id}/progress", SEEN),
    ("POST", "/queue/{job_id}/progress", own_write(409)),
    ("GET", "/preempt/check/{service}", FOREIGN),
    // Of a shared service; whoever may not steer the run knows nothing of it.
    ("POST", "/preempt/execute", own_write(409)),
    ("POST", "/preempt/release/{service}", writers(404, 200)),
    ("GET", "/queue/stats", ALL),
    ("GET", "/gpu", ALL),
    ("GET", "/vram", ALL),
    ("GET", "/containers", admin(200)),
    ("GET", "/gpu/samples", ALL),
    ("GET", "/gpu/history", ALL),
    ("POST", "/gpu/{uuid}/release", admin(404)),
    ("GET", "/available/{service_type}", ALL),
    ("GET", "/services", ALL),
    ("GET", "/services/{name}", FOREIGN),
    ("GET", "/services/{name}/logs", operators(404, 200)),
    ("POST", "/services/register", operators(200, 200)),
    ("PUT", "/services/{name}", operators(404, 200)),
    ("DELETE", "/services/{name}", operators(404, 200)),
    ("POST", "/services/{name}/enable", operators(404, 200)),
    ("POST", "/services/{name}/disable", operators(404, 200)),
    ("POST", "/services/{name}/start", operators(404, 200)),
    ("POST", "/services/{name}/stop", operators(404, 200)),
    ("POST", "/services/{name}/restart", operators(404, 200)),
    ("GET", "/ledger", admin(200)),
    ("GET", "/ledger/stream", admin(200)),
    ("GET", "/ledger/verify", admin(200)),
    ("GET", "/ledger/stats", admin(200)),
    ("GET", "/ledger/export", admin(200)),
    ("POST", "/admin/signing-keys/rotate", admin(200)),
    ("GET", "/ledger/checkpoint", admin(200)),
    ("GET", "/audit", managers(200, 200)),
    ("GET", "/audit/tail", admin(200)),
    ("POST", "/session/login", [422; 10]),
    ("POST", "/session/logout", ALL),
    ("GET", "/sessions", ALL),
    ("DELETE", "/sessions/{session_id}", OWN),
    ("POST", "/me/password", [422; 10]),
    (
        "POST",
        "/admin/users/{user_id}/password",
        managers(404, 200),
    ),
    ("GET", "/tokens", ALL),
    ("POST", "/tokens", ALL),
    ("DELETE", "/tokens/{token_id}", OWN),
    ("GET", "/admin/users", managers(200, 200)),
    ("POST", "/admin/users", managers(200, 200)),
    ("POST", "/admin/users/import", admin(200)),
    ("GET", "/admin/users/{user_id}", managers(404, 200)),
    ("PATCH", "/admin/users/{user_id}", managers(404, 200)),
    ("DELETE", "/admin/users/{user_id}", managers(404, 200)),
    ("GET", "/admin/tenants", managers(200, 200)),
    ("POST", "/admin/tenants", admin(200)),
    ("GET", "/admin/tenants/{tenant_id}", managers(404, 200)),
    ("PATCH", "/admin/tenants/{tenant_id}", admin(200)),
    (
        "GET",
        "/admin/tenants/{tenant_id}/notify",
        managers(404, 200),
    ),
    (
        "PUT",
        "/admin/tenants/{tenant_id}/notify",
        managers(404, 200),
    ),
    // Nothing is set there, which those who manage the tenant are told.
    (
        "POST",
        "/admin/tenants/{tenant_id}/notify/test",
        managers(404, 409),
    ),
    ("GET", "/admin/runtime-reservations", admin(200)),
    (
        "POST",
        "/admin/runtime-reservations/{runtime_id}/transfer",
        admin(200),
    ),
    (
        "POST",
        "/admin/runtime-reservations/{runtime_id}/purge",
        admin(200),
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
    holding: Scripted,
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
            (
                "other tenant's viewer",
                json!({"user_id": "vera", "tenant_id": "acme", "roles": ["viewer"]}),
            ),
            (
                "other tenant's operator",
                json!({"user_id": "olga", "tenant_id": "acme", "roles": ["operator"]}),
            ),
            (
                "other tenant's admin",
                json!({"user_id": "tara", "tenant_id": "acme", "roles": ["tenant_admin"]}),
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
        // Of the tenant that things are of which none of them may see.
        user(g, json!({"user_id": "gus", "tenant_id": "globex"})).await;
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
            holding,
            job_token,
            known,
            refused,
            browser,
        }
    }

    /// Something for each place of a path, fresh: of the owner's, or of the tenant `globex`.
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
        let id = uuid::Uuid::now_v7().to_string();
        let users = "/api/gateway/admin/users";
        match place {
            "run_id" | "job_id" => return run().await,
            "command_id" => {
                let body = json!({"command_id": id, "run_id": run().await, "type": "pause", "payload": {}});
                post("/api/gateway/commands", body).await;
            }
            "token_id" => {
                let body = json!({"name": id});
                let made = post("/api/gateway/tokens", body).await;
                return made["token_id"].as_str().unwrap().to_owned();
            }
            "session_id" => {
                let browser = Browser::by_token(&self.gateway, "owner", owner).await;
                let id = browser.body["session"]["session_id"].as_str();
                return id.unwrap().to_owned();
            }
            "name" | "service" => {
                let mut service = self.holding.service(&id, "foreign");
                service["tenant"] = json!("globex");
                self.gateway.register(service).await;
            }
            "user_id" | "runtime_id" => {
                let body = json!({"user_id": id, "tenant_id": "globex"});
                self.gateway.post(users, body).await.expect(200);
                if place == "runtime_id" {
                    // Nobody has it any more.
                    let path = format!("{users}/{id}?tenant_id=globex");
                    self.gateway.delete(&path).await.expect(200);
                }
            }
            "tenant_id" => {
                let body = json!({"tenant_id": id});
                let path = "/api/gateway/admin/tenants";
                self.gateway.post(path, body).await.expect(200);
            }
            "service_type" | "uuid" => {}
            other => panic!("what is a '{other}'?"),
        }
        id
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
        if method == Method::HEAD {
            assert_eq!(response.bytes().await.unwrap(), "", "HEAD {path}");
            return (status, Value::Null);
        }
        let body = match status {
            200 => Value::Null,
            _ => response.json().await.unwrap(),
        };
        (status, body)
    }
}

/// A sound body, about `id` where the route takes one that names something. What it makes is new each time.
fn body_of(method: &str, path: &str, id: &str) -> Value {
    let new = uuid::Uuid::new_v4().to_string();
    let url = "http://127.0.0.1:9/";
    match (method, path) {
        ("POST", "/commands") => json!({"command_id": "", "run_id": id, "type": "pause"}),
        ("POST", "/runs/ledger/batch") => json!({"runs": [{"run_id": id}]}),
        ("POST", "/preempt/execute") => json!({"service_name": "holding", "preemptor_job_id": id}),
        ("POST", "/runs/start") => json!({"job": {"service_type": "t", "payload": {}}}),
        ("POST", "/queue/submit") => json!({"service_type": "t", "payload": {}}),
        ("POST", "/services/register") => json!({"name": new, "type": "new", "url": url}),
        ("PUT", "/services/{name}") => json!({"description": "changed"}),
        ("POST", "/tokens") => json!({"name": new}),
        ("POST", "/admin/users") => json!({"user_id": new}),
        ("POST", "/admin/users/import") => json!({"users": []}),
        ("PATCH", "/admin/users/{user_id}") => json!({"email": "a@example.com"}),
        ("POST", "/admin/users/{user_id}/password") => json!({"password": null}),
        ("POST", "/admin/tenants") => json!({"tenant_id": new}),
        ("PATCH", "/admin/tenants/{tenant_id}") => json!({"weight": 200}),
        ("PUT", "/admin/tenants/{tenant_id}/notify") => json!({"ntfy": null}),
        ("POST", "/admin/runtime-reservations/{runtime_id}/transfer") => {
            json!({"tenant_id": "globex", "confirm_runtime_id": id, "target_user_id": "gus"})
        }
        ("POST", "/admin/runtime-reservations/{runtime_id}/purge") => {
            json!({"tenant_id": "globex", "confirm_runtime_id": id})
        }
        _ => json!({}),
    }
}

/// The path with what it names in its place, in its tenant.
fn named(path: &str, id: &str) -> String {
    match place(path) {
        Some("user_id") => format!("{}?tenant_id=globex", path.replace("{user_id}", id)),
        Some(place) => path.replace(&format!("{{{place}}}"), id),
        None => path.to_owned(),
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
    expected: &[u16; 10],
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
    // A GET is asked for its head too.
    let methods: &[&str] = match method {
        "GET" => &["HEAD", "GET"],
        _ => &[method],
    };
    let mut compare = |who: &str, status: u16, expected: u16, answer: &Value| {
        if status != expected {
            wrong.push(format!(
                "{method} {path} by {who}: {status}, not {expected}: {answer}"
            ));
        }
    };
    // Last of all, who is let in to read and may not write for want of the CSRF token.
    let cookies = ("missing CSRF", Shows::Cookies(world.browser.clone()));
    for (who, shows) in world.refused.iter().chain([&cookies]) {
        let expected = match (*who, method) {
            ("missing CSRF", "GET") => expected[9],
            ("missing CSRF", _) => 403,
            _ => 401,
        };
        for method in methods {
            let body = body_of(method, short, &id);
            let told = world.status(shows, method, &named(path, &id), &body).await;
            compare(who, told.0, open.unwrap_or(expected), &told.1);
        }
    }
    let token = Shows::Token(world.job_token.clone());
    let body = body_of(method, short, &id);
    let told = world.status(&token, method, &named(path, &id), &body).await;
    let by_job = open.unwrap_or_else(|| by_job_token(method, short));
    compare("another run's job token", told.0, by_job, &told.1);
    // Whose it is comes last: what it does may be the end of the thing.
    let is_globex = matches!(
        place,
        Some("name" | "service" | "user_id" | "runtime_id" | "tenant_id")
    );
    let mut callers: Vec<(&str, u16)> = KNOWN.into_iter().zip(*expected).collect();
    if !is_globex {
        callers.reverse();
    }
    let mut told_apart = Vec::new();
    for (who, expected) in callers {
        let shows = Shows::Token(world.known[who].clone());
        for method in methods {
            let body = body_of(method, short, &id);
            let (status, answer) = world.status(&shows, method, &named(path, &id), &body).await;
            compare(who, status, expected, &answer);
            // Those who see the run are told that it has no checkpoint.
            let sees = matches!(who, "operator" | "tenant admin" | "admin")
                && (*method, short) == ("GET", "/runs/{run_id}/checkpoint");
            if status != 404 || who == "owner" && !is_globex || sees {
                continue;
            }
            let body = body_of(method, short, &unknown);
            let path = named(path, &unknown);
            let (other, told) = world.status(&shows, method, &path, &body).await;
            if other != status || shape(&told, &unknown) != shape(&answer, &id) {
                told_apart.push(format!(
                    "{method} {path} tells {who} what exists: {answer}, {told}"
                ));
            }
        }
    }
    wrong.append(&mut told_apart);
}

/// How long the answers take tells no more than what they say: foreign and unknown ids in turns, medians compared.
#[tokio::test]
async fn a_foreign_id_takes_no_longer_than_an_unknown_one() {
    let world = World::start().await;
    let operator = Shows::Token(world.known["other tenant's operator"].clone());
    for (path, place) in [
        ("/api/gateway/runs/{}", "run_id"),
        ("/api/gateway/runs/{}/ledger", "run_id"),
        ("/queue/{}", "job_id"),
        ("/api/gateway/commands/{}", "command_id"),
        ("/services/{}", "name"),
        ("/api/gateway/services/{}/logs", "name"),
    ] {
        let foreign = world.owned(place).await;
        let (mut took, mut unknown_took) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            let unknown = uuid::Uuid::now_v7().to_string();
            for (id, times) in [(&foreign, &mut took), (&unknown, &mut unknown_took)] {
                let path = path.replace("{}", id);
                let started = std::time::Instant::now();
                let (status, _) = world.status(&operator, "GET", &path, &Value::Null).await;
                times.push(started.elapsed());
                assert_eq!(status, 404, "{path}");
            }
        }
        let median = |mut times: Vec<std::time::Duration>| {
            times.sort_unstable();
            times[times.len() / 2]
        };
        let (took, unknown_took) = (median(took), median(unknown_took));
        assert!(
            took < unknown_took * 2 && unknown_took < took * 2,
            "{path}: {took:?} of a foreign one, {unknown_took:?} of an unknown one"
        );
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
