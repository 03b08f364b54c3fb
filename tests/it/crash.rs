//! Nothing lost: the real server, killed at random moments under load, keeps all that it acknowledged, does it
//! once, and loses no process. `CRASH_KILLS` kills more often, `CRASH_SEED` chooses the moments.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::crash_audit::{self, Acknowledged};
use crate::crash_clients::{Client, Phase, World};
use crate::support::rng::Rng;
use crate::support::sse::EventSource;
use crate::support::wait::until;
use crate::support::{Gateway, Options, worker_service};

const CLIENTS: u64 = 16;
const KILLS: u64 = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_and_nothing_is_done_twice() {
    let seed = Rng::seed("CRASH_SEED");
    let kills = std::env::var("CRASH_KILLS").map_or(KILLS, |text| text.parse().unwrap());
    eprintln!("CRASH_SEED={seed} CRASH_KILLS={kills}");
    let began = Instant::now();
    let mut rng = Rng::new(seed);
    let mut gateway = Gateway::start(options()).await;
    register_services(&gateway).await;
    let twice = Watcher::start(&gateway);

    let (phase, clock) = watch::channel(Phase::default());
    let world = Arc::new(World {
        url: gateway.url(""),
        token: gateway.token().to_owned(),
        phase: clock.clone(),
        runs: Mutex::default(),
        texts: texts(),
        answers: AtomicU64::new(0),
        resent: AtomicU64::new(0),
    });
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        clients.spawn(Client::new(number, seed, world.clone()).live());
    }
    let frames = Frames::default();
    let (url, token) = (gateway.url(""), gateway.token().to_owned());
    let follower = tokio::spawn(follow(url, token, clock, frames.clone()));

    for kill in 1..=kills {
        one_crash(&mut gateway, &mut rng, &phase, kill).await;
        if let Some(ended) = clients.try_join_next() {
            ended.expect("no client fails");
            panic!("a client ended early");
        }
    }
    phase.send_modify(|phase| {
        phase.epoch += 1;
        phase.over = true;
    });
    let clients = clients.join_all().await;
    eprintln!(
        "{} answers, {} requests sent again, {:?} of crashes",
        world.answers.load(Ordering::Relaxed),
        world.resent.load(Ordering::Relaxed),
        began.elapsed()
    );
    assert!(world.answers.load(Ordering::Relaxed) > kills);
    everything_ends(&gateway, &clients).await;

    let mut acknowledged = Acknowledged::default();
    for client in &clients {
        acknowledged.add(client);
    }
    acknowledged.check_over_http(&gateway).await;
    let tail = gateway.tail().await;
    assert!(!follower.is_finished(), "the follower failed");
    acknowledged.frames = all_seen(&frames, tail).await;
    gateway.kill();
    crash_audit::check(&gateway.data_dir(), &acknowledged);

    gateway.launch().await;
    nothing_is_left(&mut gateway).await;
    assert_eq!(twice.stop(), Vec::<String>::new(), "no service ran twice");
    eprintln!("{:?} in all", began.elapsed());
}

/// Small numbers everywhere, so that everything that waits comes about between two crashes.
fn options() -> Options {
    Options::gpus("sim:24GiB")
        .set("RUNGATE_MIN_RUNTIME_MS", "20")
        .set("RUNGATE_SWAP_MAX_WAIT_MS", "200")
        .set("RUNGATE_RETRY_BASE_MS", "10")
        .set("RUNGATE_RETRY_MAX_MS", "100")
        .set("RUNGATE_RESTART_BASE_MS", "20")
        .set("RUNGATE_RESTART_MAX_MS", "100")
        .set("RUNGATE_CRASH_LOOP_DEATHS", "1000")
        .set("RUNGATE_PROBE_INTERVAL_MS", "200")
        .set("RUNGATE_SHUTDOWN_LIMIT_MS", "500")
        .set("RUNGATE_LOG", "warn")
}

/// More memory wanted than there is, so that services make room for each other.
async fn register_services(gateway: &Gateway) {
    for (name, service_type, vram_gb) in [
        ("nap-1", "nap", 8),
        ("nap-2", "nap", 8),
        ("text", "text", 12),
    ] {
        let more = json!({"vram_gb": vram_gb, "concurrency": 4});
        let body = worker_service(gateway, name, service_type, more);
        gateway.post("/services/register", body).await.expect(200);
    }
}

fn texts() -> Vec<PathBuf> {
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    vec![docs.join("LICENSE"), docs.join("CHANGELOG.md")]
}

/// One death at a random moment, some while it starts, and a few stops in good order among them.
async fn one_crash(gateway: &mut Gateway, rng: &mut Rng, phase: &watch::Sender<Phase>, kill: u64) {
    // The random moment is what is tested: nothing is waited for here.
    let moment = Duration::from_micros(rng.below(450_000));
    if kill % 40 == 20 {
        tokio::time::sleep(moment).await;
        let status = gateway.stop().await;
        assert!(status.success(), "{status}");
    } else if kill.is_multiple_of(5) {
        gateway.kill();
        gateway.spawn();
        tokio::time::sleep(moment / 4).await;
        gateway.kill();
    } else {
        tokio::time::sleep(moment).await;
        gateway.kill();
    }
    gateway.launch().await;
    phase.send_modify(|phase| phase.epoch += 1);
}

/// Held runs are let go on, and every run comes to an end.
async fn everything_ends(gateway: &Gateway, clients: &[Client]) {
    let mut open: Vec<String> = clients
        .iter()
        .flat_map(|client| &client.starts)
        .map(|start| start.run.clone().expect("every start was answered"))
        .collect();
    let mut number = 0;
    let began = Instant::now();
    while !open.is_empty() {
        let mut left = Vec::new();
        for run in open {
            let summary = gateway.run(&run).await;
            if summary["paused"] == true {
                number += 1;
                let id = format!("end-{number}");
                gateway.command(&id, &run, "resume", json!({})).await;
            }
            if !is_end(&summary["status"]) {
                left.push(run);
            }
        }
        if began.elapsed() > Duration::from_secs(60) {
            let path = format!("/api/gateway/runs/{}/why", left[0]);
            let why = gateway.get(&path).await;
            let services = gateway.get("/services").await.text;
            panic!(
                "{} runs never end; the first: {}\n{}\n{services}",
                left.len(),
                gateway.run(&left[0]).await,
                why.text
            );
        }
        open = left;
    }
}

fn is_end(status: &Value) -> bool {
    matches!(status.as_str(), Some("completed" | "failed" | "cancelled"))
}

/// What the stream of the whole ledger has shown: record hashes by seq.
type Frames = Arc<Mutex<BTreeMap<u64, String>>>;

/// Follows the whole ledger across all crashes, without gap or repeat.
async fn follow(url: String, token: String, mut phase: watch::Receiver<Phase>, frames: Frames) {
    let http = reqwest::Client::new();
    let mut last = String::new();
    loop {
        let epoch = phase.borrow_and_update().epoch;
        let request = http
            .get(format!("{url}/api/gateway/ledger/stream"))
            .bearer_auth(&token);
        if let Some(mut source) = EventSource::try_open(request, &last).await {
            while let Some(event) = source.next().await {
                let record: Value = serde_json::from_str(&event.data).unwrap();
                let Some(seq) = record["seq"].as_u64() else {
                    continue;
                };
                let hash = record["record"]["record_hash"].as_str().unwrap().to_owned();
                let mut frames = frames.lock().unwrap();
                assert_eq!(seq, frames.len() as u64 + 1, "no gap and no repeat");
                frames.insert(seq, hash);
                last = event.id;
            }
        }
        let changed = phase.wait_for(|phase| phase.epoch != epoch);
        if changed.await.is_err() {
            return;
        }
    }
}

/// Waits until the follower has seen all up to `tail`.
async fn all_seen(frames: &Frames, tail: u64) -> BTreeMap<u64, String> {
    until("the follower has seen everything", || async {
        frames.lock().unwrap().len() as u64 >= tail
    })
    .await;
    frames.lock().unwrap().clone()
}

/// With the services removed no process is left, whoever started it and whenever.
async fn nothing_is_left(gateway: &mut Gateway) {
    for name in ["nap-1", "nap-2", "text"] {
        gateway.delete(&format!("/services/{name}")).await;
    }
    until("no service's process is left", || async {
        gateway.services_alive().is_empty()
    })
    .await;
    assert!(gateway.stop().await.success());
}

/// Looks all the time whether any service has two live generations.
struct Watcher {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<String>>,
}

impl Watcher {
    fn start(gateway: &Gateway) -> Watcher {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, data) = (stop.clone(), gateway.data_dir());
        let thread = std::thread::spawn(move || {
            let mut found = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                found.extend(overlaps(&leaders(&data)));
                // A look costs a read per process of the machine.
                std::thread::sleep(Duration::from_millis(20));
            }
            found
        });
        Watcher { stop, thread }
    }

    fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Process group leaders of this gateway's services: service, generation, pid, start ticks.
fn leaders(data: &Path) -> Vec<Marked> {
    let tokens = data
        .join("auth/bootstrap-admin-token")
        .display()
        .to_string();
    let mut leaders = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let text = String::from_utf8_lossy(&environ);
        let Some(mark) = text
            .split('\0')
            .find_map(|pair| pair.strip_prefix("RUNGATE_INSTANCE="))
        else {
            continue;
        };
        if text.contains(&tokens) {
            let mut parts = mark.split('/').skip(1).map(str::to_owned);
            leaders.push(Marked {
                service: parts.next().unwrap(),
                generation: parts.next().unwrap(),
                proc: entry.path(),
            });
        }
    }
    leaders
}

struct Marked {
    service: String,
    generation: String,
    proc: PathBuf,
}

/// Two generations of one service that are alive at one moment: both are looked at once more, for one may have
/// begun after the other had ended.
fn overlaps(seen: &[Marked]) -> Vec<String> {
    let mut found = Vec::new();
    for (index, one) in seen.iter().enumerate() {
        for other in &seen[index + 1..] {
            let same = one.service == other.service && one.generation != other.generation;
            let alive = |marked: &Marked| {
                std::fs::read(marked.proc.join("environ")).is_ok_and(|environ| !environ.is_empty())
            };
            if same && alive(one) && alive(other) && alive(one) {
                found.push(format!(
                    "{}: {} and {}",
                    one.service, one.generation, other.generation
                ));
            }
        }
    }
    found
}
