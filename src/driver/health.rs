//! Health probing: until the first good answer, and from then on. Says what it sees; what follows from
//! it is decided elsewhere.

use std::time::Duration;

use tokio::time::Instant;

use super::http::error_text;
use crate::outbound::{GuardedClient, refusal};

/// One probe's time, by `contracts/gpu-gateway.md` section 3.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// How much sooner than the coordinator, which cannot say what was seen, start-up is given up here.
const LEAD: Duration = Duration::from_millis(250);

/// How often to probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeTimings {
    /// First pause during start-up; grows by half each time.
    pub startup_first: Duration,
    pub startup_max: Duration,
    /// Between probes of an instance that was healthy once.
    pub liveness: Duration,
    /// Failures in a row that make a healthy instance unhealthy.
    pub failures: u32,
}

impl Default for ProbeTimings {
    fn default() -> Self {
        Self {
            startup_first: Duration::from_millis(20),
            startup_max: Duration::from_secs(2),
            liveness: Duration::from_secs(5),
            failures: 3,
        }
    }
}

/// A change of an instance's health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Healthy,
    /// In start-up: the time is over. Later: several probes in a row failed.
    Unhealthy(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting { deadline: Instant, pause: Duration },
    Healthy { failures: u32 },
    Unhealthy,
}

/// Probes one instance.
pub(super) struct Prober {
    client: GuardedClient,
    url: String,
    timings: ProbeTimings,
    startup: Duration,
    phase: Phase,
}

impl Prober {
    /// Starts in start-up, which has begun then and may take so long.
    pub fn new(
        client: GuardedClient,
        url: String,
        timings: ProbeTimings,
        (began, startup): (Instant, Duration),
    ) -> Self {
        let phase = Phase::Starting {
            deadline: began + startup.saturating_sub(LEAD.min(startup / 5)),
            pause: timings.startup_first,
        };
        Self {
            client,
            url,
            timings,
            startup,
            phase,
        }
    }

    /// Probes until the instance's health changes.
    pub async fn next(&mut self) -> Verdict {
        loop {
            let verdict = match self.phase {
                Phase::Starting { deadline, pause } => self.start(deadline, pause).await,
                Phase::Healthy { failures } => self.live(failures).await,
                Phase::Unhealthy => self.recover().await,
            };
            if let Some(verdict) = verdict {
                return verdict;
            }
        }
    }

    async fn start(&mut self, deadline: Instant, pause: Duration) -> Option<Verdict> {
        let answer = tokio::time::timeout_at(deadline, self.probe()).await;
        let error = match answer {
            Ok(Ok(())) => {
                self.phase = Phase::Healthy { failures: 0 };
                return Some(Verdict::Healthy);
            }
            Ok(Err(error)) => error,
            Err(_) => format!("GET {}: no answer yet", self.url),
        };
        if Instant::now() + pause >= deadline {
            tokio::time::sleep_until(deadline).await;
            self.phase = Phase::Unhealthy;
            let limit_ms = self.startup.as_millis();
            return Some(Verdict::Unhealthy(format!(
                "it was not healthy within {limit_ms} ms of its start: {error}"
            )));
        }
        tokio::time::sleep(pause).await;
        let pause = (pause * 3 / 2).min(self.timings.startup_max);
        self.phase = Phase::Starting { deadline, pause };
        None
    }

    async fn live(&mut self, failures: u32) -> Option<Verdict> {
        tokio::time::sleep(self.timings.liveness).await;
        let Err(error) = self.probe().await else {
            self.phase = Phase::Healthy { failures: 0 };
            return None;
        };
        let failures = failures + 1;
        if failures < self.timings.failures {
            self.phase = Phase::Healthy { failures };
            return None;
        }
        self.phase = Phase::Unhealthy;
        Some(Verdict::Unhealthy(format!(
            "{failures} health probes in a row failed: {error}"
        )))
    }

    async fn recover(&mut self) -> Option<Verdict> {
        tokio::time::sleep(self.timings.liveness).await;
        self.probe().await.ok()?;
        self.phase = Phase::Healthy { failures: 0 };
        Some(Verdict::Healthy)
    }

    /// Healthy is any status under 400.
    async fn probe(&self) -> Result<(), String> {
        let failed = |why: String| Err(format!("GET {}: {why}", self.url));
        let request = match self.client.get(&self.url) {
            Ok(request) => request,
            Err(refused) => return failed(format!("it is not called: {refused}")),
        };
        match request.timeout(PROBE_TIMEOUT).send().await {
            Ok(answer) if answer.status().as_u16() < 400 => Ok(()),
            Ok(answer) => Err(format!(
                "GET {} answered {}",
                self.url,
                answer.status().as_u16()
            )),
            Err(error) => failed(match refusal(&error) {
                Some(refused) => format!("it is not called: {refused}"),
                None => error_text(error),
            }),
        }
    }
}
