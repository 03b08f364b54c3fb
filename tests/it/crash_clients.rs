//! Clients of the crash test: each starts runs and sends commands, remembers every answer, and after a crash
//! sends again what was not answered and asks again for what was.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::sync::watch;

use crate::support::rng::Rng;

/// Runs of one client that have not ended: more would only make the queue longer.
const OPEN_RUNS: usize = 6;

/// What the crash test tells its clients.
#[derive(Clone, Copy, Default)]
pub struct Phase {
    /// How often a gateway has begun to answer.
    pub epoch: u64,
    /// Do what is under way and nothing new.
    pub over: bool,
}

/// What all clients share.
pub struct World {
    pub url: String,
    pub token: String,
    pub phase: watch::Receiver<Phase>,
    /// Every acknowledged run, so that clients steer each other's.
    pub runs: Mutex<Vec<String>>,
    pub texts: Vec<PathBuf>,
    pub answers: AtomicU64,
    pub resent: AtomicU64,
}

/// A start and its answer.
#[derive(Clone, Debug)]
pub struct Start {
    pub key: String,
    pub body: Value,
    pub run: Option<String>,
}

/// A command and its answer.
#[derive(Clone, Debug)]
pub struct Sent {
    pub id: String,
    pub body: Value,
    pub seq: Option<u64>,
}

pub struct Client {
    number: u64,
    rng: Rng,
    world: Arc<World>,
    http: reqwest::Client,
    pub starts: Vec<Start>,
    pub commands: Vec<Sent>,
    open: VecDeque<String>,
}

impl Client {
    pub fn new(number: u64, seed: u64, world: Arc<World>) -> Client {
        let http = reqwest::Client::builder()
            .timeout(std::time::Duration::from_secs(30))
            .build()
            .unwrap();
        Client {
            number,
            rng: Rng::new(seed ^ (number << 32)),
            world,
            http,
            starts: Vec::new(),
            commands: Vec::new(),
            open: VecDeque::new(),
        }
    }

    /// Until the test says that it is over.
    pub async fn live(mut self) -> Client {
        while !self.world.phase.borrow().over {
            match self.rng.below(100) {
                0..25 if self.open.len() < OPEN_RUNS => self.start().await,
                0..40 => self.look().await,
                40..47 => self.repeat_start().await,
                47..55 => self.repeat_command().await,
                _ => self.command().await,
            }
        }
        self
    }

    async fn start(&mut self) {
        let key = format!("start-{}-{}", self.number, self.starts.len());
        let priority = 1 + self.rng.below(5);
        let max_attempts = *self.rng.pick(&[1, 3, 100, 100]);
        let (service_type, mut payload) = match self.rng.below(100) {
            0 => ("nap", json!({"operation": "exit", "code": 3})),
            1..5 => ("nap", json!({"operation": "fail", "message": "as asked"})),
            5..70 => (
                "nap",
                json!({"operation": "sleep", "ms": self.rng.below(60)}),
            ),
            _ => (
                "text",
                json!({"operation": "stats", "files": self.world.texts, "chunk_bytes": 8_192,
                       "delay_ms": self.rng.below(20)}),
            ),
        };
        payload["key"] = json!(key);
        let max_attempts = if payload["operation"] == "exit" {
            1
        } else {
            max_attempts
        };
        let body = json!({"job": {"service_type": service_type, "payload": payload,
            "priority": priority, "max_attempts": max_attempts}, "labels": {"client": self.number.to_string()}});
        self.starts.push(Start {
            key: key.clone(),
            body: body.clone(),
            run: None,
        });
        let answer = self
            .send("/api/gateway/runs/start", Some(&key), &body)
            .await;
        let run = answer["run_id"].as_str().expect("a run id").to_owned();
        self.starts.last_mut().unwrap().run = Some(run.clone());
        self.open.push_back(run.clone());
        self.world.runs.lock().unwrap().push(run);
    }

    async fn repeat_start(&mut self) {
        if self.starts.is_empty() {
            return;
        }
        let start = self.rng.pick(&self.starts).clone();
        let path = "/api/gateway/runs/start";
        let answer = self.send(path, Some(&start.key), &start.body).await;
        assert_eq!(
            answer["run_id"].as_str(),
            start.run.as_deref(),
            "one key, one run"
        );
    }

    async fn command(&mut self) {
        let Some(run) = self.any_run() else {
            return;
        };
        let (kind, payload) = match self.rng.below(100) {
            0..20 => ("pause", json!({"reason": "a look"})),
            20..55 => ("resume", json!({})),
            55..63 => ("cancel", json!({"reason": "not wanted"})),
            63..80 => ("set_priority", json!({"priority": 1 + self.rng.below(5)})),
            80..90 => ("retry", json!({})),
            _ => ("preempt", json!({})),
        };
        let id = format!("command-{}-{}", self.number, self.commands.len());
        let body = json!({"command_id": id, "run_id": run, "type": kind, "payload": payload});
        self.commands.push(Sent {
            id,
            body: body.clone(),
            seq: None,
        });
        let answer = self.send("/api/gateway/commands", None, &body).await;
        self.commands.last_mut().unwrap().seq = answer["seq"].as_u64();
        if kind == "retry" {
            self.open.push_back(run);
        }
    }

    /// Mostly one of its own that has not ended, sometimes anybody's.
    fn any_run(&mut self) -> Option<String> {
        if self.rng.below(10) > 0
            && let Some(run) = self.open.iter().last()
        {
            return Some(run.clone());
        }
        let runs = self.world.runs.lock().unwrap();
        (!runs.is_empty()).then(|| self.rng.pick(&runs).clone())
    }

    async fn repeat_command(&mut self) {
        if self.commands.is_empty() {
            return;
        }
        let command = self.rng.pick(&self.commands).clone();
        let answer = self
            .send("/api/gateway/commands", None, &command.body)
            .await;
        assert_eq!(answer["duplicate"], true, "{answer}");
        assert_eq!(answer["seq"].as_u64(), command.seq, "one id, one place");
    }

    /// Looks at its oldest run, and forgets it when it has ended.
    async fn look(&mut self) {
        let Some(run) = self.open.pop_front() else {
            return;
        };
        let path = format!("/api/gateway/runs/{run}");
        let answer = self.ask(
            |client, url, token| client.get(url).bearer_auth(token),
            &path,
        );
        let summary = answer.await;
        if !matches!(
            summary["status"].as_str(),
            Some("completed" | "failed" | "cancelled")
        ) {
            self.open.push_back(run);
        }
    }

    async fn send(&self, path: &str, key: Option<&str>, body: &Value) -> Value {
        let request = |client: &reqwest::Client, url: String, token: &str| {
            let request = client.post(url).bearer_auth(token).json(body);
            match key {
                Some(key) => request.header("idempotency-key", key),
                None => request,
            }
        };
        self.ask(request, path).await
    }

    /// Sends until there is an answer: the same request again after each crash.
    async fn ask(
        &self,
        request: impl Fn(&reqwest::Client, String, &str) -> reqwest::RequestBuilder,
        path: &str,
    ) -> Value {
        let mut phase = self.world.phase.clone();
        loop {
            let epoch = phase.borrow_and_update().epoch;
            let url = format!("{}{path}", self.world.url);
            if let Ok(response) = request(&self.http, url, &self.world.token).send().await {
                let status = response.status();
                let body = response.bytes().await;
                if let (true, Ok(body)) = (status.is_success(), &body) {
                    self.world.answers.fetch_add(1, Ordering::Relaxed);
                    return serde_json::from_slice(body).expect("JSON");
                }
                // 503: it is stopping. Anything else is nothing that a crash explains.
                assert!(
                    status.is_success() || status == 503,
                    "{path}: {status} {body:?}"
                );
            }
            self.world.resent.fetch_add(1, Ordering::Relaxed);
            if phase.borrow().over {
                // No crash will come to wait for: the machine is only slow.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
            let next = phase.wait_for(|phase| phase.epoch != epoch);
            next.await.expect("the test outlives its clients");
        }
    }
}
