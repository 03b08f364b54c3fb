//! A real gateway for tests: the built binary on a free port over a data directory of its own, killed when
//! dropped together with every process that it started.

pub mod browser;
pub mod double;
pub mod issuer;
pub mod keys;
pub mod raw;
pub mod rng;
pub mod scripted;
pub mod sse;
pub mod wait;

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::wait::until;

/// How a gateway under test is started.
#[derive(Clone, Default)]
pub struct Options {
    /// Value of `RUNGATE_GPUS`; none when it is not said.
    pub gpus: Option<String>,
    /// Further environment, such as settings.
    pub env: Vec<(String, String)>,
    /// Where the data lies, when not beside the log.
    pub data_dir: Option<PathBuf>,
    /// The certificate, in PEM form, of whoever has signed the gateway's: then it is talked to by TLS.
    pub authority: Option<String>,
}

impl Options {
    pub fn gpus(gpus: &str) -> Options {
        Options {
            gpus: Some(gpus.to_owned()),
            ..Options::default()
        }
    }

    pub fn set(mut self, name: &str, value: &str) -> Options {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A running gateway and its data.
pub struct Gateway {
    dir: TempDir,
    pub options: Options,
    addr: SocketAddr,
    child: Option<Child>,
    http: reqwest::Client,
    token: String,
}

/// An answer, its body as JSON when it is some.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
    pub json: Value,
}

impl Answer {
    /// The body, once the status is as expected.
    #[track_caller]
    pub fn expect(self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        self.json
    }
}

pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_rungate"))
}

/// A free port that the kernel gives to nobody's outgoing connection while the gateway is down
/// (`net.ipv4.ip_local_port_range` begins at 32768).
pub fn free_port() -> u16 {
    loop {
        let port = 10_000 + (uuid::Uuid::new_v4().as_fields().1 % 20_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A client that trusts this authority alone, or none and speaks plain http.
pub fn client(authority: Option<&str>) -> reqwest::Client {
    let builder = reqwest::Client::builder().timeout(Duration::from_secs(60));
    let authority = authority.map(|pem| reqwest::Certificate::from_pem(pem.as_bytes()).unwrap());
    match authority {
        Some(authority) => builder.tls_certs_only([authority]),
        None => builder,
    }
    .build()
    .unwrap()
}

impl Gateway {
    /// Starts one and waits until it answers.
    pub async fn start(options: Options) -> Gateway {
        let mut gateway = Gateway {
            dir: TempDir::new().unwrap(),
            addr: SocketAddr::from(([127, 0, 0, 1], free_port())),
            http: client(options.authority.as_deref()),
            options,
            child: None,
            token: String::new(),
        };
        gateway.launch().await;
        gateway
    }

    /// Starts the process again, over the same data and on the same port.
    pub async fn launch(&mut self) {
        self.spawn();
        self.answers().await;
    }

    /// Starts the process and waits for nothing.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("gateway.log"))
            .unwrap();
        let mut command = Command::new(binary());
        command
            .arg("serve")
            .args(["--listen", &self.addr.to_string()])
            .arg("--data-dir")
            .arg(self.data_dir())
            .env("XDG_CONFIG_HOME", self.dir.path().join("config"))
            // Tests of containers say so.
            .env("RUNGATE_DOCKER_HOST", "none")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        // Those of the machine only where a test asks for them.
        let gpus = self.options.gpus.as_deref().unwrap_or("none");
        command.env("RUNGATE_GPUS", gpus);
        for (name, value) in &self.options.env {
            command.env(name, value);
        }
        self.child = Some(command.spawn().unwrap());
    }

    /// Waits until the started process answers.
    pub async fn answers(&mut self) {
        let url = self.url("/livez");
        until("the gateway answers", || async {
            let answer = self.http.get(&url).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
        let token = std::fs::read_to_string(self.token_path()).unwrap();
        self.token = token.trim().to_owned();
    }

    pub fn data_dir(&self) -> PathBuf {
        let beside = || self.dir.path().join("data");
        self.options.data_dir.clone().unwrap_or_else(beside)
    }

    pub fn token_path(&self) -> PathBuf {
        self.data_dir().join("auth/bootstrap-admin-token")
    }

    pub fn token(&self) -> &str {
        &self.token
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn url(&self, path: &str) -> String {
        let scheme = self.options.authority.as_ref().map_or("http", |_| "https");
        format!("{scheme}://{}{path}", self.addr)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// What the process has written, for a failing test's message.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("gateway.log")).unwrap_or_default()
    }

    /// SIGKILL, and nothing else: what it started lives on.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// TERM, then waits for its end.
    pub async fn stop(&mut self) -> std::process::ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.ended().await
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.child.as_ref().expect("it runs"));
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for the process's end.
    pub async fn ended(&mut self) -> std::process::ExitStatus {
        let child = std::cell::RefCell::new(self.child.take().expect("it runs"));
        until("the gateway has ended", || async {
            child.borrow_mut().try_wait().unwrap().is_some()
        })
        .await;
        child.into_inner().wait().unwrap()
    }

    /// A request without a credential; add what is needed.
    pub fn bare(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, self.url(path))
    }

    /// A request as the administrator.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.bare(method, path).bearer_auth(&self.token)
    }

    pub async fn get(&self, path: &str) -> Answer {
        answer(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        answer(self.request(Method::POST, path).json(&body)).await
    }

    pub async fn put(&self, path: &str, body: Value) -> Answer {
        answer(self.request(Method::PUT, path).json(&body)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        answer(self.request(Method::DELETE, path)).await
    }

    /// Starts a job run; its id.
    pub async fn start_job(&self, job: Value) -> String {
        let answer = self
            .post("/api/gateway/runs/start", json!({ "job": job }))
            .await;
        let body = answer.expect(200);
        body["run_id"].as_str().expect("a run id").to_owned()
    }

    /// Sends a command; its inbox answer.
    pub async fn command(&self, id: &str, run: &str, kind: &str, payload: Value) -> Value {
        let body = json!({"command_id": id, "run_id": run, "type": kind, "payload": payload});
        self.post("/api/gateway/commands", body).await.expect(200)
    }

    pub async fn run(&self, run: &str) -> Value {
        self.get(&format!("/api/gateway/runs/{run}"))
            .await
            .expect(200)
    }

    /// Waits until the run's contract status is `status`; the summary.
    pub async fn run_becomes(&self, run: &str, status: &str) -> Value {
        let what = format!("run {run} is {status}");
        until(&what, || async { self.run(run).await["status"] == status }).await;
        self.run(run).await
    }

    /// Waits until the run's own state (`job.state`) is `state`; the summary.
    pub async fn job_becomes(&self, run: &str, state: &str) -> Value {
        let what = format!("job {run} is {state}");
        until(&what, || async {
            self.run(run).await["job"]["state"] == state
        })
        .await;
        self.run(run).await
    }

    /// Waits until a run has a record of that event; the record.
    pub async fn recorded(&self, run: &str, event: &str) -> Value {
        let what = format!("run {run} has {event}");
        until(&what, || async {
            self.events(run).await.iter().any(|name| name == event)
        })
        .await;
        let records = self.records(run).await;
        let found = records.into_iter().find(|r| r["effect"]["type"] == event);
        found.expect("it was there")
    }

    /// All records of a run.
    pub async fn records(&self, run: &str) -> Vec<Value> {
        let path = format!("/api/gateway/runs/{run}/ledger?limit=2000");
        let page = self.get(&path).await.expect(200);
        page["items"].as_array().expect("items").clone()
    }

    /// The names of a run's events, in order.
    pub async fn events(&self, run: &str) -> Vec<String> {
        names(&self.records(run).await)
    }

    /// All records of the gateway that are about a service's instances.
    pub async fn service_records(&self, service: &str) -> Vec<Value> {
        let page = self.get("/api/gateway/ledger?limit=2000").await.expect(200);
        let items = page["items"].as_array().expect("items").clone();
        let about = |r: &Value| r["effect"]["payload"]["service"] == service;
        items.into_iter().filter(about).collect()
    }

    /// The names of those, in order.
    pub async fn service_events(&self, service: &str) -> Vec<String> {
        names(&self.service_records(service).await)
    }

    pub async fn service(&self, name: &str) -> Value {
        self.get(&format!("/services/{name}")).await.expect(200)
    }

    /// Waits until a member of a service, named by its JSON pointer, has that value.
    pub async fn service_becomes(&self, name: &str, pointer: &str, value: Value) {
        let what = format!("{pointer} of service {name} is {value}");
        until(&what, || async {
            self.service(name).await.pointer(pointer) == Some(&value)
        })
        .await;
    }

    pub async fn register(&self, service: Value) -> Value {
        self.post("/services/register", service).await.expect(200)
    }

    /// The causes that block a run.
    pub async fn causes(&self, run: &str) -> Vec<String> {
        let path = format!("/api/gateway/runs/{run}/why");
        let why = self.get(&path).await.expect(200);
        let blocking = why["blocking"].as_array().expect("causes");
        let cause = |b: &Value| b["cause"].as_str().expect("a cause").to_owned();
        blocking.iter().map(cause).collect()
    }

    /// Waits until `cause` is among what blocks a run.
    pub async fn blocked_by(&self, run: &str, cause: &str) {
        let what = format!("run {run} is blocked by {cause}");
        until(&what, || async {
            self.causes(run).await.iter().any(|found| found == cause)
        })
        .await;
    }

    /// What became of a command.
    pub async fn command_state(&self, id: &str) -> Value {
        let path = format!("/api/gateway/commands/{id}");
        self.get(&path).await.expect(200)
    }

    /// The tail of the whole ledger.
    pub async fn tail(&self) -> u64 {
        let body = self.get("/api/gateway/ledger/stats").await.expect(200);
        body["tail_seq"].as_u64().expect("a tail")
    }

    /// Processes that bear the mark of this gateway's ledger.
    pub fn services_alive(&self) -> Vec<u32> {
        let data = self.data_dir().display().to_string();
        let mut alive = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            let text = String::from_utf8_lossy(&environ);
            if text.contains("RUNGATE_INSTANCE=") && text.contains(&data) {
                alive.push(pid);
            }
        }
        alive
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for pid in self.services_alive() {
            if let Some(pid) = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        if std::thread::panicking() {
            eprintln!("--- the gateway's log\n{}", self.log());
        }
    }
}

fn names(records: &[Value]) -> Vec<String> {
    let name = |r: &Value| r["effect"]["type"].as_str().expect("a name").to_owned();
    records.iter().map(name).collect()
}

/// Fails with what was found unless `wanted` occur among `found` in this order.
#[track_caller]
pub fn assert_in_order(found: &[String], wanted: &[&str]) {
    let mut rest = found.iter();
    for name in wanted {
        let there = rest.any(|found| found == name);
        assert!(
            there,
            "{name} of {wanted:?} is missing or late in {found:#?}"
        );
    }
}

/// Sends a request and takes all of the answer.
pub async fn answer(request: reqwest::RequestBuilder) -> Answer {
    let response = request.send().await.expect("the gateway answers");
    let status = response.status();
    let headers = response.headers().clone();
    let text = response.text().await.expect("a whole body");
    let json = serde_json::from_str(&text).unwrap_or(Value::Null);
    Answer {
        status,
        headers,
        text,
        json,
    }
}

/// A registration of the example worker as a process service, with further members merged in.
pub fn worker_service(gateway: &Gateway, name: &str, service_type: &str, more: Value) -> Value {
    let mut body = json!({
        "name": name,
        "container": name,
        "type": service_type,
        "port": 0,
        "command": [binary(), "worker"],
        "cancel_path": "/cancel",
        "grace_seconds": 2,
        "env": {
            "RUNGATE_GATEWAY_URL": gateway.url(""),
        },
    });
    let members = body.as_object_mut().expect("an object");
    for (key, value) in more.as_object().expect("an object") {
        members.insert(key.clone(), value.clone());
    }
    body
}
