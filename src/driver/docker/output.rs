//! What containers say, copied into the services' logs as it comes: each line once, also when the engine or the gateway
//! was away meanwhile.

use std::time::Duration;

use bollard::query_parameters::LogsOptions;
use futures_util::StreamExt;
use smol_str::SmolStr;
use tokio::sync::oneshot;

use super::engine::{Docker, DockerError, LOOK};
use super::position::{Copied, Piece};
use crate::driver::blocking;

/// Between tries to read on after the engine broke off.
const AGAIN: Duration = Duration::from_secs(1);
/// Pieces that are there at once are written at once.
const PIECES_MAX: usize = 256;

/// Silence after which the engine is asked anew, twice as long each time: its stream may stand still for ever when it has
/// cut its own log meanwhile.
const SILENCE: Duration = Duration::from_secs(5);
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// Copies what a container says after the position, until it has ended, which `is_over` tells.
pub async fn copy(docker: Docker, id: SmolStr, copied: Copied, mut is_over: oneshot::Receiver<()>) {
    // What was said before it was adopted is known from now on.
    let mut copied = write(copied, &id).await;
    let (mut over, mut silence) = (false, SILENCE);
    loop {
        docker.is_up().await;
        let before = copied.progress();
        let told = (!over).then_some(&mut is_over);
        let read;
        (copied, read) = read_on(&docker, &id, copied, told, silence).await;
        silence = match copied.progress() == before {
            true => (silence * 2).min(SILENCE_MAX),
            false => SILENCE,
        };
        match read {
            Read::BrokeOff => tokio::time::sleep(AGAIN).await,
            Read::Silent => {}
            Read::Told => over = true,
            Read::Ended if over => return,
            Read::Ended => tokio::select! {
                _ = &mut is_over => over = true,
                () = tokio::time::sleep(AGAIN) => {}
            },
        }
    }
}

/// Why reading stopped.
enum Read {
    /// The engine went away.
    BrokeOff,
    Silent,
    /// The container has ended: what it said last is to be read, as a stream has not all of it.
    Told,
    Ended,
}

async fn read_on(
    docker: &Docker,
    id: &SmolStr,
    mut copied: Copied,
    is_over: Option<&mut oneshot::Receiver<()>>,
    silence: Duration,
) -> (Copied, Read) {
    let Ok(client) = docker.client() else {
        return (copied, Read::BrokeOff);
    };
    let options = LogsOptions {
        follow: is_over.is_some(),
        stdout: true,
        stderr: true,
        timestamps: true,
        since: i32::try_from(copied.since_s()).unwrap_or(0),
        ..LogsOptions::default()
    };
    copied.begin_again();
    let mut pieces = std::pin::pin!(client.logs(id, Some(options)).ready_chunks(PIECES_MAX));
    let told = async {
        match is_over {
            // By who waits no more, too.
            Some(is_over) => drop(is_over.await),
            None => std::future::pending().await,
        }
    };
    let mut told = std::pin::pin!(told);
    loop {
        let some = tokio::select! {
            biased;
            some = pieces.next() => some,
            () = &mut told => return (copied, Read::Told),
            () = tokio::time::sleep(silence) => return (copied, Read::Silent),
        };
        // A restart of the engine ends the stream like the container's end does.
        let Some(some) = some else {
            let read = if docker.state().up {
                Read::Ended
            } else {
                Read::BrokeOff
            };
            return (copied, read);
        };
        let mut failed = None;
        for piece in some {
            match piece {
                Ok(piece) => copied.take(&piece.into_bytes()),
                Err(error) => failed = Some(error),
            }
        }
        copied = write(copied, id).await;
        if let Some(error) = failed {
            let is_down = matches!(docker.judge(error), DockerError::Down(_));
            let read = if is_down { Read::BrokeOff } else { Read::Ended };
            return (copied, read);
        }
    }
}

async fn write(mut copied: Copied, id: &str) -> Copied {
    let (copied, written) = blocking(move || {
        let written = copied.write();
        (copied, written)
    })
    .await;
    if let Err(error) = written {
        tracing::warn!(container.id = id, %error, "a container's output could not be written");
    }
    copied
}

impl Docker {
    /// The last piece that a container has said until now; `None` when it has said nothing.
    pub(super) async fn last_said(&self, id: &str) -> Option<Piece> {
        let client = self.client().ok()?;
        let options = LogsOptions {
            stdout: true,
            stderr: true,
            timestamps: true,
            tail: "1".to_owned(),
            ..LogsOptions::default()
        };
        let last = async {
            let mut pieces = std::pin::pin!(client.logs(id, Some(options)));
            let mut last = None;
            while let Some(Ok(piece)) = pieces.next().await {
                last = Piece::of(&piece.into_bytes());
            }
            last
        };
        tokio::time::timeout(LOOK, last).await.ok()?
    }
}
