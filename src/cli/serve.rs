//! `rungate serve`: runs the gateway until TERM or INT; a second signal ends it at once.

use std::path::PathBuf;

use clap::Args;
use futures_util::future::select_all;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::error::{CliError, Exit};
use super::{Context, logs};

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  rungate serve
  rungate serve --listen 127.0.0.1:9000 --data-dir /var/lib/rungate
  rungate serve --gpus sim:24GiB,24GiB
  rungate serve --listen 0.0.0.0:8443 --tls-cert gate.pem --tls-key gate.key --allowed-host gate.example

The first start writes the administrator's token to <data-dir>/auth/bootstrap-admin-token.
TERM or Ctrl-C stops in good order, a second one at once. `rungate config show` lists every setting.")]
pub struct Serve {
    /// Address and port to listen on (127.0.0.1:8080)
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// GPUs to simulate, e.g. sim:24GiB,24GiB
    #[arg(long, value_name = "GPUS")]
    gpus: Option<String>,
    /// Host name that requests may be addressed to, as often as wanted
    #[arg(long = "allowed-host", value_name = "NAME")]
    allowed_hosts: Vec<String>,
    /// Origin of browser pages that may call, as often as wanted
    #[arg(long = "allowed-origin", value_name = "ORIGIN")]
    allowed_origins: Vec<String>,
    /// Certificate chain to show, in PEM form; HUP reads it again
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Speak plain http to other machines too: tokens and payloads can be read on the way
    #[arg(long)]
    insecure_http: bool,
    /// Log filter, e.g. debug
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

impl Serve {
    /// The flags that were given, as settings.
    pub(super) fn flags(&self, flag: &mut impl FnMut(&'static str, &'static str, Option<String>)) {
        let list = |members: &[String]| (!members.is_empty()).then(|| members.join(","));
        flag("listen", "--listen", self.listen.clone());
        flag("gpus", "--gpus", self.gpus.clone());
        flag("allowed_hosts", "--allowed-host", list(&self.allowed_hosts));
        flag(
            "allowed_origins",
            "--allowed-origin",
            list(&self.allowed_origins),
        );
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        flag("tls_cert", "--tls-cert", path(&self.tls_cert));
        flag("tls_key", "--tls-key", path(&self.tls_key));
        let insecure = self.insecure_http.then(|| "true".to_owned());
        flag("insecure_http", "--insecure-http", insecure);
        flag("log", "--log", self.log.clone());
        flag("log_format", "--log-format", self.log_format.clone());
    }
}

pub(super) async fn perform(context: Context) -> Result<Exit, CliError> {
    let Context { out, config, .. } = context;
    logs::start(&config.log, config.log_format)?;
    for warning in &config.warnings {
        tracing::warn!(warning, "a setting may not be meant");
    }
    let shutdown = CancellationToken::new();
    let _signals = cancel_on_signals(&shutdown, &STOPPING)?;
    let (ready, is_ready) = oneshot::channel();
    let greeting = async {
        if let Ok(ready) = is_ready.await {
            greet(out, &ready);
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        served = crate::server::serve(config, Some(ready), shutdown) => {
            served.map_err(|error| CliError::Failed(whole_story(&error)))?;
        }
        () = greeting => {}
    }
    Ok(Exit::Success)
}

fn greet(out: super::Out, ready: &crate::server::Ready) {
    let crate::server::Ready {
        addr,
        is_tls,
        token_path,
    } = ready;
    let scheme = if *is_tls { "https" } else { "http" };
    out.note(&format!(
        "Rungate listens on {scheme}://{addr}\nthe administrator's token is in {}",
        token_path.display()
    ));
    if !addr.ip().is_loopback() && !is_tls {
        out.note(
            "warning: other machines can reach it, unencrypted; give it a certificate (--tls-cert)",
        );
    }
}

/// An error with its causes, as one sentence.
pub(super) fn whole_story(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(&format!(": {source}"));
        cause = source.source();
    }
    text
}

/// Ends its task when dropped.
pub(super) struct Signals(AbortHandle);

impl Drop for Signals {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What stops a program in good order.
pub(super) const STOPPING: [SignalKind; 2] = [SignalKind::interrupt(), SignalKind::terminate()];

/// Cancels `shutdown` at the first of these signals; the second one ends the process.
///
/// # Errors
/// Signals cannot be listened for.
pub(super) fn cancel_on_signals(
    shutdown: &CancellationToken,
    kinds: &[SignalKind],
) -> Result<Signals, CliError> {
    let listen = |kind: &SignalKind| signal(*kind).map_err(CliError::io("listen for signals"));
    let mut signals: Vec<_> = kinds.iter().map(listen).collect::<Result<_, _>>()?;
    let shutdown = shutdown.clone();
    let task = tokio::spawn(async move {
        loop {
            select_all(signals.iter_mut().map(|signal| Box::pin(signal.recv()))).await;
            if shutdown.is_cancelled() {
                std::process::exit(Exit::Interrupted as i32);
            }
            tracing::info!("stopping; a second signal stops at once");
            shutdown.cancel();
        }
    });
    Ok(Signals(task.abort_handle()))
}
