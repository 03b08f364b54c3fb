//! Server-side request forgery: whatever address a submitter or an operator names, and however it is spelt, what lies at
//! special and private addresses is not called, and that is recorded.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use rungate::domain::command::Command;
use rungate::domain::effect::Effect;
use rungate::domain::ids::{PlaneId, RunId};
use rungate::domain::time::Timestamp;
use rungate::executor::{
    CallbackBody, CallbackStatus, Executor, ExecutorOptions, PROGRESS_EVERY, Secret,
};
use rungate::outbound::{Lookup, Purpose, Reach, Rules};
use serde_json::json;
use uuid::Uuid;

use crate::support::scripted::Scripted;
use crate::support::{Gateway, Options};
use crate::world::{Ledger, World, no_notices, service_rules};

/// Spellings of this machine, private networks, and clouds' metadata. `PORT` is that of a listener.
const TARGETS: &[&str] = &[
    // This machine: whole, short, decimal, octal, hexadecimal, mixed, with a dot, other addresses of it.
    "127.0.0.1:PORT",
    "127.1:PORT",
    "127.0.1:PORT",
    "2130706433:PORT",
    "017700000001:PORT",
    "0177.0.0.1:PORT",
    "0177.0.0.01:PORT",
    "0x7f000001:PORT",
    "0x7f.0x0.0x0.0x1:PORT",
    "0x7F.1:PORT",
    "127.0.0.1.:PORT",
    "127.255.255.254:PORT",
    "%31%32%37.0.0.1:PORT",
    "\u{ff11}\u{ff12}\u{ff17}.0.0.1:PORT",
    "127\u{3002}0\u{3002}0\u{3002}1:PORT",
    "\u{24db}ocalhost:PORT",
    "0.0.0.0:PORT",
    "0:PORT",
    "0x0:PORT",
    "localhost:PORT",
    "LOCALHOST.:PORT",
    // In IPv6: itself, unspecified, mapped, compatible, translated, NAT64, 6to4.
    "[::1]:PORT",
    "[0000:0000:0000:0000:0000:0000:0000:0001]:PORT",
    "[::]:PORT",
    "[::ffff:127.0.0.1]:PORT",
    "[::ffff:7f00:1]:PORT",
    "[::127.0.0.1]:PORT",
    "[::ffff:0:127.0.0.1]:PORT",
    "[64:ff9b::127.0.0.1]:PORT",
    "[64:ff9b::7f00:1]:PORT",
    "[64:ff9b:1::127.0.0.1]:PORT",
    "[2002:7f00:1::]:PORT",
    // Metadata of Amazon, Google, Azure, Oracle, Scaleway, Alibaba; link-local in all spellings.
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "0xa9.0xfe.43518",
    "169.254.43518",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[64:ff9b::169.254.169.254]",
    "[2002:a9fe:a9fe::]",
    "[fd00:ec2::254]",
    "[fd20:ce::254]",
    "[fd20:00ce:0:0::0254]",
    "[fd00:c1::a9fe:a9fe]",
    "[fd00:c1::169.254.169.254]",
    "[fd00:42::42]",
    "[fe80::a9fe:a9fe]",
    "168.63.129.16",
    "192.0.0.192",
    "100.100.100.200",
    // Private networks, CGNAT, unique local, and what is no host at all.
    "10.0.0.1",
    "167772161",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "100.127.255.255",
    "[::ffff:10.0.0.1]",
    "[64:ff9b::10.0.0.1]",
    "[2002:a00:1::]",
    "[fc00::1]",
    "[fdff::1]",
    "[fec0::1]",
    "224.0.0.1",
    "255.255.255.255",
    "198.18.0.1",
    "[ff02::1]",
    "[2001::1]",
    "[2001:db8::1]",
    "[100::1]",
];

/// A listener that counts whoever comes, on this address; its port.
async fn listener(address: &str, port: u16, count: Arc<AtomicUsize>, status: StatusCode) -> u16 {
    let listener = tokio::net::TcpListener::bind((address, port))
        .await
        .unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = Router::new().fallback(move || {
        count.fetch_add(1, Ordering::SeqCst);
        // No connection is kept, so that each call looks its name up.
        async move { (status, [("connection", "close")]).into_response() }
    });
    tokio::spawn(async move { axum::serve(listener, router).await });
    port
}

/// An executor that sends callbacks by these rules.
struct Callbacks {
    world: World,
    executor: Executor,
    run: RunId,
}

impl Callbacks {
    fn new(rules: Rules) -> Callbacks {
        let world = World::new();
        let ledger = Arc::new(Ledger::default());
        let run = RunId(Uuid::now_v7());
        let ended_at = Timestamp(1_763_690_400_000_120);
        ledger.end(CallbackBody::new(
            run,
            CallbackStatus::Completed,
            None,
            None,
            ended_at,
        ));
        let options = ExecutorOptions {
            gateway_url: "http://127.0.0.1:8080".into(),
            container_gateway_url: String::new(),
            ledger: world.ledger,
            callbacks: rules,
            notices: no_notices(),
            ntfy_token: Arc::new(|_, _| None),
            services: service_rules(),
            secret: Secret::load_or_create(world.dir.path()).unwrap(),
            job_token: Arc::new(|_, _| None),
            read_container: Arc::new(rungate::api::container_of_job),
            jobs_kept: std::time::Duration::ZERO,
            progress_every: PROGRESS_EVERY,
        };
        let parts = (world.driver.clone(), world.outcomes(), world.tasks.clone());
        let executor = Executor::new(parts.0, parts.1, ledger, parts.2, options).unwrap();
        Callbacks {
            world,
            executor,
            run,
        }
    }

    /// What is recorded of one try.
    async fn tried(&self, number: u32, url: &str) -> (Option<u16>, String) {
        self.executor.perform(Effect::SendCallback {
            plane: PlaneId::ROOT,
            tenant: "default".into(),
            run: self.run,
            number,
            url: url.into(),
            not_before: Timestamp(0),
        });
        let tried = self.world.recorder.first(|outcome| match outcome {
            Command::CallbackTried {
                number: nth,
                status,
                error,
                ..
            } => (*nth == number).then(|| (*status, error.clone().unwrap_or_default())),
            _ => None,
        });
        tried.await
    }
}

#[tokio::test]
async fn no_spelling_of_an_address_gets_a_callback_in() {
    let count = Arc::new(AtomicUsize::new(0));
    let port = listener("0.0.0.0", 0, count.clone(), StatusCode::OK).await;
    let callbacks = Callbacks::new(Rules::new(Purpose::Callbacks, Reach::Public, Vec::new()));
    for (number, target) in (1..).zip(TARGETS) {
        let url = format!("http://{}/x", target.replace("PORT", &port.to_string()));
        let (status, error) = callbacks.tried(number, &url).await;
        assert_eq!(status, None, "{url}");
        assert!(error.starts_with("it is not called: "), "{url}: {error}");
    }
    assert_eq!(count.load(Ordering::SeqCst), 0);
}

/// Names lead where the look-ups of this list say, in turn; how many were made.
fn stub(answers: &[&[&str]]) -> (Lookup, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let parse = |answer: &&[&str]| -> Vec<SocketAddr> {
        let socket = |address: &&str| SocketAddr::new(address.parse().unwrap(), 0);
        answer.iter().map(socket).collect()
    };
    let left: Mutex<VecDeque<_>> = Mutex::new(answers.iter().map(parse).collect());
    let counted = count.clone();
    let lookup: Lookup = Arc::new(move |_name| {
        counted.fetch_add(1, Ordering::SeqCst);
        let found = left.lock().unwrap().pop_front().unwrap_or_default();
        Box::pin(async move { Ok(found) })
    });
    (lookup, count)
}

/// 127.0.0.2 stands for the public internet: it alone may be called. 127.0.0.1 is what a rebound name is after.
#[tokio::test]
async fn a_name_that_changes_between_look_up_and_connection_gains_nothing() {
    let (outside, inside) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let port = listener("127.0.0.2", 0, outside.clone(), StatusCode::OK).await;
    listener("127.0.0.1", port, inside.clone(), StatusCode::OK).await;
    let (lookup, lookups) = stub(&[
        &["127.0.0.2"],
        &["127.0.0.1"],
        &["127.0.0.1", "127.0.0.2", "::1", "169.254.169.254"],
        &["::ffff:127.0.0.1", "64:ff9b::7f00:1"],
        &["127.0.0.2"],
    ]);
    let allowed = vec!["127.0.0.2/32".parse().unwrap()];
    let rules = Rules::new(Purpose::Callbacks, Reach::Public, allowed).with_lookup(lookup);
    let callbacks = Callbacks::new(rules);
    let url = format!("http://rebinds.example:{port}/x");
    for (number, arrives) in (1..).zip([true, false, true, false, true]) {
        let (status, error) = callbacks.tried(number, &url).await;
        assert_eq!(status.is_some(), arrives, "{number}: {error}");
        assert_eq!(error.starts_with("it is not called: "), !arrives, "{error}");
        // The look-up of the check is that of the connection.
        assert_eq!(lookups.load(Ordering::SeqCst), number as usize);
    }
    assert_eq!(outside.load(Ordering::SeqCst), 3);
    assert_eq!(inside.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_redirect_leads_nowhere() {
    let inside = Arc::new(AtomicUsize::new(0));
    let port = listener("127.0.0.1", 0, inside.clone(), StatusCode::OK).await;
    for status in [301, 302, 303, 307, 308] {
        let target = format!("http://127.0.0.1:{port}/");
        let outside = tokio::net::TcpListener::bind("127.0.0.2:0").await.unwrap();
        let addr = outside.local_addr().unwrap();
        let status = StatusCode::from_u16(status).unwrap();
        let router = Router::new()
            .fallback(move || async move { (status, [("location", target)]).into_response() });
        tokio::spawn(async move { axum::serve(outside, router).await });
        let allowed = vec!["127.0.0.2".parse().unwrap()];
        let rules = Rules::new(Purpose::Callbacks, Reach::Public, allowed);
        let (told, error) = Callbacks::new(rules)
            .tried(1, &format!("http://{addr}/x"))
            .await;
        assert_eq!(told, Some(status.as_u16()));
        assert!(error.ends_with("redirects are not followed"), "{error}");
    }
    assert_eq!(inside.load(Ordering::SeqCst), 0);
}

/// Operators may name private addresses, but none that hands out a machine's credentials.
#[tokio::test]
async fn a_service_at_a_metadata_address_is_not_probed() {
    let gateway = Gateway::start(Options::default()).await;
    for (number, host) in [
        "169.254.169.254",
        "2852039166",
        "[fd00:ec2::254]",
        "[fd20:ce::254]",
        "[fd00:c1::a9fe:a9fe]",
        "[fd00:42::42]",
        "[::ffff:a9fe:a9fe]",
        "100.64.0.1",
    ]
    .iter()
    .enumerate()
    {
        let name = format!("s{number}");
        let service = json!({"name": name, "type": name, "url": format!("http://{host}/"), "startup_timeout_seconds": 0.1});
        gateway.register(service).await;
        let start = gateway.request(reqwest::Method::POST, &format!("/services/{name}/start"));
        let answer = crate::support::answer(start).await;
        assert_eq!(answer.status, 502, "{host}: {}", answer.text);
        assert!(
            answer.text.contains("it is not called: "),
            "{}",
            answer.text
        );
        assert!(
            answer.text.contains("service_allow_networks"),
            "{}",
            answer.text
        );
        let told = gateway.service_records(&name).await;
        let text = serde_json::to_string(&told).unwrap();
        assert!(text.contains("it is not called: "), "{text}");
    }
}

#[tokio::test]
async fn networks_of_the_settings_are_called_for_their_purpose_only() {
    let scripted = Scripted::start().await;
    let options =
        Options::default().set("RUNGATE_CALLBACK_ALLOW_NETWORKS", "127.0.0.1/32, fd00::/8");
    let gateway = Gateway::start(options).await;
    let attempted = async |url: String| {
        let job = json!({"service_type": "nobody", "payload": {}, "callback_url": url});
        let run = gateway.start_job(job).await;
        gateway
            .command(&format!("c-{run}"), &run, "cancel", json!({}))
            .await;
        let record = gateway.recorded(&run, "callback_attempted").await;
        record["effect"]["payload"]["status"].clone()
    };
    assert_eq!(attempted(scripted.url("/callback")).await, 200);
    let port = scripted.addr.port();
    assert!(
        attempted(format!("http://127.0.0.2:{port}/callback"))
            .await
            .is_null()
    );
    assert!(
        attempted("http://169.254.169.254/".to_owned())
            .await
            .is_null()
    );
    assert_eq!(scripted.callbacks().len(), 1);
}

/// A proxy would connect in the gateway's place, and check nothing.
#[tokio::test]
async fn no_proxy_of_the_environment_is_asked() {
    let asked = Arc::new(AtomicUsize::new(0));
    let port = listener("127.0.0.1", 0, asked.clone(), StatusCode::BAD_GATEWAY).await;
    let proxy = format!("http://127.0.0.1:{port}");
    let scripted = Scripted::start().await;
    let mut options = Options::default().set("RUNGATE_CALLBACK_ALLOW_PRIVATE", "true");
    for name in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
        options = options.set(name, &proxy);
    }
    let gateway = Gateway::start(options.set("NO_PROXY", "").set("no_proxy", "")).await;
    gateway.register(scripted.service("s", "t")).await;
    let callback = scripted.url("/callback");
    let job = json!({"service_type": "t", "payload": {}, "callback_url": callback});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "completed").await;
    let record = gateway.recorded(&run, "callback_attempted").await;
    assert_eq!(record["effect"]["payload"]["status"], 200, "{record}");
    assert_eq!(scripted.callbacks().len(), 1);
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}

/// Where a service sends a job on to, nobody has checked.
#[tokio::test]
async fn a_service_cannot_send_a_job_elsewhere() {
    let inside = Arc::new(AtomicUsize::new(0));
    let port = listener("127.0.0.1", 0, inside.clone(), StatusCode::OK).await;
    for status in [302, 307, 308] {
        let target = format!("http://127.0.0.1:{port}/");
        let outside = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", outside.local_addr().unwrap());
        let status = StatusCode::from_u16(status).unwrap();
        let router = Router::new()
            .route("/health", axum::routing::get(|| async {}))
            .fallback(move || async move { (status, [("location", target)]).into_response() });
        tokio::spawn(async move { axum::serve(outside, router).await });
        let gateway = Gateway::start(Options::default()).await;
        gateway
            .register(json!({"name": "s", "type": "t", "url": url}))
            .await;
        let job = json!({"service_type": "t", "payload": {}, "max_attempts": 1});
        let run = gateway.start_job(job).await;
        let failed = gateway.run_becomes(&run, "failed").await;
        assert!(failed.to_string().contains("a redirect"), "{failed}");
    }
    assert_eq!(inside.load(Ordering::SeqCst), 0);
}
