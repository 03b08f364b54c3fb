//! Takes the GPU memory of an instance's processes to the host and gives it back, with the vendor's program
//! `cuda-checkpoint` (driver 570 and up): lock, checkpoint; restore, unlock, each by pid.
//!
//! It cannot lock threads that are frozen, and would wait for them: a process that is stopped, or whose control group is
//! frozen (a container that is paused), is refused before the program is run.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::{Instant, timeout_at};

use super::freezer;
use super::process;
use super::procfs;
use super::{Driver, blocking};
use crate::domain::ids::{Generation, ServiceName};

/// What undoing a half-done step may take for each process.
const UNDO_LIMIT: Duration = Duration::from_secs(5);
/// How much of the program's complaint is kept.
const COMPLAINT_MAX_CHARS: usize = 300;

/// Why GPU memory was not taken or given back.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    #[error("the program '{program}' cannot be run ({error}); set cuda_checkpoint")]
    NoProgram { program: String, error: String },
    #[error("none of its processes uses CUDA")]
    NoProcess,
    #[error("process {pid} is stopped; continue it first (kill -CONT {pid})")]
    Stopped { pid: u32 },
    #[error("the control group of process {pid} is frozen; is its container paused?")]
    Frozen { pid: u32 },
    #[error("{program} --action {action} for process {pid} took too long")]
    TimedOut {
        program: String,
        action: &'static str,
        pid: u32,
    },
    #[error("{program} --action {action} for process {pid}: {error}")]
    Refused {
        program: String,
        action: &'static str,
        pid: u32,
        error: String,
    },
}

impl Driver {
    /// Takes the memory of every CUDA process of an instance, but for those whose memory is taken; when one cannot be done,
    /// gives back what was taken.
    pub async fn take_cuda(
        &self,
        service: &ServiceName,
        generation: Generation,
        limit: Instant,
    ) -> Result<(), CudaError> {
        let all = self.cuda_processes(service, generation, limit).await?;
        let running = in_state(&all, &["running"]);
        for &pid in &running {
            if procfs::stat(pid).is_some_and(|stat| matches!(stat.state, 'T' | 't')) {
                return Err(CudaError::Stopped { pid });
            }
        }
        let unfinished = in_state(&all, &["running", "locked"]);
        let done = self
            .act([("lock", &running), ("checkpoint", &unfinished)], limit)
            .await;
        if done.is_err() {
            let pids: Vec<u32> = all.into_iter().map(|(pid, _)| pid).collect();
            self.undo(&pids).await;
        }
        done
    }

    /// Gives the memory back that `take_cuda` took.
    pub async fn give_cuda(
        &self,
        service: &ServiceName,
        generation: Generation,
        limit: Instant,
    ) -> Result<(), CudaError> {
        let all = self.cuda_processes(service, generation, limit).await?;
        let taken = in_state(&all, &["checkpointed"]);
        let locked = in_state(&all, &["checkpointed", "locked"]);
        self.act([("restore", &taken), ("unlock", &locked)], limit)
            .await
    }

    /// Each action for its processes, until one fails.
    async fn act(
        &self,
        actions: [(&'static str, &Vec<u32>); 2],
        limit: Instant,
    ) -> Result<(), CudaError> {
        for (action, pids) in actions {
            for &pid in pids {
                self.cuda(action, pid, limit).await?;
            }
        }
        Ok(())
    }

    /// Leaves no process locked: it could not even end in good order.
    async fn undo(&self, pids: &[u32]) {
        for &pid in pids {
            let limit = Instant::now() + UNDO_LIMIT;
            let state = self.cuda_state(pid, limit).await.unwrap_or_default();
            let actions: &[&'static str] = match state.as_str() {
                "checkpointed" => &["restore", "unlock"],
                "locked" => &["unlock"],
                _ => &[],
            };
            for action in actions {
                if let Err(error) = self.cuda(action, pid, limit).await {
                    tracing::warn!(process.pid = pid, %error, "a CUDA process could not be unlocked");
                }
            }
        }
    }

    /// The processes of an instance that use CUDA, with their states: some may be where they are to be already, as a gateway
    /// that was killed left them.
    async fn cuda_processes(
        &self,
        service: &ServiceName,
        generation: Generation,
        limit: Instant,
    ) -> Result<Vec<(u32, String)>, CudaError> {
        let mark = self.shared.mark(service, generation);
        let look = move || {
            let members = process::members(&mark);
            let frozen = members.iter().copied().find(|&pid| freezer::is_frozen(pid));
            (members, frozen)
        };
        let (members, frozen) = blocking(look).await;
        // Even the question for its state would not be answered.
        if let Some(pid) = frozen {
            return Err(CudaError::Frozen { pid });
        }
        let mut all = Vec::new();
        for pid in members {
            match self.cuda_state(pid, limit).await {
                Ok(state) => all.push((pid, state)),
                Err(error @ CudaError::NoProgram { .. }) => return Err(error),
                Err(_) => {}
            }
        }
        match in_state(&all, &["running", "locked", "checkpointed"]).is_empty() {
            true => Err(CudaError::NoProcess),
            false => Ok(all),
        }
    }

    async fn cuda_state(&self, pid: u32, limit: Instant) -> Result<String, CudaError> {
        let pid_text = pid.to_string();
        let arguments = ["--get-state", "--pid", &pid_text];
        self.run_cuda("get-state", pid, &arguments, limit).await
    }

    async fn cuda(&self, action: &'static str, pid: u32, limit: Instant) -> Result<(), CudaError> {
        let pid_text = pid.to_string();
        let left = limit.saturating_duration_since(Instant::now()).as_millis();
        let left_ms = left.max(1).to_string();
        let mut arguments = vec!["--action", action, "--pid", &pid_text];
        if action == "lock" {
            // Without one it would wait for ever, and nothing could be done about it.
            arguments.extend(["--timeout", &left_ms]);
        }
        self.run_cuda(action, pid, &arguments, limit).await?;
        Ok(())
    }

    /// What the program prints, without white space around it.
    async fn run_cuda(
        &self,
        action: &'static str,
        pid: u32,
        arguments: &[&str],
        limit: Instant,
    ) -> Result<String, CudaError> {
        let program = self.shared.cuda_checkpoint.clone();
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .env_clear()
            .stdin(Stdio::null())
            .kill_on_drop(true);
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        let output = match timeout_at(limit, command.output()).await {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => {
                let error = error.to_string();
                return Err(CudaError::NoProgram { program, error });
            }
            Err(_) => {
                return Err(CudaError::TimedOut {
                    program,
                    action,
                    pid,
                });
            }
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        let complaint = String::from_utf8_lossy(&output.stderr);
        Err(CudaError::Refused {
            program,
            action,
            pid,
            error: complaint.trim().chars().take(COMPLAINT_MAX_CHARS).collect(),
        })
    }
}

fn in_state(all: &[(u32, String)], states: &[&str]) -> Vec<u32> {
    let mut found = all.to_vec();
    found.retain(|(_, state)| states.contains(&state.as_str()));
    found.into_iter().map(|(pid, _)| pid).collect()
}
