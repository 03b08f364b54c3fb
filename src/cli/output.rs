//! What commands print: data on stdout (tables for people, JSON for programs), messages on stderr.

use std::io::{IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

use super::error::CliError;

/// Longest text of one cell; the whole is in `--json`.
const MAX_CELL_CHARS: usize = 60;

/// How this invocation prints.
#[derive(Clone, Copy, Debug)]
pub struct Out {
    /// One JSON document (or one per line for streams) instead of words.
    pub json: bool,
    /// No messages on stderr but errors.
    pub quiet: bool,
}

impl Out {
    /// Whether progress bars have somebody to look at them.
    pub fn is_live(self) -> bool {
        !self.json && !self.quiet && std::io::stderr().is_terminal()
    }

    /// Data: one line on stdout, colours dropped when it is no terminal or `NO_COLOR` is set.
    ///
    /// # Errors
    /// `Output`; a closed pipe is one too, and ends the command quietly.
    pub fn line(self, text: &str) -> Result<(), CliError> {
        let mut stdout = anstream::stdout().lock();
        writeln!(stdout, "{text}")
            .and_then(|()| stdout.flush())
            .map_err(CliError::Output)
    }

    /// One JSON document, indented for a terminal.
    ///
    /// # Errors
    /// As `line`.
    pub fn document(self, value: &Value) -> Result<(), CliError> {
        match std::io::stdout().is_terminal() {
            true => self.line(&format!("{value:#}")),
            false => self.line(&value.to_string()),
        }
    }

    /// A message for people on stderr, unless `--quiet`.
    pub fn note(self, text: &str) {
        if !self.quiet {
            // A closed stderr has nobody to be told.
            let _ = writeln!(anstream::stderr(), "{text}");
        }
    }

    /// The document for programs, or what `words` makes of it for people.
    ///
    /// # Errors
    /// As `line`.
    pub fn show(self, value: &Value, words: impl FnOnce(&Value) -> String) -> Result<(), CliError> {
        match self.json {
            true => self.document(value),
            false => self.line(&words(value)),
        }
    }
}

/// Columns under a header, without borders.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| clip(cell)));
    }
    let text = table.to_string();
    // Every cell is padded on both sides; the outer padding is not wanted.
    let line = |line: &'_ str| line.strip_prefix(' ').unwrap_or(line).trim_end().to_owned();
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// `name: value` lines, aligned; empty values are left out.
pub fn facts(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines: Vec<String> = pairs
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name:<width$}  {value}"))
        .collect();
    lines.join("\n")
}

/// Whose memory, process or container something is: a service's, or a job's.
pub fn holder(value: &Value) -> String {
    match text(value, "run_id") {
        run if run.is_empty() => text(value, "service"),
        run => format!("job {run}"),
    }
}

/// A member as text: empty for null and absent, JSON for what is no scalar. Control characters cannot
/// reach the terminal.
pub fn text(value: &Value, name: &str) -> String {
    match value.get(name) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => plain(text),
        Some(other) => other.to_string(),
    }
}

/// `text` without control characters, which could rewrite the reader's screen.
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// An instant to the second: `2025-11-21 02:00:00`.
pub fn instant(value: &Value, name: &str) -> String {
    let text = text(value, name);
    text.get(..19)
        .map_or(text.clone(), |head| head.replace('T', " "))
}

fn clip(cell: &str) -> String {
    if cell.chars().count() <= MAX_CELL_CHARS {
        return cell.to_owned();
    }
    let head: String = cell.chars().take(MAX_CELL_CHARS - 1).collect();
    format!("{head}…")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_is_columns_without_borders() {
        let text = table(
            &["NAME", "TYPE"],
            vec![
                vec!["a".into(), "llm".into()],
                vec!["long".into(), "x".into()],
            ],
        );
        assert_eq!(text, "NAME  TYPE\na     llm\nlong  x");
    }

    #[test]
    fn a_server_text_cannot_steer_the_terminal() {
        let value = json!({"error": "a\u{1b}[2Jb"});
        assert_eq!(text(&value, "error"), "a [2Jb");
    }
}
