//! Callbacks against a real HTTP server: the body, the headers, the signature, and what is never called.

use std::collections::HashMap;
use std::process::Command as StdCommand;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use rungate::domain::command::Command;
use rungate::domain::effect::Effect;
use rungate::domain::ids::{PlaneId, RunId};
use rungate::domain::time::Timestamp;
use rungate::executor::{
    CallbackBody, CallbackStatus, Executor, ExecutorOptions, PROGRESS_EVERY, Secret,
};
use rungate::outbound::{Purpose, Reach, Rules};
use tokio::sync::watch;
use uuid::Uuid;

use crate::world::{Ledger, PYTHON, World, no_notices, service_rules};

type Seen = (String, HashMap<String, String>, String);

async fn answer(
    State(seen): State<watch::Sender<Vec<Seen>>>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path().to_owned();
    let headers = headers
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();
    seen.send_modify(|all| {
        all.push((
            path.clone(),
            headers,
            String::from_utf8(body.to_vec()).unwrap(),
        ))
    });
    match path.as_str() {
        "/redirect" => (StatusCode::FOUND, [("location", "/ok")]).into_response(),
        "/busy" => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => StatusCode::NO_CONTENT.into_response(),
    }
}

struct Callbacks {
    world: World,
    executor: Executor,
    ledger: Arc<Ledger>,
    seen: watch::Sender<Vec<Seen>>,
    base: String,
}

impl Callbacks {
    async fn new(reach: Reach) -> Callbacks {
        let seen = watch::Sender::new(Vec::new());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(seen.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let world = World::new();
        let ledger = Arc::new(Ledger::default());
        let options = ExecutorOptions {
            gateway_url: "http://127.0.0.1:8080".into(),
            container_gateway_url: String::new(),
            ledger: world.ledger,
            callbacks: Rules::new(Purpose::Callbacks, reach, Vec::new()),
            notices: no_notices(),
            ntfy_token: Arc::new(|_, _| None),
            services: service_rules(),
            secret: Secret::load_or_create(world.dir.path()).unwrap(),
            job_token: Arc::new(|_, _| None),
            read_container: Arc::new(rungate::api::container_of_job),
            jobs_kept: std::time::Duration::ZERO,
            progress_every: PROGRESS_EVERY,
        };
        let (driver, outcomes, tasks) =
            (world.driver.clone(), world.outcomes(), world.tasks.clone());
        let executor = Executor::new(driver, outcomes, ledger.clone(), tasks, options).unwrap();
        Callbacks {
            world,
            executor,
            ledger,
            seen,
            base,
        }
    }

    fn ended(&self, status: CallbackStatus, result: Option<&[u8]>, error: Option<&str>) -> RunId {
        let run = RunId(Uuid::now_v7());
        let timestamp = Timestamp(1_763_690_400_000_120);
        self.ledger.end(CallbackBody::new(
            run,
            status,
            result,
            error.map(str::to_owned),
            timestamp,
        ));
        run
    }

    async fn tried(&self, run: RunId, number: u32, url: &str) -> (Option<u16>, Option<String>) {
        self.executor.perform(Effect::SendCallback {
            plane: PlaneId::ROOT,
            tenant: "default".into(),
            run,
            number,
            url: url.into(),
            not_before: Timestamp(0),
        });
        let tried = self.world.recorder.first(|outcome| match outcome {
            Command::CallbackTried {
                run: seen,
                number: nth,
                status,
                error,
            } => (*seen == run && *nth == number).then(|| (*status, error.clone())),
            _ => None,
        });
        tried.await
    }
}

/// The signature as the standard says, by another implementation.
fn signature_by_python(
    secret_file: &std::path::Path,
    id: &str,
    timestamp: &str,
    body: &str,
) -> String {
    let script = "import base64, hashlib, hmac, sys\n\
        key = base64.b64decode(open(sys.argv[1]).read().strip()[len('whsec_'):])\n\
        text = '.'.join(sys.argv[2:]).encode()\n\
        print('v1,' + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode(), end='')";
    let mut python = StdCommand::new(&*PYTHON);
    python
        .args(["-c", script])
        .arg(secret_file)
        .args([id, timestamp, body]);
    String::from_utf8(python.output().unwrap().stdout).unwrap()
}

#[tokio::test]
async fn a_callback_has_the_contracts_body_and_a_signature() {
    let callbacks = Callbacks::new(Reach::PublicAndPrivate).await;
    let url = format!("{}/ok", callbacks.base);
    let run = callbacks.ended(CallbackStatus::Completed, Some(b"{\"n\": 1}"), None);
    assert_eq!(callbacks.tried(run, 1, &url).await, (Some(204), None));
    let (_, headers, body) = callbacks.seen.borrow()[0].clone();
    let expected = format!(
        "{{\"job_id\":\"{run}\",\"status\":\"completed\",\"result\":{{\"n\": 1}},\"error\":null,\
         \"timestamp\":\"2025-11-21T02:00:00.000120+00:00\"}}"
    );
    assert_eq!(body, expected);
    let id = headers["webhook-id"].clone();
    let expected = [
        ("content-type", "application/json".to_owned()),
        ("ce-specversion", "1.0".to_owned()),
        ("ce-id", id.clone()),
        ("ce-type", "rungate.run.completed".to_owned()),
        ("ce-source", format!("urn:uuid:{}", callbacks.world.ledger)),
        ("ce-subject", run.to_string()),
        ("ce-time", "2025-11-21T02:00:00.000120+00:00".to_owned()),
    ];
    for (name, value) in expected {
        assert_eq!(headers[name], value, "{name}");
    }
    let timestamp = headers["webhook-timestamp"].clone();
    let now_s = rungate::clock::now().0 / 1_000_000;
    assert!((now_s - timestamp.parse::<i64>().unwrap()).abs() < 300);
    let secret = callbacks.world.dir.path().join("auth/webhook-secret");
    assert_eq!(
        headers["webhook-signature"],
        signature_by_python(&secret, &id, &timestamp, &body)
    );

    callbacks.tried(run, 2, &url).await;
    assert_eq!(
        callbacks.seen.borrow()[1].1["webhook-id"],
        id,
        "each try has the same id"
    );
}

#[tokio::test]
async fn each_end_has_its_type() {
    let callbacks = Callbacks::new(Reach::PublicAndPrivate).await;
    let url = format!("{}/ok", callbacks.base);
    let ends = [
        (CallbackStatus::Completed, "completed"),
        (CallbackStatus::Failed, "failed"),
        (CallbackStatus::Cancelled, "cancelled"),
    ];
    for (status, name) in ends {
        let run = callbacks.ended(status, None, Some("why"));
        callbacks.tried(run, 1, &url).await;
        let (_, headers, body) = callbacks.seen.borrow().last().unwrap().clone();
        assert_eq!(headers["ce-type"], format!("rungate.run.{name}"));
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(
            (&body["status"], &body["error"]),
            (&name.into(), &"why".into())
        );
        assert!(body["result"].is_null());
    }
}

#[tokio::test]
async fn what_does_not_arrive_says_why() {
    let callbacks = Callbacks::new(Reach::PublicAndPrivate).await;
    let base = callbacks.base.clone();
    let run = callbacks.ended(CallbackStatus::Completed, None, None);
    let (status, error) = callbacks.tried(run, 1, &format!("{base}/redirect")).await;
    assert_eq!(
        (status, error.as_deref()),
        (
            Some(302),
            Some("it answered 302; redirects are not followed")
        )
    );
    assert!(
        callbacks
            .seen
            .borrow()
            .iter()
            .all(|(path, ..)| path == "/redirect")
    );
    let (status, error) = callbacks.tried(run, 2, &format!("{base}/busy")).await;
    assert_eq!(
        (status, error.as_deref()),
        (Some(503), Some("it answered 503"))
    );
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let (status, error) = callbacks
        .tried(run, 3, &format!("http://127.0.0.1:{port}/"))
        .await;
    assert_eq!(status, None);
    assert!(error.unwrap().contains("Connection refused"));
    let unknown = RunId(Uuid::now_v7());
    let (status, error) = callbacks.tried(unknown, 1, &format!("{base}/ok")).await;
    assert_eq!(
        (status, error.as_deref()),
        (None, Some("the run's outcome is not known any more"))
    );
}

#[tokio::test]
async fn a_private_or_special_address_is_not_called() {
    let callbacks = Callbacks::new(Reach::Public).await;
    let port = callbacks.base.rsplit_once(':').unwrap().1.to_owned();
    let run = callbacks.ended(CallbackStatus::Completed, None, None);
    let hosts = [
        "127.0.0.1",
        "2130706433",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "[::ffff:127.0.0.1]",
        "[::1]",
        "localhost",
        "localhost.",
        "169.254.169.254",
        "0.0.0.0",
        "[::]",
        "10.0.0.1",
        "100.64.0.1",
        "user@127.0.0.1",
    ];
    for (number, host) in (1..).zip(hosts) {
        let (status, error) = callbacks
            .tried(run, number, &format!("http://{host}:{port}/ok"))
            .await;
        assert_eq!(status, None, "{host}");
        assert!(error.unwrap().starts_with("it is not called: "), "{host}");
    }
    // A name that is not private by itself but leads there: refused where it is resolved. This machine's own name.
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let (status, _) = callbacks
        .tried(run, 100, &format!("http://{}:{port}/ok", name.trim()))
        .await;
    assert_eq!(status, None);
    assert!(callbacks.seen.borrow().is_empty(), "nothing was called");
}
