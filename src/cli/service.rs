//! `rungate service`: register services, look at them, operate them.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::client::{Client, segment};
use super::error::{CliError, Exit};
use super::output::{facts, table, text};
use super::{Context, log_lines};

/// Verbs of `rungate service`.
#[derive(Debug, Subcommand)]
pub enum Service {
    /// Register a service
    #[command(after_help = "\
Examples:
  rungate service register text-stats --type text-stats --vram-gb 16 -- /usr/bin/my-service --flag
  rungate service register remote --type llm --external http://10.0.0.7:8000
  rungate service register text-stats --type text-stats --concurrency 4 --replace")]
    Register(Box<Register>),
    /// List services
    List {
        /// Only services of this type
        #[arg(long = "type", value_name = "TYPE")]
        service_type: Option<String>,
    },
    /// Show one service
    Show {
        /// The service's name
        name: String,
    },
    /// Start it and wait until it is healthy
    Start {
        /// The service's name
        name: String,
    },
    /// Stop it, after its running jobs
    Stop(Stop),
    /// Stop and start it
    Restart(Stop),
    /// Let jobs be placed on it
    Enable {
        /// The service's name
        name: String,
    },
    /// Place no jobs on it
    Disable {
        /// The service's name
        name: String,
    },
    /// Forget it
    Remove {
        /// The service's name
        name: String,
    },
    /// Show what it printed
    Logs {
        /// The service's name
        name: String,
        /// At most this many lines
        #[arg(long, short = 'n', default_value_t = 100, value_name = "N")]
        tail: u32,
        /// Go on as it prints more
        #[arg(long, short)]
        follow: bool,
    },
}

#[derive(Args, Debug)]
pub struct Stop {
    /// The service's name
    name: String,
    /// Do not wait for running jobs: they go back to the queue
    #[arg(long)]
    no_drain: bool,
}

#[derive(Args, Debug)]
pub struct Register {
    /// The service's name: letters, digits, `_`, `.` and `-`
    name: String,
    /// Type that jobs ask for
    #[arg(long = "type", value_name = "TYPE")]
    service_type: String,
    /// Tenant whose jobs alone it takes, for administrators; by default it is shared
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    /// GiB of GPU memory that it needs
    #[arg(long, value_name = "GIB")]
    vram_gb: Option<f64>,
    /// Whole GPUs that it needs for itself
    #[arg(long, value_name = "N")]
    gpus: Option<u32>,
    /// Jobs that it takes at once
    #[arg(long, value_name = "N")]
    concurrency: Option<u32>,
    /// Port on 127.0.0.1; 0 lets the gateway choose and pass it as PORT
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Container name; the service's own name by default
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// Address of a service that runs elsewhere
    #[arg(long, value_name = "URL", conflicts_with = "command")]
    external: Option<String>,
    /// Path that tells health
    #[arg(long, value_name = "PATH")]
    health: Option<String>,
    /// Path that jobs are posted to
    #[arg(long, value_name = "PATH")]
    dispatch_path: Option<String>,
    /// Path that asks for a job's stop
    #[arg(long, value_name = "PATH")]
    cancel_path: Option<String>,
    /// stateless, queue (it pushes progress) or poll
    #[arg(long, value_name = "MODE")]
    progress_mode: Option<String>,
    /// Path that is asked for progress in mode poll
    #[arg(long, value_name = "PATH")]
    progress_endpoint: Option<String>,
    /// Variable of its environment, as often as wanted; the ledger keeps it, so name files of secrets
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Its working directory
    #[arg(long, value_name = "DIR")]
    working_dir: Option<String>,
    /// What it is, for people
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Seconds without work after which it is stopped
    #[arg(long, value_name = "SECONDS")]
    idle_timeout_seconds: Option<f64>,
    /// Seconds between asking it to end and killing it
    #[arg(long, value_name = "SECONDS")]
    grace_seconds: Option<f64>,
    /// Seconds until it must be healthy
    #[arg(long, value_name = "SECONDS")]
    startup_timeout_seconds: Option<f64>,
    /// Seconds that a job runs before it may be preempted
    #[arg(long, value_name = "SECONDS")]
    min_runtime_seconds: Option<f64>,
    /// How its memory is got back, as JSON: [{"step": "sleep"}, {"step": "stop"}]
    #[arg(long, value_name = "JSON", value_parser = json_value)]
    ladder: Option<Value>,
    /// Percent of a GPU's threads that it may use under MPS
    #[arg(long, value_name = "PERCENT")]
    mps_percent: Option<u8>,
    /// Change the service of this name
    #[arg(long)]
    replace: bool,
    /// Program and arguments, after `--`
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Service {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let client = context.client()?;
        match self {
            Service::Register(register) => register.perform(context, &client).await,
            Service::List { service_type } => list(context, &client, service_type).await,
            Service::Show { name } => show(context, &client, &name).await,
            Service::Start { name } => act(context, &client, &name, "start", true).await,
            Service::Stop(stop) => act(context, &client, &stop.name, "stop", !stop.no_drain).await,
            Service::Restart(stop) => {
                act(context, &client, &stop.name, "restart", !stop.no_drain).await
            }
            Service::Enable { name } => act(context, &client, &name, "enable", true).await,
            Service::Disable { name } => act(context, &client, &name, "disable", true).await,
            Service::Remove { name } => {
                let path = path(&name, "");
                let answer = client.call(Method::DELETE, &path, &[], None).await?;
                context.out.show(&answer, |_| format!("{name} removed"))?;
                Ok(Exit::Success)
            }
            Service::Logs { name, tail, follow } => {
                log_lines::show(context, &client, path(&name, "logs"), tail, follow).await
            }
        }
    }
}

fn path(name: &str, verb: &str) -> String {
    match verb {
        "" => format!("api/gateway/services/{}", segment(name)),
        verb => format!("api/gateway/services/{}/{verb}", segment(name)),
    }
}

impl Register {
    async fn perform(self, context: &Context, client: &Client) -> Result<Exit, CliError> {
        let replace = self.replace;
        let name = self.name.clone();
        let body = self.body();
        let answer = match replace {
            true => {
                let path = path(&name, "");
                client.call(Method::PUT, &path, &[], Some(&body)).await?
            }
            false => client.post(&path("register", ""), &body).await?,
        };
        let done = if replace { "changed" } else { "registered" };
        context.out.show(&answer, |_| format!("{name} {done}"))?;
        Ok(Exit::Success)
    }

    fn body(self) -> Value {
        let mut body = Map::new();
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                body.insert(name.to_owned(), value);
            }
        };
        let container = self.container.unwrap_or_else(|| self.name.clone());
        if !self.replace {
            set("name", Some(self.name.into()));
        }
        set("container", Some(container.into()));
        set("type", Some(self.service_type.into()));
        set("port", Some(self.port.into()));
        set("tenant", self.tenant.map(Value::from));
        set("vram_gb", self.vram_gb.map(Value::from));
        set("gpus", self.gpus.map(Value::from));
        set("concurrency", self.concurrency.map(Value::from));
        set("url", self.external.map(Value::from));
        set("health_endpoint", self.health.map(Value::from));
        set("dispatch_path", self.dispatch_path.map(Value::from));
        set("cancel_path", self.cancel_path.map(Value::from));
        set("progress_mode", self.progress_mode.map(Value::from));
        set("progress_endpoint", self.progress_endpoint.map(Value::from));
        set("working_dir", self.working_dir.map(Value::from));
        set("description", self.description.map(Value::from));
        set(
            "idle_timeout_seconds",
            self.idle_timeout_seconds.map(number),
        );
        set("grace_seconds", self.grace_seconds.map(number));
        set(
            "startup_timeout_seconds",
            self.startup_timeout_seconds.map(number),
        );
        set("min_runtime_seconds", self.min_runtime_seconds.map(number));
        set("ladder", self.ladder);
        set("mps_percent", self.mps_percent.map(Value::from));
        set(
            "command",
            (!self.command.is_empty()).then(|| json!(self.command)),
        );
        let env = self.env.into_iter().map(|(k, v)| (k, Value::from(v)));
        let env: Map<String, Value> = env.collect();
        set("env", (!env.is_empty()).then_some(Value::Object(env)));
        Value::Object(body)
    }
}

/// Whole seconds as an integer.
fn number(seconds: f64) -> Value {
    match seconds.fract() == 0.0 && (0.0..1e15).contains(&seconds) {
        // Checked: it has no fraction and is far below 2^63.
        true => Value::from(seconds as u64),
        false => Value::from(seconds),
    }
}

fn json_value(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// `NAME=VALUE`.
///
/// # Errors
/// There is no `=`, or nothing before it.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it like NAME=VALUE".to_owned()),
    }
}

async fn list(
    context: &Context,
    client: &Client,
    service_type: Option<String>,
) -> Result<Exit, CliError> {
    let query: Vec<(&str, String)> = service_type.into_iter().map(|t| ("type", t)).collect();
    let answer = client.get("api/gateway/services", &query).await?;
    context.out.show(&answer, |answer| {
        let services = answer["services"].as_object().into_iter().flatten();
        let rows = services.map(|(name, service)| row(name, service)).collect();
        table(
            &[
                "NAME", "TYPE", "VRAM_GB", "STATUS", "HEALTHY", "ENABLED", "PORT", "JOB",
            ],
            rows,
        )
    })?;
    Ok(Exit::Success)
}

fn row(name: &str, service: &Value) -> Vec<String> {
    let mut row = vec![name.to_owned()];
    const COLUMNS: &[&str] = &[
        "type",
        "vram_gb",
        "scheduler_status",
        "healthy",
        "enabled",
        "port",
        "active_job_id",
    ];
    row.extend(COLUMNS.iter().map(|column| text(service, column)));
    if text(service, "container_running") == "false" {
        row[3] = "stopped".to_owned();
    }
    if service["instance"]["phase"] == "sleeping" {
        row[3] = "sleeping".to_owned();
    }
    row
}

async fn show(context: &Context, client: &Client, name: &str) -> Result<Exit, CliError> {
    let answer = client.get(&path(name, ""), &[]).await?;
    context.out.show(&answer, |answer| {
        let members = answer.as_object().into_iter().flatten();
        let pairs: Vec<(&str, String)> = members
            .map(|(key, _)| (key.as_str(), text(answer, key)))
            .collect();
        facts(&pairs)
    })?;
    Ok(Exit::Success)
}

async fn act(
    context: &Context,
    client: &Client,
    name: &str,
    verb: &str,
    drain: bool,
) -> Result<Exit, CliError> {
    let query = match verb {
        "stop" | "restart" => vec![("drain", drain.to_string())],
        _ => Vec::new(),
    };
    let path = path(name, verb);
    let answer = client.call(Method::POST, &path, &query, None).await?;
    context.out.show(&answer, |answer| {
        let status = match text(answer, "status") {
            status if status.is_empty() => format!("{verb}d"),
            status => status.replace('_', " "),
        };
        match (text(answer, "startup_time_s"), text(answer, "warning")) {
            (_, warning) if !warning.is_empty() => format!("{name} {status}: {warning}"),
            (seconds, _) if !seconds.is_empty() => format!("{name} {status} in {seconds} s"),
            _ => format!("{name} {status}"),
        }
    })?;
    let unhealthy = answer.get("healthy") == Some(&Value::Bool(false));
    Ok(if unhealthy {
        Exit::Failure
    } else {
        Exit::Success
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_has_a_name() {
        assert_eq!(pair("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert!(pair("=x").is_err() && pair("x").is_err());
    }
}
