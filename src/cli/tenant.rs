//! `rungate tenant`: the weights and quotas of tenants, for administrators.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::Context;
use super::client::{Client, segment};
use super::error::{CliError, Exit};
use super::notify::Notify;
use super::output::{facts, instant, table, text};

const PATH: &str = "api/gateway/admin/tenants";

/// The quotas, as the gateway names them.
const QUOTAS: [&str; 7] = [
    "queued_runs",
    "running_runs",
    "gpus",
    "vram_mib",
    "ledger_bytes",
    "requests_per_minute",
    "users",
];

/// Verbs of `rungate tenant`.
#[derive(Debug, Subcommand)]
pub enum Tenant {
    /// List tenants
    List,
    /// Show one tenant
    Show { tenant_id: String },
    /// Change a tenant's weight, quotas and state; create it where it is not there
    #[command(
        after_help = "Example:\n  rungate tenant set acme --weight 200 --running-runs 8 --vram-mib none"
    )]
    Set(Box<Set>),
    /// Where a tenant is told of its runs: ntfy and a webhook
    #[command(subcommand)]
    Notify(Notify),
}

#[derive(Args, Debug)]
pub struct Set {
    tenant_id: String,
    /// For people
    #[arg(long)]
    name: Option<String>,
    /// 1 to 10000; one of 200 gets twice as much as one of 100
    #[arg(long)]
    weight: Option<u32>,
    /// Runs that may wait; `none` for no limit
    #[arg(long, value_name = "N")]
    queued_runs: Option<String>,
    /// Runs that may run at once
    #[arg(long, value_name = "N")]
    running_runs: Option<String>,
    /// Whole GPUs at once
    #[arg(long, value_name = "N")]
    gpus: Option<String>,
    /// MiB of GPU memory at once
    #[arg(long, value_name = "N")]
    vram_mib: Option<String>,
    /// Bytes of payloads, results, progress and checkpoints that are kept
    #[arg(long, value_name = "N")]
    ledger_bytes: Option<String>,
    /// Requests a minute of all its users together
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<String>,
    /// Users
    #[arg(long, value_name = "N")]
    users: Option<String>,
    /// Whether its users are let in
    #[arg(long, value_name = "BOOL")]
    enabled: Option<bool>,
}

impl Tenant {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let client = context.client()?;
        match self {
            Tenant::List => {
                let answer = client.get(PATH, &[]).await?;
                context.out.show(&answer, words)?;
            }
            Tenant::Show { tenant_id } => {
                let path = format!("{PATH}/{}", segment(&tenant_id));
                let answer = client.get(&path, &[]).await?;
                context.out.show(&answer, described)?;
            }
            Tenant::Set(set) => {
                let answer = set.perform(&client).await?;
                context.out.show(&answer, described)?;
            }
            Tenant::Notify(notify) => return notify.perform(context).await,
        }
        Ok(Exit::Success)
    }
}

impl Set {
    async fn perform(self: Box<Self>, client: &Client) -> Result<Value, CliError> {
        let path = format!("{PATH}/{}", segment(&self.tenant_id));
        let tenant_id = self.tenant_id.clone();
        let mut body = self.body()?;
        match client.call(Method::PATCH, &path, &[], Some(&body)).await {
            Err(CliError::Problem(problem)) if problem.status == 404 => {
                body["tenant_id"] = tenant_id.into();
                client.post(PATH, &body).await
            }
            answer => answer,
        }
    }

    fn body(self) -> Result<Value, CliError> {
        let mut body = Map::new();
        body.extend(self.name.map(|name| ("name".to_owned(), name.into())));
        body.extend(
            self.weight
                .map(|weight| ("weight".to_owned(), weight.into())),
        );
        body.extend(self.enabled.map(|on| ("enabled".to_owned(), on.into())));
        let given = [
            self.queued_runs,
            self.running_runs,
            self.gpus,
            self.vram_mib,
            self.ledger_bytes,
            self.requests_per_minute,
            self.users,
        ];
        let mut quotas = Map::new();
        for (name, given) in QUOTAS.into_iter().zip(given) {
            let Some(given) = given else { continue };
            let value = match given.as_str() {
                "none" => Value::Null,
                number => match number.parse::<u64>() {
                    Ok(number) => json!(number),
                    Err(_) => {
                        let flag = name.replace('_', "-");
                        return Err(CliError::Usage(format!(
                            "--{flag} takes a whole number or 'none'"
                        )));
                    }
                },
            };
            quotas.insert(name.to_owned(), value);
        }
        if !quotas.is_empty() {
            body.insert("quotas".to_owned(), quotas.into());
        }
        Ok(Value::Object(body))
    }
}

/// A quota in words.
fn quota(tenant: &Value, name: &str) -> String {
    match &tenant["quotas"][name] {
        Value::Null => "-".to_owned(),
        limit => limit.to_string(),
    }
}

fn words(answer: &Value) -> String {
    let tenants = answer["tenants"].as_array().into_iter().flatten();
    let row = |tenant: &Value| {
        let mut row = vec![
            text(tenant, "tenant_id"),
            text(tenant, "name"),
            text(tenant, "weight"),
            text(tenant, "enabled"),
            text(tenant, "users"),
        ];
        row.extend(QUOTAS.iter().take(4).map(|name| quota(tenant, name)));
        row
    };
    let head = [
        "TENANT", "NAME", "WEIGHT", "ENABLED", "USERS", "QUEUED", "RUNNING", "GPUS", "VRAM_MIB",
    ];
    table(&head, tenants.map(row).collect())
}

fn described(answer: &Value) -> String {
    let tenant = &answer["tenant"];
    facts(&[
        ("tenant", text(tenant, "tenant_id")),
        ("name", text(tenant, "name")),
        ("weight", text(tenant, "weight")),
        ("enabled", text(tenant, "enabled")),
        ("users", text(tenant, "users")),
        ("queued runs", quota(tenant, "queued_runs")),
        ("running runs", quota(tenant, "running_runs")),
        ("GPUs", quota(tenant, "gpus")),
        ("VRAM MiB", quota(tenant, "vram_mib")),
        ("ledger bytes", quota(tenant, "ledger_bytes")),
        ("requests a minute", quota(tenant, "requests_per_minute")),
        ("users at most", quota(tenant, "users")),
        ("created", instant(tenant, "created_at")),
        ("updated", instant(tenant, "updated_at")),
    ])
}
