//! Entry point of the `rungate` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    rungate::cli::main()
}
