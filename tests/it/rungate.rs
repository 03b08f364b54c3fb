//! Runs the real binary, away from this machine's settings.

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A command of the binary with an environment of its own: `home` is all that it may find.
pub fn rungate(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rungate"));
    command
        .args(arguments)
        .env_clear()
        .env("HOME", home)
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null());
    command
}

/// Runs it to its end: exit code, stdout, stderr.
pub fn run(mut command: Command) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("the binary was built by cargo");
    (
        status.code().unwrap_or(-1),
        String::from_utf8(stdout).expect("output is text"),
        String::from_utf8(stderr).expect("messages are text"),
    )
}
