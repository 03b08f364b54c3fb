//! `rungate gpu`: the GPUs, what is used and reserved on them and for whom; a live view of that; and the end of a
//! quarantine.

mod keys;

use std::io::IsTerminal;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::Context;
use super::client::segment;
use super::error::{CliError, Exit};
use super::output::{holder, table, text};
use keys::Keys;

/// Moves to the top and clears what is below.
const CLEAR: &str = "\u{1b}[H\u{1b}[J";

/// What to do about GPUs; shows them when nothing is said.
#[derive(Args, Debug)]
pub(super) struct Gpu {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Watch the GPUs and their processes; q or Ctrl-C ends it
    Top(Top),
    /// End the quarantine of a GPU, so that it gets new instances again
    Release(Release),
}

#[derive(Args, Debug)]
struct Top {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
    /// End after so many looks
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

#[derive(Args, Debug)]
struct Release {
    /// As `rungate gpu` shows it
    #[arg(value_name = "UUID")]
    uuid: String,
}

impl Gpu {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        match self.verb {
            None => show(context).await,
            Some(Verb::Top(top)) => top.perform(context).await,
            Some(Verb::Release(release)) => release.perform(context).await,
        }
    }
}

async fn show(context: &Context) -> Result<Exit, CliError> {
    let answer = context.client()?.get("api/gateway/gpu", &[]).await?;
    context.out.show(&answer, words)?;
    Ok(Exit::Success)
}

impl Release {
    async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let path = format!("api/gateway/gpu/{}/release", segment(&self.uuid));
        let answer = context
            .client()?
            .post(&path, &serde_json::json!({}))
            .await?;
        let said = |_: &Value| format!("GPU {} gets new instances again", self.uuid);
        context.out.show(&answer, said)?;
        Ok(Exit::Success)
    }
}

impl Top {
    async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let is_between = self.interval.is_finite() && (0.1..=3_600.0).contains(&self.interval);
        if !is_between {
            let message = "--interval is between 0.1 and 3600 seconds";
            return Err(CliError::Usage(message.to_owned()));
        }
        let client = context.client()?;
        let is_live = !context.out.json && std::io::stdout().is_terminal();
        let mut keys = Keys::listen(is_live);
        let mut left = self.count.unwrap_or(u64::MAX);
        while left > 0 {
            let answer = client.get("api/gateway/gpu", &[]).await?;
            let clear = if is_live { CLEAR } else { "" };
            let frame = |answer: &Value| format!("{clear}{}", picture(answer));
            context.out.show(&answer, frame)?;
            left -= 1;
            if left == 0 {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs_f64(self.interval)) => {}
                () = keys.quit() => break,
            }
        }
        Ok(Exit::Success)
    }
}

fn words(answer: &Value) -> String {
    let gpus: Vec<&Value> = answer["gpus"].as_array().into_iter().flatten().collect();
    if gpus.is_empty() {
        let why = text(answer, "error");
        return match why.is_empty() {
            true => "no GPU".to_owned(),
            false => format!("no GPU: {why}"),
        };
    }
    let rows = gpus.into_iter().map(row).collect();
    table(
        &[
            "GPU",
            "UUID",
            "NAME",
            "SOURCE",
            "TOTAL_MIB",
            "RESERVED_MIB",
            "USED_MIB",
            "UTIL",
            "TEMP",
            "POWER",
            "HEALTH",
            "RESERVED FOR",
        ],
        rows,
    )
}

fn row(gpu: &Value) -> Vec<String> {
    let holders = gpu["reservations"].as_array().into_iter().flatten();
    let holders: Vec<String> = holders.map(holder).collect();
    let health = match gpu["quarantine"]["detail"].as_str() {
        Some(detail) => format!("{}: {}", text(gpu, "health"), super::output::plain(detail)),
        None => text(gpu, "health"),
    };
    vec![
        text(gpu, "index"),
        text(gpu, "uuid"),
        text(gpu, "name"),
        text(gpu, "source"),
        text(gpu, "memory_total_mb"),
        text(gpu, "memory_reserved_mb"),
        text(gpu, "memory_used_mb"),
        measured(gpu, "gpu_utilization_pct", "%"),
        measured(gpu, "temperature_c", "C"),
        measured(gpu, "power_draw_w", "W"),
        health,
        holders.join(", "),
    ]
}

/// A number with its unit; empty when it is not told.
fn measured(gpu: &Value, name: &str, unit: &str) -> String {
    match text(gpu, name) {
        number if number.is_empty() => number,
        number => format!("{number}{unit}"),
    }
}

/// The GPUs, and below them their processes.
fn picture(answer: &Value) -> String {
    let gpus = answer["gpus"].as_array().into_iter().flatten();
    let rows: Vec<Vec<String>> = gpus
        .flat_map(|gpu| {
            let processes = gpu["processes"].as_array().into_iter().flatten();
            processes.map(|process| {
                vec![
                    text(gpu, "index"),
                    text(process, "pid"),
                    text(process, "type"),
                    text(process, "memory_mb"),
                    holder(process),
                    text(process, "name"),
                ]
            })
        })
        .collect();
    let processes = match rows.is_empty() {
        true => "no processes".to_owned(),
        false => table(&["GPU", "PID", "TYPE", "MIB", "SERVICE", "PROCESS"], rows),
    };
    format!("{}\n\n{processes}\n", words(answer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_picture_has_the_gpus_and_their_processes() {
        let answer = json!({"gpus": [{
            "index": 0, "uuid": "GPU-a", "name": "Big", "source": "nvml", "memory_total_mb": 100, "memory_reserved_mb": 50,
            "memory_used_mb": 40, "gpu_utilization_pct": 7, "temperature_c": null, "power_draw_w": 55.5, "health": "quarantined",
            "quarantine": {"detail": "XID 79"}, "reservations": [{"service": "s"}],
            "processes": [{"pid": 7, "type": "C", "memory_mb": 40, "service": "s", "name": "python3"}]
        }]});
        let text = picture(&answer);
        for part in ["GPU-a", "7%", "55.5W", "quarantined: XID 79", "python3"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(
            picture(&json!({"gpus": [], "error": "why"})),
            "no GPU: why\n\nno processes\n"
        );
    }
}
