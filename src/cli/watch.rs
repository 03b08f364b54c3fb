//! `rungate run watch`: follows one run's ledger to its end, with a progress bar on a terminal.

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::client::{Client, segment};
use super::error::{CliError, Exit};
use super::output::{Out, instant, plain, text};
use super::stream::{Follow, Frame};

/// Follows `run` from after `after` until it ends.
///
/// # Errors
/// As the stream's.
pub async fn run(out: Out, client: &Client, run: &str, after: u64) -> Result<Exit, CliError> {
    let path = format!("api/gateway/runs/{}/ledger/stream", segment(run));
    let mut follow = Follow::new(client, path, vec![("after", after.to_string())]);
    let bar = out.is_live().then(bar);
    while let Some(frame) = follow.next().await? {
        if frame.event == "done" {
            break;
        }
        let Some(step) = step(out, &frame)? else {
            continue;
        };
        match &bar {
            Some(bar) => bar.suspend(|| print(out, &frame, &step))?,
            None => print(out, &frame, &step)?,
        }
        if let Some(bar) = &bar {
            advance(bar, &step);
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    finish(out, client, run).await
}

/// How the run ended, asked of the gateway: the stream may have begun after the end.
async fn finish(out: Out, client: &Client, run: &str) -> Result<Exit, CliError> {
    let path = format!("api/gateway/runs/{}", segment(run));
    let summary = client.get(&path, &[]).await?;
    let status = text(&summary, "status");
    match (status.as_str(), text(&summary, "error")) {
        ("completed", _) => {
            out.note("completed");
            Ok(Exit::Success)
        }
        (status, error) if error.is_empty() => Err(CliError::Failed(format!("the run {status}"))),
        (status, error) => Err(CliError::Failed(format!("the run {status}: {error}"))),
    }
}

/// The record in a frame. A frame that is none (a gap, data beyond what is kept) is told on stderr.
///
/// # Errors
/// The frame is no JSON.
pub fn step(out: Out, frame: &Frame) -> Result<Option<Value>, CliError> {
    if frame.event != "step" {
        out.note(&format!("{}: {}", plain(&frame.event), plain(&frame.data)));
        return Ok(None);
    }
    let mut data: Value = serde_json::from_str(&frame.data)
        .map_err(|error| CliError::Answer(format!("a frame is no JSON: {error}")))?;
    Ok(Some(match data.get_mut("record") {
        Some(record) => record.take(),
        None => data,
    }))
}

fn print(out: Out, frame: &Frame, step: &Value) -> Result<(), CliError> {
    match out.json {
        true => out.line(&frame.data.replace('\n', " ")),
        false => out.line(&words(step)),
    }
}

/// A record's kind: the event's name in snake case.
pub fn kind(record: &Value) -> String {
    record
        .get("effect")
        .map_or_else(String::new, |effect| text(effect, "type"))
}

/// A record in one line: when, what, and what matters about it.
pub fn words(record: &Value) -> String {
    let kind = kind(record);
    let payload = record
        .get("effect")
        .and_then(|effect| effect.get("payload"));
    let detail = match (text(record, "error"), percent(record)) {
        (error, _) if !error.is_empty() => error,
        (_, Some(percent)) => format!("{percent} %"),
        (_, None) => payload.map_or_else(String::new, detail),
    };
    format!("{}  {kind:<22} {detail}", instant(record, "at"))
        .trim_end()
        .to_owned()
}

/// The members of an event that people look for, in this order.
fn detail(payload: &Value) -> String {
    const SHOWN: &[&str] = &[
        "service",
        "attempt",
        "generation",
        "cause",
        "by",
        "command",
        "kind",
        "percent",
        "size_bytes",
        "priority",
        "startup_ms",
        "reason",
        "retry_at",
    ];
    let parts: Vec<String> = SHOWN
        .iter()
        .map(|name| (*name, text(payload, name)))
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name}={}", plain(&value)))
        .collect();
    parts.join(" ")
}

/// The per cent that a progress record tells, if it is one.
pub fn percent(record: &Value) -> Option<f64> {
    let of = |value: &Value| {
        value
            .get("percent")
            .or_else(|| value.get("progress").and_then(|inner| inner.get("percent")))
            .and_then(Value::as_f64)
    };
    let result = record.get("result").and_then(of);
    let payload = record
        .get("effect")
        .and_then(|effect| effect.get("payload"));
    result.or_else(|| payload.and_then(of))
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos:>3} %  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(100).with_style(style)
}

fn advance(bar: &ProgressBar, record: &Value) {
    if let Some(percent) = percent(record) {
        // A percentage is between 0 and 100: the cast only drops the fraction.
        bar.set_position(percent.clamp(0.0, 100.0) as u64);
    }
    bar.set_message(kind(record).replace('_', " "));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_record_is_told_in_one_line() {
        let record = json!({"at": "2025-11-21T02:00:00.000120+00:00", "effect": {
            "type": "job_dispatched", "payload": {"service": "s", "attempt": 2, "run": "x"}}});
        assert_eq!(
            words(&record),
            "2025-11-21 02:00:00  job_dispatched         service=s attempt=2"
        );
    }

    #[test]
    fn progress_is_found_where_a_record_carries_it() {
        assert_eq!(percent(&json!({"result": {"percent": 12.5}})), Some(12.5));
        assert_eq!(
            percent(&json!({"effect": {"payload": {"percent": 3}}})),
            Some(3.0)
        );
        assert_eq!(percent(&json!({"result": null})), None);
    }
}
