//! What tests of driver and executor stand on: a driver with real processes, a record of outcomes to wait for,
//! and the certainty that nothing is left running.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command as StdCommand, Stdio};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use rungate::clock::now;
use rungate::domain::command::Command;
use rungate::domain::event::Exit;
use rungate::domain::ids::{Generation, PlaneId, RunId, Seq, ServiceName};
use rungate::domain::notify::Notify;
use rungate::domain::spec::{ProgressMode, ServiceSpec, Worker};
use rungate::domain::time::Timestamp;
use rungate::driver::{
    Credentials, Driver, DriverOptions, Mark, Meter, NotTaken, Outcomes, ProbeTimings, Sink, Tasks,
    Unmetered, marked_by,
};
use rungate::executor::{CallbackBody, NoticeFacts, RunEnd, Source, SourceError};
use rungate::outbound::{Purpose, Reach, Rules};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use uuid::Uuid;

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The interpreter itself: a launcher in front of it would cost time at each start.
pub static PYTHON: LazyLock<String> = LazyLock::new(|| {
    let told = StdCommand::new("python3")
        .args(["-c", "import sys; print(sys.executable)"])
        .output();
    String::from_utf8(told.unwrap().stdout)
        .unwrap()
        .trim()
        .to_owned()
});

/// A service in Python. `WORKER` in its environment chooses its habits.
const WORKER: &str = r#"
import http.server, json, os, signal, subprocess, sys, threading
habits = os.environ.get("WORKER", "").split(",")
if "ignores-term" in habits:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "has-children" in habits:
    subprocess.Popen(["sleep", "1000"])
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
healthy = "sick" not in habits
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass
    def answer(self, status, body=b"{}"):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/health":
            self.answer(200 if healthy else 503)
        else:
            self.answer(200, json.dumps(dict(os.environ)).encode())
    def do_POST(self):
        global healthy
        if self.path == "/crash":
            os._exit(3)
        if self.path == "/say":
            print(self.rfile.read(int(self.headers["content-length"])).decode(), flush=True)
        healthy = {"/sick": False, "/well": True}.get(self.path, healthy)
        self.answer(200)
print("ready", flush=True)
class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *args):
        pass  # A gateway that dies leaves broken connections, which are not worth a line in the log.
Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;

/// Takes every outcome and lets tests wait for them.
pub struct Recorder {
    outcomes: watch::Sender<Vec<Command>>,
}

impl Sink for Recorder {
    fn submit(&self, outcome: Command) -> BoxFuture<'_, Result<(), NotTaken>> {
        self.outcomes.send_modify(|outcomes| outcomes.push(outcome));
        Box::pin(async { Ok(()) })
    }
}

impl Recorder {
    pub fn all(&self) -> Vec<Command> {
        self.outcomes.borrow().clone()
    }

    /// Waits until `count` outcomes are there that `wanted` takes, and answers the last of them.
    pub async fn nth<T>(&self, count: usize, wanted: impl Fn(&Command) -> Option<T>) -> T {
        let mut outcomes = self.outcomes.subscribe();
        let enough = |all: &Vec<Command>| all.iter().filter_map(&wanted).count() >= count;
        let waiting = tokio::time::timeout(PATIENCE, outcomes.wait_for(enough)).await;
        match waiting {
            Ok(all) => all
                .unwrap()
                .iter()
                .filter_map(&wanted)
                .nth(count - 1)
                .unwrap(),
            Err(_) => panic!(
                "the awaited outcome did not come; there are {:#?}",
                self.all()
            ),
        }
    }

    pub async fn first<T>(&self, wanted: impl Fn(&Command) -> Option<T>) -> T {
        self.nth(1, wanted).await
    }

    /// Waits for the end of everything about an instance; answers how it exited.
    pub async fn released(&self, generation: u64) -> Exit {
        self.first(|outcome| match outcome {
            Command::InstanceReleased {
                generation: seen, ..
            } => (seen.0 == generation).then_some(()),
            _ => None,
        })
        .await;
        self.first(|outcome| match outcome {
            Command::InstanceExited {
                generation: seen,
                exit,
                ..
            } => (seen.0 == generation).then(|| exit.clone()),
            _ => None,
        })
        .await
    }

    /// The outcomes' names in order, those of one instance.
    pub fn story(&self, generation: u64) -> Vec<String> {
        self.all()
            .iter()
            .filter_map(|outcome| told(outcome, Generation(generation)))
            .collect()
    }
}

fn told(outcome: &Command, of: Generation) -> Option<String> {
    let (generation, text) = match outcome {
        Command::InstanceSpawned { generation, .. } => (generation, "spawned".into()),
        Command::InstanceHealthy { generation, .. } => (generation, "healthy".into()),
        Command::InstanceUnhealthy { generation, .. } => (generation, "unhealthy".into()),
        Command::InstanceAdopted { generation, .. } => (generation, "adopted".into()),
        Command::InstanceSignalled {
            generation, signal, ..
        } => (generation, signal.to_string()),
        Command::InstanceExited { generation, .. } => (generation, "exited".into()),
        Command::InstanceReleased { generation, .. } => (generation, "released".into()),
        _ => return None,
    };
    (*generation == of).then_some(text)
}

pub fn is_spawned(outcome: &Command) -> Option<(u32, u16)> {
    match outcome {
        Command::InstanceSpawned { pid, port, .. } => Some((*pid, *port)),
        _ => None,
    }
}

pub fn is_healthy(outcome: &Command) -> Option<()> {
    matches!(outcome, Command::InstanceHealthy { .. }).then_some(())
}

/// A ledger in memory: payloads by seq, and how runs ended.
#[derive(Default)]
pub struct Ledger {
    payloads: Mutex<Vec<Bytes>>,
    ended: Mutex<HashMap<RunId, CallbackBody>>,
}

impl Ledger {
    pub fn keep(&self, payload: &str) -> Seq {
        let mut payloads = self.payloads.lock().unwrap();
        payloads.push(Bytes::copy_from_slice(payload.as_bytes()));
        payloads.len() as Seq
    }

    pub fn end(&self, body: CallbackBody) {
        self.ended.lock().unwrap().insert(body.job_id, body);
    }
}

impl Source for Ledger {
    fn payload(&self, seq: Seq) -> Result<Option<Bytes>, SourceError> {
        Ok(self.payloads.lock().unwrap().get(seq as usize - 1).cloned())
    }

    fn callback_body(&self, _: PlaneId, run: RunId) -> Result<Option<CallbackBody>, SourceError> {
        Ok(self.ended.lock().unwrap().get(&run).cloned())
    }

    fn notify(&self, _: &str) -> Result<Notify, SourceError> {
        Ok(Notify::default())
    }

    fn run_end(&self, _: PlaneId, _: RunId) -> Result<RunEnd, SourceError> {
        Ok(RunEnd::Live)
    }

    fn notice_facts(&self, _: PlaneId, _: RunId) -> Result<Option<NoticeFacts>, SourceError> {
        Ok(None)
    }
}

/// A directory, a ledger's id, and one driver at a time.
pub struct World {
    pub dir: tempfile::TempDir,
    pub ledger: Uuid,
    pub tasks: Tasks,
    pub recorder: Arc<Recorder>,
    pub driver: Driver,
    probes: ProbeTimings,
    meter: Arc<dyn Meter>,
}

impl World {
    pub fn new() -> World {
        World::metered(Arc::new(Unmetered))
    }

    /// One in which GPU memory is measured.
    pub fn metered(meter: Arc<dyn Meter>) -> World {
        let probes = ProbeTimings {
            startup_first: Duration::from_millis(20),
            startup_max: Duration::from_millis(100),
            liveness: Duration::from_millis(50),
            failures: 3,
        };
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("worker.py"), WORKER).unwrap();
        let ledger = Uuid::new_v4();
        let (driver, recorder, tasks) = driver(dir.path().into(), ledger, probes, meter.clone());
        World {
            dir,
            ledger,
            tasks,
            recorder,
            driver,
            probes,
            meter,
        }
    }

    pub fn outcomes(&self) -> Outcomes {
        Outcomes::new(self.recorder.clone())
    }

    /// The gateway dies without a word, and another takes its place.
    pub async fn restart(&mut self) {
        self.tasks.stop().await;
        let meter = self.meter.clone();
        (self.driver, self.recorder, self.tasks) =
            driver(self.dir.path().into(), self.ledger, self.probes, meter);
    }

    /// A service that runs the worker with these habits.
    pub fn worker(&self, habits: &str) -> ServiceSpec {
        let script = self.dir.path().join("worker.py").display().to_string();
        let mut spec = process(&[&PYTHON, "-u", &script]);
        if let Worker::Process { env, .. } = &mut spec.worker {
            env.push(("WORKER".into(), habits.into()));
        }
        spec
    }

    /// Starts it and waits until it is healthy; answers its base URL.
    pub async fn started(&self, spec: ServiceSpec, generation: u64) -> String {
        let name = spec.name.clone();
        self.driver.start(spec, Generation(generation), Vec::new());
        self.recorder.first(is_healthy).await;
        self.driver
            .endpoint(&name, Generation(generation))
            .unwrap()
            .base_url
            .clone()
    }

    pub fn stop(&self, generation: u64, grace_ms: u64) {
        self.driver
            .stop(&service(), Generation(generation), soon(grace_ms));
    }

    pub fn mark(&self, generation: u64) -> Mark {
        Mark {
            ledger: self.ledger,
            service: service(),
            generation: Generation(generation),
        }
    }

    /// Nothing of this ledger runs any more.
    pub fn assert_nothing_left(&self) {
        assert_eq!(marked_by(self.ledger), []);
    }
}

impl Drop for World {
    /// A test that failed half-way leaves no process either.
    fn drop(&mut self) {
        for process in marked_by(self.ledger) {
            let _ = kill_process(pid(process.pid), Signal::KILL);
        }
    }
}

/// Files in the place of tokens.
struct Files(PathBuf);

impl Credentials for Files {
    fn renew_every(&self) -> Duration {
        Duration::from_secs(3_600)
    }

    fn write(&self, service: &ServiceName, generation: Generation) -> std::io::Result<PathBuf> {
        std::fs::create_dir_all(&self.0)?;
        let path = self.0.join(format!("{service}.{generation}"));
        std::fs::write(&path, "token")?;
        Ok(path)
    }

    fn remove(&self, service: &ServiceName, generation: Generation) {
        let _ = std::fs::remove_file(self.0.join(format!("{service}.{generation}")));
    }
}

fn driver(
    data_dir: PathBuf,
    ledger: Uuid,
    probes: ProbeTimings,
    meter: Arc<dyn Meter>,
) -> (Driver, Arc<Recorder>, Tasks) {
    let recorder = Arc::new(Recorder {
        outcomes: watch::Sender::new(Vec::new()),
    });
    let tasks = Tasks::new();
    let options = DriverOptions {
        data_dir: data_dir.clone(),
        ledger,
        probes,
        services: service_rules(),
        credentials: Arc::new(Files(data_dir.join("tokens"))),
        docker: rungate::driver::DockerOptions::none(),
        meter,
        cuda_checkpoint: "cuda-checkpoint".to_owned(),
        container_owners: rungate::driver::ContainerOwners::default(),
    };
    let driver = Driver::new(options, Outcomes::new(recorder.clone()), tasks.clone()).unwrap();
    (driver, recorder, tasks)
}

/// As the gateway has them by default.
/// For executors that tell nobody.
pub fn no_notices() -> Rules {
    Rules::new(Purpose::Notifications, Reach::Public, Vec::new())
}

pub fn service_rules() -> Rules {
    Rules::new(Purpose::Services, Reach::PublicAndPrivate, Vec::new())
}

pub fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.try_into().unwrap()).unwrap()
}

pub fn service() -> ServiceName {
    ServiceName::new("worker")
}

pub fn soon(ms: u64) -> Timestamp {
    now() + ms
}

/// Waits for something that nobody tells.
pub async fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let looking = async {
        while !seen() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(
        tokio::time::timeout(PATIENCE, looking).await.is_ok(),
        "{what} did not come about"
    );
}

/// A process that nobody's driver started, as an earlier gateway would have left it: not our child.
pub fn abandoned(command: &[&str], env: &[(&str, &str)]) {
    let mut shell = StdCommand::new("sh");
    shell
        .args(["-c", "setsid \"$@\" </dev/null >/dev/null 2>&1 &", "sh"])
        .args(command);
    shell.envs(env.iter().copied()).stdin(Stdio::null());
    assert!(shell.status().unwrap().success());
}

pub fn process(command: &[&str]) -> ServiceSpec {
    spec(Worker::Process {
        command: command.iter().map(|&part| part.to_owned()).collect(),
        env: Vec::new(),
        working_dir: None,
    })
}

pub fn external(url: &str) -> ServiceSpec {
    spec(Worker::External {
        url: url.to_owned(),
    })
}

fn spec(worker: Worker) -> ServiceSpec {
    ServiceSpec {
        name: service(),
        service_type: "text".into(),
        container: "worker".into(),
        port: 0,
        health_endpoint: "/health".into(),
        description: String::new(),
        vram_mib: 0,
        gpus: 0,
        progress_mode: ProgressMode::Stateless,
        progress_endpoint: None,
        worker,
        concurrency: 1,
        dispatch_path: None,
        cancel_path: None,
        idle_timeout_ms: None,
        grace_ms: 500,
        startup_timeout_ms: 20_000,
        min_runtime_ms: None,
        ladder: Vec::new(),
        mps_percent: None,
    }
}
