//! `rungate run`: start runs, look at them, steer them.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::client::{Client, segment};
use super::error::{CliError, Exit};
use super::output::{facts, instant, table, text};
use super::{Context, log_lines, watch};

/// Largest payload read from a file or stdin, in bytes: the gateway takes no larger body.
const MAX_PAYLOAD_BYTES: u64 = 64 << 20;
/// Runs asked for in one page.
const PAGE: usize = 500;
/// How often, and how many times, the inbox is asked what became of a command: 10 s in all. The
/// coordinator decides with the commit that accepts, so the first answer is nearly always final.
const DECISION_POLL: Duration = Duration::from_millis(100);
const DECISION_POLLS: u32 = 100;

/// Verbs of `rungate run`.
#[derive(Debug, Subcommand)]
pub enum Run {
    /// Start a job run
    #[command(after_help = "\
Examples:
  rungate run start --type text-stats --payload '{\"files\":[\"/etc/hosts\"]}'
  rungate run start --service llama --payload-file request.json --priority 1 --watch
  jq -c . request.json | rungate run start --type llm --payload-file - --json
  rungate run start --image trainer:3 --gpus 1 --checkpoint-signal SIGUSR1 --watch -- --epochs 10")]
    Start(Box<Start>),
    /// List runs, newest first
    #[command(
        after_help = "Example:\n  rungate run list --status running --json | jq -r '.items[].run_id'"
    )]
    List(List),
    /// Show one run
    Show {
        /// The run's id
        run: String,
    },
    /// Follow a run until it ends; exit code 1 unless it completed
    #[command(
        after_help = "Example:\n  rungate run watch 0198c0de-… --json | jq -c .record.effect.type"
    )]
    Watch {
        /// The run's id
        run: String,
        /// Only what comes after this cursor
        #[arg(long, default_value_t = 0, value_name = "CURSOR")]
        after: u64,
    },
    /// Show what the containers of a job wrote
    #[command(after_help = "Example:\n  rungate run output 0198c0de-… --follow")]
    Output {
        /// The run's id
        run: String,
        /// At most this many lines
        #[arg(long, short = 'n', default_value_t = 100, value_name = "N")]
        tail: u32,
        /// Go on as they write more, to the end of the run
        #[arg(long, short)]
        follow: bool,
    },
    /// Hold a run: a queued one stays out of the queue, a running one saves its state and frees its GPU
    Pause(Reasoned),
    /// Put a held run back into the queue
    Resume(Target),
    /// Stop a run for good
    Cancel(Reasoned),
    /// Make a running run give way
    Preempt {
        #[command(flatten)]
        target: Target,
        /// The queued run that gets its place; without it the run goes back to the queue
        #[arg(long, value_name = "RUN")]
        by: Option<String>,
    },
    /// Queue an ended run again, as a new attempt
    Retry(Target),
    /// Tell why a run waits
    Why {
        /// The run's id
        run: String,
    },
    /// Change a run's priority: 1 is the most urgent, 5 the least
    SetPriority {
        #[command(flatten)]
        target: Target,
        /// 1 to 5
        #[arg(value_parser = clap::value_parser!(u8).range(1..=5))]
        priority: u8,
    },
}

/// The run a command is for.
#[derive(Args, Debug)]
pub struct Target {
    /// The run's id
    run: String,
    /// Id of the command; the same id is applied once, however often it is sent
    #[arg(long, value_name = "ID")]
    command_id: Option<String>,
}

/// A run, and a reason that the ledger keeps.
#[derive(Args, Debug)]
pub struct Reasoned {
    #[command(flatten)]
    target: Target,
    /// Why; kept in the ledger
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

#[derive(Args, Debug)]
pub struct Start {
    /// Any service of this type
    #[arg(
        long = "type",
        value_name = "TYPE",
        required_unless_present_any = ["service", "image"]
    )]
    service_type: Option<String>,
    /// This service and no other
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    #[command(flatten)]
    container: Container,
    /// The job's payload, as JSON
    #[arg(long, value_name = "JSON", conflicts_with_all = ["payload_file", "image"])]
    payload: Option<String>,
    /// File that holds the payload; `-` reads standard input
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    payload_file: Option<PathBuf>,
    /// 1 is the most urgent, 5 the least
    #[arg(long, short, value_parser = clap::value_parser!(u8).range(1..=5))]
    priority: Option<u8>,
    /// Seconds that it may wait for its first dispatch
    #[arg(long, value_name = "SECONDS")]
    ttl_seconds: Option<u64>,
    /// Seconds that one attempt may take
    #[arg(long, value_name = "SECONDS")]
    timeout_seconds: Option<u64>,
    /// Failed attempts after which it fails
    #[arg(long, value_name = "N")]
    max_attempts: Option<u32>,
    /// Address that the outcome is posted to
    #[arg(long, value_name = "URL")]
    callback_url: Option<String>,
    /// Session that it belongs to
    #[arg(long, value_name = "ID")]
    session: Option<String>,
    /// Label, as often as wanted
    #[arg(long, value_name = "NAME=VALUE", value_parser = super::service::pair)]
    label: Vec<(String, String)>,
    /// The same key starts one run, however often it is sent
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Follow it until it ends
    #[arg(long, short)]
    watch: bool,
}

/// A container of the job's own.
#[derive(Args, Debug)]
pub struct Container {
    /// A container of its own, made of this image and run to its end
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["service_type", "service"])]
    image: Option<String>,
    /// Whole GPUs that it gets for itself
    #[arg(long, value_name = "N", requires = "image")]
    gpus: Option<u32>,
    /// GiB of GPU memory that it gets on a shared GPU
    #[arg(long, value_name = "GIB", requires = "image")]
    vram_gb: Option<f64>,
    /// Environment variable, as often as wanted
    #[arg(long, value_name = "NAME=VALUE", requires = "image", value_parser = super::service::pair)]
    env: Vec<(String, String)>,
    /// Folder or volume, as often as wanted; `:ro` behind it when nothing may be written
    #[arg(long, value_name = "SOURCE:TARGET", requires = "image")]
    volume: Vec<String>,
    /// Sent to it before it is stopped, so that it saves its work to `RUNGATE_CHECKPOINT_DIR`
    #[arg(long, value_name = "SIGNAL", requires = "image")]
    checkpoint_signal: Option<String>,
    /// What the image's entry point gets
    #[arg(last = true, value_name = "ARGS", requires = "image")]
    args: Vec<String>,
}

impl Container {
    /// The member `container` of a job, if there is to be one.
    fn member(self, timeout_seconds: Option<u64>) -> Option<Value> {
        let mut container = json!({"image": self.image?});
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                container[name] = value;
            }
        };
        set("gpus", self.gpus.map(Value::from));
        set("vram_gb", self.vram_gb.map(Value::from));
        set("timeout_seconds", timeout_seconds.map(Value::from));
        let env = self.env.into_iter().map(|(k, v)| (k, Value::from(v)));
        let env: Map<String, Value> = env.collect();
        set("env", (!env.is_empty()).then(|| env.into()));
        let volumes = Some(self.volume).filter(|volumes| !volumes.is_empty());
        set("volumes", volumes.map(Value::from));
        set("checkpoint_signal", self.checkpoint_signal.map(Value::from));
        set(
            "args",
            Some(self.args)
                .filter(|args| !args.is_empty())
                .map(Value::from),
        );
        Some(container)
    }
}

#[derive(Args, Debug)]
pub struct List {
    /// queued, running, paused, preempted, completed, failed or cancelled
    #[arg(long)]
    status: Option<String>,
    /// Only runs of this session
    #[arg(long, value_name = "ID")]
    session: Option<String>,
    /// At most this many
    #[arg(long, default_value_t = 50, value_name = "N")]
    limit: usize,
}

impl Run {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let client = context.client()?;
        match self {
            Run::Start(start) => start.perform(context, &client).await,
            Run::List(list) => list.perform(context, &client).await,
            Run::Show { run } => show(context, &client, &run).await,
            Run::Watch { run, after } => watch::run(context.out, &client, &run, after).await,
            Run::Output { run, tail, follow } => {
                let path = format!("api/gateway/runs/{}/output", segment(&run));
                log_lines::show(context, &client, path, tail, follow).await
            }
            Run::Why { run } => why(context, &client, &run).await,
            Run::Pause(Reasoned { target, reason }) => {
                let payload = reason_payload(reason);
                send(context, &client, target, "pause", payload).await
            }
            Run::Resume(target) => send(context, &client, target, "resume", json!({})).await,
            Run::Cancel(Reasoned { target, reason }) => {
                let payload = reason_payload(reason);
                send(context, &client, target, "cancel", payload).await
            }
            Run::Preempt { target, by } => {
                let payload = by.map_or_else(|| json!({}), |by| json!({"by": by}));
                send(context, &client, target, "preempt", payload).await
            }
            Run::Retry(target) => send(context, &client, target, "retry", json!({})).await,
            Run::SetPriority { target, priority } => {
                let payload = json!({"priority": priority});
                send(context, &client, target, "set_priority", payload).await
            }
        }
    }
}

impl Start {
    async fn perform(self, context: &Context, client: &Client) -> Result<Exit, CliError> {
        let watches = self.watch;
        let key = self.idempotency_key.clone();
        let headers: Vec<(&str, &str)> = key
            .iter()
            .map(|key| ("idempotency-key", key.as_str()))
            .collect();
        let body = self.body()?;
        let path = "api/gateway/runs/start";
        let started = client
            .call_with(Method::POST, path, &[], Some(&body), &headers)
            .await?;
        let run = text(&started, "run_id");
        if run.is_empty() {
            return Err(CliError::Answer("it has no run_id".to_owned()));
        }
        if !watches {
            context.out.show(&started, |_| run.clone())?;
            return Ok(Exit::Success);
        }
        context.out.note(&format!("started {run}"));
        watch::run(context.out, client, &run, 0).await
    }

    fn body(self) -> Result<Value, CliError> {
        if self.container.image.is_none() && !self.container.args.is_empty() {
            let message = "arguments behind -- are those of a container: give --image";
            return Err(CliError::Usage(message.to_owned()));
        }
        let payload = match (&self.payload, &self.payload_file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => read_payload(path)?,
            (None, None) => "{}".to_owned(),
        };
        let payload: Value = serde_json::from_str(&payload)
            .map_err(|error| CliError::Usage(format!("the payload is no JSON: {error}")))?;
        let mut job = Map::new();
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                job.insert(name.to_owned(), value);
            }
        };
        set("service_type", self.service_type.map(Value::from));
        set("service_name", self.service.map(Value::from));
        let container = self.container.member(self.timeout_seconds);
        let is_call = container.is_none();
        set("container", container);
        set("payload", Some(payload).filter(|_| is_call));
        set("priority", self.priority.map(Value::from));
        set("ttl_seconds", self.ttl_seconds.map(Value::from));
        let of_call = self.timeout_seconds.filter(|_| is_call);
        set("timeout_seconds", of_call.map(Value::from));
        set("max_attempts", self.max_attempts.map(Value::from));
        set("callback_url", self.callback_url.map(Value::from));
        let mut body = json!({"job": job});
        if let Some(session) = self.session {
            body["session_id"] = session.into();
        }
        if !self.label.is_empty() {
            let labels = self.label.into_iter().map(|(k, v)| (k, Value::from(v)));
            body["labels"] = Value::Object(labels.collect());
        }
        Ok(body)
    }
}

/// The whole of a file, or of standard input for `-`.
fn read_payload(path: &PathBuf) -> Result<String, CliError> {
    let mut text = String::new();
    let read = match path.as_os_str() == "-" {
        true => std::io::stdin()
            .take(MAX_PAYLOAD_BYTES)
            .read_to_string(&mut text),
        false => std::fs::File::open(path)
            .and_then(|file| file.take(MAX_PAYLOAD_BYTES).read_to_string(&mut text)),
    };
    read.map_err(CliError::io(format!("read the payload {}", path.display())))?;
    Ok(text)
}

impl List {
    async fn perform(self, context: &Context, client: &Client) -> Result<Exit, CliError> {
        let mut items: Vec<Value> = Vec::new();
        let mut cursor: Option<String> = None;
        while items.len() < self.limit {
            let page = PAGE.min(self.limit - items.len());
            let mut query = vec![("limit", page.to_string())];
            query.extend(self.status.clone().map(|status| ("status", status)));
            query.extend(self.session.clone().map(|session| ("session_id", session)));
            query.extend(cursor.take().map(|cursor| ("after", cursor)));
            let mut answer = client.get("api/gateway/runs", &query).await?;
            if let Some(Value::Array(page)) = answer.get_mut("items").map(Value::take) {
                items.extend(page);
            }
            cursor = answer
                .get("next_cursor")
                .and_then(Value::as_str)
                .map(str::to_owned);
            if cursor.is_none() {
                break;
            }
        }
        let document = json!({"items": items, "next_cursor": cursor});
        context.out.show(&document, |document| {
            let rows = document["items"].as_array().into_iter().flatten();
            let rows = rows.map(row).collect::<Vec<_>>();
            table(
                &[
                    "RUN", "STATUS", "PRIORITY", "SERVICE", "ATTEMPT", "CREATED", "ERROR",
                ],
                rows,
            )
        })?;
        Ok(Exit::Success)
    }
}

fn row(run: &Value) -> Vec<String> {
    let job = run.get("job").unwrap_or(run);
    let either = |name| match text(run, name) {
        own if own.is_empty() => text(job, name),
        own => own,
    };
    let service = ["service", "service_name", "service_type"]
        .iter()
        .map(|name| either(name))
        .find(|name| !name.is_empty())
        .unwrap_or_default();
    vec![
        text(run, "run_id"),
        state(run),
        either("priority"),
        service,
        either("attempt"),
        instant(run, "created_at"),
        text(run, "error"),
    ]
}

/// The job's own state, which tells more than the contract's status.
fn state(run: &Value) -> String {
    match run.get("job").map(|job| text(job, "state")) {
        Some(state) if !state.is_empty() => state,
        _ => text(run, "status"),
    }
}

async fn show(context: &Context, client: &Client, run: &str) -> Result<Exit, CliError> {
    let path = format!("api/gateway/runs/{}", segment(run));
    let summary = client.get(&path, &[]).await?;
    context
        .out
        .show(&summary, |summary| facts(&members(summary)))?;
    Ok(Exit::Success)
}

/// What people look for first, in this order; the rest follows by name.
const FIRST: &[&str] = &[
    "run_id",
    "state",
    "service_type",
    "service_name",
    "service",
    "priority",
    "attempt",
    "error",
    "output",
];

/// A run's members and its job's, without those that say nothing; `--json` has them all.
fn members(summary: &Value) -> Vec<(&str, String)> {
    let job = summary.get("job").unwrap_or(&Value::Null);
    let own = summary.as_object().into_iter().flatten();
    let own = own.filter(|(name, _)| *name != "job");
    let inner = job.as_object().into_iter().flatten();
    let mut pairs: Vec<(&str, String)> = own
        .map(|(name, _)| (name.as_str(), text(summary, name)))
        .chain(inner.map(|(name, _)| (name.as_str(), text(job, name))))
        .filter(|(_, value)| !matches!(value.as_str(), "" | "false" | "{}"))
        .collect();
    let rank = |name: &str| FIRST.iter().position(|first| *first == name);
    pairs.sort_by_key(|(name, _)| (rank(name).unwrap_or(FIRST.len()), *name));
    pairs
}

async fn why(context: &Context, client: &Client, run: &str) -> Result<Exit, CliError> {
    let path = format!("api/gateway/runs/{}/why", segment(run));
    let why = client.get(&path, &[]).await?;
    context.out.show(&why, |why| {
        let mut lines = vec![match text(why, "position") {
            place if place.is_empty() => text(why, "state"),
            place => format!("{}, number {place} in its queue", text(why, "state")),
        }];
        let since = instant(why, "since");
        if !since.is_empty() {
            lines[0].push_str(&format!(", since {since}"));
        }
        for cause in why["blocking"].as_array().into_iter().flatten() {
            lines.push(format!(
                "  {}: {}",
                text(cause, "cause"),
                text(cause, "detail")
            ));
        }
        lines.join("\n")
    })?;
    Ok(Exit::Success)
}

fn reason_payload(reason: Option<String>) -> Value {
    reason.map_or_else(|| json!({}), |reason| json!({"reason": reason}))
}

/// Puts a command into the inbox and tells what became of it.
async fn send(
    context: &Context,
    client: &Client,
    target: Target,
    kind: &str,
    payload: Value,
) -> Result<Exit, CliError> {
    let id = target
        .command_id
        .unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
    let body = json!({
        "command_id": id,
        "run_id": target.run,
        "type": kind,
        "payload": payload,
        "client_id": "rungate-cli",
    });
    client.post("api/gateway/commands", &body).await?;
    let path = format!("api/gateway/commands/{}", segment(&id));
    for _ in 0..DECISION_POLLS {
        let entry = client.get(&path, &[]).await?;
        let state = super::command::state(&entry);
        if state != "accepted" {
            context.out.show(&entry, super::command::words)?;
            return Ok(super::command::exit(&entry));
        }
        tokio::time::sleep(DECISION_POLL).await;
    }
    let text = format!(
        "{kind} {id} is in the inbox but not decided yet; `rungate command show {id}` tells"
    );
    Err(CliError::Failed(text))
}
