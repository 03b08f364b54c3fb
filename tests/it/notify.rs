//! Notifications: off until a tenant's administrators say where to; then each event once, to its tenant alone, signed,
//! over restarts, and without a flood when nobody takes them.

use std::process::Command;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::{call, user};
use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Gateway, Options, answer, binary, worker_service};
use crate::world::PYTHON;

/// What a receiver got.
#[derive(Clone, Debug)]
struct Told {
    path: String,
    headers: HeaderMap,
    body: String,
}

impl Told {
    fn header(&self, name: &str) -> String {
        let value = self.headers.get(name);
        let value = value.map(|value| value.to_str().unwrap().to_owned());
        value.unwrap_or_default()
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

#[derive(Clone)]
struct Inner {
    told: Arc<Mutex<Vec<Told>>>,
    status: Arc<Mutex<u16>>,
}

/// An ntfy server and a receiver of webhooks: whatever path is posted to.
struct Receiver {
    url: String,
    inner: Inner,
}

async fn take(State(inner): State<Inner>, uri: Uri, headers: HeaderMap, body: Bytes) -> StatusCode {
    inner.told.lock().unwrap().push(Told {
        path: uri.path().to_owned(),
        headers,
        body: String::from_utf8(body.to_vec()).unwrap(),
    });
    StatusCode::from_u16(*inner.status.lock().unwrap()).unwrap()
}

impl Receiver {
    async fn start() -> Receiver {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let inner = Inner {
            told: Arc::default(),
            status: Arc::new(Mutex::new(200)),
        };
        let router = Router::new().fallback(take).with_state(inner.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Receiver { url, inner }
    }

    fn answers(&self, status: u16) {
        *self.inner.status.lock().unwrap() = status;
    }

    fn told(&self) -> Vec<Told> {
        self.inner.told.lock().unwrap().clone()
    }

    async fn gets(&self, count: usize) -> Vec<Told> {
        let what = format!("{count} notices");
        until(&what, || async { self.told().len() >= count }).await;
        self.told()
    }
}

fn path(tenant: &str) -> String {
    format!("/api/gateway/admin/tenants/{tenant}/notify")
}

/// Local receivers may be told, and failures are soon over.
fn options() -> Options {
    Options::default()
        .set("RUNGATE_NOTIFY_ALLOW_PRIVATE", "true")
        .set("RUNGATE_CALLBACK_BASE_MS", "200")
        .set("RUNGATE_MIN_RUNTIME_MS", "0")
}

async fn with_service(options: Options) -> (Gateway, Scripted) {
    let gateway = Gateway::start(options).await;
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "sdxl")).await;
    (gateway, scripted)
}

fn job() -> Value {
    json!({"service_type": "sdxl", "payload": {"a": 1}})
}

async fn set(gateway: &Gateway, body: Value) -> Value {
    gateway.put(&path("default"), body).await.expect(200)
}

#[tokio::test]
async fn nobody_is_told_until_somebody_says_so() {
    let (gateway, _scripted) = with_service(options()).await;
    let told = gateway.get(&path("default")).await.expect(200);
    assert_eq!(
        told,
        json!({"tenant_id": "default", "ntfy": null, "webhook": null})
    );
    let run = gateway.start_job(job()).await;
    gateway.run_becomes(&run, "completed").await;
    let events = gateway.events(&run).await;
    assert!(
        !events.iter().any(|e| e == "notification_attempted"),
        "{events:?}"
    );
    let test = format!("{}/test", path("default"));
    let tested = gateway.post(&test, json!({})).await;
    assert_eq!(tested.expect(409)["code"], "nothing_to_test");
}

#[tokio::test]
async fn ntfy_is_told_of_completed_failed_preempted_and_resumed() {
    let receiver = Receiver::start().await;
    let gateway = Gateway::start(options()).await;
    gateway
        .register(worker_service(&gateway, "w", "w", json!({})))
        .await;
    let said = set(
        &gateway,
        json!({"ntfy": {"url": format!("{}/", receiver.url), "topic": "gpu-1"}}),
    );
    let said = said.await;
    assert_eq!(
        said["ntfy"]["events"],
        json!(["completed", "failed", "preempted", "resumed"])
    );
    let of = |ms: u64, priority: u8| json!({"service_type": "w", "payload": {"operation": "sleep", "ms": ms}, "priority": priority});
    let victim = gateway.start_job(of(1_500, 5)).await;
    gateway.job_becomes(&victim, "running").await;
    let urgent = gateway.start_job(of(50, 1)).await;
    gateway.run_becomes(&urgent, "completed").await;
    gateway.run_becomes(&victim, "completed").await;
    let bad = json!({"service_type": "w", "payload": {"operation": "nonsense"}, "max_attempts": 1});
    let bad = gateway.start_job(bad).await;
    gateway.run_becomes(&bad, "failed").await;
    let told = receiver.gets(5).await;
    let of_run = |run: &str| -> Vec<(String, String, String)> {
        let about = told.iter().filter(|told| told.body.contains(run));
        let row = |told: &Told| {
            (
                told.header("title"),
                told.header("priority"),
                told.header("tags"),
            )
        };
        about.map(row).collect()
    };
    let row = |title: &str, priority: &str, tags: &str| {
        (title.to_owned(), priority.to_owned(), tags.to_owned())
    };
    assert_eq!(
        of_run(&victim),
        [
            row("w job preempted", "3", "pause_button"),
            row("w job resumed", "2", "arrow_forward"),
            row("w job completed", "3", "white_check_mark"),
        ]
    );
    assert_eq!(
        of_run(&urgent),
        [row("w job completed", "3", "white_check_mark")]
    );
    assert_eq!(of_run(&bad), [row("w job failed", "4", "x")]);
    assert!(told.iter().all(|told| told.path == "/gpu-1"), "{told:?}");
    // The error is told, the payload is not.
    let failed = told.iter().find(|told| told.body.contains(&bad)).unwrap();
    assert!(failed.body.contains("has failed on w: "), "{}", failed.body);
    assert!(
        told.iter()
            .all(|told| told.header("authorization").is_empty())
    );
    gateway.recorded(&bad, "notification_attempted").await;
    let attempts = gateway.records(&bad).await;
    let attempt = attempts.last().unwrap();
    assert_eq!(attempt["effect"]["payload"]["channel"], "ntfy");
    assert_eq!(attempt["effect"]["payload"]["delivered"], true);
    assert!(!attempt.to_string().contains("gpu-1"), "{attempt}");
}

#[tokio::test]
async fn a_webhook_gets_signed_events_and_the_chosen_ones_only() {
    let receiver = Receiver::start().await;
    let (gateway, _scripted) = with_service(options()).await;
    let url = format!("{}/hook", receiver.url);
    let said = set(&gateway, json!({"webhook": {"url": url}})).await;
    assert_eq!(said["webhook"]["events"].as_array().unwrap().len(), 5);
    let held = json!({"service_type": "sdxl", "payload": {"hold": true}});
    let held = gateway.start_job(held).await;
    gateway.job_becomes(&held, "running").await;
    gateway.command("c1", &held, "cancel", json!({})).await;
    gateway.run_becomes(&held, "cancelled").await;
    let run = gateway.start_job(job()).await;
    gateway.run_becomes(&run, "completed").await;
    let told = receiver.gets(2).await;
    let cancelled = told
        .iter()
        .find(|told| told.json()["job_id"] == *held)
        .unwrap();
    assert_eq!(cancelled.json()["event"], "cancelled");
    let done = told
        .iter()
        .find(|told| told.json()["job_id"] == *run)
        .unwrap();
    let body = done.json();
    assert_eq!(body["event"], "completed");
    assert_eq!(body["tenant_id"], "default");
    assert_eq!(body["service_type"], "sdxl");
    assert_eq!(body["service_name"], "s");
    assert_eq!(body["error"], Value::Null);
    assert_eq!(done.header("ce-type"), "rungate.run.completed");
    assert_eq!(done.header("ce-id"), done.header("webhook-id"));
    let signed = signature(
        &gateway.data_dir().join("auth/webhook-secret"),
        &done.header("webhook-id"),
        &done.header("webhook-timestamp"),
        &done.body,
    );
    assert_eq!(done.header("webhook-signature"), signed);
    set(
        &gateway,
        json!({"webhook": {"url": url, "events": ["failed"]}}),
    )
    .await;
    let quiet = gateway.start_job(job()).await;
    gateway.run_becomes(&quiet, "completed").await;
    set(
        &gateway,
        json!({"webhook": {"url": url, "events": ["completed"]}}),
    )
    .await;
    let loud = gateway.start_job(job()).await;
    gateway.run_becomes(&loud, "completed").await;
    let told = receiver.gets(3).await;
    assert_eq!(told.len(), 3);
    assert_eq!(told[2].json()["job_id"], *loud);
}

/// The signature as the standard says, by another implementation.
fn signature(secret: &std::path::Path, id: &str, timestamp: &str, body: &str) -> String {
    let script = "import base64, hashlib, hmac, sys\n\
        key = base64.b64decode(open(sys.argv[1]).read().strip()[len('whsec_'):])\n\
        text = '.'.join(sys.argv[2:]).encode()\n\
        print('v1,' + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode(), end='')";
    let mut python = Command::new(&*PYTHON);
    python
        .args(["-c", script])
        .arg(secret)
        .args([id, timestamp, body]);
    String::from_utf8(python.output().unwrap().stdout).unwrap()
}

#[tokio::test]
async fn each_tenant_is_told_of_its_own_and_by_its_own_administrators() {
    let (acme, globex) = (Receiver::start().await, Receiver::start().await);
    let (gateway, _scripted) = with_service(options()).await;
    let boss = |tenant: &str| json!({"user_id": format!("boss-{tenant}"), "tenant_id": tenant, "roles": ["tenant_admin", "user"]});
    let boss_of_acme = user(&gateway, boss("acme")).await;
    let boss_of_globex = user(&gateway, boss("globex")).await;
    let plain = user(&gateway, json!({"user_id": "p", "tenant_id": "acme"})).await;
    let topic = |receiver: &Receiver| json!({"ntfy": {"url": receiver.url, "topic": "t"}});
    let put = |token: String, tenant: &'static str, body: Value| {
        let gateway = &gateway;
        async move { call(gateway, &token, Method::PUT, &path(tenant), Some(body)).await }
    };
    put(boss_of_acme.clone(), "acme", topic(&acme))
        .await
        .expect(200);
    put(boss_of_globex.clone(), "globex", topic(&globex))
        .await
        .expect(200);
    // Neither the other's, nor a plain user's own.
    put(boss_of_acme.clone(), "globex", topic(&acme))
        .await
        .expect(404);
    put(plain.clone(), "acme", topic(&acme)).await.expect(403);
    let foreign = call(&gateway, &boss_of_acme, Method::GET, &path("globex"), None).await;
    foreign.expect(404);
    let body = json!({"job": job()});
    let started = call(
        &gateway,
        &plain,
        Method::POST,
        "/api/gateway/runs/start",
        Some(body),
    )
    .await;
    let run = started.expect(200)["run_id"].as_str().unwrap().to_owned();
    let body = json!({"job": job()});
    let other = call(
        &gateway,
        &boss_of_globex,
        Method::POST,
        "/api/gateway/runs/start",
        Some(body),
    );
    let other = other.await.expect(200)["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(acme.gets(1).await[0].body.contains(&run));
    assert!(globex.gets(1).await[0].body.contains(&other));
    let own = gateway.start_job(job()).await;
    gateway.run_becomes(&own, "completed").await;
    assert_eq!((acme.told().len(), globex.told().len()), (1, 1));
}

#[tokio::test]
async fn what_was_not_taken_is_told_after_a_crash_and_an_outage_floods_nobody() {
    let receiver = Receiver::start().await;
    let (mut gateway, _scripted) = with_service(options()).await;
    receiver.answers(503);
    set(
        &gateway,
        json!({"ntfy": {"url": receiver.url, "topic": "t"}, "webhook": {"url": receiver.url}}),
    )
    .await;
    let mut runs = Vec::new();
    for _ in 0..40 {
        runs.push(gateway.start_job(job()).await);
    }
    for run in &runs {
        gateway.run_becomes(run, "completed").await;
    }
    // Eighty things to tell, and a few tries: those that had begun, and one at a time since.
    tokio::time::sleep(std::time::Duration::from_millis(800)).await;
    let tries = receiver.told().len();
    assert!((2..=30).contains(&tries), "{tries}");
    let state = gateway.get(&path("default")).await.expect(200);
    let delivery = &state["ntfy"]["delivery"];
    assert_eq!(delivery["waiting"], 40, "{state}");
    assert_eq!(delivery["last"]["status"], 503);
    assert!(delivery["failures"].as_u64().unwrap() >= 1, "{state}");
    gateway.kill();
    receiver.answers(200);
    gateway.launch().await;
    let all_told = || async {
        let told = receiver.told();
        let new = &told[tries..];
        runs.iter().all(|run| {
            let texts = new
                .iter()
                .filter(|t| t.path == "/t" && t.body.contains(run));
            let hooks = new.iter().filter(|t| t.path == "/" && t.body.contains(run));
            texts.count() >= 1 && hooks.count() >= 1
        })
    };
    until("everything is told", all_told).await;
    until("nothing waits", || async {
        let state = gateway.get(&path("default")).await.expect(200);
        state["ntfy"]["delivery"]["waiting"] == 0 && state["webhook"]["delivery"]["waiting"] == 0
    })
    .await;
    // Each try that had an outcome is a record of its run.
    let mut ids: Vec<String> = receiver.told()[tries..]
        .iter()
        .map(|t| t.header("webhook-id"))
        .collect();
    ids.retain(|id| !id.is_empty());
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 40);
    let verified = gateway.get("/api/gateway/ledger/verify").await.expect(200);
    assert_eq!(verified["ok"], true, "{verified}");
}

#[tokio::test]
async fn a_receiver_that_is_gone_holds_up_no_job() {
    let (gateway, _scripted) =
        with_service(options().set("RUNGATE_CALLBACK_BASE_MS", "60000")).await;
    // Nothing listens there.
    let gone = "http://127.0.0.1:9";
    set(&gateway, json!({"ntfy": {"url": gone, "topic": "t"}})).await;
    let mut runs = Vec::new();
    for _ in 0..100 {
        runs.push(gateway.start_job(job()).await);
    }
    for run in &runs {
        gateway.run_becomes(run, "completed").await;
    }
    let page = gateway
        .get("/api/gateway/ledger?limit=2000")
        .await
        .expect(200);
    let items = page["items"].as_array().unwrap();
    let tries = items
        .iter()
        .filter(|r| r["effect"]["type"] == "notification_attempted");
    assert!(tries.count() <= 8);
    let state = gateway.get(&path("default")).await.expect(200);
    let error = state["ntfy"]["delivery"]["last"]["error"].as_str().unwrap();
    assert!(error.contains("refused"), "{error}");
}

#[tokio::test]
async fn private_addresses_are_told_nothing_unless_the_settings_allow_it() {
    let receiver = Receiver::start().await;
    let gateway = Gateway::start(Options::default()).await;
    set(&gateway, json!({"ntfy": {"url": receiver.url, "topic": "t"}, "webhook": {"url": "http://169.254.169.254/latest"}})).await;
    let asked = gateway
        .post(&format!("{}/test", path("default")), json!({}))
        .await;
    assert_eq!(asked.expect(200)["channels"], json!(["ntfy", "webhook"]));
    let last = |state: &Value, channel: &str| state[channel]["delivery"]["last"]["error"].clone();
    until("both were tried", || async {
        let state = gateway.get(&path("default")).await.expect(200);
        !last(&state, "ntfy").is_null() && !last(&state, "webhook").is_null()
    })
    .await;
    let state = gateway.get(&path("default")).await.expect(200);
    let ntfy = last(&state, "ntfy").to_string();
    assert!(
        ntfy.contains("127.0.0.1 is private") && ntfy.contains("notify_allow_private"),
        "{ntfy}"
    );
    let webhook = last(&state, "webhook").to_string();
    assert!(
        webhook.contains("169.254.169.254") && webhook.contains("notify_allow_networks"),
        "{webhook}"
    );
    assert_eq!(receiver.told().len(), 0);
}

#[tokio::test]
async fn no_title_carries_a_second_header() {
    let receiver = Receiver::start().await;
    let gateway = Gateway::start(options()).await;
    set(
        &gateway,
        json!({"ntfy": {"url": receiver.url, "topic": "t", "events": ["cancelled"]}}),
    )
    .await;
    let odd = ["ü-x", "a: b", "\u{2028}X-Evil: 1"];
    for kind in odd {
        let run = gateway
            .start_job(json!({"service_type": kind, "payload": {}}))
            .await;
        gateway.command(&run, &run, "cancel", json!({})).await;
    }
    // A type with a line break is refused when the job is submitted.
    let broken = json!({"service_type": "a\r\nX-Evil: 1", "payload": {}});
    gateway.post("/queue/submit", broken).await.expect(422);
    let told = receiver.gets(odd.len()).await;
    assert!(told.iter().all(|told| told.headers.get("x-evil").is_none()));
    let titles: Vec<String> = told.iter().map(|told| told.header("title")).collect();
    assert!(
        titles.contains(&"a: b job cancelled".to_owned()),
        "{titles:?}"
    );
    assert_eq!(
        titles
            .iter()
            .filter(|title| title.starts_with("=?UTF-8?B?"))
            .count(),
        2
    );
}

#[tokio::test]
async fn an_access_token_is_shown_to_its_server_and_nowhere_else() {
    let (receiver, other) = (Receiver::start().await, Receiver::start().await);
    let canary = format!("tk_{}", uuid::Uuid::new_v4().simple());
    let options = options().set("RUNGATE_LOG", "trace");
    let mut gateway = Gateway::start(options).await;
    let ntfy = |url: &str| json!({"ntfy": {"url": url, "topic": "t"}});
    let mut with = ntfy(&receiver.url);
    with["ntfy"]["token"] = canary.clone().into();
    let said = set(&gateway, with.clone()).await;
    assert_eq!(said["ntfy"]["has_token"], true);
    let test = format!("{}/test", path("default"));
    gateway.post(&test, json!({})).await.expect(200);
    let told = receiver.gets(1).await;
    assert_eq!(told[0].header("authorization"), format!("Bearer {canary}"));
    // Said again without it: it stays, for this server.
    let kept = set(&gateway, ntfy(&receiver.url)).await;
    assert_eq!(kept["ntfy"]["has_token"], true);
    let file = gateway.data_dir().join("auth/ntfy/token-default");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    // Another server is not shown it.
    let moved = set(&gateway, ntfy(&other.url)).await;
    assert_eq!(moved["ntfy"]["has_token"], false);
    assert!(!file.exists());
    gateway.post(&test, json!({})).await.expect(200);
    assert_eq!(other.gets(1).await[0].header("authorization"), "");
    set(&gateway, with).await;
    let mut said = Vec::new();
    for path in [
        path("default").as_str(),
        "/api/gateway/ledger/export",
        "/api/gateway/audit?limit=500",
        "/metrics",
    ] {
        let answered = answer(gateway.request(Method::GET, path)).await;
        assert_eq!(answered.status, 200, "{}", answered.text);
        said.push((path.to_owned(), answered.text));
    }
    // Each write is told once, whether its record is of the token's file or of the ledger: four said where, two tested.
    let audit: Value = serde_json::from_str(&said[2].1).unwrap();
    let writes = |method: &str| {
        let items = audit["items"].as_array().unwrap().iter();
        let of = |e: &&Value| e["route"].as_str().unwrap_or("").contains("/notify");
        items.filter(of).filter(|e| e["method"] == method).count()
    };
    assert_eq!((writes("PUT"), writes("POST")), (4, 2), "{audit}");
    gateway.stop().await;
    said.push(("the log".to_owned(), gateway.log()));
    let ledger = std::fs::read(gateway.data_dir().join("ledger.redb")).unwrap();
    said.push((
        "the ledger".to_owned(),
        String::from_utf8_lossy(&ledger).into_owned(),
    ));
    for (place, text) in &said {
        assert!(!text.contains(&canary), "the token is in {place}");
    }
    assert!(std::fs::read_to_string(&file).unwrap().contains(&canary));
}

#[tokio::test]
async fn the_settings_name_the_default_tenants_topic_and_take_it_back() {
    let receiver = Receiver::start().await;
    let by_settings = options()
        .set("NTFY_ENABLED", "true")
        .set("NTFY_URL", &receiver.url)
        .set("NTFY_TOPIC", "gpu");
    let mut gateway = Gateway::start(by_settings).await;
    let state = gateway.get(&path("default")).await.expect(200);
    assert_eq!(state["ntfy"]["topic"], "gpu");
    assert_eq!(state["ntfy"]["by_settings"], true);
    gateway
        .post(&format!("{}/test", path("default")), json!({}))
        .await
        .expect(200);
    assert_eq!(receiver.gets(1).await[0].path, "/gpu");
    gateway.stop().await;
    gateway.options = options();
    gateway.launch().await;
    let state = gateway.get(&path("default")).await.expect(200);
    assert_eq!(state["ntfy"], Value::Null);
    // What its administrators said themselves is left alone.
    set(
        &gateway,
        json!({"ntfy": {"url": receiver.url, "topic": "own"}}),
    )
    .await;
    gateway.stop().await;
    gateway.launch().await;
    let state = gateway.get(&path("default")).await.expect(200);
    assert_eq!(state["ntfy"]["topic"], "own");
    let enabled = Command::new(binary())
        .args(["config", "check"])
        .env("NTFY_ENABLED", "true")
        .output()
        .unwrap();
    assert!(!enabled.status.success(), "there is no default topic");
    let said = String::from_utf8_lossy(&enabled.stderr).into_owned();
    assert!(said.contains("ntfy_topic"), "{said}");
}

/// `rungate tenant notify …` with the administrator's token.
async fn rungate(gateway: &Gateway, args: &[&str]) -> (bool, String) {
    let mut command = tokio::process::Command::new(binary());
    command
        .args(["--url", &gateway.url("/api/gateway"), "tenant", "notify"])
        .args(args)
        .env("RUNGATE_TOKEN", gateway.token());
    let output = command.output().await.unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[tokio::test]
async fn the_command_line_sets_shows_and_tests() {
    let receiver = Receiver::start().await;
    let gateway = Gateway::start(options()).await;
    let url = receiver.url.as_str();
    let token_file = gateway.data_dir().join("token");
    std::fs::write(&token_file, "tk_from_a_file\n").unwrap();
    let token_file = token_file.to_str().unwrap();
    let (done, said) = rungate(
        &gateway,
        &[
            "set",
            "default",
            "--ntfy-topic",
            "t",
            "--ntfy-url",
            url,
            "--ntfy-token-file",
            token_file,
            "--ntfy-events",
            "failed,completed",
            "--webhook-url",
            url,
        ],
    )
    .await;
    assert!(
        done && said.contains("failed, completed") && !said.contains("tk_from"),
        "{said}"
    );
    let (done, said) = rungate(&gateway, &["test", "default"]).await;
    assert!(done && said.matches("delivered").count() == 2, "{said}");
    assert_eq!(receiver.gets(2).await.len(), 2);
    receiver.answers(403);
    let (done, said) = rungate(&gateway, &["test", "default"]).await;
    assert!(!done && said.contains("it answered 403"), "{said}");
    let (done, said) = rungate(&gateway, &["set", "default", "--no-ntfy", "--no-webhook"]).await;
    assert!(done && said.matches("off").count() == 2, "{said}");
    let (done, said) = rungate(&gateway, &["set", "default"]).await;
    assert!(!done && said.contains("name a channel"), "{said}");
    let (done, _) = rungate(&gateway, &["show", "nobody"]).await;
    assert!(!done);
}
