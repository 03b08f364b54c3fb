//! `rungate ledger`: follow, verify, sign, export, import and measure. With `--data-dir` the file itself is
//! read, the gateway being stopped; without it a running gateway is asked.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::PathBuf;

use clap::Subcommand;
use futures_util::StreamExt;
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::{Value, json};

use super::checkpoint::{self, Against};
use super::error::{CliError, Exit};
use super::output::{Out, facts, text};
use super::serve::whole_story;
use super::stream::Follow;
use super::{Context, watch};
use crate::ledger::{Ledger as Store, OpenOptions, transfer};

/// Verbs of `rungate ledger`.
#[derive(Debug, Subcommand)]
pub enum Ledger {
    /// Print records as they are appended, until interrupted
    #[command(
        after_help = "Example:\n  rungate ledger follow --after 0 --json | jq -c .record.effect.type"
    )]
    Follow {
        /// Only what comes after this seq; by default what is appended from now on
        #[arg(long, value_name = "SEQ")]
        after: Option<u64>,
    },
    /// Check the hash chain and all that follows from it; exit code 1 names the first bad record
    #[command(
        after_help = "Examples:\n  rungate ledger verify\n  rungate ledger verify --data-dir /var/lib/rungate --checkpoint heads.jsonl --public-key rungate.pub"
    )]
    Verify(Against),
    /// Print the chain's head, signed, as one line to keep on another machine
    #[command(after_help = "Example:\n  rungate ledger checkpoint | ssh safe 'cat >> heads.jsonl'")]
    Checkpoint,
    /// Write every record as one line of JSON
    #[command(
        after_help = "Example:\n  rungate ledger export --data-dir /var/lib/rungate > ledger.ndjson"
    )]
    Export {
        /// Only what comes after this seq; an import needs all of it
        #[arg(long, default_value_t = 0, value_name = "SEQ")]
        after: u64,
        /// File to write, instead of standard output
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Rebuild an equal ledger from an export, in a data directory that has none
    #[command(
        after_help = "Example:\n  rungate ledger import ledger.ndjson --data-dir /var/lib/rungate-2"
    )]
    Import {
        /// The export; `-` reads standard input
        file: PathBuf,
    },
    /// Count records, runs and bytes
    Stats,
}

impl Ledger {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let offline = context.data_dir_given;
        match self {
            Ledger::Follow { after } => follow(context, after).await,
            Ledger::Checkpoint => checkpoint::perform(context, options(context)).await,
            Ledger::Verify(against) if offline => {
                let is_live = context.out.is_live();
                let proof = against.read(context)?;
                let value = read(context, move |store| {
                    let bar = match is_live {
                        true => ProgressBar::new(store.tail()),
                        false => ProgressBar::hidden(),
                    };
                    let verified = store.verify(&mut |seq| bar.set_position(seq));
                    bar.finish_and_clear();
                    let verified = verified.map_err(|error| error.to_string())?;
                    let mut value = json!(verified);
                    if let Some(proof) = proof {
                        value["checkpoints"] = proof.check(store)?.into();
                    }
                    Ok(value)
                });
                shown(context.out, &value.await?)
            }
            Ledger::Verify(against) => {
                let proof = against.read(context)?;
                let mut value = ask(context, "verify").await?;
                if let Some(proof) = proof {
                    value["checkpoints"] = proof.ask(context).await?.into();
                }
                shown(context.out, &value)
            }
            Ledger::Stats if offline => {
                let value = read(context, |store| {
                    store.stats().map_err(|error| error.to_string())
                });
                shown(context.out, &value.await?)
            }
            Ledger::Stats => shown(context.out, &ask(context, "stats").await?),
            Ledger::Export { after, output } => export(context, after, output).await,
            Ledger::Import { file } => import(context, file).await,
        }
    }
}

async fn follow(context: &Context, after: Option<u64>) -> Result<Exit, CliError> {
    let client = context.client()?;
    let after = match after {
        Some(after) => after,
        None => tail(&ask(context, "stats").await?)?,
    };
    let query = vec![("after_seq", after.to_string())];
    let mut frames = Follow::new(&client, "api/gateway/ledger/stream".to_owned(), query);
    while let Some(frame) = frames.next().await? {
        let Some(record) = watch::step(context.out, &frame)? else {
            continue;
        };
        match context.out.json {
            true => context.out.line(&frame.data.replace('\n', " "))?,
            false => {
                let line = format!("{:>8}  {}", text(&record, "seq"), watch::words(&record));
                context.out.line(&line)?;
            }
        }
    }
    Ok(Exit::Success)
}

fn tail(stats: &Value) -> Result<u64, CliError> {
    let tail = stats.get("tail_seq").and_then(Value::as_u64);
    tail.ok_or_else(|| CliError::Answer("it has no tail_seq".to_owned()))
}

async fn ask(context: &Context, verb: &str) -> Result<Value, CliError> {
    let path = format!("api/gateway/ledger/{verb}");
    context.client()?.get(&path, &[]).await
}

/// The document, its scalars one a line for people; a verification that failed is a failure.
fn shown(out: Out, value: &Value) -> Result<Exit, CliError> {
    out.show(value, |value| {
        let members = value.as_object().into_iter().flatten();
        let pairs: Vec<(&str, String)> = members
            .map(|(name, member)| match member {
                Value::Object(counts) => (name.as_str(), listed(counts)),
                _ => (name.as_str(), text(value, name)),
            })
            .collect();
        facts(&pairs)
    })?;
    Ok(match value.get("ok") {
        Some(Value::Bool(false)) => Exit::Failure,
        _ => Exit::Success,
    })
}

fn listed(counts: &serde_json::Map<String, Value>) -> String {
    let parts: Vec<String> = counts
        .iter()
        .map(|(name, n)| format!("{name} {n}"))
        .collect();
    parts.join(", ")
}

/// Reads the ledger of `--data-dir` on a thread that may block.
async fn read<T: Serialize + Send + 'static>(
    context: &Context,
    work: impl FnOnce(&Store) -> Result<T, String> + Send + 'static,
) -> Result<Value, CliError> {
    let data_dir = context.config.data_dir.clone();
    let options = options(context);
    blocking(move || {
        let store = Store::open_read_only(&data_dir, &options).map_err(|e| e.to_string())?;
        let done = work(&store)?;
        serde_json::to_value(done).map_err(|error| error.to_string())
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, CliError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| CliError::Failed(error.to_string()))?
        .map_err(CliError::Failed)
}

fn options(context: &Context) -> OpenOptions {
    let cache_bytes = usize::try_from(context.config.cache_mib << 20).unwrap_or(usize::MAX);
    OpenOptions { cache_bytes }
}

async fn export(context: &Context, after: u64, output: Option<PathBuf>) -> Result<Exit, CliError> {
    let mut sink = open_output(output.as_ref())?;
    if context.data_dir_given {
        let data_dir = context.config.data_dir.clone();
        let options = options(context);
        let done = blocking(move || {
            let store = Store::open_read_only(&data_dir, &options).map_err(|e| e.to_string())?;
            Ok(store.export(after, &mut sink))
        });
        let done = done.await?.map_err(export_error)?;
        context.out.note(&format!("{} records", done.records));
        return Ok(Exit::Success);
    }
    let client = context.client()?;
    let query = [("after", after.to_string())];
    let answer = client
        .open("api/gateway/ledger/export", &query, None)
        .await?;
    let mut body = answer.bytes_stream();
    while let Some(bytes) = body.next().await {
        let bytes = bytes.map_err(|error| client.unreachable(&error))?;
        sink.write_all(&bytes).map_err(CliError::Output)?;
    }
    sink.flush().map_err(CliError::Output)?;
    Ok(Exit::Success)
}

fn export_error(error: transfer::TransferError) -> CliError {
    match error {
        // A closed pipe is no failure.
        transfer::TransferError::Write(source) => CliError::Output(source),
        error => CliError::Failed(whole_story(&error)),
    }
}

fn open_output(path: Option<&PathBuf>) -> Result<Box<dyn Write + Send>, CliError> {
    Ok(match path {
        None => Box::new(BufWriter::new(std::io::stdout())),
        Some(path) => {
            let what = format!("create {}", path.display());
            // An export that was not meant to replace one must not.
            Box::new(BufWriter::new(
                File::create_new(path).map_err(CliError::io(what))?,
            ))
        }
    })
}

async fn import(context: &Context, file: PathBuf) -> Result<Exit, CliError> {
    if !context.data_dir_given {
        let text = "import builds a new ledger: name an empty directory with --data-dir";
        return Err(CliError::Usage(text.to_owned()));
    }
    let input: Box<dyn Read + Send> = match file.as_os_str() == "-" {
        true => Box::new(std::io::stdin()),
        false => {
            let what = format!("open {}", file.display());
            Box::new(File::open(&file).map_err(CliError::io(what))?)
        }
    };
    let data_dir = context.config.data_dir.clone();
    let options = options(context);
    let done = blocking(move || {
        transfer::import(&mut BufReader::new(input), &data_dir, &options)
            .map_err(|error| whole_story(&error))
    });
    let done =
        serde_json::to_value(done.await?).map_err(|error| CliError::Failed(error.to_string()))?;
    shown(context.out, &done)
}
