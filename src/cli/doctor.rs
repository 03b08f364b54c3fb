//! `rungate doctor`: looks at what a gateway needs from this machine and its settings; a sentence and a
//! remedy for each.

mod certificate;
mod engine;
mod security;

use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anstyle::{AnsiColor, Style};
use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::Context;
use super::client::Client;
use super::error::{CliError, Exit};
use super::output::{Out, text};
use super::serve::whole_story;
use crate::config::Config;

/// Free disk below which a ledger has little future, in bytes.
const LOW_DISK_BYTES: u64 = 1 << 30;
/// Free disk below which the gateway does not start, in bytes.
const NO_DISK_BYTES: u64 = 16 << 20;
/// Files that a gateway needs besides its connections: the ledger, logs of services, pipes.
const OTHER_FILES: u64 = 256;
/// No clock was right before this: 2025-01-01T00:00:00Z, in seconds.
const EARLIEST_S: u64 = 1_735_689_600;
/// How long a gateway may take to answer.
const LOOK: Duration = Duration::from_secs(3);
/// How far two clocks of one machine may be apart.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5);

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    Ok,
    Warning,
    Wrong,
}

/// One check's outcome.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    message: String,
    remedy: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            message: message.into(),
            remedy: None,
        }
    }

    fn warning(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Warning,
            message: message.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn wrong(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            level: Level::Wrong,
            ..Self::warning(check, message, remedy)
        }
    }
}

/// Options of `rungate doctor`.
#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// List the running gateway's containers and tell which are orphans, instead; changes nothing
    #[arg(long)]
    containers: bool,
}

pub(super) async fn perform(context: &Context, options: &Doctor) -> Result<Exit, CliError> {
    if options.containers {
        return engine::containers(context).await;
    }
    let config = &context.config;
    let mut findings = settings(config);
    findings.push(gpus(config));
    findings.push(data_dir(&config.data_dir));
    findings.extend(ledger_file(&config.data_dir));
    findings.extend(token_file(config));
    findings.push(disk(&config.data_dir, config.min_free_bytes));
    findings.extend(address(config).await);
    findings.push(clock(&config.data_dir));
    findings.push(open_files(config));
    findings.extend(security::findings(config));
    findings.push(engine::finding(config).await);
    report(context.out, &findings)
}

/// The settings cannot be used, so that nothing else can be looked at.
pub(super) fn broken_settings(json: bool, error: &CliError) -> Result<Exit, CliError> {
    let remedy = "correct it; `rungate config show --about` explains every setting";
    let finding = Finding::wrong("settings", error.to_string(), remedy);
    report(Out { json, quiet: false }, &[finding])
}

fn report(out: Out, findings: &[Finding]) -> Result<Exit, CliError> {
    let is_wrong = findings.iter().any(|finding| finding.level == Level::Wrong);
    if out.json {
        out.document(&json!({"ok": !is_wrong, "findings": findings}))?;
    } else {
        for finding in findings {
            out.line(&line(finding))?;
        }
    }
    Ok(if is_wrong {
        Exit::Failure
    } else {
        Exit::Success
    })
}

fn line(finding: &Finding) -> String {
    let (mark, colour) = match finding.level {
        Level::Ok => ("ok     ", AnsiColor::Green),
        Level::Warning => ("warning", AnsiColor::Yellow),
        Level::Wrong => ("WRONG  ", AnsiColor::Red),
    };
    let style = Style::new().fg_color(Some(colour.into()));
    let head = format!(
        "{style}{mark}{style:#} {}: {}",
        finding.check, finding.message
    );
    match &finding.remedy {
        Some(remedy) => format!("{head}\n        {remedy}"),
        None => head,
    }
}

fn settings(config: &Config) -> Vec<Finding> {
    if let Err(error) = super::config::check_texts(config) {
        let remedy = "correct it; `rungate config show --about` explains every setting";
        return vec![Finding::wrong("settings", error.to_string(), remedy)];
    }
    if config.warnings.is_empty() {
        return vec![Finding::ok("settings", "every setting can be used")];
    }
    let remedy = "correct or unset it; `rungate config show --about` lists all of them";
    config
        .warnings
        .iter()
        .map(|warning| Finding::warning("settings", warning.clone(), remedy))
        .collect()
}

fn gpus(config: &Config) -> Finding {
    let machine = crate::gpu::Machine::here(&config.nvml_library);
    match crate::gpu::inventory(&config.gpus, &machine) {
        Ok(inventory) if inventory.gpus.is_empty() => Finding::warning(
            "GPUs",
            inventory
                .reason
                .unwrap_or_else(|| "there are none".to_owned()),
            "services that need no GPU memory run all the same; --gpus sim:24GiB simulates one",
        ),
        Ok(inventory) => {
            let named = |gpu: &crate::domain::spec::GpuFacts| {
                format!("{} ({} MiB, {})", gpu.name, gpu.memory_mib, gpu.uuid)
            };
            let all: Vec<String> = inventory.gpus.iter().map(named).collect();
            Finding::ok("GPUs", format!("{}: {}", all.len(), all.join(", ")))
        }
        Err(error) => Finding::wrong("GPUs", error.to_string(), "correct RUNGATE_GPUS or --gpus"),
    }
}

fn data_dir(dir: &Path) -> Finding {
    let check = "data directory";
    let shown = dir.display();
    let metadata = match std::fs::metadata(dir) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return missing_data_dir(dir),
        Err(error) => {
            let remedy = "give this user the right to it, or choose another with --data-dir";
            return Finding::wrong(check, format!("{shown} cannot be read: {error}"), remedy);
        }
    };
    if !metadata.is_dir() {
        let remedy = "choose another with --data-dir";
        return Finding::wrong(check, format!("{shown} is not a directory"), remedy);
    }
    if tempfile::tempfile_in(dir).is_err() {
        let remedy =
            format!("give this user the right to write there: chown or chmod u+rwx {shown}");
        return Finding::wrong(check, format!("{shown} cannot be written to"), remedy);
    }
    let others = metadata.permissions().mode() & 0o077;
    if others != 0 {
        let can = if others & 0o022 != 0 {
            "write to"
        } else {
            "look into"
        };
        let remedy = format!("chmod 700 {shown}: every payload is in its ledger");
        return Finding::warning(check, format!("others can {can} {shown}"), remedy);
    }
    Finding::ok(check, format!("{shown} can be read and written"))
}

/// It will be made at the first start, if its nearest existing parent lets us.
fn missing_data_dir(dir: &Path) -> Finding {
    let parent = nearest_existing(dir);
    match tempfile::tempfile_in(&parent) {
        Ok(_) => Finding::ok(
            "data directory",
            format!("{} will be made at the first start", dir.display()),
        ),
        Err(error) => Finding::wrong(
            "data directory",
            format!("{} cannot be made: {error}", dir.display()),
            format!(
                "give this user the right to write to {}, or choose another with --data-dir",
                parent.display()
            ),
        ),
    }
}

fn nearest_existing(dir: &Path) -> PathBuf {
    dir.ancestors()
        .find(|ancestor| ancestor.is_dir())
        .map_or_else(|| PathBuf::from("."), Path::to_owned)
}

fn ledger_file(dir: &Path) -> Option<Finding> {
    let path = dir.join(crate::ledger::FILE_NAME);
    let metadata = std::fs::metadata(&path).ok()?;
    let own = rustix::process::geteuid().as_raw();
    Some(match metadata.uid() == own || own == 0 {
        true => Finding::ok(
            "ledger",
            format!(
                "{} has {} MiB; `rungate ledger verify` proves it",
                path.display(),
                metadata.len() >> 20
            ),
        ),
        false => Finding::wrong(
            "ledger",
            format!("{} belongs to another user", path.display()),
            "run the gateway as that user, or chown it",
        ),
    })
}

fn token_file(config: &Config) -> Option<Finding> {
    let path = config.bootstrap_token_path();
    let mode = std::fs::metadata(&path).ok()?.permissions().mode();
    Some(match mode & 0o077 {
        0 => Finding::ok("token", format!("{} is its owner's only", path.display())),
        _ => Finding::wrong(
            "token",
            format!(
                "others can read the administrator's token in {}",
                path.display()
            ),
            format!(
                "chmod 600 {}, and make a new one if somebody may have read it",
                path.display()
            ),
        ),
    })
}

fn disk(dir: &Path, reserve_bytes: u64) -> Finding {
    let check = "disk";
    let free = match rustix::fs::statvfs(nearest_existing(dir)) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(error) => {
            let remedy = "check that the file system is mounted";
            return Finding::wrong(
                check,
                format!("its free space cannot be told: {error}"),
                remedy,
            );
        }
    };
    let message = format!("{} MiB are free for {}", free >> 20, dir.display());
    let remedy = "free some space, or move the data directory with --data-dir";
    if free < NO_DISK_BYTES {
        Finding::wrong(check, message, remedy)
    } else if free < reserve_bytes {
        let short = format!(
            "{message}, and min_free_bytes keeps {} MiB: starts, progress and checkpoints are refused",
            reserve_bytes >> 20
        );
        Finding::wrong(check, short, format!("{remedy}; or lower min_free_bytes"))
    } else if free < LOW_DISK_BYTES {
        Finding::warning(check, message, remedy)
    } else {
        Finding::ok(check, message)
    }
}

/// The port is free, or a gateway answers there.
async fn address(config: &Config) -> Vec<Finding> {
    let check = "address";
    let listen = config.listen;
    let mut findings = Vec::new();
    if let Err(error) = crate::server::check_transport(config) {
        let remedy = "`rungate serve` would not start";
        findings.push(Finding::wrong("transport", whole_story(&error), remedy));
    } else if !listen.ip().is_loopback() && config.tls_cert.is_none() {
        findings.push(Finding::warning(
            "transport",
            format!("{listen} is reachable from other machines, unencrypted"),
            "give it a certificate (--tls-cert and --tls-key), or keep the network closed",
        ));
    }
    let alive = alive(config).await;
    findings.push(match (TcpListener::bind(listen), alive) {
        (Ok(_), _) => Finding::ok(check, format!("{listen} is free; no gateway runs there")),
        (Err(_), true) => Finding::ok(check, format!("a gateway answers on {listen}")),
        (Err(error), false) if error.kind() == ErrorKind::AddrInUse => Finding::wrong(
            check,
            format!("{listen} is taken by something that is no gateway"),
            "stop it, or choose another address with --listen or RUNGATE_LISTEN",
        ),
        (Err(error), false) => Finding::wrong(
            check,
            format!("{listen} cannot be listened on: {error}"),
            "choose an address of this machine and a port above 1023",
        ),
    });
    findings
}

async fn alive(config: &Config) -> bool {
    let mut address = config.listen;
    if address.ip().is_unspecified() {
        address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    if config.tls_cert.is_some() {
        // Its certificate is for a name, not for this address: that it answers must do.
        let answer = tokio::net::TcpStream::connect(address);
        return matches!(tokio::time::timeout(LOOK, answer).await, Ok(Ok(_)));
    }
    let Ok(base) = format!("http://{address}/").parse() else {
        return false;
    };
    let Ok(client) = Client::with_token(base, None) else {
        return false;
    };
    let health = client.get("health", &[]);
    // A listener that never answers is no gateway.
    match tokio::time::timeout(LOOK, health).await {
        Ok(Ok(answer)) => text(&answer, "status") == "ok",
        _ => false,
    }
}

fn clock(dir: &Path) -> Finding {
    let check = "clock";
    let now = SystemTime::now();
    let earliest = SystemTime::UNIX_EPOCH + Duration::from_secs(EARLIEST_S);
    let remedy = "set the clock and keep it right: timedatectl set-ntp true";
    if now < earliest {
        return Finding::wrong(check, "the machine's clock is years behind", remedy);
    }
    // The last write to the ledger came from an earlier reading of the same clock.
    let written = std::fs::metadata(dir.join(crate::ledger::FILE_NAME))
        .and_then(|metadata| metadata.modified());
    match written {
        Ok(written) if written > now + CLOCK_TOLERANCE => Finding::warning(
            check,
            "the clock was set back: the ledger was written later than now",
            remedy,
        ),
        _ => Finding::ok(check, "the machine's clock is plausible"),
    }
}

fn open_files(config: &Config) -> Finding {
    let check = "open files";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let needed = config.max_connections + OTHER_FILES;
    match limit {
        Some(limit) if limit < needed => Finding::warning(
            check,
            format!(
                "this process may open {limit} files; {} connections need {needed}",
                config.max_connections
            ),
            format!("ulimit -n {needed} (LimitNOFILE= under systemd), or lower max_connections"),
        ),
        Some(limit) => Finding::ok(check, format!("this process may open {limit} files")),
        None => Finding::ok(check, "this process may open any number of files"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_others_see_or_write_to_is_warned_about() {
        let dir = tempfile::tempdir().unwrap();
        for (mode, level) in [
            (0o700, Level::Ok),
            (0o755, Level::Warning),
            (0o777, Level::Warning),
        ] {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(dir.path(), mode).unwrap();
            assert_eq!(data_dir(dir.path()).level, level);
        }
        assert_eq!(data_dir(&dir.path().join("a/b")).level, Level::Ok);
        assert_eq!(data_dir(Path::new("/dev/null")).level, Level::Wrong);
    }
}
