//! What containers say, copied into the services' logs as it comes.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use bollard::query_parameters::LogsOptions;
use futures_util::StreamExt;
use smol_str::SmolStr;

use super::engine::Docker;
use crate::driver::blocking;

/// Between tries to read on after the engine broke off.
const AGAIN: Duration = Duration::from_secs(1);
/// Every line begins with the engine's time in RFC 3339 with nine digits of a second, then a space.
const TIME_CHARS: usize = 30;

/// Copies what a container has said since `since` (microseconds since the epoch) and says from now on, until it has ended.
pub async fn copy(docker: Docker, id: SmolStr, log: File, since: i64) {
    let mut last = String::new();
    let mut from_s = since.div_euclid(1_000_000);
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
            since: i32::try_from(from_s).unwrap_or(0),
            ..LogsOptions::default()
        };
        let mut lines = std::pin::pin!(client.logs(&id, Some(options)));
        let broke_off = loop {
            let bytes = match lines.next().await {
                Some(Ok(line)) => line.into_bytes(),
                Some(Err(error)) => {
                    break matches!(docker.judge(error), super::DockerError::Down(_));
                }
                // A restart of the engine ends the stream like the container's end does.
                None => break !docker.state().up,
            };
            let Some((time, text)) = split(&bytes) else {
                continue;
            };
            // Once more what was copied before the engine broke off.
            if time <= last.as_str() {
                continue;
            }
            last = time.to_owned();
            let Ok(mut file) = log.try_clone() else {
                return;
            };
            let text = text.to_vec();
            if blocking(move || file.write_all(&text)).await.is_err() {
                tracing::warn!(container.id = %id, "a container's output could not be written");
            }
        };
        if !broke_off {
            return;
        }
        from_s = seconds_of(&last).unwrap_or(from_s);
        tokio::time::sleep(AGAIN).await;
    }
}

fn split(line: &[u8]) -> Option<(&str, &[u8])> {
    let time = std::str::from_utf8(line.get(..TIME_CHARS)?).ok()?;
    Some((time, line.get(TIME_CHARS + 1..)?))
}

fn seconds_of(time: &str) -> Option<i64> {
    let parsed: jiff::Timestamp = time.parse().ok()?;
    Some(parsed.as_second())
}
