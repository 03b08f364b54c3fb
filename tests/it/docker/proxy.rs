//! An engine that goes away in the middle of a start: a proxy before the machine's hides it for a while.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::engine::{Docked, docker, options, until_engine};
use crate::support::wait::until;

const ENGINE: &str = "/var/run/docker.sock";

/// Long enough for the engine to have taken what it was told.
const TAKEN: Duration = Duration::from_secs(1);

const OPEN: u8 = 0;
/// The next start of a container is the last thing that the engine is seen to be asked.
const TO_BREAK: u8 = 1;
const AWAY: u8 = 2;

/// Passes everything on, until it is to break off.
struct Proxy {
    state: Arc<AtomicU8>,
    path: PathBuf,
}

impl Proxy {
    fn start(dir: &Path) -> Proxy {
        let path = dir.join("engine.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let state = Arc::new(AtomicU8::new(OPEN));
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if shared.load(Ordering::SeqCst) != AWAY {
                    tokio::spawn(pass(client, shared.clone()));
                }
            }
        });
        Proxy { state, path }
    }

    fn set(&self, state: u8) {
        self.state.store(state, Ordering::SeqCst);
    }

    fn is_away(&self) -> bool {
        self.state.load(Ordering::SeqCst) == AWAY
    }
}

async fn pass(client: UnixStream, state: Arc<AtomicU8>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_engine, mut to_engine) = UnixStream::connect(ENGINE).await.unwrap().into_split();
    let answering = tokio::spawn(async move {
        let _ = tokio::io::copy(&mut from_engine, &mut to_client).await;
    });
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
        let asked = String::from_utf8_lossy(&buffer[..read]);
        let first = asked.lines().next().unwrap_or_default();
        let starts = first.starts_with("POST ") && first.contains("/start");
        if starts && state.load(Ordering::SeqCst) == TO_BREAK {
            // The engine hears it; its answer is lost.
            answering.abort();
            state.store(AWAY, Ordering::SeqCst);
            let _ = to_engine.write_all(&buffer[..read]).await;
            tokio::time::sleep(TAKEN).await;
            return;
        }
        if state.load(Ordering::SeqCst) == AWAY
            || to_engine.write_all(&buffer[..read]).await.is_err()
        {
            break;
        }
    }
    answering.abort();
}

#[tokio::test]
async fn a_start_that_breaks_off_keeps_its_memory_until_its_container_is_gone() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let proxy = Proxy::start(dir.path());
    let host = format!("unix://{}", proxy.path.display());
    let gateway = Docked::start(options().set("RUNGATE_DOCKER_HOST", &host)).await;
    gateway.python("py", json!({"vram_gb": 1})).await;
    proxy.set(TO_BREAK);
    let run = gateway
        .start_job(json!({"service_type": "py", "payload": {"op": "echo"}}))
        .await;
    until("its start breaks off", || async { proxy.is_away() }).await;
    let running = || {
        docker(&[
            "ps",
            "-q",
            "--no-trunc",
            "--filter",
            &format!("label=io.rungate.ledger={}", gateway.ledger),
        ])
    };
    until_engine("it runs all the same", || !running().is_empty()).await;
    let first = running();
    until("the gateway sees that the engine is away", || async {
        gateway.get("/containers").await.expect(200)["engine"]["up"] == false
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(vram["reserved_mb"], 1024, "it may run: {vram}");
    proxy.set(OPEN);
    gateway.run_becomes(&run, "completed").await;
    let now = gateway.containers();
    assert_eq!(now.len(), 1);
    assert_ne!(now[0], first, "the first was removed");
    assert_eq!(now[0], gateway.container_of("py").await);
}
