//! The log of `serve`, `worker` and `demo`: events to stderr, as words or as JSON.

use std::any::Any;
use std::backtrace::Backtrace;
use std::panic::PanicHookInfo;

use tracing_subscriber::EnvFilter;

use super::error::CliError;
use crate::config::LogFormat;

/// Starts logging what `filter` lets through, panics among it.
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
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// One event for a panic; the backtrace is there when `RUST_BACKTRACE` asks for it.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let at = panic.location().map(ToString::to_string);
    let thread = std::thread::current();
    tracing::error!(
        panic.at = at.unwrap_or_default(),
        panic.message = message(panic.payload()),
        panic.backtrace = %Backtrace::capture(),
        thread.name = thread.name().unwrap_or_default(),
        "a thread panicked"
    );
}

/// What a panic says when that is written in the source. A message that was put together may quote what the code worked
/// on: a request's text, and secrets in it.
fn message(payload: &(dyn Any + Send)) -> &'static str {
    let literal = payload.downcast_ref::<&'static str>();
    literal
        .copied()
        .unwrap_or("not shown: it may quote a secret")
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

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn what_a_panic_quotes_is_not_shown() {
        let secret = String::from("bört");
        let said = |panics: &dyn Fn()| {
            let payload = catch_unwind(AssertUnwindSafe(panics)).unwrap_err();
            message(&*payload)
        };
        let quotes = said(&|| drop(secret[..2].to_owned()));
        assert_eq!(quotes, "not shown: it may quote a secret");
        assert_eq!(said(&|| panic!("on purpose")), "on purpose");
    }
}
