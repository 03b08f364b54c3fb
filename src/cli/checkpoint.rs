//! `rungate ledger checkpoint`, and `verify --checkpoint`: a signed head to keep elsewhere, and proof that the ledger
//! still goes through it.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::Context;
use super::error::{CliError, Exit};
use super::output::text;
use crate::ledger::checkpoint::{Checkpoint, CheckpointError, PublicKey};
use crate::ledger::{Ledger, OpenOptions};
use crate::server;

/// Largest file of checkpoints that is read, in bytes: half a million of them.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// What a ledger is checked against.
#[derive(Args, Debug, Default)]
pub struct Against {
    /// File of checkpoints, one a line, that the ledger must go through
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    /// Public key of the checkpoints; by default the data directory's auth/checkpoint-key.pub
    #[arg(long, value_name = "FILE", requires = "checkpoint")]
    public_key: Option<PathBuf>,
}

/// Checkpoints and what their signatures are checked with.
pub struct Proof {
    made: Vec<Checkpoint>,
    key: PublicKey,
}

impl Against {
    /// Reads the files; `None` when there is nothing to check against.
    ///
    /// # Errors
    /// A file cannot be read, holds no checkpoint or no key, or a signature does not fit.
    pub fn read(&self, context: &Context) -> Result<Option<Proof>, CliError> {
        let Some(file) = &self.checkpoint else {
            return Ok(None);
        };
        let made = Checkpoint::read_all(&read_file(file)?).map_err(failed)?;
        let of_data_dir = || server::public_key_path(&context.config.data_dir);
        let file = self.public_key.clone().unwrap_or_else(of_data_dir);
        let key = PublicKey::parse(&read_file(&file)?).ok_or_else(|| {
            CliError::Usage(format!(
                "{} holds no public key (64 hexadecimal digits); name the right file with --public-key",
                file.display()
            ))
        })?;
        for one in &made {
            one.check_signature(&key).map_err(failed)?;
        }
        Ok(Some(Proof { made, key }))
    }
}

impl Proof {
    /// That an open ledger goes through all of them.
    pub fn check(&self, ledger: &Ledger) -> Result<usize, String> {
        match ledger.check(&self.made, &self.key) {
            Ok(Ok(())) => Ok(self.made.len()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// That the ledger of a running gateway does, as it tells.
    ///
    /// # Errors
    /// The first that it does not go through.
    pub async fn ask(&self, context: &Context) -> Result<usize, CliError> {
        let client = context.client()?;
        let head = client.get("api/gateway/ledger/checkpoint", &[]).await?;
        let ledger = text(&head, "ledger").parse();
        let ledger = ledger.map_err(|_| CliError::Answer("it has no ledger id".to_owned()))?;
        let tail = head.get("seq").and_then(Value::as_u64).unwrap_or(0);
        for made in &self.made {
            let hash = match made.seq {
                0 => Some("0".repeat(64)),
                seq => {
                    let query = [
                        ("after_seq", (seq - 1).to_string()),
                        ("limit", "1".to_owned()),
                    ];
                    let page = client.get("api/gateway/ledger", &query).await?;
                    let hash = page.pointer("/items/0/record_hash");
                    hash.and_then(Value::as_str).map(str::to_owned)
                }
            };
            made.check_ledger(ledger, tail, hash.as_deref())
                .map_err(failed)?;
        }
        Ok(self.made.len())
    }
}

/// Prints the signed head.
pub async fn perform(context: &Context, options: OpenOptions) -> Result<Exit, CliError> {
    let made = if context.data_dir_given {
        let data_dir = context.config.data_dir.clone();
        let signed =
            tokio::task::spawn_blocking(move || server::sign_checkpoint(&data_dir, &options));
        let signed = signed
            .await
            .map_err(|error| CliError::Failed(error.to_string()))?
            .map_err(|error| CliError::Failed(super::serve::whole_story(&error)))?;
        json!(signed)
    } else {
        let path = "api/gateway/ledger/checkpoint";
        context.client()?.get(path, &[]).await?
    };
    // One line even on a terminal: the lines of a file of checkpoints.
    context.out.line(&made.to_string())?;
    Ok(Exit::Success)
}

fn read_file(path: &Path) -> Result<String, CliError> {
    let what = || format!("read {}", path.display());
    let size_bytes = std::fs::metadata(path).map_err(CliError::io(what()))?.len();
    if size_bytes > MAX_FILE_BYTES {
        let text = format!("{} has more than {MAX_FILE_BYTES} bytes", path.display());
        return Err(CliError::Usage(text));
    }
    std::fs::read_to_string(path).map_err(CliError::io(what()))
}

fn failed(error: CheckpointError) -> CliError {
    CliError::Failed(error.to_string())
}
