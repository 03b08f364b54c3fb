//! The demo's own gateway: in this process, on a free port, in a directory of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cli::client::{Client, read_token};
use crate::cli::error::CliError;
use crate::cli::serve::whole_story;
use crate::config::{Config, Sources};
use crate::server::{self, Ready, ServeError};

use super::jobs;

/// How long the gateway may take to be ready, and to stop.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Gateway {
    client: Client,
    token_path: PathBuf,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Gateway {
    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start(data_dir: &Path) -> Result<Self, CliError> {
        let config = settings(data_dir)?;
        let shutdown = CancellationToken::new();
        let (ready, is_ready) = oneshot::channel();
        let mut task = tokio::spawn(server::serve(config, Some(ready), shutdown.clone()));
        let Ready {
            addr, token_path, ..
        } = tokio::select! {
            Ok(ready) = is_ready => ready,
            ended = &mut task => return Err(why(ended)),
            () = tokio::time::sleep(PATIENCE) => {
                return Err(CliError::Failed("the gateway did not come up".to_owned()));
            }
        };
        let token = read_token(&token_path).map_err(CliError::io("read the token"))?;
        let base = format!("http://{addr}/")
            .parse()
            .map_err(|error| CliError::Failed(format!("{addr} is no address: {error}")))?;
        Ok(Self {
            client: Client::with_token(base, Some(token))?,
            token_path,
            shutdown,
            task,
        })
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Stops the services, then the gateway.
    ///
    /// # Errors
    /// The gateway failed on its way down.
    pub async fn stop(mut self) -> Result<(), CliError> {
        // A gateway that stops leaves its services running, to adopt them at its next start. Disabled
        // first: else the jobs that still wait would start one again.
        for verb in ["disable", "stop"] {
            for service in jobs::SERVICES {
                let path = format!("api/gateway/services/{service}/{verb}");
                let query = match verb {
                    "stop" => vec![("drain", "false".to_owned())],
                    _ => Vec::new(),
                };
                let call = self.client.call(reqwest::Method::POST, &path, &query, None);
                // One that was never registered or started cannot be stopped, and need not be.
                let _ = tokio::time::timeout(PATIENCE, call).await;
            }
        }
        self.shutdown.cancel();
        match tokio::time::timeout(PATIENCE, &mut self.task).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(ended) => Err(why(ended)),
            Err(_) => {
                self.task.abort();
                Err(CliError::Failed("the gateway did not stop".to_owned()))
            }
        }
    }

    /// What to type to look at it.
    pub fn how_to_look(&self) -> String {
        let base = self.client.base().as_str().trim_end_matches('/');
        let token = self.token_path.display();
        format!(
            "\nthe gateway goes on serving until Ctrl-C. In another terminal:\n\n\
             \x20 export RUNGATE_URL={base} RUNGATE_TOKEN_FILE={token}\n\
             \x20 rungate run list\n\
             \x20 rungate service list\n\
             \x20 rungate ledger follow --after 0\n\n\
             \x20 curl -H \"Authorization: Bearer $(cat {token})\" {base}/api/gateway/runs\n\
             \x20 curl -N -H \"Authorization: Bearer $(cat {token})\" {base}/api/gateway/ledger/stream\n"
        )
    }
}

fn settings(data_dir: &Path) -> Result<Config, CliError> {
    let flags: &[(&str, &str)] = &[
        ("listen", "127.0.0.1:0"),
        ("gpus", "sim:24GiB"),
        // A demonstration of seconds has no time for the patience of production.
        ("min_runtime_ms", "500"),
        ("swap_max_wait_ms", "4000"),
        ("restart_base_ms", "100"),
        ("retry_base_ms", "200"),
        ("shutdown_limit_ms", "2000"),
    ];
    let mut sources = Sources {
        flags: flags
            .iter()
            .map(|(key, value)| (*key, "demo", (*value).to_owned()))
            .collect(),
        // The user's own settings are for the user's own gateway.
        environment: BTreeMap::new(),
        file: Some(PathBuf::from("/dev/null")),
    };
    let data_dir = data_dir.display().to_string();
    sources.flags.push(("data_dir", "demo", data_dir));
    Ok(Config::load(&sources)?)
}

fn why(ended: Result<Result<(), ServeError>, tokio::task::JoinError>) -> CliError {
    CliError::Failed(match ended {
        Ok(Ok(())) => "the gateway ended".to_owned(),
        Ok(Err(error)) => format!("the gateway failed: {}", whole_story(&error)),
        Err(error) => format!("the gateway failed: {error}"),
    })
}
