//! How fast, how small and how steady the gateway is, each figure beside a floor from the same run and the
//! bar that it must meet.
//!
//! `cargo bench --bench gateway -- [--quick] [--json FILE] [--only NAME]… [--clients N]…`; ends with 1 when a bar is missed.

mod child;
mod client;
mod commands;
mod containers;
mod decisions;
mod floor;
mod followers;
mod jobs;
mod logins;
mod machine;
mod memory;
mod preemption;
mod replay;
mod report;
mod scale;
mod servers;
mod starts;
mod stub;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use self::report::{Figure, Report};
use self::scale::Scale;

/// Whatever stops a measurement.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A benchmark of the gateway on this machine.
#[derive(Parser)]
struct Arguments {
    /// Scale sizes down, to end in under a minute. Bars are shown all the same.
    #[arg(long)]
    quick: bool,
    /// Write the figures as JSON to this file too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure only this; may be repeated.
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(GROUPS.map(|(name, _)| name)))]
    only: Vec<String>,
    /// Measure starts with this many clients only; may be repeated.
    #[arg(long, value_name = "N")]
    clients: Vec<usize>,
    /// Where to put ledgers, several GiB; on the disk that is to be measured.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Cargo passes it to say that this is no test run.
    #[arg(long, hide = true)]
    bench: bool,
}

type Measure = fn(&mut Context, &Scale) -> Result<(), Failure>;

/// What is measured, in this order: what wants a quiet machine first.
const GROUPS: [(&str, Measure); 9] = [
    ("starts", starts::measure),
    ("commands", commands::measure),
    ("preemption", preemption::measure),
    ("containers", containers::measure),
    ("followers", followers::measure),
    ("logins", logins::measure),
    ("decisions", decisions::measure),
    ("replay", replay::measure),
    ("memory", memory::measure),
];

/// What measurements share: where their files go, and what they have found.
struct Context {
    root: tempfile::TempDir,
    figures: Vec<Figure>,
    notes: Vec<String>,
}

impl Context {
    /// A fresh directory.
    fn dir(&self, name: &str) -> Result<PathBuf, Failure> {
        let dir = self.root.path().join(name);
        std::fs::create_dir(&dir)?;
        Ok(dir)
    }

    fn add(&mut self, figure: Figure) {
        let ratio = figure
            .ratio
            .map(|r| format!(", {r:.2} × floor"))
            .unwrap_or_default();
        eprintln!(
            "  {}: {:.2} {}{ratio}",
            figure.name, figure.value, figure.unit
        );
        self.figures.push(figure);
    }

    fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// A runtime for clients, dropped with all that they have open.
    fn clients() -> Result<tokio::runtime::Runtime, Failure> {
        Ok(tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?)
    }
}

fn main() -> ExitCode {
    let ended = match child::run() {
        Some(part) => part.map(|()| true),
        None => benchmark(&Arguments::parse()),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("the benchmark could not be run: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether all bars are met.
fn benchmark(arguments: &Arguments) -> Result<bool, Failure> {
    if !arguments.bench {
        println!("run it with `cargo bench --bench gateway`");
        return Ok(true);
    }
    let started = Instant::now();
    let mut scale = if arguments.quick {
        Scale::quick()
    } else {
        Scale::full()
    };
    if !arguments.clients.is_empty() {
        scale.clients.clone_from(&arguments.clients);
    }
    // Beside the build, which lies on a real disk: /tmp may be memory.
    let target = std::env::current_exe()?;
    let beside = target.parent().unwrap_or(&target).to_path_buf();
    let root = tempfile::Builder::new()
        .prefix("rungate-bench-")
        .tempdir_in(arguments.dir.as_ref().unwrap_or(&beside))?;
    let machine = machine::describe(root.path())?;
    let mut context = Context {
        root,
        figures: Vec::new(),
        notes: Vec::new(),
    };
    for (name, measure) in GROUPS {
        if arguments.only.is_empty() || arguments.only.iter().any(|only| only == name) {
            eprintln!("{name} …");
            measure(&mut context, &scale)?;
        }
    }
    let report = Report {
        quick: scale.quick,
        machine,
        figures: context.figures,
        notes: context.notes,
        took_s: started.elapsed().as_secs_f64(),
    };
    println!("{}", report.table());
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(report.passed())
}
