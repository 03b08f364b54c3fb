//! What the demo asks for: the services, and jobs over the given files, paced so that there is
//! something to see.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::cli::client::Client;
use crate::cli::error::CliError;

/// Both services; with 16 GiB each they cannot be loaded together.
pub const SERVICES: [&str; 2] = ["text-stats", "text-digest"];
/// The texts read when no files are given.
const TEXTS: &[(&str, &str)] = &[
    (
        "command-line.md",
        include_str!("../../../docs/command-line.md"),
    ),
    (
        "configuration.md",
        include_str!("../../../docs/configuration.md"),
    ),
];
/// Jobs of each service, and how long one of them lasts, in milliseconds.
const STATS_JOBS: usize = 6;
const STATS_MS: u64 = 2_000;
const DIGEST_JOBS: usize = 5;
const DIGEST_MS: u64 = 1_000;
/// Priorities: the urgent job is three levels ahead, which is more than the gap that preempts.
const STEADY: u8 = 4;
const URGENT: u8 = 1;
/// Chunks that a job's text is cut into.
const CHUNKS: u64 = 40;
/// Shortest text of a job: shorter ones are read several times, so that there are chunks at all.
const MIN_BYTES: u64 = 2_048;
/// Longest texts together: the demo is over in half a minute on a slow machine too.
const MAX_BYTES: u64 = 32 << 20;
/// Most files.
const MAX_FILES: usize = 1_000;

/// All jobs.
pub struct Plan {
    pub jobs: Vec<Job>,
}

/// One job.
pub struct Job {
    pub name: String,
    pub urgent: bool,
    pub files: Vec<PathBuf>,
    service_type: &'static str,
    chunk_bytes: u64,
    delay_ms: u64,
}

impl Plan {
    /// Spreads `files`, or the shipped texts written to `dir`, over the jobs.
    ///
    /// # Errors
    /// A file that cannot be read, too many, too large, or all empty.
    pub fn new(files: &[PathBuf], dir: &Path) -> Result<Self, CliError> {
        let files = match files.is_empty() {
            true => write_texts(dir)?,
            false => absolute(files)?,
        };
        if files.len() > MAX_FILES {
            let text = format!("the demo reads at most {MAX_FILES} files");
            return Err(CliError::Usage(text));
        }
        let mut sized = Vec::new();
        for path in files {
            let what = format!("read {}", path.display());
            let metadata = std::fs::metadata(&path).map_err(CliError::io(what))?;
            if !metadata.is_file() {
                let text = format!("{} is not a regular file", path.display());
                return Err(CliError::Usage(text));
            }
            sized.push((path, metadata.len()));
        }
        sized.retain(|(_, size)| *size > 0);
        let total: u64 = sized.iter().map(|(_, size)| size).sum();
        match total {
            0 => Err(CliError::Usage("the files are empty".to_owned())),
            1..=MAX_BYTES => Ok(Self { jobs: jobs(&sized) }),
            _ => {
                let text = format!("the demo reads at most {} MiB", MAX_BYTES >> 20);
                Err(CliError::Usage(text))
            }
        }
    }
}

fn jobs(files: &[(PathBuf, u64)]) -> Vec<Job> {
    let [stats, digest] = SERVICES;
    let steady = (1..=STATS_JOBS)
        .map(|n| (format!("stats-{n}"), stats, STATS_MS))
        .chain((1..=DIGEST_JOBS).map(|n| (format!("digest-{n}"), digest, DIGEST_MS)));
    let all: Vec<_> = steady
        .chain([("URGENT".to_owned(), digest, DIGEST_MS)])
        .collect();
    let count = all.len();
    all.into_iter()
        .enumerate()
        .map(|(index, (name, service_type, duration_ms))| {
            // Every file is read, and every job reads one.
            let first = index % files.len();
            let mut own: Vec<_> = files[first..].iter().step_by(count).cloned().collect();
            while own.iter().map(|(_, size)| size).sum::<u64>() < MIN_BYTES {
                own.push(own[0].clone());
            }
            let total: u64 = own.iter().map(|(_, size)| size).sum();
            Job {
                urgent: index + 1 == count,
                name,
                service_type,
                chunk_bytes: total.div_ceil(CHUNKS),
                delay_ms: (duration_ms / (CHUNKS + own.len() as u64)).max(1),
                files: own.into_iter().map(|(path, _)| path).collect(),
            }
        })
        .collect()
}

fn absolute(files: &[PathBuf]) -> Result<Vec<PathBuf>, CliError> {
    let absolute = |path: &PathBuf| {
        let what = format!("read {}", path.display());
        std::fs::canonicalize(path).map_err(CliError::io(what))
    };
    files.iter().map(absolute).collect()
}

fn write_texts(dir: &Path) -> Result<Vec<PathBuf>, CliError> {
    let write = |(name, text): &(&str, &str)| {
        let path = dir.join(name);
        let what = format!("write {}", path.display());
        std::fs::write(&path, text).map_err(CliError::io(what))?;
        Ok(path)
    };
    TEXTS.iter().map(write).collect()
}

impl Job {
    /// Starts it as a run that is labelled with its name.
    pub async fn submit(&self, client: &Client) -> Result<(), CliError> {
        let body = json!({
            "job": {
                "service_type": self.service_type,
                "priority": if self.urgent { URGENT } else { STEADY },
                "payload": {
                    "operation": "stats",
                    "files": self.files,
                    "chunk_bytes": self.chunk_bytes,
                    "delay_ms": self.delay_ms,
                },
            },
            "session_id": "demo",
            "labels": {"name": self.name},
        });
        client.post("api/gateway/runs/start", &body).await?;
        Ok(())
    }
}

/// Registers both services: this very program as `rungate worker`.
pub async fn register(client: &Client) -> Result<(), CliError> {
    let program = std::env::current_exe().map_err(CliError::io("find this program"))?;
    for service in SERVICES {
        let body = json!({
            "name": service,
            "container": service,
            "type": service,
            "port": 0,
            "vram_gb": 16,
            "description": "text statistics in chunks",
            "command": [program, "worker"],
            "env": {
                "RUNGATE_GATEWAY_URL": client.base().as_str(),
                "RUNGATE_CONFIG": "/dev/null",
            },
            "concurrency": 2,
            "cancel_path": "/cancel",
            "progress_mode": "queue",
            "grace_seconds": 2,
            "startup_timeout_seconds": 10,
            "min_runtime_seconds": 0.5,
        });
        client.post("api/gateway/services/register", &body).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_read_and_every_job_has_enough_to_read() {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<PathBuf> = (0..30).map(|n| dir.path().join(n.to_string())).collect();
        for file in &files {
            std::fs::write(file, "some words\n").unwrap();
        }
        let plan = Plan::new(&files, dir.path()).unwrap();
        for file in absolute(&files).unwrap() {
            assert!(
                plan.jobs.iter().any(|job| job.files.contains(&file)),
                "{file:?}"
            );
        }
        assert!(plan.jobs.iter().all(|job| job.files.len() * 11 >= 2_048));
        assert_eq!(plan.jobs.iter().filter(|job| job.urgent).count(), 1);
    }

    #[test]
    fn empty_files_are_refused_before_anything_is_started() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let plan = Plan::new(&[file.path().to_owned()], Path::new("/nonexistent"));
        assert!(matches!(plan, Err(CliError::Usage(_))));
    }
}
