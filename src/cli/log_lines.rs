//! What services and the containers of jobs wrote, as people read it.

use serde_json::Value;

use super::Context;
use super::client::Client;
use super::error::{CliError, Exit};
use super::output::text;
use super::stream::Follow;

/// Shows the last lines at `path`, and each new one if `follow`, to the end of what they are of.
pub async fn show(
    context: &Context,
    client: &Client,
    path: String,
    tail: u32,
    follow: bool,
) -> Result<Exit, CliError> {
    let tail = ("tail", tail.to_string());
    if !follow {
        let answer = client.get(&path, &[tail]).await?;
        context.out.show(&answer, log_lines)?;
        return Ok(Exit::Success);
    }
    let query = vec![tail, ("follow", "true".to_owned())];
    let mut frames = Follow::new(client, path, query);
    while let Some(frame) = frames.next().await? {
        if frame.event == "done" {
            break;
        }
        if context.out.json {
            context.out.line(&frame.data.replace('\n', " "))?;
            continue;
        }
        match serde_json::from_str::<Value>(&frame.data) {
            Ok(Value::Object(line)) => context.out.line(&log_line(&Value::Object(line)))?,
            Ok(Value::String(line)) => context.out.line(&line)?,
            _ => context.out.line(&frame.data)?,
        }
    }
    Ok(Exit::Success)
}

/// The lines of a log document, whether each is a text or an object with a text in it.
fn log_lines(answer: &Value) -> String {
    let lines = ["lines", "logs"]
        .iter()
        .find_map(|name| answer.get(name))
        .unwrap_or(answer);
    match lines {
        Value::Array(lines) => lines.iter().map(log_line).collect::<Vec<_>>().join("\n"),
        Value::String(text) => text.trim_end().to_owned(),
        other => other.to_string(),
    }
}

fn log_line(line: &Value) -> String {
    match line {
        Value::String(text) => text.clone(),
        line => ["line", "text", "message"]
            .iter()
            .map(|name| text(line, name))
            .find(|text| !text.is_empty())
            .unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_log_is_read_in_both_shapes() {
        assert_eq!(log_lines(&json!({"lines": ["a", "b"]})), "a\nb");
        assert_eq!(log_lines(&json!({"lines": [{"line": "a"}]})), "a");
        assert_eq!(log_lines(&json!({"logs": "a\n"})), "a");
    }
}
