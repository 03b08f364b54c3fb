//! `rungate gpu`: the GPUs, what is reserved on them and for whom.

use serde_json::Value;

use super::Context;
use super::error::{CliError, Exit};
use super::output::{table, text};

pub(super) async fn perform(context: &Context) -> Result<Exit, CliError> {
    let answer = context.client()?.get("api/gateway/gpu", &[]).await?;
    context.out.show(&answer, words)?;
    Ok(Exit::Success)
}

fn words(answer: &Value) -> String {
    let gpus: Vec<&Value> = answer["gpus"].as_array().into_iter().flatten().collect();
    if gpus.is_empty() {
        let why = text(answer, "error");
        return match why.is_empty() {
            true => "no GPU".to_owned(),
            false => format!("no GPU: {why}"),
        };
    }
    let rows = gpus.into_iter().map(row).collect();
    table(
        &[
            "GPU",
            "UUID",
            "NAME",
            "SOURCE",
            "TOTAL_MIB",
            "RESERVED_MIB",
            "USED_MIB",
            "RESERVED FOR",
        ],
        rows,
    )
}

fn row(gpu: &Value) -> Vec<String> {
    let holders = gpu["reservations"].as_array().into_iter().flatten();
    let holders: Vec<String> = holders.map(|holder| text(holder, "service")).collect();
    vec![
        text(gpu, "index"),
        text(gpu, "uuid"),
        text(gpu, "name"),
        text(gpu, "source"),
        text(gpu, "memory_total_mb"),
        text(gpu, "memory_reserved_mb"),
        text(gpu, "memory_used_mb"),
        holders.join(", "),
    ]
}
