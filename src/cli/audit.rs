//! `rungate audit`: who asked for which write, for administrators.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::Context;
use super::error::{CliError, Exit};
use super::output::{instant, table, text};

const PATH: &str = "api/gateway/audit";

/// Entries of one request.
const PAGE: u64 = 500;

/// How often `--follow` asks for what is new.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  rungate audit --outcome denied --since 2026-11-21T00:00:00Z
  rungate audit --actor alice --limit 1000 --json | jq -c '.items[]'
  rungate audit --follow")]
pub struct Audit {
    /// As records name it: alice, acme/alice, nobody
    #[arg(long)]
    actor: Option<String>,
    /// Of the user who asked
    #[arg(long)]
    tenant: Option<String>,
    /// A route's pattern, e.g. /queue/{job_id}
    #[arg(long)]
    route: Option<String>,
    /// allowed, denied (401, 403, 429) or failed
    #[arg(long)]
    outcome: Option<String>,
    /// At or after, RFC 3339
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Before, RFC 3339
    #[arg(long, value_name = "TIME", conflicts_with = "follow")]
    until: Option<String>,
    /// Most entries that are shown
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    limit: u64,
    /// Print what is new, oldest first, until interrupted
    #[arg(long, short, conflicts_with = "limit")]
    follow: bool,
}

impl Audit {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        if self.follow {
            return self.follow(context).await;
        }
        let items = self.newest(context, self.limit, 0).await?;
        context
            .out
            .show(&json!({"items": items}), |_| words(&items))?;
        Ok(Exit::Success)
    }

    /// The newest entries after record `after`, newest first.
    async fn newest(
        &self,
        context: &Context,
        limit: u64,
        after: u64,
    ) -> Result<Vec<Value>, CliError> {
        let client = context.client()?;
        let mut items: Vec<Value> = Vec::new();
        let mut cursor = None;
        loop {
            let missing = limit - items.len() as u64;
            let mut query = self.filters();
            query.push(("limit", missing.min(PAGE).to_string()));
            query.extend(cursor.take().map(|cursor| ("after", cursor)));
            let mut page = client.get(PATH, &query).await?;
            if let Some(Value::Array(found)) = page.get_mut("items").map(Value::take) {
                for item in found {
                    if item["seq"].as_u64().is_some_and(|seq| seq <= after) {
                        return Ok(items);
                    }
                    items.push(item);
                }
            }
            cursor = page["next_cursor"].as_str().map(str::to_owned);
            if cursor.is_none() || items.len() as u64 >= limit {
                return Ok(items);
            }
        }
    }

    async fn follow(mut self, context: &Context) -> Result<Exit, CliError> {
        let query = [("limit", "1".to_owned())];
        let newest = context.client()?.get(PATH, &query).await?;
        let newest = &newest["items"][0];
        let (mut seen, mut at) = (seq(newest), text(newest, "at"));
        loop {
            tokio::time::sleep(FOLLOW_EVERY).await;
            // Spares the gateway a look at what was before.
            if !at.is_empty() {
                self.since = Some(std::mem::take(&mut at));
            }
            let items = self.newest(context, u64::MAX, seen).await?;
            if let Some(last) = items.first() {
                (seen, at) = (seq(last), text(last, "at"));
            }
            for item in items.iter().rev() {
                match context.out.json {
                    true => context.out.line(&item.to_string())?,
                    false => context.out.line(&row(item).join("  "))?,
                }
            }
        }
    }

    fn filters(&self) -> Vec<(&'static str, String)> {
        let filters = [
            ("actor", &self.actor),
            ("tenant", &self.tenant),
            ("route", &self.route),
            ("outcome", &self.outcome),
            ("since", &self.since),
            ("until", &self.until),
        ];
        let given = filters
            .into_iter()
            .filter_map(|(name, value)| Some((name, value.clone()?)));
        given.collect()
    }
}

fn seq(item: &Value) -> u64 {
    item["seq"].as_u64().unwrap_or_default()
}

fn row(item: &Value) -> Vec<String> {
    let what = match text(item, "event") {
        event if event.is_empty() => text(item, "code"),
        event => event,
    };
    vec![
        text(item, "seq"),
        instant(item, "at"),
        text(item, "actor_id"),
        text(item, "address"),
        text(item, "method"),
        text(item, "path"),
        text(item, "status"),
        text(item, "count"),
        what,
    ]
}

fn words(items: &[Value]) -> String {
    table(
        &[
            "SEQ", "AT", "ACTOR", "ADDRESS", "METHOD", "PATH", "STATUS", "COUNT", "WHAT",
        ],
        items.iter().map(row).collect(),
    )
}
