//! `rungate queue`: how much waits and runs, by type and by priority.

use serde_json::Value;

use super::Context;
use super::error::{CliError, Exit};
use super::output::{facts, text};

pub(super) async fn perform(context: &Context) -> Result<Exit, CliError> {
    let answer = context
        .client()?
        .get("api/gateway/queue/stats", &[])
        .await?;
    context.out.show(&answer, |answer| {
        facts(&[
            ("queued", text(answer, "total_queued")),
            ("running", text(answer, "total_running")),
            ("by type", counts(&answer["by_type"])),
            ("by priority", counts(&answer["by_priority"])),
        ])
    })?;
    Ok(Exit::Success)
}

fn counts(by: &Value) -> String {
    let members = by.as_object().into_iter().flatten();
    let parts: Vec<String> = members
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    parts.join(", ")
}
