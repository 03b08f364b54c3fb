//! The durable inbox over HTTP (`contracts/run-gateway.md` section 5.1): accepted once under its id, and what
//! became of it.

use axum::Json;
use axum::extract::State;
use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;
use smol_str::SmolStr;
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::body::{JsonBody, PathOf};
use super::error::{ApiError, ErrorCode};
use super::examples;
use super::fields::{Fields, TextRule};
use super::guard::Caller;
use super::job::MAX_ID_CHARS;
use super::routes::Routes;
use super::runs::unexpected;
use super::state::App;
use crate::domain::command::{Command, InboxAction, InboxCommand, Reply};
use crate::domain::event::CommandKind;
use crate::domain::ids::RunId;
use crate::domain::spec::Priority;
use crate::domain::time::Timestamp;
use crate::ledger::{InboxEntry, InboxState};

/// Longest reason: it is shown in lists.
const MAX_REASON_CHARS: usize = 2_000;

/// The routes of this file, under `/api/gateway`.
pub fn router() -> Routes {
    Routes::default()
        .routes(routes!(submit))
        .routes(routes!(read))
}

/// A command.
#[derive(Serialize, ToSchema)]
pub struct CommandRequest {
    /// The caller's id, up to 200 characters: the command is done once under it. Empty gets a new one.
    pub command_id: String,
    pub run_id: String,
    /// `pause`, `resume`, `cancel`, `preempt`, `set_priority` or `retry`.
    #[serde(rename = "type")]
    #[schema(rename = "type")]
    pub kind: String,
    /// pause and cancel: `{reason?}`; preempt: `{by?: run id}`; set_priority: `{priority: 1..5}`.
    #[schema(value_type = Option<Object>)]
    pub payload: Option<Value>,
    pub ts: Option<String>,
    pub client_id: Option<String>,
}

/// The command's place in the inbox.
#[derive(Serialize, ToSchema)]
pub struct CommandAnswer {
    /// It was accepted now, not before.
    pub accepted: bool,
    pub duplicate: bool,
    /// Where it stands in the ledger.
    pub seq: u64,
    /// The id it goes by: the caller's, or the new one.
    pub command_id: String,
}

/// Submit a command.
///
/// Accepted means durably in the inbox; `GET /commands/{id}` tells whether it was applied or why not.
#[utoipa::path(
    post, path = "/commands", tag = "commands",
    request_body(content = CommandRequest, example = json!({
        "command_id": "d3e05ae3-f3c3-4600-93a5-8905f6ca3a03", "run_id": "0199f3a2-7c1e-7d0a-9c55-6f0f0d1f2a3b",
        "type": "pause", "payload": {"reason": "maintenance"}, "client_id": "console"
    })),
    responses(
        (status = 200, body = CommandAnswer, example = json!({"accepted": true, "duplicate": false, "seq": 42, "command_id": "d3e05ae3-f3c3-4600-93a5-8905f6ca3a03"})),
        (status = 400, description = "type must be one of …"),
        (status = 409, description = "The command id was used with another body"),
    )
)]
async fn submit(
    State(app): State<App>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<CommandAnswer>, ApiError> {
    let command = read_command(&body.fields()?)?;
    let command_id = command.command.to_string();
    let found = match command.run {
        // Whoever sees only its own plane is told by the inbox what is not there.
        Some(run) if caller.principal.sees_tenant() => app.find_run(&caller, run).await?,
        _ => None,
    };
    let plane = found.map_or(caller.plane(), |run| run.plane);
    let command = Command::Inbox(command);
    match app.submit_in(plane, &caller, command).await? {
        Reply::Inbox { seq, duplicate } => Ok(Json(CommandAnswer {
            accepted: !duplicate,
            duplicate,
            seq,
            command_id,
        })),
        reply => Err(unexpected(&reply)),
    }
}

pub(super) fn read_command(fields: &Fields) -> Result<InboxCommand, ApiError> {
    let any_id = TextRule {
        min: 0,
        max: MAX_ID_CHARS,
        plain: true,
    };
    let command = fields.required_text("command_id", any_id);
    let run_text = fields.required_text("run_id", TextRule::name(MAX_ID_CHARS));
    let kind = fields.required_text("type", any_id);
    fields.text("ts", any_id);
    let client_id = fields.text("client_id", any_id).map(SmolStr::from);
    let payload = fields.object("payload");
    fields.finish()?;
    let action = read_action(&kind, payload.as_ref())?;
    fields.finish()?;
    let command = match command.as_str() {
        "" => SmolStr::new(Uuid::new_v4().to_string()),
        id => SmolStr::new(id),
    };
    let payload = fields.raw("payload").map_or("{}", |raw| raw.get());
    Ok(InboxCommand {
        command,
        run: run_text.parse().ok(),
        run_text: run_text.into(),
        action,
        client_id,
        payload: Bytes::copy_from_slice(payload.as_bytes()),
        ended: None,
    })
}

fn read_action(kind: &str, payload: Option<&Fields>) -> Result<InboxAction, ApiError> {
    let reason = || payload.and_then(|p| p.text("reason", TextRule::prose(MAX_REASON_CHARS)));
    Ok(match kind {
        "pause" => InboxAction::Pause { reason: reason() },
        "resume" => InboxAction::Resume,
        "cancel" => InboxAction::Cancel { reason: reason() },
        "preempt" => InboxAction::Preempt {
            by: payload.and_then(read_preemptor),
        },
        "set_priority" => InboxAction::SetPriority {
            priority: read_priority(payload)?,
        },
        "retry" => InboxAction::Retry,
        _ => {
            return Err(ApiError::new(
                ErrorCode::CommandTypeUnknown,
                "type must be one of pause|resume|cancel|preempt|set_priority|retry",
            ));
        }
    })
}

fn read_preemptor(payload: &Fields) -> Option<RunId> {
    let text = payload.text("by", TextRule::name(MAX_ID_CHARS))?;
    let run = text.parse().ok();
    if run.is_none() {
        payload.fault(
            "by",
            "uuid_parsing",
            "Input should be a valid UUID, a run's id",
        );
    }
    run
}

fn read_priority(payload: Option<&Fields>) -> Result<Priority, ApiError> {
    if let Some(payload) = payload {
        if !payload.has("priority") {
            payload.missing("priority");
        }
        let priority = payload.int("priority", 1..=5);
        payload.finish()?;
        if let Some(priority) = priority.and_then(|value| Priority::new(value as u8)) {
            return Ok(priority);
        }
    }
    let loc = ["body", "payload", "priority"].map(str::to_owned).into();
    let missing = super::error::FieldError::new(loc, "missing", "Field required");
    Err(ApiError::validation(vec![missing]))
}

/// What became of a command.
#[derive(Serialize, ToSchema)]
pub struct CommandView {
    pub command_id: String,
    pub run_id: String,
    #[serde(rename = "type")]
    #[schema(rename = "type", value_type = String)]
    pub kind: CommandKind,
    /// `accepted`, `applied` or `rejected`.
    pub state: &'static str,
    pub seq: u64,
    #[schema(value_type = String)]
    pub accepted_at: Timestamp,
    #[schema(value_type = Option<String>)]
    pub decided_at: Option<Timestamp>,
    /// Of a rejection.
    pub code: Option<String>,
    pub reason: Option<String>,
}

impl CommandView {
    fn of(id: String, entry: InboxEntry) -> CommandView {
        let (state, code, reason) = match entry.state {
            InboxState::Accepted => ("accepted", None, None),
            InboxState::Applied => ("applied", None, None),
            InboxState::Rejected { code, reason } => {
                ("rejected", Some(code.to_string()), Some(reason))
            }
        };
        CommandView {
            command_id: id,
            run_id: entry.run_text.to_string(),
            kind: entry.kind,
            state,
            seq: entry.seq,
            accepted_at: entry.accepted_at,
            decided_at: entry.decided_at,
            code,
            reason,
        }
    }
}

/// Read what became of a command.
#[utoipa::path(
    get, path = "/commands/{command_id}", tag = "commands",
    responses((status = 200, body = CommandView, example = json!(examples::command())), (status = 404, description = "Command 'x' not found"))
)]
async fn read(
    State(app): State<App>,
    caller: Caller,
    PathOf(id): PathOf<String>,
) -> Result<Json<CommandView>, ApiError> {
    let mut entry = app.ledger.command(caller.plane(), &id)?;
    if entry.is_none() && caller.principal.sees_tenant() {
        let (tenant, id) = (caller.principal.user.tenant.clone(), id.clone());
        let read = app.scan(move |ledger| ledger.command_of_tenant(&tenant, &id));
        entry = read.await?;
    }
    match entry {
        Some(entry) => Ok(Json(CommandView::of(id, entry))),
        None => Err(ApiError::new(
            ErrorCode::CommandNotFound,
            format!("Command '{id}' not found"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<InboxCommand, ApiError> {
        read_command(&Fields::of_body(body).unwrap())
    }

    #[test]
    fn a_command_is_read_with_its_payload_as_it_came() {
        let command = read(
            r#"{"command_id":"c","run_id":"nope","type":"set_priority","payload":{"priority": 1}}"#,
        )
        .unwrap();
        assert_eq!(command.payload, r#"{"priority": 1}"#);
        assert_eq!(command.run, None);
        assert!(matches!(command.action, InboxAction::SetPriority { .. }));
        let command = read(r#"{"command_id":"","run_id":"r","type":"retry"}"#).unwrap();
        assert_eq!(
            (command.command.len(), &command.payload[..]),
            (36, &b"{}"[..])
        );
    }

    #[test]
    fn each_fault_has_its_code() {
        let cases = [
            (
                r#"{"command_id":"c","run_id":"r","type":"zap"}"#,
                "command_type_unknown",
            ),
            (
                r#"{"command_id":"c","run_id":"r","type":"set_priority"}"#,
                "validation_failed",
            ),
            (
                r#"{"command_id":"c","run_id":"r","type":"set_priority","payload":{"priority":9}}"#,
                "validation_failed",
            ),
            (
                r#"{"command_id":"c","run_id":"r","type":"preempt","payload":{"by":"x"}}"#,
                "validation_failed",
            ),
            (
                r#"{"command_id":"c","run_id":"r","type":"pause","payload":[]}"#,
                "validation_failed",
            ),
            (
                r#"{"command_id":"c","run_id":"r\u0000","type":"pause"}"#,
                "validation_failed",
            ),
            (r#"{"run_id":"r","type":"pause"}"#, "validation_failed"),
        ];
        for (body, code) in cases {
            assert_eq!(read(body).unwrap_err().code.as_str(), code, "{body}");
        }
    }
}
