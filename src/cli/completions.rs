//! `rungate completions`: completion scripts, made from the same definition as the help.

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::error::{CliError, Exit};

#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  rungate completions bash > ~/.local/share/bash-completion/completions/rungate"
)]
pub struct Completions {
    shell: Shell,
}

impl Completions {
    pub(super) fn perform(self) -> Result<Exit, CliError> {
        let mut script = Vec::new();
        clap_complete::generate(
            self.shell,
            &mut super::Cli::command(),
            "rungate",
            &mut script,
        );
        std::io::stdout()
            .write_all(&script)
            .map_err(CliError::Output)?;
        Ok(Exit::Success)
    }
}
