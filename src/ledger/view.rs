//! A record as JSON, in the one shape of design section 6: the fields of the contract's step record
//! (`contracts/run-gateway.md` section 6.1) and more, whatever the event.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde::ser::SerializeMap;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use smol_str::SmolStr;
use uuid::Uuid;

use crate::domain::event::{Event, JobStopCause};
use crate::domain::ids::{Attempt, Cursor, PlaneId, RunId, Seq};
use crate::domain::record::Record;
use crate::domain::time::Timestamp;

use super::error::ReadError;
use super::read;
use super::record_codec::Hash;
use super::store::Snapshot;

/// A client's bytes above this are shown as a reference, `{"$seq": n, "size_bytes": n}`, as the contract
/// does above 256 KiB.
pub const MAX_INLINE_PAYLOAD_BYTES: usize = 256 << 10;

/// What a record's JSON shows that is not in the record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// Its run's session, as given at the start.
    pub session: Option<SmolStr>,
    /// The other run that it names is one of another plane, whose ids are nobody else's business.
    pub hides_other: bool,
}

/// The run beside its own that an event names: who preempted it.
pub fn other_run(event: &Event) -> Option<RunId> {
    match event {
        Event::JobPreempted { by, .. }
        | Event::JobStopRequested {
            cause: JobStopCause::Preempt { by },
            ..
        } => Some(*by),
        _ => None,
    }
}

/// A record's JSON, compact, on one line.
pub fn json(record: &Record, context: &Context) -> Vec<u8> {
    let view = RecordView::new(record, context);
    serde_json::to_vec(&view).expect("the view has string keys and no failing values")
}

/// The same as a `Value`; numbers of a client's payload beyond 64 bits lose digits here.
pub fn record_json(record: &Record, context: &Context) -> Value {
    serde_json::to_value(RecordView::new(record, context)).unwrap_or(Value::Null)
}

/// An event's name in snake case and its fields.
pub fn name_and_fields(event: &Event) -> (String, Map<String, Value>) {
    let tagged = serde_json::to_value(event).unwrap_or(Value::Null);
    let Value::Object(tagged) = tagged else {
        return (String::new(), Map::new());
    };
    match tagged.into_iter().next() {
        Some((name, Value::Object(fields))) => (name, fields),
        Some((name, _)) => (name, Map::new()),
        None => (String::new(), Map::new()),
    }
}

/// Values of a process service's environment may be secrets: readers see the names only.
fn hide_environment(fields: &mut Map<String, Value>) {
    let environment = fields
        .get_mut("spec")
        .and_then(|spec| spec.pointer_mut("/worker/process/env"))
        .and_then(Value::as_array_mut);
    for variable in environment.into_iter().flatten() {
        *variable = variable.get(0).cloned().unwrap_or_default();
    }
}

/// Hashes of tokens are no secrets, yet no reader needs them; of a password it is told whether there is one.
fn hide_hashes(fields: &mut Map<String, Value>) {
    fields.remove("digest");
    if let Some(password) = fields.get_mut("password") {
        *password = (!password.is_null()).into();
    }
    if let Some(Value::Object(token)) = fields.get_mut("token") {
        token.remove("hash");
    }
}

/// The contexts of the records of one read; each run is looked up once.
pub struct Contexts<'a> {
    snapshot: &'a dyn Snapshot,
    /// Whether it exists, and its session.
    known: HashMap<(PlaneId, RunId), (bool, Option<SmolStr>)>,
}

impl<'a> Contexts<'a> {
    pub(super) fn new(snapshot: &'a dyn Snapshot) -> Self {
        Self {
            snapshot,
            known: HashMap::new(),
        }
    }

    pub(super) fn of(&mut self, record: &Record) -> Result<Context, ReadError> {
        let session = match record.event.run().filter(|_| record.cursor > 0) {
            Some(run) => self.look_up(record.plane, run)?.1,
            None => None,
        };
        let hides_other = match other_run(&record.event) {
            Some(other) => !self.look_up(record.plane, other)?.0,
            None => false,
        };
        Ok(Context {
            session,
            hides_other,
        })
    }

    fn look_up(
        &mut self,
        plane: PlaneId,
        run: RunId,
    ) -> Result<(bool, Option<SmolStr>), ReadError> {
        if let Some(known) = self.known.get(&(plane, run)) {
            return Ok(known.clone());
        }
        let summary = read::run(self.snapshot, plane, run)?;
        let found = (
            summary.is_some(),
            summary.and_then(|summary| summary.session),
        );
        self.known.insert((plane, run), found.clone());
        Ok(found)
    }
}

#[derive(Serialize)]
struct RecordView<'a> {
    cursor: Cursor,
    seq: Seq,
    at: Timestamp,
    run_id: Option<RunId>,
    step_id: Uuid,
    node_id: Option<String>,
    status: &'static str,
    effect: EffectView<'a>,
    result: Option<ResultView<'a>>,
    error: Option<&'a str>,
    started_at: Timestamp,
    ended_at: Option<Timestamp>,
    actor_id: &'a str,
    request_id: Option<&'a str>,
    session_id: Option<SmolStr>,
    attempt: Attempt,
    idempotency_key: Option<&'a str>,
    purged: bool,
    prev_hash: String,
    record_hash: String,
    signature: Option<()>,
}

impl<'a> RecordView<'a> {
    fn new(record: &'a Record, context: &Context) -> Self {
        let event = &record.event;
        let (name, mut fields) = name_and_fields(event);
        hide_environment(&mut fields);
        hide_hashes(&mut fields);
        if context.hides_other {
            hide_other(&mut fields);
        }
        let run = event.run().filter(|_| record.cursor > 0);
        let status = status(event);
        let attempt = attempt(event);
        let node_id = match fields.get("service") {
            Some(Value::String(service)) => Some(service.clone()),
            _ => None,
        };
        let payload = Payload::of(record);
        let completes = matches!(event, Event::JobCompleted { .. });
        RecordView {
            cursor: record.cursor,
            seq: record.seq,
            at: record.at,
            run_id: run,
            step_id: step_id(record, run, attempt),
            node_id,
            status,
            effect: EffectView {
                name,
                fields,
                payload: payload
                    .clone()
                    .filter(|_| !completes)
                    .map(|p| (payload_name(event), p)),
            },
            result: payload.filter(|_| completes).map(|output| ResultView {
                completed: true,
                output,
            }),
            error: error(event),
            started_at: record.at,
            ended_at: (!matches!(status, "started" | "waiting")).then_some(record.at),
            actor_id: &record.actor,
            request_id: record.request_id.as_deref(),
            session_id: run.map(|run| match &context.session {
                Some(session) => session.clone(),
                None => SmolStr::new(run.to_string()),
            }),
            attempt: attempt.unwrap_or(1).max(1),
            idempotency_key: super::projection::inbox::command_of(event).map(SmolStr::as_str),
            purged: record.purged,
            prev_hash: hex(&record.prev_hash),
            record_hash: hex(&record.hash),
            signature: None,
        }
    }
}

/// Blanks the preemptor of `job_preempted` and of the cause of `job_stop_requested`.
fn hide_other(fields: &mut Map<String, Value>) {
    if let Some(by) = fields.get_mut("by") {
        *by = Value::Null;
    }
    if let Some(by) = fields
        .get_mut("cause")
        .and_then(|cause| cause.pointer_mut("/preempt/by"))
    {
        *by = Value::Null;
    }
}

/// What a completed run gave.
#[derive(Serialize)]
struct ResultView<'a> {
    completed: bool,
    output: Payload<'a>,
}

/// `{type, payload, result_key}`: the event's name, its fields, and the client's bytes among them.
struct EffectView<'a> {
    name: String,
    fields: Map<String, Value>,
    payload: Option<(&'static str, Payload<'a>)>,
}

impl Serialize for EffectView<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(3))?;
        map.serialize_entry("type", &self.name)?;
        map.serialize_entry("payload", &Fields(self))?;
        map.serialize_entry("result_key", &())?;
        map.end()
    }
}

struct Fields<'a>(&'a EffectView<'a>);

impl Serialize for Fields<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in &self.0.fields {
            map.serialize_entry(name, value)?;
        }
        if let Some((name, payload)) = &self.0.payload {
            map.serialize_entry(name, payload)?;
        }
        map.end()
    }
}

/// A client's bytes as they can be shown.
#[derive(Clone)]
enum Payload<'a> {
    /// The JSON as it came, without the white space between its tokens.
    Json(Box<RawValue>),
    /// Not JSON, or too deep to be taken for it.
    Bytes(&'a [u8], SmolStr),
    /// Too large to be shown here; `GET` it by its seq.
    Reference(Seq, usize),
    /// Removed by a purge: told, never skipped.
    Purged,
}

impl<'a> Payload<'a> {
    fn of(record: &'a Record) -> Option<Payload<'a>> {
        let bytes = &record.payload[..];
        if record.purged {
            return Some(Payload::Purged);
        }
        if bytes.is_empty() {
            return None;
        }
        if bytes.len() > MAX_INLINE_PAYLOAD_BYTES {
            return Some(Payload::Reference(record.seq, bytes.len()));
        }
        if let Ok(raw) = serde_json::from_slice::<&RawValue>(bytes)
            && let Ok(compact) = RawValue::from_string(compact(raw.get()))
        {
            return Some(Payload::Json(compact));
        }
        let content_type = match &record.event {
            Event::CheckpointSaved { content_type, .. } => content_type.clone(),
            _ => SmolStr::new_static("application/octet-stream"),
        };
        Some(Payload::Bytes(bytes, content_type))
    }
}

impl Serialize for Payload<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Payload::Json(raw) => raw.serialize(serializer),
            Payload::Bytes(bytes, content_type) => {
                json!({"base64": STANDARD.encode(bytes), "content_type": content_type})
                    .serialize(serializer)
            }
            Payload::Reference(seq, size) => {
                json!({"$seq": seq, "size_bytes": size}).serialize(serializer)
            }
            Payload::Purged => json!({"purged": true}).serialize(serializer),
        }
    }
}

/// Valid JSON without the white space between tokens: a stream's `data:` must be one line.
fn compact(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let (mut in_string, mut escaped) = (false, false);
    for character in json.chars() {
        if in_string {
            out.push(character);
            match character {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => in_string = false,
                _ => {}
            }
        } else if !character.is_ascii_whitespace() {
            in_string = character == '"';
            out.push(character);
        }
    }
    out
}

/// Under which name the client's bytes stand among the event's fields.
fn payload_name(event: &Event) -> &'static str {
    match event {
        Event::JobProgressed { .. } | Event::JobPreempted { .. } => "progress",
        Event::CheckpointSaved { .. } => "checkpoint",
        _ => "payload",
    }
}

/// The contract's status of a step.
fn status(event: &Event) -> &'static str {
    match event {
        Event::JobDispatched { .. } => "started",
        Event::JobFailed { .. } | Event::JobAttemptFailed { .. } => "failed",
        Event::JobCancelled { .. } => "cancelled",
        Event::JobQueued { .. }
        | Event::JobPaused { .. }
        | Event::JobResumed { .. }
        | Event::JobPreempted { .. }
        | Event::JobRequeued { .. }
        | Event::JobRevived { .. }
        | Event::JobStopRequested { .. }
        | Event::CommandAccepted { .. } => "waiting",
        _ => "completed",
    }
}

fn error(event: &Event) -> Option<&str> {
    match event {
        Event::JobAttemptFailed { error, .. } | Event::JobFailed { error, .. } => Some(error),
        Event::JobCancelled { reason, .. } => Some(reason),
        Event::ServiceCrashLooped { last_error, .. } => Some(last_error),
        Event::InstanceUnhealthy { error, .. } => Some(error),
        Event::CallbackAttempted { error, .. } | Event::NotificationAttempted { error, .. } => {
            error.as_deref()
        }
        _ => None,
    }
}

fn attempt(event: &Event) -> Option<Attempt> {
    match event {
        Event::JobDispatched { attempt, .. }
        | Event::JobProgressed { attempt, .. }
        | Event::CheckpointSaved { attempt, .. }
        | Event::JobStopRequested { attempt, .. }
        | Event::JobStopped { attempt, .. }
        | Event::JobAttemptFailed { attempt, .. }
        | Event::JobCompleted { attempt, .. }
        | Event::JobRevived { attempt, .. }
        | Event::JobOutcomeStale { attempt, .. } => Some(*attempt),
        _ => None,
    }
}

/// One id for all records of an attempt, its own for any other record; the same at every reading.
fn step_id(record: &Record, run: Option<RunId>, attempt: Option<Attempt>) -> Uuid {
    let mut hasher = blake3::Hasher::new();
    match (run, attempt) {
        (Some(run), Some(attempt)) => {
            hasher.update(b"attempt").update(run.0.as_bytes());
            hasher.update(&attempt.to_be_bytes());
        }
        _ => {
            hasher.update(b"record").update(&record.hash);
        }
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    // Version 8: bytes of our own making (RFC 9562 section 5.8).
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// Back from `hex`.
pub fn parse_hex(text: &str) -> Option<Hash> {
    crate::hex::decode(text)?.try_into().ok()
}

/// A hash as 64 hex digits.
pub fn hex(hash: &Hash) -> String {
    crate::hex::encode(hash)
}
