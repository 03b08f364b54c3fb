//! Steps of ladders: asking for a checkpoint, taking an instance's GPU memory, giving it back. Each is one task that
//! reports one outcome; whether memory was really given back is measured, where that can be done.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::Inner;
use super::answer::{bounded, broken, not_called};
use crate::domain::command::Command;
use crate::domain::effect::{AskCheckpoint, TakeMemory, WakeInstance};
use crate::domain::ids::{Generation, ServiceName};
use crate::domain::ladder::{Ask, SleepCall, Step, StepOutcome};
use crate::domain::spec::Grant;
use crate::domain::time::Timestamp;
use crate::driver::{CudaError, Endpoint, join, until};

/// How much sooner than the coordinator, which cannot say what was seen, a step is given up here.
const LEAD: Duration = Duration::from_millis(250);
/// Pauses between questions whether it sleeps, or answers again.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// Longest such question.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);
/// Pauses between looks for an instance that a restarted gateway has not found yet.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Longest answer to whether it sleeps, in bytes.
const ANSWER_MAX_BYTES: usize = 4 << 10;
/// A step counts when at most this share of the memory is still held: an engine that sleeps keeps what its driver needs.
const MOST_HELD_PERCENT: u64 = 50;

/// How a step ended, and what is still held where that was measured.
type Ended = (StepOutcome, Option<String>, Option<Vec<Grant>>);

/// Time left for work that is to be reported before the coordinator gives it up.
fn limit(deadline: Timestamp) -> Instant {
    let left = until(deadline);
    Instant::now() + left.saturating_sub(LEAD.min(left / 5))
}

pub(super) fn ask_checkpoint(inner: &Arc<Inner>, asking: AskCheckpoint) {
    let inner = inner.clone();
    inner.clone().tasks.spawn("checkpoint", async move {
        let failed = match &asking.ask {
            // That it was saved is told by the service itself.
            Ask::Signal(signal) => {
                let sent = inner
                    .driver
                    .signal(&asking.service, asking.generation, signal);
                match sent.await {
                    true => return,
                    false => Some(format!("no process took {signal}")),
                }
            }
            Ask::Path(path) => post_checkpoint(&inner, path, &asking).await.err(),
        };
        let outcome = match failed {
            Some(_) => StepOutcome::Failed,
            None => StepOutcome::Done,
        };
        let report = Command::LadderStepTried {
            service: asking.service,
            generation: asking.generation,
            run: Some(asking.run),
            attempt: asking.attempt,
            number: asking.number,
            outcome,
            error: failed,
            held: None,
        };
        inner.outcomes.report(report).await;
    });
}

async fn post_checkpoint(inner: &Inner, path: &str, asking: &AskCheckpoint) -> Result<(), String> {
    let limit = limit(asking.deadline);
    let endpoint = endpoint(inner, &asking.service, asking.generation, limit).await?;
    let body = json!({
        "run_id": asking.run.to_string(),
        "attempt": asking.attempt,
        "within_ms": u64::try_from(until(asking.deadline).as_millis()).unwrap_or(u64::MAX),
    });
    post(inner, &endpoint, path, Some(&body), limit).await
}

/// Where an instance is reached: after a restart it may have to be found first.
async fn endpoint(
    inner: &Inner,
    service: &ServiceName,
    generation: Generation,
    limit: Instant,
) -> Result<Arc<Endpoint>, String> {
    loop {
        if let Some(endpoint) = inner.driver.endpoint(service, generation) {
            return Ok(endpoint);
        }
        if Instant::now() >= limit {
            return Err("its process was not found".to_owned());
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn post(
    inner: &Inner,
    endpoint: &Endpoint,
    path: &str,
    body: Option<&Value>,
    limit: Instant,
) -> Result<(), String> {
    let request = inner
        .call_client
        .post(&join(&endpoint.base_url, path))
        .map_err(|refused| not_called(&refused).error)?
        .timeout(limit.saturating_duration_since(Instant::now()));
    let request = match body {
        Some(body) => request.json(body),
        None => request,
    };
    let answer = request.send().await.map_err(|e| broken(e).error)?;
    match answer.status() {
        status if status.is_success() => Ok(()),
        status => Err(format!("POST {path} answered {}", status.as_u16())),
    }
}

pub(super) fn take_memory(inner: &Arc<Inner>, taking: TakeMemory) {
    let inner = inner.clone();
    inner.clone().tasks.spawn("ladder step", async move {
        let (outcome, error, held) = take(&inner, &taking).await;
        if let Some(error) = &error {
            tracing::warn!(
                service.name = %taking.service, instance.generation = taking.generation.0,
                step = taking.step.name(), error, "a step of a ladder came to nothing"
            );
        }
        let report = Command::LadderStepTried {
            service: taking.service,
            generation: taking.generation,
            run: None,
            attempt: 0,
            number: taking.number,
            outcome,
            error,
            held,
        };
        inner.outcomes.report(report).await;
    });
}

async fn take(inner: &Inner, taking: &TakeMemory) -> Ended {
    let limit = limit(taking.deadline);
    let at = (&taking.service, taking.generation);
    let endpoint = match endpoint(inner, at.0, at.1, limit).await {
        Ok(endpoint) => endpoint,
        Err(error) => return (StepOutcome::Failed, Some(error), None),
    };
    let before = measured(inner, at, &taking.grants);
    let taken = match &taking.step {
        Step::Sleep { call, .. } => posted(inner, &endpoint, (call, &call.path), true, limit).await,
        Step::CudaCheckpoint { .. } => match inner.driver.take_cuda(at.0, at.1, limit).await {
            Ok(()) => Ok(()),
            Err(error @ CudaError::NoProgram { .. }) => {
                return (StepOutcome::Skipped, Some(error.to_string()), None);
            }
            Err(error) => Err(error.to_string()),
        },
        other => Err(format!("'{}' takes no memory", other.name())),
    };
    match taken {
        Ok(()) => given_back(inner, at, taking, before, limit).await,
        Err(error) => (
            StepOutcome::Failed,
            Some(error),
            measured(inner, at, &taking.grants),
        ),
    }
}

/// What an engine refuses to do once more counts when it says that it is in that state.
async fn posted(
    inner: &Inner,
    endpoint: &Endpoint,
    (call, path): (&SleepCall, &str),
    wanted: bool,
    limit: Instant,
) -> Result<(), String> {
    let posted = post(inner, endpoint, path, None, limit).await;
    match (&posted, &call.is_sleeping_path) {
        (Ok(()), Some(path)) => sleeps(inner, endpoint, path, wanted, limit).await,
        (Err(_), Some(path)) if asked(inner, endpoint, path).await == Ok(wanted) => Ok(()),
        _ => posted,
    }
}

/// Asks until it says that it sleeps, or that it does not.
async fn sleeps(
    inner: &Inner,
    endpoint: &Endpoint,
    path: &str,
    wanted: bool,
    limit: Instant,
) -> Result<(), String> {
    loop {
        let said = asked(inner, endpoint, path).await;
        if said == Ok(wanted) {
            return Ok(());
        }
        if Instant::now() + ASK_EVERY >= limit {
            let state = if wanted { "asleep" } else { "awake" };
            return Err(match said {
                Ok(_) => format!("GET {path} does not say that it is {state}"),
                Err(error) => format!("GET {path}: {error}"),
            });
        }
        sleep(ASK_EVERY).await;
    }
}

async fn asked(inner: &Inner, endpoint: &Endpoint, path: &str) -> Result<bool, String> {
    let request = inner
        .call_client
        .get(&join(&endpoint.base_url, path))
        .map_err(|refused| not_called(&refused).error)?
        .timeout(ASK_TIMEOUT);
    let answer = request.send().await.map_err(|e| broken(e).error)?;
    if !answer.status().is_success() {
        return Err(format!("it answered {}", answer.status().as_u16()));
    }
    let body = bounded(answer, ANSWER_MAX_BYTES)
        .await
        .map_err(|failure| failure.error)?;
    let said: Value = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
    let said = said.get("is_sleeping").unwrap_or(&said);
    said.as_bool()
        .ok_or_else(|| "its answer has no true or false in 'is_sleeping'".to_owned())
}

/// What an instance holds on the GPUs of its grants; `None` where that cannot be measured.
fn measured(
    inner: &Inner,
    (service, generation): (&ServiceName, Generation),
    grants: &[Grant],
) -> Option<Vec<Grant>> {
    let meter = inner.driver.meter();
    let held = |grant: &Grant| {
        let mib = meter.held_mib(service, generation, &grant.gpu)?;
        let gpu = grant.gpu.clone();
        Some(Grant { gpu, mib })
    };
    grants.iter().map(held).collect()
}

/// Waits until the memory is seen to be given back; a service that only says so has failed.
async fn given_back(
    inner: &Inner,
    at: (&ServiceName, Generation),
    taking: &TakeMemory,
    before: Option<Vec<Grant>>,
    limit: Instant,
) -> Ended {
    let total = |grants: &[Grant]| grants.iter().map(|grant| grant.mib).sum::<u64>();
    let granted = total(&taking.grants);
    // Where nothing was seen before, what was granted counts; as it does where the memory may have been taken before.
    let had = match &before {
        Some(before) if !taking.is_anew => total(before),
        _ => granted,
    };
    loop {
        let left = limit.saturating_duration_since(Instant::now());
        let sampled = timeout(left, inner.driver.meter().next_sample()).await;
        let is_over = sampled.is_err() || Instant::now() >= limit;
        let held = match measured(inner, at, &taking.grants) {
            Some(held) => held,
            None if before.is_none() => return (StepOutcome::Done, None, None),
            // It could be measured before, and may be again.
            None if is_over => {
                let error = "its GPU memory cannot be measured any more".to_owned();
                return (StepOutcome::Failed, Some(error), None);
            }
            None => continue,
        };
        let mib = total(&held);
        if sampled.is_ok() && mib <= had * MOST_HELD_PERCENT / 100 {
            return (StepOutcome::Done, None, Some(held));
        }
        if is_over {
            let error = format!("it said that it is done and still holds {mib} MiB of GPU memory");
            return (StepOutcome::Failed, Some(error), Some(held));
        }
    }
}

pub(super) fn wake(inner: &Arc<Inner>, waking: WakeInstance) {
    let inner = inner.clone();
    inner.clone().tasks.spawn("wake-up", async move {
        let error = wake_up(&inner, &waking).await.err();
        let report = Command::InstanceWoken {
            service: waking.service,
            generation: waking.generation,
            error: error.map(|error| format!("it was not woken: {error}")),
        };
        inner.outcomes.report(report).await;
    });
}

async fn wake_up(inner: &Inner, waking: &WakeInstance) -> Result<(), String> {
    let limit = limit(waking.deadline);
    let at = (&waking.service, waking.generation);
    let endpoint = endpoint(inner, at.0, at.1, limit).await?;
    match &waking.step {
        Step::Sleep { call, .. } => {
            posted(inner, &endpoint, (call, &call.wake_path), false, limit).await?;
        }
        _ => inner
            .driver
            .give_cuda(at.0, at.1, limit)
            .await
            .map_err(|error| error.to_string())?,
    }
    healthy(inner, &endpoint, limit).await
}

/// Asks until it is healthy, which is any status under 400.
async fn healthy(inner: &Inner, endpoint: &Endpoint, limit: Instant) -> Result<(), String> {
    let path = &endpoint.spec.health_endpoint;
    loop {
        let request = inner
            .call_client
            .get(&join(&endpoint.base_url, path))
            .map_err(|refused| not_called(&refused).error)?
            .timeout(ASK_TIMEOUT);
        let error = match request.send().await {
            Ok(answer) if answer.status().as_u16() < 400 => return Ok(()),
            Ok(answer) => format!("it answered {}", answer.status().as_u16()),
            Err(error) => broken(error).error,
        };
        if Instant::now() + ASK_EVERY >= limit {
            return Err(format!("GET {path}: {error}"));
        }
        sleep(ASK_EVERY).await;
    }
}
