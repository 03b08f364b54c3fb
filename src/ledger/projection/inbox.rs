//! The inbox: each command's one place under its id, and what became of it.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use crate::domain::event::{CommandKind, Event};
use crate::domain::ids::{CommandId, RunId, Seq};
use crate::domain::time::Timestamp;

use crate::ledger::record_codec::Hash;

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InboxState {
    Accepted,
    Applied,
    /// `code` and `reason` as the client sees them.
    Rejected {
        code: SmolStr,
        reason: String,
    },
}

/// A command as the inbox keeps it. The body's identity is `kind`, `run_text` and `payload_hash`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InboxEntry {
    /// Where its `CommandAccepted` stands in the ledger.
    pub seq: Seq,
    pub kind: CommandKind,
    /// `None` when what the client wrote is no run id.
    pub run: Option<RunId>,
    pub run_text: SmolStr,
    /// blake3 of the command's payload.
    pub payload_hash: Hash,
    pub state: InboxState,
    pub accepted_at: Timestamp,
    /// When it was applied or rejected.
    pub decided_at: Option<Timestamp>,
}

/// The command that an event is about.
pub fn command_of(event: &Event) -> Option<&CommandId> {
    match event {
        Event::CommandAccepted { command, .. }
        | Event::CommandApplied { command, .. }
        | Event::CommandRejected { command, .. } => Some(command),
        _ => None,
    }
}

/// Folds one event into its command's entry. A decision about a command that was never accepted is
/// nothing to the inbox.
pub fn apply(
    entry: Option<InboxEntry>,
    event: &Event,
    seq: Seq,
    at: Timestamp,
    payload_hash: Hash,
) -> Option<InboxEntry> {
    match event {
        Event::CommandAccepted {
            run,
            run_text,
            kind,
            ..
        } => Some(InboxEntry {
            seq,
            kind: *kind,
            run: *run,
            run_text: run_text.clone(),
            payload_hash,
            state: InboxState::Accepted,
            accepted_at: at,
            decided_at: None,
        }),
        Event::CommandApplied { .. } => entry.map(|entry| InboxEntry {
            state: InboxState::Applied,
            decided_at: Some(at),
            ..entry
        }),
        Event::CommandRejected { code, reason, .. } => entry.map(|entry| InboxEntry {
            state: InboxState::Rejected {
                code: code.clone(),
                reason: reason.clone(),
            },
            decided_at: Some(at),
            ..entry
        }),
        _ => entry,
    }
}
