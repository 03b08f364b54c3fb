//! `rungate health`: whether a gateway answers; for containers without a shell.

use super::Context;
use super::error::{CliError, Exit};
use super::output::text;

pub(super) async fn perform(context: &Context) -> Result<Exit, CliError> {
    let answer = context.client()?.get("health", &[]).await?;
    context.out.show(&answer, |answer| text(answer, "status"))?;
    match text(&answer, "status").as_str() {
        "ok" => Ok(Exit::Success),
        other => Err(CliError::Failed(format!("the gateway says '{other}'"))),
    }
}
