//! `rungate tenant notify`: where tenants are told of their runs, for administrators.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::Context;
use super::client::{Client, segment};
use super::error::{CliError, Exit};
use super::output::{facts, instant, text};
use super::password;

/// How long a test is waited for: a try takes 10 s at most.
const TEST_WAIT: Duration = Duration::from_secs(15);
const TEST_PAUSE: Duration = Duration::from_millis(100);

/// Verbs of `rungate tenant notify`.
#[derive(Debug, Subcommand)]
pub enum Notify {
    /// Show where a tenant is told of its runs, and how that goes
    Show { tenant_id: String },
    /// Say where; what is not named stays as it is
    #[command(after_help = "Examples:\n  \
        rungate tenant notify set acme --ntfy-topic acme-gpu-7Qm2x9Lb4T --ntfy-events failed\n  \
        rungate tenant notify set acme --webhook-url https://example.org/runs --no-ntfy")]
    Set(Box<Set>),
    /// Send a test to each of its channels, and wait for what comes of it
    Test { tenant_id: String },
}

#[derive(Args, Debug)]
pub struct Set {
    tenant_id: String,
    /// Topic of an ntfy server; whoever knows it reads what it is told, unless the server protects it
    #[arg(long, value_name = "TOPIC")]
    ntfy_topic: Option<String>,
    /// The server
    #[arg(long, value_name = "URL", requires = "ntfy_topic")]
    ntfy_url: Option<String>,
    /// File with the access token for that server, `-` for standard input; without one an earlier token is kept as
    /// long as the server is the same
    #[arg(long, value_name = "FILE", requires = "ntfy_topic")]
    ntfy_token_file: Option<PathBuf>,
    /// Show the server no access token any more
    #[arg(long, requires = "ntfy_topic", conflicts_with = "ntfy_token_file")]
    ntfy_no_token: bool,
    /// What it is told: completed, failed, cancelled, preempted, resumed
    #[arg(
        long,
        value_name = "EVENTS",
        value_delimiter = ',',
        requires = "ntfy_topic"
    )]
    ntfy_events: Option<Vec<String>>,
    /// Turn ntfy off
    #[arg(long, conflicts_with = "ntfy_topic")]
    no_ntfy: bool,
    /// URL that gets signed JSON
    #[arg(long, value_name = "URL")]
    webhook_url: Option<String>,
    /// What it is told, as with --ntfy-events
    #[arg(
        long,
        value_name = "EVENTS",
        value_delimiter = ',',
        requires = "webhook_url"
    )]
    webhook_events: Option<Vec<String>>,
    /// Turn the webhook off
    #[arg(long, conflicts_with = "webhook_url")]
    no_webhook: bool,
}

fn path(tenant_id: &str) -> String {
    format!("api/gateway/admin/tenants/{}/notify", segment(tenant_id))
}

impl Notify {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let client = context.client()?;
        match self {
            Notify::Show { tenant_id } => {
                let answer = client.get(&path(&tenant_id), &[]).await?;
                context.out.show(&answer, words)?;
                Ok(Exit::Success)
            }
            Notify::Set(set) => {
                let (path, body) = (path(&set.tenant_id), set.body()?);
                let answer = client.call(Method::PUT, &path, &[], Some(&body)).await?;
                context.out.show(&answer, words)?;
                Ok(Exit::Success)
            }
            Notify::Test { tenant_id } => {
                let answer = test(&client, &path(&tenant_id)).await?;
                context.out.show(&answer, words)?;
                match CHANNELS.iter().all(|name| is_well(&answer[*name])) {
                    true => Ok(Exit::Success),
                    false => Ok(Exit::Failure),
                }
            }
        }
    }
}

const CHANNELS: [&str; 2] = ["ntfy", "webhook"];

fn is_well(channel: &Value) -> bool {
    channel.is_null() || channel["delivery"]["last"]["delivered"] == true
}

/// Asks for a test and waits until each channel has tried something since.
async fn test(client: &Client, path: &str) -> Result<Value, CliError> {
    let before = client.get(path, &[]).await?;
    client.post(&format!("{path}/test"), &json!({})).await?;
    let deadline = Instant::now() + TEST_WAIT;
    loop {
        let now = client.get(path, &[]).await?;
        let last = |answer: &Value, name: &str| answer[name]["delivery"]["last"]["at"].clone();
        let is_told = |name: &str| now[name].is_null() || last(&now, name) != last(&before, name);
        if CHANNELS.iter().all(|name| is_told(name)) || Instant::now() > deadline {
            return Ok(now);
        }
        tokio::time::sleep(TEST_PAUSE).await;
    }
}

impl Set {
    fn body(self) -> Result<Value, CliError> {
        let mut body = Map::new();
        if let Some(topic) = self.ntfy_topic {
            let mut ntfy = Map::new();
            ntfy.insert("topic".to_owned(), topic.into());
            ntfy.extend(self.ntfy_url.map(|url| ("url".to_owned(), url.into())));
            ntfy.extend(
                self.ntfy_events
                    .map(|events| ("events".to_owned(), events.into())),
            );
            if let Some(file) = self.ntfy_token_file {
                ntfy.insert("token".to_owned(), password::from_file(&file)?.into());
            }
            if self.ntfy_no_token {
                ntfy.insert("token".to_owned(), Value::Null);
            }
            body.insert("ntfy".to_owned(), ntfy.into());
        }
        if let Some(url) = self.webhook_url {
            let mut webhook = Map::new();
            webhook.insert("url".to_owned(), url.into());
            webhook.extend(
                self.webhook_events
                    .map(|events| ("events".to_owned(), events.into())),
            );
            body.insert("webhook".to_owned(), webhook.into());
        }
        let off = [("ntfy", self.no_ntfy), ("webhook", self.no_webhook)];
        for (name, _) in off.iter().filter(|(_, off)| *off) {
            body.insert((*name).to_owned(), Value::Null);
        }
        match body.is_empty() {
            true => Err(CliError::Usage(
                "name a channel: --ntfy-topic, --webhook-url, --no-ntfy or --no-webhook".to_owned(),
            )),
            false => Ok(Value::Object(body)),
        }
    }
}

fn words(answer: &Value) -> String {
    let mut rows = vec![("tenant", text(answer, "tenant_id"))];
    let (ntfy, webhook) = (&answer["ntfy"], &answer["webhook"]);
    match ntfy {
        Value::Null => rows.push(("ntfy", "off".to_owned())),
        ntfy => {
            rows.push(("ntfy", text(ntfy, "url")));
            rows.push(("topic", text(ntfy, "topic")));
            rows.push(("access token", text(ntfy, "has_token")));
            rows.extend(channel(ntfy));
        }
    }
    match webhook {
        Value::Null => rows.push(("webhook", "off".to_owned())),
        webhook => {
            rows.push(("webhook", text(webhook, "url")));
            rows.extend(channel(webhook));
        }
    }
    facts(&rows)
}

/// What a channel is told, and how it is doing.
fn channel(channel: &Value) -> Vec<(&'static str, String)> {
    let events = channel["events"].as_array().into_iter().flatten();
    let events: Vec<&str> = events.filter_map(Value::as_str).collect();
    let delivery = &channel["delivery"];
    let last = &delivery["last"];
    let outcome = match last {
        Value::Null => "-".to_owned(),
        last if last["delivered"] == true => format!("delivered {}", instant(last, "at")),
        last => format!("{} ({})", text(last, "error"), instant(last, "at")),
    };
    let mut rows = vec![
        ("events", events.join(", ")),
        ("waiting", text(delivery, "waiting")),
        ("last try", outcome),
    ];
    if delivery["skipped"] != 0 {
        rows.push(("skipped", text(delivery, "skipped")));
    }
    if !delivery["next_try_at"].is_null() {
        rows.push(("next try", instant(delivery, "next_try_at")));
    }
    rows
}
