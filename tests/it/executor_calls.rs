//! Jobs' calls against a real HTTP server: what is sent, what an answer means, and how a call is stopped.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use rungate::domain::command::{Command, JobFailure};
use rungate::domain::effect::{Dispatch, Effect};
use rungate::domain::ids::{Generation, PlaneId, RunId};
use rungate::domain::spec::{ProgressMode, ServiceSpec, Worker};
use rungate::executor::{Executor, ExecutorOptions, Secret};
use rungate::outbound::{Lookup, Purpose, Reach, Rules};
use tokio::sync::{Semaphore, mpsc, watch};
use uuid::Uuid;

use crate::world::{
    Ledger, PATIENCE, World, external, is_healthy, no_notices, service, service_rules, soon,
};

/// A service: answers by the payload's text, and remembers what it was asked.
#[derive(Clone)]
struct Service {
    seen: watch::Sender<Vec<Seen>>,
    /// Lets a waiting job answer.
    go: Arc<Semaphore>,
    /// Lets the cancel endpoint answer.
    cancel: Arc<Semaphore>,
    progress: Arc<Mutex<Vec<&'static str>>>,
}

#[derive(Clone, Debug)]
struct Seen {
    path: String,
    headers: HashMap<String, String>,
    body: String,
}

impl Service {
    async fn start() -> (Service, String) {
        let service = Service {
            seen: watch::Sender::new(Vec::new()),
            go: Arc::new(Semaphore::new(0)),
            cancel: Arc::new(Semaphore::new(0)),
            progress: Arc::default(),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(service.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (service, base)
    }

    /// The first request to `path`, waited for.
    async fn asked(&self, path: &str) -> Seen {
        let mut seen = self.seen.subscribe();
        let found = seen.wait_for(|all| all.iter().any(|seen| seen.path == path));
        let all = tokio::time::timeout(PATIENCE, found)
            .await
            .unwrap()
            .unwrap();
        all.iter().find(|seen| seen.path == path).unwrap().clone()
    }
}

async fn answer(
    State(service): State<Service>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path().to_owned();
    let body = String::from_utf8(body.to_vec()).unwrap();
    if path != "/health" {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        let seen = Seen {
            path: path.clone(),
            headers,
            body: body.clone(),
        };
        service.seen.send_modify(|all| all.push(seen));
    }
    match (path.as_str(), body.as_str()) {
        ("/health", _) => "ok".into_response(),
        ("/cancel", _) => {
            service.cancel.acquire().await.unwrap().forget();
            StatusCode::ACCEPTED.into_response()
        }
        ("/refuse", _) => StatusCode::NOT_FOUND.into_response(),
        ("/progress", _) => {
            let mut left = service.progress.lock().unwrap();
            if left.len() > 1 {
                left.remove(0)
            } else {
                left[0]
            }
            .into_response()
        }
        (_, "\"fail\"") => (StatusCode::BAD_GATEWAY, "x".repeat(5_000)).into_response(),
        (_, "\"redirect\"") => (StatusCode::FOUND, [("location", "/elsewhere")]).into_response(),
        (_, "\"text\"") => "not json".into_response(),
        (_, "\"empty\"") => "".into_response(),
        (_, "\"deep\"") => "[".repeat(100_000).into_response(),
        (_, "\"large\"") => Body::from(vec![b' '; (16 << 20) + 1]).into_response(),
        (_, "\"large stream\"") => {
            let chunk = || Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 1 << 20]));
            let chunks = std::iter::repeat_with(chunk).take(17);
            Body::from_stream(futures_util::stream::iter(chunks)).into_response()
        }
        (_, "\"wait\"") => {
            service.go.acquire().await.unwrap().forget();
            "{\"waited\":true}".into_response()
        }
        _ => "{\"done\":true}".into_response(),
    }
}

struct Calls {
    world: World,
    service: Service,
    executor: Executor,
    ledger: Arc<Ledger>,
    effects: mpsc::UnboundedSender<Vec<Effect>>,
}

impl Calls {
    /// A healthy service, `change`d.
    async fn new(change: impl FnOnce(&mut ServiceSpec)) -> Calls {
        Calls::ruled(service_rules(), change).await
    }

    /// The same, with rules of its own for the calls of jobs.
    async fn ruled(services: Rules, change: impl FnOnce(&mut ServiceSpec)) -> Calls {
        let (service, base) = Service::start().await;
        let world = World::new();
        let ledger = Arc::new(Ledger::default());
        let options = ExecutorOptions {
            gateway_url: "http://127.0.0.1:8080".into(),
            container_gateway_url: String::new(),
            ledger: world.ledger,
            callbacks: Rules::new(Purpose::Callbacks, Reach::Public, Vec::new()),
            notices: no_notices(),
            ntfy_token: Arc::new(|_, _| None),
            services,
            secret: Secret::load_or_create(world.dir.path()).unwrap(),
            job_token: Arc::new(|dispatch, lasting| {
                Some(format!("{}.{}", dispatch.attempt, lasting.as_millis()))
            }),
            read_container: Arc::new(rungate::api::container_of_job),
            jobs_kept: Duration::ZERO,
            progress_every: Duration::from_millis(30),
        };
        let (driver, outcomes, tasks) =
            (world.driver.clone(), world.outcomes(), world.tasks.clone());
        let executor = Executor::new(driver, outcomes, ledger.clone(), tasks, options).unwrap();
        let (effects, receiver) = mpsc::unbounded_channel();
        let running = executor.clone();
        world
            .tasks
            .spawn("executor", async move { running.run(receiver).await });
        let mut spec = external(&base);
        change(&mut spec);
        let start = Effect::StartInstance {
            spec: Box::new(spec),
            generation: Generation(1),
            grants: Vec::new(),
        };
        effects.send(vec![start]).unwrap();
        world.recorder.first(is_healthy).await;
        Calls {
            world,
            service,
            executor,
            ledger,
            effects,
        }
    }

    fn dispatch(&self, payload: &str, change: impl FnOnce(&mut Dispatch)) -> RunId {
        let mut dispatch = Dispatch {
            plane: PlaneId::ROOT,
            run: RunId(Uuid::now_v7()),
            attempt: 1,
            service: service(),
            generation: Generation(1),
            payload: self.ledger.keep(payload),
            checkpoint: None,
            timeout_ms: 30_000,
        };
        change(&mut dispatch);
        let run = dispatch.run;
        self.effects
            .send(vec![Effect::Dispatch(Box::new(dispatch))])
            .unwrap();
        run
    }

    fn stop(&self, run: RunId, grace_ms: u64) {
        let stop = Effect::StopCall {
            run,
            attempt: 1,
            service: service(),
            generation: Generation(1),
            reason: "preempt",
            deadline: soon(grace_ms),
        };
        self.effects.send(vec![stop]).unwrap();
    }

    async fn answered(&self, run: RunId) -> Result<String, JobFailure> {
        let outcome = self.world.recorder.first(|outcome| match outcome {
            Command::JobAnswered {
                run: seen, outcome, ..
            } if *seen == run => Some(outcome.clone()),
            _ => None,
        });
        outcome
            .await
            .map(|body| String::from_utf8(body.to_vec()).unwrap())
    }

    async fn stopped(&self, run: RunId) -> bool {
        let done = self.world.recorder.first(|outcome| match outcome {
            Command::JobStopDone {
                run: seen,
                confirmed,
                ..
            } if *seen == run => Some(*confirmed),
            _ => None,
        });
        done.await
    }

    /// Every call has had exactly one outcome.
    async fn assert_told_once(&self, runs: usize) {
        assert_eq!(self.executor.finish_calls(PATIENCE).await, 0);
        let outcomes = self.world.recorder.all();
        let ends = |outcome: &&Command| {
            matches!(
                outcome,
                Command::JobAnswered { .. } | Command::JobStopDone { .. }
            )
        };
        assert_eq!(outcomes.iter().filter(ends).count(), runs, "{outcomes:#?}");
    }
}

#[tokio::test]
async fn a_payload_is_posted_with_what_the_service_must_know() {
    let calls = Calls::new(|spec| spec.dispatch_path = Some("/work".into())).await;
    let run = calls.dispatch("{\"n\":1}", |dispatch| {
        dispatch.attempt = 3;
        dispatch.checkpoint = Some(9);
    });
    assert_eq!(calls.answered(run).await.unwrap(), "{\"done\":true}");
    let seen = calls.service.asked("/work").await;
    assert_eq!(seen.body, "{\"n\":1}");
    let expected = [
        ("content-type", "application/json".to_owned()),
        ("content-length", "7".to_owned()),
        ("x-rungate-run-id", run.to_string()),
        ("x-rungate-attempt", "3".to_owned()),
        // The call's limit, the service's grace, and ten seconds.
        ("x-rungate-token", "3.40500".to_owned()),
        (
            "x-rungate-progress",
            format!("http://127.0.0.1:8080/queue/{run}/progress"),
        ),
        (
            "x-rungate-checkpoint",
            format!("http://127.0.0.1:8080/api/gateway/runs/{run}/checkpoint"),
        ),
    ];
    for (name, value) in expected {
        assert_eq!(seen.headers[name], value, "{name}");
    }
    let first = calls.dispatch("2", |_| {});
    calls.answered(first).await.unwrap();
    let seen = calls.service.seen.borrow().last().unwrap().clone();
    assert!(!seen.headers.contains_key("x-rungate-checkpoint"));
    calls.assert_told_once(2).await;
}

#[tokio::test]
async fn each_way_to_fail_has_its_code() {
    let calls = Calls::new(|_| {}).await;
    let cases = [
        ("\"fail\"", "http_status", "the service answered 502: xxx"),
        (
            "\"redirect\"",
            "http_status",
            "the service answered 302, a redirect",
        ),
        ("\"text\"", "bad_answer", "the service's answer is no JSON"),
        ("\"empty\"", "bad_answer", "the service's answer is no JSON"),
        ("\"deep\"", "bad_answer", "the service's answer is no JSON"),
        (
            "\"large\"",
            "answer_too_large",
            "larger than 16777216 bytes",
        ),
        (
            "\"large stream\"",
            "answer_too_large",
            "larger than 16777216 bytes",
        ),
    ];
    for (payload, code, error) in cases {
        let failure = calls
            .answered(calls.dispatch(payload, |_| {}))
            .await
            .unwrap_err();
        assert_eq!(failure.code, code, "{payload}: {failure:?}");
        assert!(failure.error.contains(error), "{payload}: {failure:?}");
        assert!(failure.error.len() < 2_200, "{payload}");
    }
    let late = calls.dispatch("\"wait\"", |dispatch| dispatch.timeout_ms = 100);
    let failure = calls.answered(late).await.unwrap_err();
    assert_eq!(
        (failure.code.as_str(), failure.error.as_str()),
        ("timeout", "no answer within 100 ms")
    );
    let nowhere = calls.dispatch("1", |dispatch| dispatch.generation = Generation(2));
    assert_eq!(
        calls.answered(nowhere).await.unwrap_err().code,
        "instance_exited"
    );
    let purged = calls.dispatch("1", |dispatch| dispatch.payload = 999);
    assert_eq!(
        calls.answered(purged).await.unwrap_err().code,
        "payload_missing"
    );
    calls.assert_told_once(cases.len() + 3).await;
}

#[tokio::test]
async fn nobody_listening_is_told_as_such() {
    let calls = Calls::new(|_| {}).await;
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let spec = external(&format!("http://127.0.0.1:{port}"));
    let start = Effect::StartInstance {
        spec: Box::new(spec),
        generation: Generation(2),
        grants: Vec::new(),
    };
    calls.effects.send(vec![start]).unwrap();
    crate::world::until("the endpoint", || {
        calls
            .world
            .driver
            .endpoint(&service(), Generation(2))
            .is_some()
    })
    .await;
    let run = calls.dispatch("1", |dispatch| dispatch.generation = Generation(2));
    let failure = calls.answered(run).await.unwrap_err();
    assert_eq!(failure.code, "connect");
    assert!(failure.error.contains("Connection refused"), "{failure:?}");
}

#[tokio::test]
async fn an_attempt_is_called_once() {
    let calls = Calls::new(|_| {}).await;
    let run = calls.dispatch("\"wait\"", |_| {});
    calls.service.asked("/process").await;
    calls.dispatch("\"wait\"", |dispatch| dispatch.run = run);
    assert_eq!(
        calls.executor.finish_calls(Duration::from_millis(50)).await,
        1,
        "it is still open"
    );
    calls.service.go.add_permits(1);
    calls.answered(run).await.unwrap();
    calls.assert_told_once(1).await;
    assert_eq!(calls.service.seen.borrow().len(), 1);
}

#[tokio::test]
async fn a_stop_is_confirmed_by_the_service() {
    let calls = Calls::new(|spec| spec.cancel_path = Some("/cancel".into())).await;
    let run = calls.dispatch("\"wait\"", |_| {});
    calls.service.asked("/process").await;
    calls.stop(run, 20_000);
    calls.stop(run, 20_000);
    let asked = calls.service.asked("/cancel").await;
    let body: serde_json::Value = serde_json::from_str(&asked.body).unwrap();
    assert_eq!(body["run_id"], run.to_string());
    assert_eq!(
        (&body["attempt"], &body["reason"]),
        (&1.into(), &"preempt".into())
    );
    assert!(
        (1..=20_000).contains(&body["grace_ms"].as_u64().unwrap()),
        "{body}"
    );
    assert_eq!(
        calls.executor.finish_calls(Duration::ZERO).await,
        1,
        "the call stays open meanwhile"
    );
    calls.service.cancel.add_permits(1);
    assert!(calls.stopped(run).await);
    calls.assert_told_once(1).await;
}

#[tokio::test]
async fn a_stop_that_nobody_confirms_ends_at_its_deadline() {
    let calls = Calls::new(|spec| spec.cancel_path = Some("/cancel".into())).await;
    let run = calls.dispatch("\"wait\"", |_| {});
    calls.service.asked("/process").await;
    calls.stop(run, 100);
    assert!(!calls.stopped(run).await);
    calls.assert_told_once(1).await;
}

#[tokio::test]
async fn without_a_way_to_ask_the_call_is_dropped_at_once() {
    for cancel_path in [None, Some("/refuse".to_owned())] {
        let calls = Calls::new(|spec| spec.cancel_path = cancel_path).await;
        let run = calls.dispatch("\"wait\"", |_| {});
        calls.service.asked("/process").await;
        calls.stop(run, 3_600_000);
        assert!(!calls.stopped(run).await);
        calls.assert_told_once(1).await;
    }
}

#[tokio::test]
async fn a_result_that_comes_before_the_stop_is_confirmed_is_the_outcome() {
    let calls = Calls::new(|spec| spec.cancel_path = Some("/cancel".into())).await;
    let run = calls.dispatch("\"wait\"", |_| {});
    calls.service.asked("/process").await;
    calls.stop(run, 20_000);
    calls.service.asked("/cancel").await;
    calls.service.go.add_permits(1);
    assert_eq!(calls.answered(run).await.unwrap(), "{\"waited\":true}");
    calls.assert_told_once(1).await;
}

#[tokio::test]
async fn a_call_that_an_earlier_gateway_made_is_stopped_all_the_same() {
    let calls = Calls::new(|spec| spec.cancel_path = Some("/cancel".into())).await;
    let run = RunId(Uuid::now_v7());
    calls.service.cancel.add_permits(1);
    calls.stop(run, 20_000);
    assert!(calls.stopped(run).await);
    assert!(
        calls
            .service
            .asked("/cancel")
            .await
            .body
            .contains(&run.to_string())
    );
}

#[tokio::test]
async fn progress_is_asked_for_while_a_call_is_open_and_only_news_is_told() {
    let calls = Calls::new(|spec| {
        spec.progress_mode = ProgressMode::Poll;
        spec.progress_endpoint = Some("/progress".into());
    })
    .await;
    *calls.service.progress.lock().unwrap() =
        vec!["{\"p\":1}", "{\"p\":1}", "[]", "oops", "{\"p\":2}"];
    let run = calls.dispatch("\"wait\"", |_| {});
    let told = |outcome: &Command| match outcome {
        Command::ProgressPolled {
            run: seen,
            attempt: 1,
            body,
            ..
        } if *seen == run => Some(body.clone()),
        _ => None,
    };
    assert_eq!(calls.world.recorder.nth(2, told).await, "{\"p\":2}");
    calls.service.go.add_permits(1);
    calls.answered(run).await.unwrap();
    let all: Vec<_> = calls.world.recorder.all().iter().filter_map(told).collect();
    assert_eq!(all, ["{\"p\":1}", "{\"p\":2}"]);
}

/// It was healthy where its name led then; since, the name leads to where a cloud hands out credentials.
#[tokio::test]
async fn a_service_whose_name_has_changed_is_not_called() {
    let metadata = "169.254.169.254:0".parse().unwrap();
    let lookup: Lookup = Arc::new(move |_| Box::pin(async move { Ok(vec![metadata]) }));
    let rules = service_rules().with_lookup(lookup);
    let calls = Calls::ruled(rules, |spec| {
        if let Worker::External { url } = &mut spec.worker {
            *url = url.replace("127.0.0.1", "localhost");
        }
    });
    let calls = calls.await;
    let run = calls.dispatch("{}", |_| {});
    let failure = calls.answered(run).await.unwrap_err();
    assert_eq!(failure.code, "not_called");
    let expected = "it is not called: 169.254.169.254 is a link-local, metadata";
    assert!(failure.error.starts_with(expected), "{}", failure.error);
    assert!(calls.service.seen.borrow().is_empty());
    calls.assert_told_once(1).await;
}
