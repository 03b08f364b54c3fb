//! `rungate command`: what became of a command in the inbox.

use clap::Subcommand;
use serde_json::Value;

use super::Context;
use super::client::segment;
use super::error::{CliError, Exit};
use super::output::text;

/// Verbs of `rungate command`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show whether it was accepted, applied or rejected, and why
    Show {
        /// The command's id: yours, or the one that was answered
        command_id: String,
    },
}

impl Command {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let Command::Show { command_id } = self;
        let path = format!("api/gateway/commands/{}", segment(&command_id));
        let entry = context.client()?.get(&path, &[]).await?;
        context.out.show(&entry, words)?;
        Ok(Exit::Success)
    }
}

/// `accepted`, `applied` or `rejected`.
pub fn state(entry: &Value) -> String {
    text(entry, "state")
}

/// The entry in one sentence.
pub fn words(entry: &Value) -> String {
    let subject = format!("{} of run {}", text(entry, "type"), text(entry, "run_id"));
    match (state(entry).as_str(), text(entry, "reason")) {
        (state, reason) if reason.is_empty() => format!("{subject}: {state}"),
        (state, reason) => format!("{subject}: {state}: {reason}"),
    }
}

/// Applied is a success; a rejection because there is no such run is its own exit code.
pub fn exit(entry: &Value) -> Exit {
    match (state(entry).as_str(), text(entry, "code").as_str()) {
        ("applied", _) => Exit::Success,
        (_, "run_not_found") => Exit::NotFound,
        _ => Exit::Failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_rejection_is_a_failure_told_with_its_reason() {
        let entry = json!({"type": "pause", "run_id": "7", "state": "rejected",
            "code": "run_ended", "reason": "Run '7' has already ended (completed)"});
        assert_eq!(exit(&entry), Exit::Failure);
        assert_eq!(
            words(&entry),
            "pause of run 7: rejected: Run '7' has already ended (completed)"
        );
    }
}
