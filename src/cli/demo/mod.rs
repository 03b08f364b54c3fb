//! `rungate demo`: a gateway in a temporary directory, one simulated GPU, two services that do not fit
//! on it together, a dozen jobs and an urgent one that preempts; checked against the ledger at the end.

mod board;
mod check;
mod gateway;
mod jobs;
mod screen;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use tokio::signal::unix::SignalKind;
use tokio_util::sync::CancellationToken;

use super::error::{CliError, Exit};
use super::output::Out;
use super::stream::Follow;
use super::{Context, logs, serve, watch};
use board::Board;
use gateway::Gateway;
use jobs::{Job, Plan};
use screen::Screen;

/// The demo ends by itself: what is not over by then is a fault.
const DEADLINE: Duration = Duration::from_secs(28);

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  rungate demo
  rungate demo ~/books/*.txt
  rungate demo --keep          then look around with rungate run list, rungate gpu, …")]
pub struct Demo {
    /// Texts that the jobs read; by default Rungate's own documentation
    files: Vec<PathBuf>,
    /// Leave the gateway serving, until Ctrl-C
    #[arg(long)]
    keep: bool,
}

impl Demo {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        // The log would write over the progress bars; what goes wrong is told by the demo itself.
        logs::start("off", context.config.log_format)?;
        let interrupted = CancellationToken::new();
        // The gateway takes HUP for itself; a demo ends with its terminal.
        let [interrupt, terminate] = serve::STOPPING;
        let ending = [interrupt, terminate, SignalKind::hangup()];
        let _signals = serve::cancel_on_signals(&interrupted, &ending)?;
        let dir = tempfile::Builder::new()
            .prefix("rungate-demo-")
            .tempdir()
            .map_err(CliError::io("make a temporary directory"))?;
        let plan = Plan::new(&self.files, dir.path())?;
        let gateway = Gateway::start(&dir.path().join("data")).await?;
        let shown = tokio::select! {
            shown = show(context.out, &gateway, &plan) => shown,
            () = interrupted.cancelled() => Err(CliError::Interrupted),
        };
        if self.keep && shown.is_ok() {
            context.out.note(&gateway.how_to_look());
            interrupted.cancelled().await;
        }
        // Whatever happened: no process and no file is left behind.
        let stopped = gateway.stop().await;
        let removed = dir.close();
        let exit = shown?;
        stopped?;
        removed.map_err(CliError::io("remove the temporary directory"))?;
        Ok(exit)
    }
}

async fn show(out: Out, gateway: &Gateway, plan: &Plan) -> Result<Exit, CliError> {
    out.note(&format!(
        "a gateway on {}, one simulated GPU with 24 GiB, two services with 16 GiB each, {} jobs",
        gateway.client().base(),
        plan.jobs.len()
    ));
    let began = Instant::now();
    let shown = tokio::time::timeout(DEADLINE, play(out, gateway, plan)).await;
    let board = shown.map_err(|_| {
        let seconds = DEADLINE.as_secs();
        CliError::Failed(format!(
            "the demo was not over after {seconds} s: jobs were lost or stuck"
        ))
    })??;
    let outcome = check::check(gateway.client(), plan, &board.names).await?;
    let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut document = json!(outcome);
    document["ok"] = outcome.faults.is_empty().into();
    document["elapsed_ms"] = elapsed_ms.into();
    out.show(&document, |_| outcome.words(elapsed_ms))?;
    Ok(match outcome.faults.is_empty() {
        true => Exit::Success,
        false => Exit::Failure,
    })
}

/// Submits the jobs and follows the ledger until all have ended.
async fn play(out: Out, gateway: &Gateway, plan: &Plan) -> Result<Board, CliError> {
    let client = gateway.client();
    jobs::register(client).await?;
    let (urgent, steady): (Vec<&Job>, Vec<&Job>) = plan.jobs.iter().partition(|job| job.urgent);
    for job in steady {
        job.submit(client).await?;
    }
    let mut urgent = urgent.into_iter();
    let mut board = Board::default();
    let mut screen = Screen::new(out);
    let query = vec![("after_seq", "0".to_owned())];
    let mut frames = Follow::new(client, "api/gateway/ledger/stream".to_owned(), query);
    while let Some(frame) = frames.next().await? {
        let Some(record) = watch::step(out, &frame)? else {
            continue;
        };
        let line = board.apply(&record);
        screen.show(&board, line.as_deref())?;
        // Once a job has something to lose, the urgent one comes and takes its place.
        if board.has_checkpoint || board.ended() > 0 {
            for job in urgent.by_ref() {
                job.submit(client).await?;
            }
        }
        if board.ended() == plan.jobs.len() {
            break;
        }
    }
    screen.finish();
    Ok(board)
}
