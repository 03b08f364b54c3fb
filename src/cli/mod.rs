//! The command line: one file per noun. Everything but `serve`, `demo`, `doctor` and the offline
//! `ledger` verbs talks to a gateway over HTTP.

mod audit;
mod checkpoint;
mod client;
mod command;
mod completions;
mod config;
mod config_init;
mod demo;
mod doctor;
mod error;
mod gpu;
mod health;
mod ledger;
mod log_lines;
mod logs;
mod notify;
mod output;
mod password;
mod queue;
mod run;
mod serve;
mod service;
mod session;
mod stream;
mod tenant;
mod token;
mod user;
mod watch;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, Sources};
use client::Client;
use error::{CliError, Exit};
use output::Out;

const AFTER_HELP: &str = "\
Examples:
  rungate demo                                   see it work, with nothing set up
  rungate serve                                  start a gateway on 127.0.0.1:8080
  rungate run start --type text-stats --payload '{\"files\":[\"/etc/hosts\"]}' --watch
  rungate ledger follow --json | head -3

Environment:
  RUNGATE_URL         the gateway to talk to (http://127.0.0.1:8080)
  RUNGATE_TOKEN_FILE  file that holds the token; RUNGATE_TOKEN is the token itself
  RUNGATE_CONFIG      configuration file; `rungate config show` lists every setting
  NO_COLOR            no colours

Exit codes:
  0    done
  1    not done, or a watched run did not complete
  2    the command line or a setting is wrong
  3    the run, service or command does not exist
  4    no valid token, or not allowed
  5    no gateway answers
  130  interrupted";

/// A durable gateway in front of GPU machines.
///
/// Runs are submitted, steered by commands and followed in one ledger that survives whatever happens.
#[derive(Debug, Parser)]
#[command(name = "rungate", version, after_help = AFTER_HELP, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    noun: Noun,
}

/// Where the options of every command stand in the help: below the command's own.
const GLOBAL: &str = "Options of every command";

/// Options of every command.
#[derive(Args, Debug)]
struct Global {
    /// Print JSON for programs: one document, or one per line for streams
    #[arg(long, global = true, help_heading = GLOBAL)]
    json: bool,
    /// Print no messages but errors
    #[arg(long, short, global = true, help_heading = GLOBAL)]
    quiet: bool,
    /// Configuration file
    #[arg(
        long,
        global = true,
        help_heading = GLOBAL,
        value_name = "FILE",
        env = "RUNGATE_CONFIG",
        hide_env = true
    )]
    config: Option<PathBuf>,
    /// Gateway to talk to
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "URL")]
    url: Option<String>,
    /// File that holds the bearer token
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Certificates to trust instead of the system's, in PEM form
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "FILE")]
    ca_cert: Option<PathBuf>,
    /// Directory of the ledger and of all else that is kept
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Noun {
    /// Run the gateway
    Serve(serve::Serve),
    /// Show it at work: a gateway, a simulated GPU, services, jobs, a preemption
    Demo(demo::Demo),
    /// Check this machine and the settings; exit code 1 when something is wrong, 0 with warnings alone
    Doctor(doctor::Doctor),
    /// Start, follow and steer runs
    #[command(subcommand)]
    Run(run::Run),
    /// Register and operate services
    #[command(subcommand)]
    Service(service::Service),
    /// Show the GPUs, watch them, release one from quarantine
    Gpu(gpu::Gpu),
    /// Show what waits and what runs
    Queue,
    /// Show what became of a command
    #[command(subcommand)]
    Command(command::Command),
    /// Follow, verify and move the ledger
    #[command(subcommand)]
    Ledger(ledger::Ledger),
    /// Manage users: create, disable, delete, give new tokens
    #[command(subcommand)]
    User(user::User),
    /// Manage tenants: their weights and quotas
    #[command(subcommand)]
    Tenant(tenant::Tenant),
    /// Manage your own tokens
    #[command(subcommand)]
    Token(token::Token),
    /// List and end the sessions of browsers
    #[command(subcommand)]
    Session(session::Session),
    /// Show who asked for which write, newest first
    Audit(audit::Audit),
    /// Show, check and write down the settings
    #[command(subcommand)]
    Config(config::ConfigVerb),
    /// Ask whether a gateway is healthy
    Health,
    /// Run the example service: text statistics over files
    Worker(worker::Worker),
    /// Print a completion script for a shell
    Completions(completions::Completions),
}

/// What every command gets.
struct Context {
    out: Out,
    sources: Sources,
    config: Config,
    /// `--data-dir` was given: `ledger` verbs work on that directory, with the gateway stopped.
    data_dir_given: bool,
}

impl Context {
    fn new(global: Global, noun: &Noun) -> Result<Self, CliError> {
        let data_dir_given = global.data_dir.is_some();
        let mut flags = Vec::new();
        let path = |path: PathBuf| path.display().to_string();
        let mut flag = |key, name, text: Option<String>| {
            flags.extend(text.map(|text| (key, name, text)));
        };
        flag("url", "--url", global.url);
        flag("token_file", "--token-file", global.token_file.map(path));
        flag("ca_cert", "--ca-cert", global.ca_cert.map(path));
        flag("data_dir", "--data-dir", global.data_dir.map(path));
        if let Noun::Serve(serve) = noun {
            serve.flags(&mut flag);
        }
        let sources = Sources::of_process(global.config, flags);
        Ok(Self {
            out: Out {
                json: global.json,
                quiet: global.quiet,
            },
            config: Config::load(&sources)?,
            sources,
            data_dir_given,
        })
    }

    fn client(&self) -> Result<Client, CliError> {
        Client::new(&self.config)
    }
}

/// Parses the command line, does what it says, and gives the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("rungate: cannot start the runtime: {error}");
            return Exit::Failure.into();
        }
    };
    let exit = match runtime.block_on(dispatch(cli)) {
        Ok(exit) => exit,
        Err(error) => {
            let exit = error.exit();
            if !matches!(exit, Exit::Success | Exit::Interrupted) {
                eprintln!("rungate: {error}");
            }
            exit
        }
    };
    // A blocking read of a slow disk must not hold up the exit.
    runtime.shutdown_background();
    exit.into()
}

async fn dispatch(cli: Cli) -> Result<Exit, CliError> {
    let Cli { global, noun } = cli;
    // The verbs that look at broken settings, or need none.
    let noun = match noun {
        Noun::Completions(completions) => return completions.perform(),
        Noun::Config(config::ConfigVerb::Init) => {
            let out = Out {
                json: global.json,
                quiet: global.quiet,
            };
            return config_init::perform(out, global.config);
        }
        noun => noun,
    };
    let json = global.json;
    let context = match (Context::new(global, &noun), &noun) {
        (Err(error), Noun::Doctor(_)) => return doctor::broken_settings(json, &error),
        (context, _) => context?,
    };
    match noun {
        // These stop in their own good order.
        Noun::Serve(_) => serve::perform(context).await,
        Noun::Worker(worker) => worker.perform(&context).await,
        Noun::Demo(demo) => demo.perform(&context).await,
        noun => {
            tokio::select! {
                exit = talk(noun, &context) => exit,
                _ = tokio::signal::ctrl_c() => Err(CliError::Interrupted),
            }
        }
    }
}

async fn talk(noun: Noun, context: &Context) -> Result<Exit, CliError> {
    match noun {
        Noun::Run(verb) => verb.perform(context).await,
        Noun::Service(verb) => verb.perform(context).await,
        Noun::Gpu(gpu) => gpu.perform(context).await,
        Noun::Queue => queue::perform(context).await,
        Noun::Command(verb) => verb.perform(context).await,
        Noun::Ledger(verb) => verb.perform(context).await,
        Noun::User(verb) => verb.perform(context).await,
        Noun::Tenant(verb) => verb.perform(context).await,
        Noun::Token(verb) => verb.perform(context).await,
        Noun::Audit(audit) => audit.perform(context).await,
        Noun::Session(verb) => verb.perform(context).await,
        Noun::Config(verb) => verb.perform(context),
        Noun::Doctor(options) => doctor::perform(context, &options).await,
        Noun::Health => health::perform(context).await,
        Noun::Serve(_) | Noun::Worker(_) | Noun::Demo(_) | Noun::Completions(_) => {
            unreachable!("dispatch has taken these")
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
