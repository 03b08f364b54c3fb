//! What containers say, copied into the services' logs as it comes: each line once, also when the engine or the gateway
//! was away meanwhile.

use std::time::Duration;

use bollard::query_parameters::LogsOptions;
use futures_util::StreamExt;
use smol_str::SmolStr;

use super::engine::{Docker, DockerError, LOOK};
use super::position::{Copied, Piece};
use crate::driver::blocking;

/// Between tries to read on after the engine broke off.
const AGAIN: Duration = Duration::from_secs(1);
/// Pieces that are there at once are written at once.
const PIECES_MAX: usize = 256;

/// Copies what a container says after the position, until it has ended.
pub async fn copy(docker: Docker, id: SmolStr, copied: Copied) {
    // What was said before it was adopted is known from now on.
    let mut copied = write(copied, &id).await;
    loop {
        docker.is_up().await;
        let Ok(client) = docker.client() else {
            continue;
        };
        let options = LogsOptions {
            follow: true,
            stdout: true,
            stderr: true,
            timestamps: true,
            since: i32::try_from(copied.since_s()).unwrap_or(0),
            ..LogsOptions::default()
        };
        copied.begin_again();
        let mut pieces = std::pin::pin!(client.logs(&id, Some(options)).ready_chunks(PIECES_MAX));
        let broke_off = loop {
            // A restart of the engine ends the stream like the container's end does.
            let Some(some) = pieces.next().await else {
                break !docker.state().up;
            };
            let mut failed = None;
            for piece in some {
                match piece {
                    Ok(piece) => copied.take(&piece.into_bytes()),
                    Err(error) => failed = Some(error),
                }
            }
            copied = write(copied, &id).await;
            if let Some(error) = failed {
                break matches!(docker.judge(error), DockerError::Down(_));
            }
        };
        if !broke_off {
            return;
        }
        tokio::time::sleep(AGAIN).await;
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
