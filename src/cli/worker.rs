//! `rungate worker`: runs the example service.

use std::net::{Ipv4Addr, SocketAddr};

use clap::Args;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::client::{read_token, trusted};
use super::error::{CliError, Exit};
use super::{Context, logs, serve};
use crate::worker::Gateway;

#[derive(Args, Debug)]
#[command(after_help = "\
Serves GET /health, POST /process, /cancel, /checkpoint, /sleep and /wake_up, and GET /is_sleeping on
127.0.0.1; SIGUSR1 saves a checkpoint of every job. A payload is
  {\"files\": [PATH…], \"chunk_bytes\": N, \"delay_ms\": N, \"checkpoint_ms\": N}     text statistics, in chunks
  {\"operation\": \"sleep\", \"ms\": N}    {\"operation\": \"fail\"}    {\"operation\": \"exit\", \"code\": N}

Progress and checkpoints go to RUNGATE_GATEWAY_URL with the token that each job brings along, else with
that of RUNGATE_TOKEN_FILE.

Example:
  rungate service register text-stats --type text-stats --vram-gb 16 --concurrency 2 \\
    --cancel-path /cancel --env RUNGATE_GATEWAY_URL=http://127.0.0.1:8080 -- /path/to/rungate worker")]
pub struct Worker {
    /// Port to listen on
    #[arg(long, env = "PORT")]
    port: u16,
    /// Gateway that progress and checkpoints go to
    #[arg(long, env = "RUNGATE_GATEWAY_URL", value_name = "URL")]
    gateway: Option<Url>,
}

impl Worker {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let config = &context.config;
        logs::start(&config.log, config.log_format)?;
        let token = match (config.token.reveal(), &config.token_file) {
            (Some(token), _) => Some(token.into()),
            (None, Some(path)) => {
                let what = format!("read the token file {}", path.display());
                Some(read_token(path).map_err(CliError::io(what))?)
            }
            (None, None) => None,
        };
        let gateway = Gateway::new(self.gateway, token, trusted(config)?)
            .map_err(|error| CliError::Failed(error.to_string()))?;
        let shutdown = CancellationToken::new();
        let _signals = serve::cancel_on_signals(&shutdown, &serve::STOPPING)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        crate::worker::serve(address, gateway, shutdown)
            .await
            .map_err(CliError::io(format!("serve on {address}")))?;
        Ok(Exit::Success)
    }
}
