//! Who did what: every write and every refused one is told once, with who, whence, what and what came of it; floods
//! are counted; nobody sees another tenant's.

use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::{call, user};
use crate::rungate::{run, rungate};
use crate::support::wait::until;
use crate::support::{Answer, Gateway, Options};

const AUDIT: &str = "/api/gateway/audit";
const START: &str = "/api/gateway/runs/start";

fn job() -> Value {
    json!({"job": {"service_type": "t", "payload": {}}})
}

/// All entries that a query shows, newest first, a small page at a time.
async fn entries(gateway: &Gateway, token: &str, query: &str) -> Vec<Value> {
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let path = format!("{AUDIT}?{query}&limit=3{after}");
        let page = call(gateway, token, Method::GET, &path, None)
            .await
            .expect(200);
        let items = page["items"].as_array().unwrap();
        assert!(items.len() <= 3);
        all.extend(items.iter().cloned());
        match page["next_cursor"].as_str() {
            Some(cursor) => after = format!("&after={cursor}"),
            None => return all,
        }
    }
}

async fn all(gateway: &Gateway) -> Vec<Value> {
    entries(gateway, gateway.token(), "").await
}

/// Waits until a request is told; the entry.
async fn told(gateway: &Gateway, request_id: &str) -> Value {
    until("the request is audited", || async {
        let all = all(gateway).await;
        all.iter().any(|entry| entry["request_id"] == request_id)
    })
    .await;
    let found = all(gateway).await.into_iter();
    let mut found = found.filter(|entry| entry["request_id"] == request_id);
    let entry = found.next().unwrap();
    assert_eq!(found.next(), None, "told twice");
    entry
}

fn id(answer: &Answer) -> String {
    answer.headers["x-request-id"].to_str().unwrap().to_owned()
}

async fn names(gateway: &Gateway, after: u64) -> Vec<String> {
    let path = format!("/api/gateway/ledger?after_seq={after}");
    let page = gateway.get(&path).await.expect(200);
    let items = page["items"].as_array().unwrap();
    let name = |item: &Value| item["effect"]["type"].as_str().unwrap().to_owned();
    items.iter().map(name).collect()
}

#[tokio::test]
async fn a_start_is_told_by_its_own_record_with_who_whence_and_what() {
    let mut gateway = Gateway::start(Options::default()).await;
    let alice = user(&gateway, json!({"user_id": "alice", "tenant_id": "acme"})).await;
    let me = call(&gateway, &alice, Method::GET, "/api/gateway/me", None)
        .await
        .expect(200);
    let tail = gateway.tail().await;
    let path = format!("{START}?trace=hunter2&empty=");
    let started = call(&gateway, &alice, Method::POST, &path, Some(job())).await;
    let request = id(&started);
    let run = started.expect(200)["run_id"].clone();
    // The answer was given, so it is on disk together with who asked for it.
    gateway.kill();
    gateway.launch().await;
    let entry = told(&gateway, &request).await;
    let expected = json!({
        "actor_id": "acme/alice", "user_id": "alice", "tenant_id": "acme", "address": "127.0.0.1",
        "method": "POST", "route": START, "path": START, "query": ["trace", "empty"], "status": 200,
        "outcome": "allowed", "code": null, "count": 1, "event": "job_queued", "run_id": run,
        "token_fingerprint": me["principal"]["token_fingerprint"],
    });
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&entry[name], value, "{name}");
    }
    assert!(
        entry["duration_ms"]
            .as_f64()
            .is_some_and(|ms| ms < 60_000.0)
    );
    let names = names(&gateway, tail).await;
    assert!(names.contains(&"job_queued".to_owned()));
    assert!(!names.contains(&"write_audited".to_owned()), "{names:?}");
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn a_refused_write_is_told_with_its_reason_and_a_read_is_not() {
    let gateway = Gateway::start(Options::default()).await;
    let viewer = user(&gateway, json!({"user_id": "vera", "roles": ["viewer"]})).await;
    let admin = gateway.token();
    let wrong = "agw_no_token_of_anybody";
    let start = |token| call(&gateway, token, Method::POST, START, Some(job()));
    let mut cases = vec![
        (start(wrong).await, "nobody", 401, "unauthorized", START),
        (start(&viewer).await, "vera", 403, "role_required", START),
    ];
    let body = json!({"job": {"service_type": 7}});
    let invalid = call(&gateway, admin, Method::POST, START, Some(body)).await;
    cases.push((invalid, "admin", 422, "validation_failed", START));
    let stop = "/services/{name}/stop";
    let absent = call(&gateway, admin, Method::POST, "/services/x/stop", None).await;
    cases.push((absent, "admin", 404, "service_not_found", stop));
    let unknown = call(&gateway, admin, Method::DELETE, "/nowhere", None).await;
    cases.push((unknown, "admin", 404, "not_found", "unmatched"));
    for (answer, actor, status, code, route) in cases {
        let request = id(&answer);
        answer.expect(status);
        let entry = told(&gateway, &request).await;
        assert_eq!(entry["actor_id"], actor, "{entry}");
        assert_eq!(entry["status"], status, "{entry}");
        assert_eq!(entry["code"], code, "{entry}");
        assert_eq!(entry["route"], route, "{entry}");
        assert_eq!(entry["address"], "127.0.0.1", "{entry}");
        assert_eq!(entry["token_fingerprint"].as_str().map(str::len), Some(12));
        assert_eq!(entry["event"], Value::Null, "{entry}");
    }
    let before = all(&gateway).await.len();
    for (method, path) in [
        (Method::GET, "/api/gateway/ledger"),
        (Method::POST, "/api/gateway/runs/ledger/batch"),
    ] {
        call(&gateway, wrong, method, path, None).await.expect(401);
    }
    // What was refused before these is told before what is refused after them.
    let last = call(&gateway, wrong, Method::PUT, "/services/x", None).await;
    told(&gateway, &id(&last)).await;
    assert_eq!(all(&gateway).await.len(), before + 1);
}

#[tokio::test]
async fn what_changes_nothing_is_told_too() {
    let gateway = Gateway::start(Options::default().set("RUNGATE_AUDIT", "required")).await;
    let start = || {
        let request = gateway.request(Method::POST, START);
        crate::support::answer(request.header("idempotency-key", "k").json(&job()))
    };
    let first = start().await;
    let again = start().await;
    assert_eq!(again.headers["idempotency-replayed"], "true");
    let refused = gateway.post("/services/x/stop", json!({})).await;
    // With `required` the record is there before the answer: nothing is waited for.
    let entries = all(&gateway).await;
    let find = |answer: &Answer| {
        let request = id(answer);
        let mut found = entries.iter().filter(|e| e["request_id"] == request);
        let entry = found.next().expect("it is told at once").clone();
        assert_eq!(found.next(), None);
        entry
    };
    assert_eq!(find(&first)["event"], "job_queued");
    assert_eq!(find(&again)["event"], Value::Null);
    assert_eq!(find(&again)["outcome"], "allowed");
    assert_eq!(find(&refused)["outcome"], "failed");
}

#[tokio::test]
async fn a_flood_of_refusals_is_counted_and_not_written_down_one_by_one() {
    const SENT: u64 = 600;
    let mut gateway = Gateway::start(Options::default()).await;
    let tail = gateway.tail().await;
    let sends = (0..SENT).map(|n| {
        let token = format!("agw_made_up_token_number_{n}");
        let request = gateway.bare(Method::POST, START).bearer_auth(token);
        crate::support::answer(request.header("host", format!("{}", gateway.addr())))
    });
    for answer in futures_util::future::join_all(sends).await {
        assert!(matches!(answer.status.as_u16(), 401 | 429));
    }
    // A stop in good order tells what was counted.
    gateway.stop().await;
    gateway.launch().await;
    let entries = entries(&gateway, gateway.token(), "outcome=denied").await;
    let told: u64 = entries.iter().map(|e| e["count"].as_u64().unwrap()).sum();
    assert_eq!(told, SENT);
    let records = gateway.tail().await - tail;
    assert!(records < 40, "{records} records");
    let many = entries
        .iter()
        .find(|e| e["count"].as_u64() > Some(1))
        .unwrap();
    assert!(many["since"].as_str() <= many["at"].as_str(), "{many}");
}

#[tokio::test]
async fn a_tenants_administrator_sees_its_own_tenant_and_filters_hold() {
    let gateway = Gateway::start(Options::default()).await;
    let body = json!({"user_id": "tara", "tenant_id": "acme", "roles": ["tenant_admin"]});
    let tara = user(&gateway, body).await;
    let ann = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let bob = user(&gateway, json!({"user_id": "bob"})).await;
    for token in [&ann, &bob, &ann, &bob] {
        call(&gateway, token, Method::POST, START, Some(job()))
            .await
            .expect(200);
    }
    let refused = call(&gateway, &ann, Method::POST, "/services/register", None).await;
    told(&gateway, &id(&refused)).await;
    let everyone = gateway.token().to_owned();
    let count = async |token: &str, query: &str| entries(&gateway, token, query).await.len();
    // How she and Ann came to be, Ann's two starts and her refusal.
    assert_eq!(count(&tara, "").await, 5);
    assert_eq!(count(&tara, "tenant=acme").await, 5);
    assert_eq!(count(&tara, "tenant=default").await, 0);
    assert_eq!(count(&tara, "actor=bob").await, 0);
    assert_eq!(count(&everyone, "tenant=acme").await, 5);
    assert_eq!(count(&everyone, "actor=acme/ann&outcome=denied").await, 1);
    assert_eq!(count(&everyone, "actor=bob").await, 2);
    assert_eq!(count(&everyone, "route=/runs/start").await, 4);
    assert_eq!(count(&everyone, &format!("route={START}")).await, 4);
    assert_eq!(count(&everyone, "route=/services/register").await, 1);
    let starts = entries(&gateway, &everyone, "route=/runs/start").await;
    let newest_first = starts.is_sorted_by_key(|e| std::cmp::Reverse(e["seq"].as_u64()));
    assert!(newest_first);
    let at = starts[1]["at"].as_str().unwrap();
    assert_eq!(
        count(&everyone, &format!("route=/runs/start&since={at}")).await,
        2
    );
    assert_eq!(
        count(&everyone, &format!("route=/runs/start&until={at}")).await,
        2
    );
    assert_eq!(count(&everyone, "since=2999-01-01T00:00:00Z").await, 0);

    let page = gateway.get(&format!("{AUDIT}?limit=1")).await.expect(200);
    let cursor = page["next_cursor"].as_str().unwrap();
    let other = format!("{AUDIT}?limit=1&actor=bob&after={cursor}");
    assert_eq!(
        gateway.get(&other).await.expect(400)["code"],
        "invalid_cursor"
    );
    let theirs = format!("{AUDIT}?after={cursor}");
    call(&gateway, &tara, Method::GET, &theirs, None)
        .await
        .expect(400);
}

/// Logins were told as nobody's, and what the gateway's administrator did to a tenant was hidden from it.
#[tokio::test]
async fn a_tenants_administrator_sees_its_logins_and_what_is_done_to_it_by_others() {
    let mut gateway = Gateway::start(Options::default()).await;
    let admin_of = |name: &str, tenant: &str| json!({"user_id": name, "tenant_id": tenant, "roles": ["tenant_admin"]});
    let tara = user(&gateway, admin_of("tara", "acme")).await;
    let tess = user(&gateway, admin_of("tess", "default")).await;
    let ann = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let users = "/api/gateway/admin/users";
    let password = json!({"password": "correct horse battery"});
    let path = format!("{users}/ann/password?tenant_id=acme");
    let set = gateway.post(&path, password).await;
    let done_to = [id(&set), {
        let body = Some(json!({"email": "ann@example.com"}));
        let path = format!("{users}/ann?tenant_id=acme");
        let patched = call(&gateway, gateway.token(), Method::PATCH, &path, body).await;
        assert_eq!(patched.status, 200, "{}", patched.text);
        id(&patched)
    }];
    let login = async |more: Value| {
        let mut body = json!({"user_id": "ann", "tenant_id": "acme"});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let request = gateway
            .bare(Method::POST, "/api/gateway/session/login")
            .json(&body);
        crate::support::answer(request.header("user-agent", "a browser")).await
    };
    let by_password = login(json!({"password": "correct horse battery"})).await;
    let wrong = login(json!({"password": "canary of a password"})).await;
    let by_token = login(json!({"token": ann})).await;
    let me = call(&gateway, &ann, Method::GET, "/api/gateway/me", None).await;
    let fingerprint = me.expect(200)["principal"]["token_fingerprint"].clone();
    let ids = [&by_password, &wrong, &by_token].map(id);
    assert_eq!(
        [by_password.status, wrong.status, by_token.status],
        [200, 401, 200]
    );
    let session = &by_token.json["principal"];
    assert_eq!(session["token_fingerprint"], fingerprint);
    told(&gateway, &ids[1]).await;
    // What was answered with success is on disk.
    gateway.kill();
    gateway.launch().await;
    let seen = entries(&gateway, &tara, "").await;
    let find = |id: &String| seen.iter().find(|entry| entry["request_id"] == id.as_str());
    let login = |id| {
        let entry = find(id).expect("its administrator sees it").clone();
        let tried = (&entry["tried_tenant_id"], &entry["tried_user_id"]);
        assert_eq!(tried, (&json!("acme"), &json!("ann")), "{entry}");
        assert_eq!(entry["user_agent"], "a browser");
        assert!(entry["bytes_in"].as_u64() > Some(20), "{entry}");
        entry
    };
    let (right, refused, by_token) = (login(&ids[0]), login(&ids[1]), login(&ids[2]));
    assert_eq!(
        (&right["actor_id"], &right["outcome"]),
        (&json!("acme/ann"), &json!("allowed"))
    );
    assert_eq!(right["token_fingerprint"], Value::Null);
    assert_eq!(
        (&refused["actor_id"], &refused["outcome"]),
        (&json!("nobody"), &json!("denied"))
    );
    assert_eq!(by_token["token_fingerprint"], fingerprint);
    for id in &done_to {
        let entry = find(id).expect("what was done to it");
        assert_eq!(
            (&entry["actor_id"], &entry["about_tenant_id"]),
            (&json!("admin"), &json!("acme"))
        );
    }
    let elsewhere = entries(&gateway, &tess, "").await;
    let foreign = |entry: &&Value| entry.to_string().contains("acme");
    assert_eq!(elsewhere.iter().find(foreign), None);
    let tail = gateway.get("/api/gateway/audit/tail").await.expect(200);
    let lines = tail["content"].as_str().unwrap();
    assert!(lines.contains(r#""user_agent":"a browser""#) && !lines.contains("canary"));
}

#[tokio::test]
async fn the_tail_is_the_contracts_lines() {
    let gateway = Gateway::start(Options::default()).await;
    let tail = "/api/gateway/audit/tail";
    for _ in 0..20 {
        gateway
            .post(&format!("{START}?k=v"), job())
            .await
            .expect(200);
    }
    let answer = gateway.get(tail).await.expect(200);
    assert_eq!(answer["truncated"], false);
    let content = answer["content"].as_str().unwrap();
    assert_eq!(answer["bytes"], content.len());
    let lines: Vec<Value> = content
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 20);
    assert!(lines.is_sorted_by_key(|line| line["ts"].as_str().unwrap().to_owned()));
    let last = lines.last().unwrap();
    assert_eq!(last["query"], "k=<redacted>");
    assert_eq!(last["principal_user_id"], "admin");
    assert_eq!(last["principal_tenant_id"], "default");
    assert_eq!(last["status"], 200);
    let short = gateway.get(&format!("{tail}?max_bytes=1024")).await;
    let short = short.expect(200);
    assert_eq!(short["truncated"], true);
    let end = short["content"].as_str().unwrap();
    assert!(!end.is_empty() && end.len() <= 1_024 && content.ends_with(end));
}

#[tokio::test]
async fn off_leaves_actor_and_request_and_nothing_else() {
    let gateway = Gateway::start(Options::default().set("RUNGATE_AUDIT", "off")).await;
    let tail = gateway.tail().await;
    gateway.post(START, job()).await.expect(200);
    gateway
        .post("/services/x/stop", json!({}))
        .await
        .expect(404);
    assert_eq!(all(&gateway).await, Vec::<Value>::new());
    assert_eq!(names(&gateway, tail).await, ["job_queued"]);
}

#[tokio::test]
async fn the_command_line_shows_the_same() {
    let gateway = Gateway::start(Options::default()).await;
    let started = gateway.post(START, job()).await;
    let refused = gateway.post("/services/x/stop", json!({})).await;
    told(&gateway, &id(&refused)).await;
    let home = tempfile::tempdir().unwrap();
    let shell = |arguments: &[&str]| {
        let mut command = rungate(home.path(), arguments);
        command
            .env("RUNGATE_URL", gateway.url(""))
            .env("RUNGATE_TOKEN_FILE", gateway.token_path());
        run(command)
    };
    let (code, out, _) = shell(&["audit", "--json"]);
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(code, 0);
    let of = |answer: &Answer| {
        let mut items = shown["items"].as_array().unwrap().iter();
        items.any(|item| item["request_id"] == id(answer))
    };
    assert!(of(&started) && of(&refused), "{out}");
    let (code, out, _) = shell(&["audit", "--outcome", "failed", "--limit", "1"]);
    assert_eq!(code, 0);
    assert!(
        out.starts_with("SEQ") && out.contains("service_not_found"),
        "{out}"
    );
    assert_eq!(out.lines().count(), 2, "{out}");
    let (code, _, err) = shell(&["audit", "--outcome", "maybe"]);
    assert_eq!(code, 1);
    assert!(err.contains("outcome"), "{err}");
}

#[tokio::test]
async fn the_command_line_follows_what_is_new() {
    let gateway = Gateway::start(Options::default()).await;
    gateway.post(START, job()).await.expect(200);
    let home = tempfile::tempdir().unwrap();
    let mut command = rungate(
        home.path(),
        &["audit", "--follow", "--json", "--route", START],
    );
    let mut child = command
        .env("RUNGATE_URL", gateway.url(""))
        .env("RUNGATE_TOKEN_FILE", gateway.token_path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let reading = tokio::task::spawn_blocking(move || {
        let mut lines = [String::new(), String::new()];
        for line in &mut lines {
            std::io::BufRead::read_line(&mut out, line).unwrap();
        }
        lines.map(|line| serde_json::from_str::<Value>(&line).unwrap())
    });
    // From some moment on each is shown, once and in order.
    until("two were shown", || async {
        gateway.post(START, job()).await.expect(200);
        reading.is_finished()
    })
    .await;
    let [first, second] = reading.await.unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(first["event"], "job_queued");
    assert_eq!(
        second["seq"].as_u64(),
        first["seq"].as_u64().map(|seq| seq + 1)
    );
}
