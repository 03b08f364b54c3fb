//! No secret gets out. A canary is sent through every route of the OpenAPI document, in each place where people put
//! secrets, and looked for wherever the gateway tells anything.
//!
//! What counts as a secret here: what is shown in `Authorization` (accepted or not), a token that the gateway made or
//! an administrator chose (told in the answer to that alone), the value of a query parameter that the route does not know, and a `password` in a
//! body that the route does not ask for. It may stand in no answer, log, metric, record, export, audit line, error,
//! file of the data directory, or environment of a process.
//!
//! What does not count: what a caller submits to be kept and given back (a job's payload, result, progress and
//! checkpoint, labels, reasons, the environment of a service), which is in the ledger because that was asked for. It
//! is looked for all the same, where it has no business: logs, metrics, the audit, processes' environments.

use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::user;
use crate::support::{Gateway, Options, answer, worker_service};

/// Secrets by where they are sent. Each is unlike anything else.
struct Canaries {
    /// Shown as a bearer token that nobody has.
    shown: String,
    /// Shown in another scheme.
    basic: String,
    query: String,
    body: String,
    /// Chosen for a user by an administrator.
    chosen: String,
    /// Kept on purpose, within a payload.
    payload: String,
}

impl Canaries {
    fn new() -> Canaries {
        let fresh = |kind: &str| format!("canary{kind}{}", uuid::Uuid::new_v4().simple());
        Canaries {
            shown: fresh("shown"),
            basic: fresh("basic"),
            query: fresh("query"),
            body: fresh("body"),
            chosen: fresh("chosen"),
            payload: fresh("payload"),
        }
    }

    /// Those that may be nowhere.
    fn secret(&self) -> [&String; 5] {
        [
            &self.shown,
            &self.basic,
            &self.query,
            &self.body,
            &self.chosen,
        ]
    }
}

/// Whatever was said, and where.
type Said = Vec<(String, String)>;

/// A path with something in its places.
fn filled(template: &str, run: &str) -> String {
    template
        .replace("{run_id}", run)
        .replace("{job_id}", run)
        .split('/')
        .map(|part| if part.starts_with('{') { "x" } else { part })
        .collect::<Vec<_>>()
        .join("/")
}

/// Sends the canaries through one route; what was answered. Streams are not waited for.
async fn through(
    gateway: &Gateway,
    canaries: &Canaries,
    method: &str,
    template: &str,
    run: &str,
) -> Said {
    let path = format!(
        "{}?secret={}&{}",
        filled(template, run),
        canaries.query,
        canaries.query
    );
    let method: Method = method.to_uppercase().parse().unwrap();
    let body = json!({"password": canaries.body, "current_token": canaries.body,
        "job": {"service_type": 7, "password": canaries.body}});
    let credentials = [
        ("the administrator", format!("Bearer {}", gateway.token())),
        ("a wrong token", format!("Bearer {}", canaries.shown)),
        ("another scheme", format!("Basic {}", canaries.basic)),
    ];
    let mut said = Said::new();
    for (who, authorization) in credentials {
        if template.ends_with("/stream") && who == "the administrator" {
            continue;
        }
        let mut request = gateway.bare(method.clone(), &path);
        request = request.header("authorization", authorization);
        if method != Method::GET && method != Method::DELETE {
            request = request.json(&body);
        }
        let answered = answer(request).await;
        let told = format!("{:?}\n{}", answered.headers, answered.text);
        said.push((format!("the answer of {method} {template} to {who}"), told));
    }
    said
}

/// All files below a directory, as text.
fn files(below: &Path, said: &mut Said) {
    for entry in std::fs::read_dir(below).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, said);
        } else {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            said.push((path.display().to_string(), text));
        }
    }
}

/// What other users of the machine, or a look at the process, would see of its environment and command line.
fn process(pid: u32) -> Said {
    let of = |pid: &str| {
        ["environ", "cmdline"].map(|file| {
            let path = format!("/proc/{pid}/{file}");
            let bytes = std::fs::read(&path).unwrap_or_default();
            (path, String::from_utf8_lossy(&bytes).into_owned())
        })
    };
    of(&pid.to_string()).into()
}

/// What tells of the gateway without being asked for somebody's data.
async fn told(gateway: &Gateway) -> Said {
    let mut said = vec![("the log".to_owned(), gateway.log())];
    for path in [
        "/metrics",
        "/api/gateway/audit?limit=500",
        "/api/gateway/audit/tail?max_bytes=400000",
    ] {
        let answered = answer(gateway.request(Method::GET, path)).await;
        assert_eq!(answered.status, 200, "{}", answered.text);
        said.push((path.to_owned(), answered.text));
    }
    said.extend(process(gateway.pid()));
    for pid in gateway.services_alive() {
        said.extend(process(pid));
    }
    said
}

#[track_caller]
fn nowhere(said: &Said, canary: &str) {
    for (place, text) in said {
        assert!(!text.contains(canary), "{canary} is in {place}: {text}");
    }
}

#[tokio::test]
async fn a_secret_is_in_nothing_that_the_gateway_tells_or_keeps() {
    let canaries = Canaries::new();
    let options = Options::default()
        .set("RUNGATE_LOG", "trace")
        .set("RUNGATE_LOG_FORMAT", "json")
        .set("RUST_BACKTRACE", "full");
    let mut gateway = Gateway::start(options).await;
    let job = json!({"service_type": "t", "payload": {"password": canaries.payload}});
    let run = gateway.start_job(job.clone()).await;
    let chosen = json!({"user_id": "carla", "token": canaries.chosen});
    let created = gateway.post("/api/gateway/admin/users", chosen).await;
    // The answer to who chose it is the one place that tells it.
    assert_eq!(created.expect(200)["token"], canaries.chosen.as_str());
    let mut said = Said::new();
    let minted = user(&gateway, json!({"user_id": "mia"})).await;
    let patch = json!({"token": format!("{}0", canaries.chosen)});
    let path = "/api/gateway/admin/users/carla";
    let patched = answer(gateway.request(Method::PATCH, path).json(&patch)).await;
    assert_eq!(patched.status, 200, "{}", patched.text);
    let changed = format!("{}0", canaries.chosen);
    assert_eq!(patched.json["token"], changed.as_str());

    let api = gateway.get("/openapi.json").await.expect(200);
    let mut routes = 0;
    for (template, item) in api["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            said.extend(through(&gateway, &canaries, method, template, &run).await);
            routes += 1;
        }
    }
    assert!(routes > 60, "{routes}");
    // A wrong token in a path, where somebody took it for an id.
    let path = format!("/api/gateway/tokens/{minted}");
    let mistaken = answer(gateway.request(Method::DELETE, &path)).await;
    assert_eq!(mistaken.status, 404);

    // The first may have been purged on the way. This one reaches a service, which can make nothing of it.
    let worker = worker_service(&gateway, "worker", "t", json!({}));
    let registered = gateway.post("/services/register", worker).await;
    assert_eq!(registered.status, 200, "{}", registered.text);
    let mut job = job;
    job["max_attempts"] = 1.into();
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "failed").await;
    assert!(!gateway.services_alive().is_empty());
    let told = told(&gateway).await;
    for text in [&canaries.payload, &minted, gateway.token()] {
        nowhere(&told, text);
    }
    said.extend(told);
    for path in [
        "/api/gateway/ledger/export",
        "/api/gateway/ledger?limit=2000",
    ] {
        let answered = answer(gateway.request(Method::GET, path)).await;
        assert_eq!(answered.status, 200);
        said.push((path.to_owned(), decoded(&answered.text)));
        nowhere(&said, &minted);
    }
    let kept_in = said.last().unwrap();
    assert!(
        kept_in.1.contains(&canaries.payload),
        "a payload is kept, as was asked for"
    );
    gateway.stop().await;
    files(&gateway.data_dir(), &mut said);
    for canary in canaries.secret() {
        nowhere(&said, canary);
    }
    // The first administrator's token is in its file, and there alone.
    let token = gateway.token().to_owned();
    let holders = said.iter().filter(|(_, text)| text.contains(&token));
    let holders: Vec<&str> = holders.map(|(place, _)| place.as_str()).collect();
    assert_eq!(holders, [gateway.token_path().to_str().unwrap()]);
}

/// An export with what it has in base64 spelled out beside.
fn decoded(text: &str) -> String {
    use base64::Engine;
    let mut spelled = text.to_owned();
    for line in text.lines() {
        let value: Value = serde_json::from_str(line).unwrap_or(Value::Null);
        for name in ["event_bytes", "meta_bytes", "payload"] {
            let bytes = value[name].as_str().and_then(|text| {
                let engine = base64::engine::general_purpose::STANDARD;
                engine.decode(text).ok()
            });
            spelled.push_str(&String::from_utf8_lossy(&bytes.unwrap_or_default()));
        }
    }
    spelled
}
