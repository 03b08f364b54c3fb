//! What is refused: each fault of each route has its status and its code, in one shape, and leaves no trace in
//! the ledger.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::bad_input_table::{Case, Fixture, table};
use crate::support::raw::{Reply, exchange};
use crate::support::{Gateway, Options};

/// What the table needs to be there: nothing of it moves by itself.
async fn fixture() -> (Gateway, Fixture) {
    // What is audited of refusals is told in `audit`; here they leave nothing.
    let options = Options::default().set("RUNGATE_AUDIT", "off");
    let gateway = Gateway::start(options).await;
    let service = json!({"name": "plain", "container": "plain", "port": 9, "type": "t"});
    gateway
        .post("/services/register", service)
        .await
        .expect(200);
    let job = |of_type: &str| json!({"service_type": of_type, "payload": {"a": 1}});
    let queued = gateway.start_job(job("nobody")).await;
    let ended = gateway.start_job(job("nobody")).await;
    gateway.command("used", &ended, "cancel", json!({})).await;
    let purged = gateway.start_job(job("nobody")).await;
    gateway.command("purge", &purged, "cancel", json!({})).await;
    let path = format!("/api/gateway/runs/{purged}/purge");
    gateway.post(&path, json!({})).await.expect(200);
    let first = gateway.request(reqwest::Method::POST, "/api/gateway/runs/start");
    let first = first.header("idempotency-key", "used");
    let first = first.json(&json!({"job": job("nobody")}));
    assert_eq!(first.send().await.unwrap().status(), 200);
    let fixture = Fixture {
        queued,
        ended,
        purged,
    };
    (gateway, fixture)
}

fn request(gateway: &Gateway, case: &Case) -> Vec<u8> {
    let mut head = format!(
        "{} {} HTTP/1.1\r\nconnection: close\r\n",
        case.method, case.path
    );
    if case.host {
        head.push_str(&format!("host: {}\r\n", gateway.addr()));
    }
    if case.token {
        head.push_str(&format!("authorization: Bearer {}\r\n", gateway.token()));
    }
    let mut bytes = head.into_bytes();
    for (name, value) in &case.headers {
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value);
        bytes.extend_from_slice(b"\r\n");
    }
    if let Some(body) = &case.body {
        if !case
            .headers
            .iter()
            .any(|(name, _)| name == "content-length")
        {
            bytes.extend_from_slice(format!("content-length: {}\r\n", body.len()).as_bytes());
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(body);
    } else {
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// What is wrong with an answer, if anything.
fn faults(case: &Case, reply: &Reply) -> Vec<String> {
    let problem = reply.json();
    let mut faults = Vec::new();
    let mut check = |good: bool, what: &str| {
        if !good {
            faults.push(what.to_owned());
        }
    };
    check(reply.status == case.status, "status");
    check(problem["code"] == case.code, "code");
    let kind = reply.header("content-type");
    check(kind == Some("application/problem+json"), "content-type");
    check(problem["status"] == reply.status, "status member");
    let kind = format!("urn:rungate:error:{}", case.code);
    check(problem["type"] == Value::String(kind), "type");
    check(
        problem["title"].as_str().is_some_and(|t| !t.is_empty()),
        "title",
    );
    let detail = &problem["detail"];
    check(
        detail.is_string() || detail.is_array() || detail.is_object(),
        "detail",
    );
    let id = problem["request_id"].as_str();
    check(
        id.is_some() && id == reply.header("x-request-id"),
        "request_id",
    );
    check(
        reply.header("x-content-type-options") == Some("nosniff"),
        "nosniff",
    );
    if reply.status == 401 {
        check(
            reply.header("www-authenticate") == Some("Bearer"),
            "www-authenticate",
        );
    }
    if reply.status == 405 {
        check(reply.header("allow").is_some(), "allow");
    }
    if matches!(case.code, "validation_failed" | "missing_field") {
        let errors = problem["errors"].as_array().cloned().unwrap_or_default();
        let whole = |e: &Value| {
            ["field", "message", "code"]
                .iter()
                .all(|m| e[m].is_string())
        };
        check(!errors.is_empty() && errors.iter().all(whole), "errors");
    }
    let text = String::from_utf8_lossy(&reply.body);
    check(text.len() < 16 << 10, "an answer that is small");
    check(!text.contains('\0'), "no NUL");
    faults
}

async fn new_records(gateway: &Gateway, tail: u64) -> Value {
    let path = format!("/api/gateway/ledger?after_seq={tail}");
    gateway.get(&path).await.expect(200)["items"].clone()
}

#[tokio::test]
async fn every_fault_has_its_status_and_code_and_leaves_no_record() {
    let (gateway, fixture) = fixture().await;
    let tail = gateway.tail().await;
    let cases = table(&fixture);
    let mut wrong = Vec::new();
    for case in &cases {
        let reply = exchange(gateway.addr(), &request(&gateway, case)).await;
        let mut faults = faults(case, &reply);
        if new_records(&gateway, tail).await != json!([]) {
            faults.push("the ledger".to_owned());
        }
        if !faults.is_empty() {
            let body = String::from_utf8_lossy(&reply.body).into_owned();
            wrong.push(format!(
                "{} {} ({}): expected {} {}, wrong: {} in {} {body}",
                case.method,
                case.path,
                case.about,
                case.status,
                case.code,
                faults.join(", "),
                reply.status,
            ));
        }
        if wrong.len() > 30 || wrong.iter().any(|text| text.contains("the ledger")) {
            break;
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
    assert!(cases.len() >= 100, "{}", cases.len());
    every_route_is_in(&gateway, &cases).await;
}

/// A route that nobody tried to break fails here.
async fn every_route_is_in(gateway: &Gateway, cases: &[Case]) {
    let tried: BTreeSet<&str> = cases.iter().map(|case| case.route.as_str()).collect();
    let api = gateway.get("/openapi.json").await.expect(200);
    let mut untried = Vec::new();
    for (path, item) in api["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let route = format!("{} {path}", method.to_uppercase());
            if !tried.contains(route.as_str()) {
                untried.push(route);
            }
        }
    }
    assert!(untried.is_empty(), "no row tries {untried:#?}");
}

/// The doors that every route has: a token, a host of ours, an origin of ours, a method that exists.
#[tokio::test]
async fn no_route_lets_in_who_does_not_belong() {
    let (gateway, fixture) = fixture().await;
    let tail = gateway.tail().await;
    let api = gateway.get("/openapi.json").await.expect(200);
    let mut wrong = Vec::new();
    for (template, item) in api["paths"].as_object().unwrap() {
        let path = fixture.fill(template);
        for (method, operation) in item.as_object().unwrap() {
            let open = operation["security"] == json!([{}]);
            let probe = matches!(path.as_str(), "/livez" | "/readyz");
            let (code, status) = if probe {
                continue;
            } else {
                ("host_not_allowed", 403)
            };
            let base = Case::new(&method.to_uppercase(), template, &path);
            let mut cases = vec![
                base.clone()
                    .without_host()
                    .header("host", "evil.example")
                    .fails(status, code),
                base.clone().without_host().fails(status, code),
                base.clone()
                    .without_host()
                    .header("host", "localhost.evil.example:80")
                    .fails(status, code),
                base.clone()
                    .header("origin", "https://evil.example")
                    .fails(403, "origin_not_allowed"),
                base.clone()
                    .header("host", "evil.example")
                    .fails(status, code),
                base.clone()
                    .header("origin", "null")
                    .fails(403, "origin_not_allowed"),
            ];
            if !open {
                cases.push(base.clone().without_token().fails(401, "unauthorized"));
                for bad in [
                    "Bearer",
                    "Bearer x",
                    "Basic YTpi",
                    "bearer  ",
                    "Bearer \u{ff}",
                ] {
                    let case = base.clone().without_token().header("authorization", bad);
                    cases.push(case.fails(401, "unauthorized"));
                }
            }
            for case in &cases {
                let reply = exchange(gateway.addr(), &request(&gateway, case)).await;
                let faults = faults(case, &reply);
                if !faults.is_empty() {
                    wrong.push(format!(
                        "{method} {path}: {} {faults:?} {:?}",
                        case.about, reply
                    ));
                }
            }
        }
        let method = match item["patch"].is_object() {
            true => "PUT",
            false => "PATCH",
        };
        let case = Case::new(method, template, &path).fails(405, "method_not_allowed");
        let reply = exchange(gateway.addr(), &request(&gateway, &case)).await;
        let faults = faults(&case, &reply);
        if !faults.is_empty() {
            wrong.push(format!("{method} {path}: {faults:?} {reply:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(new_records(&gateway, tail).await, json!([]));
}

/// Names and ids in the path are keys, never paths: whatever they hold, they name nothing.
#[tokio::test]
async fn no_path_trick_names_anything() {
    let (gateway, fixture) = fixture().await;
    let tail = gateway.tail().await;
    let long = "a".repeat(4_000);
    let tricks = [
        "%2e%2e",
        "..",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "..%5c..%5cx",
        "%00",
        "plain%00",
        "%2fplain",
        "plain%2f",
        "plain%20",
        "PLAIN",
        "%ff%fe",
        "%c0%ae%c0%ae",
        "*",
        "%25%32%65",
        long.as_str(),
    ];
    let api = gateway.get("/openapi.json").await.expect(200);
    let mut wrong = Vec::new();
    for (template, item) in api["paths"].as_object().unwrap() {
        let Some(parameter) = template.split('/').find(|part| part.starts_with('{')) else {
            continue;
        };
        if parameter == "{service_type}" {
            // Any text may be asked for; it is only compared.
            continue;
        }
        for method in item.as_object().unwrap().keys() {
            for trick in tricks {
                let path = template.replace(parameter, trick);
                let case = Case::new(&method.to_uppercase(), template, &path).json("{}");
                let reply = exchange(gateway.addr(), &request(&gateway, &case)).await;
                let code = reply.json()["code"].as_str().unwrap_or("").to_owned();
                let known = [
                    "run_not_found",
                    "service_not_found",
                    "tenant_not_found",
                    "command_not_found",
                    "user_not_found",
                    "token_not_found",
                    "runtime_not_found",
                    "session_not_found",
                    "gpu_not_found",
                    "not_found",
                ];
                // `..` and `%2e%2e` in a bare segment may hit a route of fewer parameters, never a resource.
                let sound = reply.status == 404 && known.contains(&code.as_str());
                if !sound {
                    wrong.push(format!("{method} {path}: {} {code}", reply.status));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(new_records(&gateway, tail).await, json!([]));
    let services = gateway.get("/services").await.expect(200);
    assert_eq!(services["services"].as_object().unwrap().len(), 1);
    assert_eq!(fixture.queued, gateway.run(&fixture.queued).await["run_id"]);
}

/// What never becomes a request is refused before it reaches a route.
#[tokio::test]
async fn a_request_that_is_none_is_refused() {
    let (gateway, _) = fixture().await;
    let tail = gateway.tail().await;
    let host = format!("host: {}\r\n", gateway.addr());
    let many = "x: y\r\n".repeat(200);
    let large = format!("x: {}\r\n", "y".repeat(64 << 10));
    let target = "a".repeat(64 << 10);
    for (request, status) in [
        ("nonsense\r\n\r\n".to_owned(), 400),
        (format!("GET /livez HTTP/1.1\r\n{host}{many}\r\n"), 431),
        (format!("GET /livez HTTP/1.1\r\n{host}{large}\r\n"), 431),
        (format!("GET /{target} HTTP/1.1\r\n{host}\r\n"), 414),
        (format!("GET /livez\0 HTTP/1.1\r\n{host}\r\n"), 400),
        (
            format!("POST /livez HTTP/1.1\r\n{host}content-length: -1\r\n\r\n"),
            400,
        ),
        (
            format!("POST /livez HTTP/1.1\r\n{host}content-length: 1\r\ncontent-length: 2\r\n\r\n"),
            400,
        ),
        (format!("GET /livez HTTP/1.1\r\n{host}x\0: y\r\n\r\n"), 400),
    ] {
        let reply = exchange(gateway.addr(), request.as_bytes()).await;
        let shown = &request[..request.len().min(60)];
        // A header that does not fit may be refused by either name.
        let same = reply.status == status
            || (matches!(status, 414 | 431) && matches!(reply.status, 414 | 431));
        assert!(same, "{shown:?}: {}", reply.status);
    }
    assert_eq!(new_records(&gateway, tail).await, json!([]));
}

/// The rest of a refused body is never taken for a request of its own.
#[tokio::test]
async fn a_refused_body_hides_no_second_request() {
    let (gateway, fixture) = fixture().await;
    let tail = gateway.tail().await;
    let hidden = format!(
        "DELETE /queue/{} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\n\r\n",
        fixture.queued,
        gateway.addr(),
        gateway.token(),
    );
    for framing in [
        "content-length: 2000000".to_owned(),
        "transfer-encoding: chunked\r\ncontent-length: 4".to_owned(),
        "transfer-encoding: xchunked".to_owned(),
        "transfer-encoding: chunked, identity".to_owned(),
        format!(
            "content-type: text/plain\r\ncontent-length: {}",
            hidden.len()
        ),
    ] {
        let request = format!(
            "POST /api/gateway/commands HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\nconnection: close\r\n{framing}\r\n\r\n{hidden}",
            gateway.addr(),
            gateway.token(),
        );
        let reply = exchange(gateway.addr(), request.as_bytes()).await;
        assert!(
            (400..500).contains(&reply.status),
            "{framing}: {}",
            reply.status
        );
        let rest = String::from_utf8_lossy(&reply.body).into_owned();
        assert!(!rest.contains("HTTP/1.1"), "{framing}: {rest}");
    }
    assert_eq!(new_records(&gateway, tail).await, json!([]));
    assert_eq!(gateway.run(&fixture.queued).await["job"]["state"], "queued");
}

/// A connection that is closed with unread bytes is reset, and the reset would destroy the answer: the sender of a
/// body that nobody wants reads why, every time.
#[tokio::test]
async fn the_sender_of_a_refused_body_gets_the_answer() {
    let (gateway, _) = fixture().await;
    let body = vec![b'x'; 3 << 20];
    for _ in 0..50 {
        for (path, token, status) in [
            ("/api/gateway/commands", true, 413),
            ("/api/gateway/commands", false, 401),
            ("/api/gateway/nowhere", true, 404),
        ] {
            let mut request = gateway.bare(reqwest::Method::POST, path);
            if token {
                request = request.bearer_auth(gateway.token());
            }
            let answer = request.body(body.clone()).send().await;
            assert_eq!(answer.expect("an answer").status(), status, "{path}");
        }
    }
}
