//! `rungate config`: what the settings are, where each came from, and whether they can be meant.

use clap::Subcommand;
use serde_json::{Value, json};

use super::error::{CliError, Exit};
use super::output::table;
use super::{Context, logs};
use crate::config::Config;

/// Verbs of `rungate config`.
#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Show every setting with its value and where that came from; secrets stay hidden
    #[command(
        after_help = "Example:\n  RUNGATE_LISTEN=127.0.0.1:9000 rungate config show --json | jq .listen"
    )]
    Show {
        /// With what each means
        #[arg(long)]
        about: bool,
    },
    /// Check the settings; exit code 2 when one cannot be used
    Check,
    /// Write a settings file in which every setting is explained and commented out; refuses to overwrite one
    #[command(after_help = "Example:\n  rungate config init --config /etc/rungate/rungate.toml")]
    Init,
}

impl ConfigVerb {
    pub(super) fn perform(self, context: &Context) -> Result<Exit, CliError> {
        match self {
            ConfigVerb::Show { about } => show(context, about),
            ConfigVerb::Check => check(context),
            ConfigVerb::Init => unreachable!("dispatch has taken it"),
        }
    }
}

fn show(context: &Context, about: bool) -> Result<Exit, CliError> {
    let rows = Config::rows(&context.sources)?;
    if context.out.json {
        let members = rows.iter().map(|(setting, value, origin)| {
            let member = json!({
                "value": value,
                "origin": origin.to_string(),
                "environment": setting.env,
                "about": setting.about,
            });
            (setting.key.to_owned(), member)
        });
        context.out.document(&Value::Object(members.collect()))?;
        return Ok(Exit::Success);
    }
    if about {
        for (setting, value, origin) in &rows {
            let text = format!(
                "{} = {value}  ({origin})\n    {} [{}]",
                setting.key, setting.about, setting.env
            );
            context.out.line(&text)?;
        }
        return Ok(Exit::Success);
    }
    let rows = rows
        .into_iter()
        .map(|(setting, value, origin)| vec![setting.key.to_owned(), value, origin.to_string()])
        .collect();
    context
        .out
        .line(&table(&["SETTING", "VALUE", "ORIGIN"], rows))?;
    Ok(Exit::Success)
}

/// What loading does not look into: texts that another part reads.
///
/// # Errors
/// The first setting that cannot be used.
pub(super) fn check_texts(config: &Config) -> Result<(), CliError> {
    logs::parse(&config.log)?;
    crate::gpu::wanted(&config.gpus).map_err(|error| CliError::Usage(error.to_string()))?;
    Ok(())
}

/// The settings have been loaded already: what is left are some texts, and the warnings.
fn check(context: &Context) -> Result<Exit, CliError> {
    check_texts(&context.config)?;
    let warnings = &context.config.warnings;
    if context.out.json {
        let document = json!({"ok": true, "warnings": warnings});
        context.out.document(&document)?;
        return Ok(Exit::Success);
    }
    for warning in warnings {
        context.out.note(&format!("warning: {warning}"));
    }
    context.out.line("the settings are in order")?;
    Ok(Exit::Success)
}
