//! The log of `serve`, `worker` and `demo`: events to stderr, as words or as JSON.

use tracing_subscriber::EnvFilter;

use super::error::CliError;
use crate::config::LogFormat;

/// Starts logging what `filter` lets through.
///
/// # Errors
/// The filter cannot be parsed.
pub fn start(filter: &str, format: LogFormat) -> Result<(), CliError> {
    let filter = parse(filter)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours());
    // A second start (tests in one process) keeps the first.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// The filter that a setting's text means.
///
/// # Errors
/// It means none.
pub fn parse(filter: &str) -> Result<EnvFilter, CliError> {
    EnvFilter::try_new(filter).map_err(|error| {
        CliError::Usage(format!(
            "setting 'log' is '{filter}': {error}; write it like info or rungate=debug,warn"
        ))
    })
}

fn colours() -> bool {
    use std::io::IsTerminal;
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}
