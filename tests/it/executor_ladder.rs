//! Steps of ladders against a real HTTP server and a double of the GPUs' meter: sleep that is believed only when the
//! memory is seen to be given back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use futures_util::future::BoxFuture;
use rungate::domain::command::Command;
use rungate::domain::effect::{AskCheckpoint, Effect, TakeMemory, WakeInstance};
use rungate::domain::ids::{Generation, GpuUuid, RunId, ServiceName};
use rungate::domain::ladder::{Ask, SleepCall, Step, StepOutcome};
use rungate::domain::spec::Grant;
use rungate::driver::{Meter, StillHeld};
use rungate::executor::{Executor, ExecutorOptions, PROGRESS_EVERY, Secret};
use rungate::outbound::{Purpose, Reach, Rules};
use uuid::Uuid;

use crate::world::{Ledger, World, external, is_healthy, no_notices, service, service_rules, soon};

/// An engine that holds GPU memory, and the meter that sees it.
#[derive(Default)]
struct Engine {
    held_mib: AtomicU64,
    /// It answers well and keeps its memory.
    lies: AtomicBool,
    asleep: AtomicBool,
    /// It refuses to do what it has done already.
    refuses_twice: AtomicBool,
    /// So many looks at the GPU come to nothing once it sleeps.
    unseen: AtomicU64,
    /// It answers checkpoints with 500.
    broken: AtomicBool,
    checkpoints: AtomicU64,
}

struct Watching(Arc<Engine>);

impl Meter for Watching {
    fn held_mib(&self, _: &ServiceName, _: Generation, gpu: &GpuUuid) -> Option<u64> {
        let one_less = |left: u64| left.checked_sub(1);
        let unseen = &self.0.unseen;
        let is_unseen = self.0.asleep.load(Ordering::SeqCst)
            && unseen
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less)
                .is_ok();
        (gpu == "g0" && !is_unseen).then(|| self.0.held_mib.load(Ordering::SeqCst))
    }

    fn next_sample(&self) -> BoxFuture<'_, ()> {
        Box::pin(tokio::time::sleep(Duration::from_millis(10)))
    }

    fn freed(&self, _: &ServiceName, _: Generation) -> BoxFuture<'_, Vec<StillHeld>> {
        Box::pin(std::future::ready(Vec::new()))
    }
}

async fn fall_asleep(State(engine): State<Arc<Engine>>) -> StatusCode {
    if engine.asleep.swap(true, Ordering::SeqCst) && engine.refuses_twice.load(Ordering::SeqCst) {
        return StatusCode::CONFLICT;
    }
    if !engine.lies.load(Ordering::SeqCst) {
        engine.held_mib.store(700, Ordering::SeqCst);
    }
    StatusCode::OK
}

async fn wake_up(State(engine): State<Arc<Engine>>) -> StatusCode {
    match engine.asleep.swap(false, Ordering::SeqCst) {
        false if engine.refuses_twice.load(Ordering::SeqCst) => StatusCode::CONFLICT,
        _ => StatusCode::OK,
    }
}

async fn is_sleeping(State(engine): State<Arc<Engine>>) -> axum::Json<bool> {
    axum::Json(engine.asleep.load(Ordering::SeqCst))
}

async fn checkpoint(State(engine): State<Arc<Engine>>) -> StatusCode {
    engine.checkpoints.fetch_add(1, Ordering::SeqCst);
    match engine.broken.load(Ordering::SeqCst) {
        true => StatusCode::INTERNAL_SERVER_ERROR,
        false => StatusCode::NO_CONTENT,
    }
}

struct Steps {
    world: World,
    engine: Arc<Engine>,
    executor: Executor,
}

impl Steps {
    async fn new() -> Steps {
        let engine = Arc::new(Engine::default());
        engine.held_mib.store(16_000, Ordering::SeqCst);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/health", get(|| async { StatusCode::OK }))
            .route("/sleep", post(fall_asleep))
            .route("/wake_up", post(wake_up))
            .route("/is_sleeping", get(is_sleeping))
            .route("/checkpoint", post(checkpoint))
            .with_state(engine.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let world = World::metered(Arc::new(Watching(engine.clone())));
        let options = ExecutorOptions {
            gateway_url: "http://127.0.0.1:8080".into(),
            container_gateway_url: String::new(),
            notices: no_notices(),
            ntfy_token: Arc::new(|_, _| None),
            ledger: world.ledger,
            callbacks: Rules::new(Purpose::Callbacks, Reach::Public, Vec::new()),
            services: service_rules(),
            secret: Secret::load_or_create(world.dir.path()).unwrap(),
            job_token: Arc::new(|_, _| None),
            read_container: Arc::new(rungate::api::container_of_job),
            jobs_kept: Duration::ZERO,
            progress_every: PROGRESS_EVERY,
        };
        let (driver, outcomes, tasks) =
            (world.driver.clone(), world.outcomes(), world.tasks.clone());
        let source = Arc::new(Ledger::default());
        let executor = Executor::new(driver, outcomes, source, tasks, options).unwrap();
        executor.perform(Effect::StartInstance {
            spec: Box::new(external(&base)),
            generation: Generation(1),
            grants: Vec::new(),
        });
        world.recorder.first(is_healthy).await;
        Steps {
            world,
            engine,
            executor,
        }
    }

    /// Puts it to sleep as step `number`; how that ended, with the error and what is held.
    async fn sleep(&self, number: u32, gpu: &str) -> (StepOutcome, String, Option<Vec<Grant>>) {
        self.begin(number, gpu, false).await
    }

    async fn begin(
        &self,
        number: u32,
        gpu: &str,
        is_anew: bool,
    ) -> (StepOutcome, String, Option<Vec<Grant>>) {
        self.executor
            .perform(Effect::TakeMemory(Box::new(TakeMemory {
                service: service(),
                generation: Generation(1),
                number,
                step: step(),
                grants: vec![Grant {
                    gpu: gpu.into(),
                    mib: 16_384,
                }],
                is_anew,
                deadline: soon(1_500),
            })));
        let of_step = |command: &Command| match command {
            Command::LadderStepTried {
                number: of,
                outcome,
                error,
                held,
                ..
            } if *of == number => Some((*outcome, error.clone().unwrap_or_default(), held.clone())),
            _ => None,
        };
        self.world.recorder.first(of_step).await
    }

    /// Wakes it; what went wrong.
    async fn wake(&self) -> Option<String> {
        self.executor
            .perform(Effect::WakeInstance(Box::new(WakeInstance {
                service: service(),
                generation: Generation(1),
                step: step(),
                deadline: soon(5_000),
            })));
        let woken = |command: &Command| match command {
            Command::InstanceWoken { error, .. } => Some(error.clone()),
            _ => None,
        };
        self.world.recorder.first(woken).await
    }
}

fn step() -> Step {
    Step::Sleep {
        call: SleepCall {
            level: 1,
            path: "/sleep?level=1".into(),
            wake_path: "/wake_up".into(),
            is_sleeping_path: Some("/is_sleeping".into()),
        },
        ms: 1_500,
    }
}

#[tokio::test]
async fn sleep_is_believed_when_the_memory_is_seen_to_be_free() {
    let steps = Steps::new().await;
    let (outcome, error, held) = steps.sleep(0, "g0").await;
    assert_eq!((outcome, error.as_str()), (StepOutcome::Done, ""));
    assert_eq!(held.unwrap()[0].mib, 700);
    assert_eq!(steps.wake().await, None);
    assert!(!steps.engine.asleep.load(Ordering::SeqCst));
}

#[tokio::test]
async fn an_engine_that_says_it_sleeps_and_holds_its_memory_has_failed() {
    let steps = Steps::new().await;
    steps.engine.lies.store(true, Ordering::SeqCst);
    let (outcome, error, held) = steps.sleep(0, "g0").await;
    assert_eq!(outcome, StepOutcome::Failed);
    assert!(error.contains("still holds 16000 MiB"), "{error}");
    assert_eq!(held.unwrap()[0].mib, 16_000);
    // Where nothing can be measured its word counts.
    let (outcome, _, held) = steps.sleep(1, "g9").await;
    assert_eq!((outcome, held), (StepOutcome::Done, None));
}

#[tokio::test]
async fn a_checkpoint_is_asked_for_by_a_post_and_its_answer_counts() {
    let steps = Steps::new().await;
    for (number, broken, wanted) in [
        (0, false, StepOutcome::Done),
        (1, true, StepOutcome::Failed),
    ] {
        steps.engine.broken.store(broken, Ordering::SeqCst);
        steps
            .executor
            .perform(Effect::AskCheckpoint(Box::new(AskCheckpoint {
                run: RunId(Uuid::from_u128(7)),
                attempt: 1,
                service: service(),
                generation: Generation(1),
                number,
                ask: Ask::Path("/checkpoint".into()),
                deadline: soon(5_000),
            })));
        let of_step = |command: &Command| match command {
            Command::LadderStepTried {
                number: of,
                outcome,
                ..
            } if *of == number => Some(*outcome),
            _ => None,
        };
        assert_eq!(steps.world.recorder.first(of_step).await, wanted);
    }
    assert_eq!(steps.engine.checkpoints.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_step_begun_anew_that_took_effect_before_is_done() {
    let steps = Steps::new().await;
    steps.engine.refuses_twice.store(true, Ordering::SeqCst);
    assert_eq!(steps.sleep(0, "g0").await.0, StepOutcome::Done);
    // Of a step that is not begun anew half of what was there has to go.
    let (outcome, error, _) = steps.sleep(1, "g0").await;
    assert_eq!(outcome, StepOutcome::Failed);
    assert!(error.contains("still holds 700 MiB"), "{error}");
    // The gateway was killed before it could record the first.
    let (outcome, error, held) = steps.begin(2, "g0", true).await;
    assert_eq!((outcome, error.as_str()), (StepOutcome::Done, ""));
    assert_eq!(held.unwrap()[0].mib, 700);
}

#[tokio::test]
async fn a_wake_up_begun_anew_of_what_is_awake_is_done() {
    let steps = Steps::new().await;
    steps.engine.refuses_twice.store(true, Ordering::SeqCst);
    assert_eq!(steps.wake().await, None);
}

#[tokio::test]
async fn memory_that_was_seen_before_is_looked_for_until_it_is_seen_again() {
    let steps = Steps::new().await;
    steps.engine.unseen.store(3, Ordering::SeqCst);
    let (outcome, error, held) = steps.sleep(0, "g0").await;
    assert_eq!((outcome, error.as_str()), (StepOutcome::Done, ""));
    assert_eq!(held.unwrap()[0].mib, 700);
    assert_eq!(steps.wake().await, None);
    // It stays out of sight.
    steps.engine.held_mib.store(16_000, Ordering::SeqCst);
    steps.engine.unseen.store(u64::MAX, Ordering::SeqCst);
    let (outcome, error, held) = steps.sleep(1, "g0").await;
    assert_eq!((outcome, held), (StepOutcome::Failed, None));
    assert!(error.contains("cannot be measured any more"), "{error}");
}
