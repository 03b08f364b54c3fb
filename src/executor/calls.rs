//! Jobs' calls: posting a payload to an instance, and stopping such a call. Each call is one task that reports
//! exactly one outcome: the answer, or that the stop is done.

use std::collections::HashMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderValue;
use serde_json::json;
use tokio::sync::{oneshot, watch};

use super::answer::{broken, failure, not_called, result_of};
use super::{Inner, progress};
use crate::domain::command::{Command, JobFailure};
use crate::domain::effect::Dispatch;
use crate::domain::ids::{Attempt, Generation, RunId, ServiceName};
use crate::domain::spec::ServiceSpec;
use crate::domain::time::Timestamp;
use crate::driver::{Endpoint, join, until};

/// What a token outlasts its attempt by: reports that are under way when it ends.
const TOKEN_SLACK: Duration = Duration::from_secs(10);

/// One attempt.
type CallId = (RunId, Attempt);

/// How a call is to be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stop {
    pub reason: &'static str,
    pub deadline: Timestamp,
}

/// The calls that are open or whose outcome is not yet taken.
pub(super) struct Calls {
    open: Mutex<HashMap<CallId, Option<oneshot::Sender<Stop>>>>,
    count: watch::Sender<usize>,
}

impl Default for Calls {
    fn default() -> Self {
        Self {
            open: Mutex::default(),
            count: watch::Sender::new(0),
        }
    }
}

impl Calls {
    /// `None` when this attempt has a call already.
    fn enter(&self, id: CallId) -> Option<oneshot::Receiver<Stop>> {
        let mut open = self.lock();
        if open.contains_key(&id) {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        open.insert(id, Some(sender));
        self.count.send_replace(open.len());
        Some(receiver)
    }

    fn leave(&self, id: CallId) {
        let mut open = self.lock();
        open.remove(&id);
        self.count.send_replace(open.len());
    }

    /// Hands `stop` to the call's task; the first one counts. `false` when there is no such call.
    fn stop(&self, id: CallId, stop: Stop) -> bool {
        let mut open = self.lock();
        let Some(call) = open.get_mut(&id) else {
            return false;
        };
        if let Some(sender) = call.take() {
            // A task that does not listen any more has its outcome already and is reporting it.
            let _ = sender.send(stop);
        }
        true
    }

    pub async fn finish(&self, limit: Duration) -> usize {
        let mut count = self.count.subscribe();
        let _ = tokio::time::timeout(limit, count.wait_for(|&open| open == 0)).await;
        *self.count.borrow()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<CallId, Option<oneshot::Sender<Stop>>>> {
        // Nothing panics while it is held.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Leaves the table however the call's task ends.
struct Entry {
    inner: Arc<Inner>,
    id: CallId,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.inner.calls.leave(self.id);
    }
}

/// Begins a call. A second one of the same attempt is not made.
pub(super) fn dispatch(inner: &Arc<Inner>, dispatch: Dispatch) {
    let arrived = Instant::now();
    let id = (dispatch.run, dispatch.attempt);
    let Some(stop) = inner.calls.enter(id) else {
        return;
    };
    let entry = Entry {
        inner: inner.clone(),
        id,
    };
    inner.tasks.spawn("call", async move {
        let inner = &entry.inner;
        let outcome = match inner
            .driver
            .endpoint(&dispatch.service, dispatch.generation)
        {
            Some(endpoint) => {
                let outcome = call(inner, &endpoint, &dispatch, arrived, stop).await;
                if is_broken(&outcome) {
                    inner.driver.settle(&endpoint, dispatch.generation).await;
                }
                outcome
            }
            None => answered(&dispatch, Err(gone(&dispatch))),
        };
        inner.outcomes.report(outcome).await;
        drop(entry);
    });
}

/// Stops an open call. For one that is not open, as after a restart of the gateway, the service is asked all the same.
pub(super) fn stop(inner: &Arc<Inner>, id: CallId, at: &(ServiceName, Generation), stop: Stop) {
    if inner.calls.stop(id, stop) {
        return;
    }
    let endpoint = inner.driver.endpoint(&at.0, at.1);
    let (inner, (run, attempt)) = (inner.clone(), id);
    inner.clone().tasks.spawn("stop of a call", async move {
        let confirmed = match endpoint {
            Some(endpoint) => ask_to_stop(&inner, &endpoint, id, stop).await,
            None => false,
        };
        inner
            .outcomes
            .report(Command::JobStopDone {
                run,
                attempt,
                confirmed,
            })
            .await;
    });
}

async fn call(
    inner: &Arc<Inner>,
    endpoint: &Endpoint,
    dispatch: &Dispatch,
    arrived: Instant,
    mut stop: oneshot::Receiver<Stop>,
) -> Command {
    let limit = Duration::from_millis(dispatch.timeout_ms);
    let mut exchange = pin!(async {
        match tokio::time::timeout(limit, exchange(inner, endpoint, dispatch, arrived)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(failure(
                "timeout",
                format!("no answer within {} ms", dispatch.timeout_ms),
            )),
        }
    });
    tokio::select! {
        biased;
        outcome = &mut exchange => {
            let result = outcome.as_ref().map_or_else(|failure| failure.code.to_string(), |_| "ok".into());
            metrics::histogram!("rungate_call_seconds", "result" => result).record(arrived.elapsed());
            answered(dispatch, outcome)
        }
        Ok(stop) = &mut stop => stopped(inner, endpoint, dispatch, stop, exchange).await,
        () = progress::poll(inner, endpoint, dispatch) => answered(dispatch, exchange.await),
    }
}

/// Keeps the call open until the service has answered the request to stop; then drops it. A result that comes before
/// that is reported; a call that merely breaks meanwhile is what a stop looks like.
async fn stopped(
    inner: &Arc<Inner>,
    endpoint: &Endpoint,
    dispatch: &Dispatch,
    stop: Stop,
    mut exchange: Pin<&mut impl Future<Output = Result<Bytes, JobFailure>>>,
) -> Command {
    let (run, attempt) = (dispatch.run, dispatch.attempt);
    let mut asking = pin!(ask_to_stop(inner, endpoint, (run, attempt), stop));
    let confirmed = tokio::select! {
        biased;
        outcome = &mut exchange => match outcome {
            Ok(result) => return answered(dispatch, Ok(result)),
            Err(_) => asking.await,
        },
        confirmed = &mut asking => confirmed,
    };
    Command::JobStopDone {
        run,
        attempt,
        confirmed,
    }
}

/// Whether the service says, by the deadline, that the attempt is stopped.
async fn ask_to_stop(
    inner: &Inner,
    endpoint: &Endpoint,
    (run, attempt): CallId,
    stop: Stop,
) -> bool {
    let Some(path) = &endpoint.spec.cancel_path else {
        return false;
    };
    let grace = until(stop.deadline);
    let body = json!({
        "run_id": run.to_string(),
        "attempt": attempt,
        "reason": stop.reason,
        "grace_ms": u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
    });
    let asked = match inner.call_client.post(&join(&endpoint.base_url, path)) {
        Ok(request) => {
            let request = request.json(&body).timeout(grace);
            request.send().await.map_err(broken)
        }
        Err(refused) => Err(not_called(&refused)),
    };
    match asked {
        Ok(response) => response.status().is_success(),
        Err(JobFailure { error, .. }) => {
            tracing::debug!(run.id = %run, run.attempt = attempt, error, "a service did not confirm a stop");
            false
        }
    }
}

/// Posts the payload and reads the answer.
async fn exchange(
    inner: &Arc<Inner>,
    endpoint: &Endpoint,
    dispatch: &Dispatch,
    arrived: Instant,
) -> Result<Bytes, JobFailure> {
    let seq = dispatch.payload;
    let payload = match inner.read(move |source| source.payload(seq)).await {
        Ok(Some(payload)) => payload,
        Ok(None) => return Err(failure("payload_missing", "the job's payload was purged")),
        Err(error) => {
            return Err(failure(
                "payload_unreadable",
                format!("the job's payload cannot be read: {error}"),
            ));
        }
    };
    let gateway = inner.options.gateway_for(&endpoint.spec);
    let run = dispatch.run;
    let mut request = inner
        .call_client
        .post(&join(&endpoint.base_url, endpoint.spec.dispatch_path()))
        .map_err(|refused| not_called(&refused))?
        .header(http::header::CONTENT_TYPE, "application/json")
        .header(http::header::ACCEPT, "application/json")
        .header("x-rungate-run-id", run.to_string())
        .header("x-rungate-attempt", dispatch.attempt)
        .header(
            "x-rungate-progress",
            join(gateway, &format!("queue/{run}/progress")),
        )
        .body(payload);
    if let Some(token) = job_token(inner, &endpoint.spec, dispatch).and_then(sensitive) {
        request = request.header("x-rungate-token", token);
    }
    if dispatch.checkpoint.is_some() {
        let url = join(gateway, &format!("api/gateway/runs/{run}/checkpoint"));
        request = request.header("x-rungate-checkpoint", url);
    }
    metrics::histogram!("rungate_dispatch_seconds").record(arrived.elapsed());
    result_of(request.send().await.map_err(broken)?).await
}

/// Good for as long as the attempt can last: its call, or its container's life, and a stop at the end of it.
pub(super) fn job_token(inner: &Inner, spec: &ServiceSpec, dispatch: &Dispatch) -> Option<String> {
    let lasting = Duration::from_millis(dispatch.timeout_ms)
        .saturating_add(Duration::from_millis(spec.longest_stop_ms()))
        .saturating_add(TOKEN_SLACK);
    (inner.options.job_token)(dispatch, lasting)
}

/// As a header that is kept out of debug output.
fn sensitive(token: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(&token).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn answered(dispatch: &Dispatch, outcome: Result<Bytes, JobFailure>) -> Command {
    Command::JobAnswered {
        run: dispatch.run,
        attempt: dispatch.attempt,
        outcome,
    }
}

/// Whether the connection failed, which may be because the instance has ended.
fn is_broken(outcome: &Command) -> bool {
    let Command::JobAnswered {
        outcome: Err(failure),
        ..
    } = outcome
    else {
        return false;
    };
    matches!(failure.code.as_str(), "connect" | "interrupted")
}

fn gone(dispatch: &Dispatch) -> JobFailure {
    let (service, generation) = (&dispatch.service, dispatch.generation);
    failure(
        "instance_exited",
        format!("instance {generation} of service '{service}' is gone"),
    )
}
