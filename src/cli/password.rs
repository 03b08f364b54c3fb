//! Reads passwords: from a terminal without showing them, else a line each from standard input. Never from a flag,
//! which everybody on the machine could see.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use super::error::CliError;

/// Longest line that is read, in bytes.
const MAX_BYTES: u64 = 4_096;

/// The current password, where a person is asked for it; an empty line stands for none.
///
/// # Errors
/// Standard input cannot be read.
pub fn current() -> Result<String, CliError> {
    line("current password (empty for none): ")
}

/// A new password, twice from a person.
///
/// # Errors
/// Standard input cannot be read, or the two differ.
pub fn new() -> Result<String, CliError> {
    let password = line("new password: ")?;
    if std::io::stdin().is_terminal() && line("once more: ")? != password {
        return Err(CliError::Usage("the two differ".to_owned()));
    }
    match password.is_empty() {
        true => Err(CliError::Usage("there is no password".to_owned())),
        false => Ok(password),
    }
}

/// A secret that a file holds in its first line; `-` asks for it, or reads a line of standard input.
///
/// # Errors
/// The file or standard input cannot be read.
pub fn from_file(path: &Path) -> Result<String, CliError> {
    if path == Path::new("-") {
        return line("access token: ");
    }
    let text = std::fs::read_to_string(path);
    let text = text.map_err(CliError::io(format!("read {}", path.display())))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Shows what is typed again when it is dropped.
struct Hidden(Termios);

impl Hidden {
    fn start() -> Option<Hidden> {
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).ok()?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&stdin, OptionalActions::Flush, &hidden).ok()?;
        Some(Hidden(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // There is nothing else to try.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, &self.0);
        let _ = writeln!(std::io::stderr());
    }
}

fn line(prompt: &str) -> Result<String, CliError> {
    let hidden = match std::io::stdin().is_terminal() {
        true => {
            // A closed stderr has nobody to be told.
            let _ = write!(std::io::stderr(), "{prompt}");
            Hidden::start()
        }
        false => None,
    };
    let mut text = String::new();
    let mut input = std::io::Read::take(std::io::stdin().lock(), MAX_BYTES);
    let read = input.read_line(&mut text);
    drop(hidden);
    read.map_err(CliError::io("read the password".to_owned()))?;
    Ok(text.trim_end_matches(['\n', '\r']).to_owned())
}
