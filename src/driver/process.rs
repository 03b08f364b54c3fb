//! One process of an instance: spawned by us or found again after the gateway died. Knows how to await
//! its end, to signal all that descends from it, and to tell how it ended. When to do so is `instance`'s.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open,
    pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::credentials::VARIABLE as TOKEN_FILE_VARIABLE;
use super::mps;
use super::procfs::{self, MARK_VARIABLE, Mark};
use crate::domain::event::Exit;
use crate::domain::spec::Grant;

/// What a service gets of the gateway's own environment. All else, tokens above all, stays with the gateway.
const INHERITED: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];

/// Pauses between looks for descendants that have not gone yet: first and longest.
const GONE_FIRST: Duration = Duration::from_millis(20);
const GONE_MAX: Duration = Duration::from_secs(2);

/// What a process is started with.
pub(super) struct Spawn<'a> {
    pub mark: Mark,
    pub command: &'a [String],
    pub env: &'a [(String, String)],
    pub working_dir: Option<&'a Path>,
    pub port: u16,
    pub grants: &'a [Grant],
    /// Percent of a GPU's threads that it may use under MPS.
    pub mps_percent: Option<u8>,
    /// Where its token lies.
    pub token_file: &'a Path,
    /// Open for appending: the service writes to it itself, so that it outlives the gateway.
    pub log: std::fs::File,
}

/// Why a process never came to be.
#[derive(Debug, thiserror::Error)]
pub(super) enum SpawnError {
    #[error("its command is empty")]
    NoCommand,
    #[error("its working directory {0} does not exist")]
    NoWorkingDir(String),
    #[error("cannot start '{command}'")]
    Exec { command: String, source: io::Error },
    #[error("cannot watch its process")]
    Watch { source: io::Error },
}

/// The leader of an instance's process group, alive or ended but not yet reaped.
#[derive(Debug)]
pub(super) struct Process {
    pub pid: u32,
    pub start_ticks: u64,
    pub port: u16,
    mark: Mark,
    leader: Pid,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Starts a process in a group of its own. Blocks for the fork and exec; needs a runtime's context.
    pub fn spawn(spawn: Spawn<'_>) -> Result<Process, SpawnError> {
        let (program, arguments) = spawn.command.split_first().ok_or(SpawnError::NoCommand)?;
        if let Some(dir) = spawn.working_dir.filter(|dir| !dir.is_dir()) {
            return Err(SpawnError::NoWorkingDir(dir.display().to_string()));
        }
        let exec = |source| SpawnError::Exec {
            command: program.clone(),
            source,
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .process_group(0)
            .stdin(Stdio::null());
        command
            .stdout(spawn.log.try_clone().map_err(exec)?)
            .stderr(spawn.log);
        if let Some(dir) = spawn.working_dir {
            command.current_dir(dir);
        }
        command.env_clear().envs(environment(
            &spawn.mark,
            spawn.env,
            spawn.port,
            (spawn.grants, spawn.mps_percent),
            spawn.token_file,
        ));
        let mut child = command.spawn().map_err(exec)?;
        // Until it is reaped, which only `reap` does, its pid cannot be anyone else's.
        let start_ticks = procfs::stat(child.id()).map_or(0, |stat| stat.start_ticks);
        Process::watch(child.id(), start_ticks, spawn.port, spawn.mark).map_err(|source| {
            let _ = child.kill();
            let _ = child.wait();
            SpawnError::Watch { source }
        })
    }

    /// Takes over a process that is alive, leads its group, and is the one that `start_ticks` tells of.
    pub fn open(pid: u32, start_ticks: u64, port: u16, mark: Mark) -> Option<Process> {
        let process = Process::watch(pid, start_ticks, port, mark).ok()?;
        // Looked at after the pidfd was opened: from here on the pidfd is this process and no later one.
        let stat = procfs::stat(pid)?;
        let same =
            stat.start_ticks == start_ticks && stat.process_group == pid && !stat.is_zombie();
        same.then_some(process)
    }

    /// Looks for the leader of a marked process group: the oldest, for a descendant may lead a group of its own.
    pub fn find(mark: &Mark) -> Option<Process> {
        let mut leaders = procfs::marked_by(mark.ledger);
        leaders.retain(|found| found.mark == *mark && found.stat.process_group == found.pid);
        leaders.sort_unstable_by_key(|found| (found.stat.start_ticks, found.pid));
        leaders.into_iter().find_map(|found| {
            Process::open(
                found.pid,
                found.stat.start_ticks,
                found.port.unwrap_or(0),
                found.mark,
            )
        })
    }

    #[allow(
        deprecated,
        reason = "its successor is unsafe, which we forbid; what it asks of the caller, that the descriptor stays \
                  open and the same, OwnedFd guarantees"
    )]
    fn watch(pid: u32, start_ticks: u64, port: u16, mark: Mark) -> io::Result<Process> {
        let leader = leader_of(pid).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = pidfd_open(leader, PidfdFlags::NONBLOCK)?;
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        Ok(Process {
            pid,
            start_ticks,
            port,
            mark,
            leader,
            pidfd,
        })
    }

    /// Returns when the leader has ended. Can be awaited any number of times.
    pub async fn exited(&self) {
        // An error means that the runtime is shutting down: nothing can be waited for any more.
        if self.pidfd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Sends `signal` to the leader's group and to marked descendants that left it. Tells whether anyone was there.
    pub fn signal(&self, signal: Signal) -> bool {
        let grouped = self.is_there() && kill_process_group(self.leader, signal).is_ok();
        let mut reached = grouped;
        for pid in self.members() {
            let in_group = procfs::stat(pid).is_some_and(|stat| stat.process_group == self.pid);
            if !(grouped && in_group) {
                reached |= signal_marked(pid, &self.mark, self.pid, signal);
            }
        }
        reached
    }

    /// Sends `signal` to the leader's group alone: what left the group knows nothing of it.
    pub fn signal_group(&self, signal: Signal) -> bool {
        self.is_there() && kill_process_group(self.leader, signal).is_ok()
    }

    /// Kills what the leader left behind. To be called after its end and before `reap`, which frees its pid,
    /// and with it the group's number.
    pub fn kill_rest(&self) -> bool {
        let rest = self.members();
        rest.into_iter()
            .filter(|&pid| signal_marked(pid, &self.mark, self.pid, Signal::KILL))
            .count()
            > 0
    }

    /// How it ended, taking our child off the process table. `Exit::Unknown` for what was not our child.
    pub fn reap(&self) -> Exit {
        match waitid(
            WaitId::PidFd(self.pidfd.get_ref().as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            },
            Ok(None) | Err(_) => Exit::Unknown,
        }
    }

    /// Whether the pid is still this process, ended or not.
    fn is_there(&self) -> bool {
        procfs::stat(self.pid).is_some_and(|stat| stat.start_ticks == self.start_ticks)
    }

    /// All live processes of this instance: those with its mark, and those of its group as long as the group's
    /// number is certain to be ours.
    fn members(&self) -> Vec<u32> {
        let marked = members(&self.mark);
        let group_is_ours = self.is_there()
            || marked
                .iter()
                .any(|&pid| procfs::stat(pid).is_some_and(|stat| stat.process_group == self.pid));
        let mut all = marked;
        if group_is_ours {
            all.extend(procfs::group_members(self.pid));
        }
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// Live processes that bear exactly this mark.
pub(super) fn members(mark: &Mark) -> Vec<u32> {
    procfs::marked_by(mark.ledger)
        .into_iter()
        .filter(|process| process.mark == *mark)
        .map(|process| process.pid)
        .collect()
}

/// Returns when no process bears `mark` any more, killing those that still do.
pub(super) async fn killed_and_gone(mark: &Mark) {
    let mut pause = GONE_FIRST;
    loop {
        let looked = mark.clone();
        let left = super::blocking(move || {
            let left = members(&looked);
            for &pid in &left {
                signal_marked(pid, &looked, 0, Signal::KILL);
            }
            left.len()
        });
        if left.await == 0 {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(GONE_MAX);
    }
}

/// Signals one process after making sure, with its pidfd in hand, that it bears `mark` or is of `process_group`.
pub(super) fn signal_marked(pid: u32, mark: &Mark, process_group: u32, signal: Signal) -> bool {
    let Some(pidfd) = leader_of(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
    else {
        return false;
    };
    let ours = procfs::marked(pid).is_some_and(|process| process.mark == *mark)
        || procfs::stat(pid)
            .is_some_and(|stat| stat.process_group == process_group && !stat.is_zombie());
    ours && pidfd_send_signal(pidfd, signal).is_ok()
}

fn leader_of(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

/// The service's own settings first, then ours: what was granted cannot be overridden.
fn environment(
    mark: &Mark,
    env: &[(String, String)],
    port: u16,
    (grants, mps_percent): (&[Grant], Option<u8>),
    token_file: &Path,
) -> Vec<(String, String)> {
    let (amd, others): (Vec<&str>, Vec<&str>) = grants
        .iter()
        .map(|grant| grant.gpu.as_str())
        .partition(|gpu| is_amd(gpu));
    let mut all: Vec<(String, String)> = INHERITED
        .iter()
        .filter_map(|&name| Some((name.to_owned(), std::env::var(name).ok()?)))
        .collect();
    all.extend_from_slice(env);
    let ours = [
        ("PORT", port.to_string()),
        // Empty hides every GPU from a service that was granted none.
        ("CUDA_VISIBLE_DEVICES", others.join(",")),
        ("ROCR_VISIBLE_DEVICES", amd.join(",")),
        ("RUNGATE_SERVICE", mark.service.to_string()),
        ("RUNGATE_GENERATION", mark.generation.to_string()),
        (TOKEN_FILE_VARIABLE, token_file.display().to_string()),
        (MARK_VARIABLE, mark.text()),
        // Keeps Python's setproctitle from writing its title over the environment, and so over the mark.
        ("SPT_NOENV", "1".to_owned()),
    ];
    all.extend(ours.map(|(name, value)| (name.to_owned(), value)));
    all.extend(mps::variables(grants, mps_percent));
    all
}

/// AMD's runtime names its GPUs by 16 digits, NVIDIA's by a UUID.
fn is_amd(gpu: &str) -> bool {
    gpu.strip_prefix("GPU-")
        .is_some_and(|id| id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::domain::ids::Generation;

    #[test]
    fn a_service_cannot_override_what_it_was_granted() {
        let mark = Mark {
            ledger: Uuid::nil(),
            service: "s".into(),
            generation: Generation(3),
        };
        let own = [("CUDA_VISIBLE_DEVICES", "0"), ("PORT", "1"), ("MODEL", "m")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let grants = ["SIM-0", "SIM-1"].map(|gpu| Grant {
            gpu: gpu.into(),
            mib: 1,
        });
        let file = Path::new("/t");
        let seen: std::collections::HashMap<_, _> =
            environment(&mark, &own, 8123, (&grants, None), file)
                .into_iter()
                .collect();
        assert_eq!(seen["CUDA_VISIBLE_DEVICES"], "SIM-0,SIM-1");
        assert_eq!(seen["ROCR_VISIBLE_DEVICES"], "");
        assert_eq!(seen["PORT"], "8123");
        assert_eq!(seen["MODEL"], "m");
        assert_eq!(seen[MARK_VARIABLE], mark.text());
        assert!(!seen.contains_key("RUNGATE_TOKEN"));
        let grants = [Grant {
            gpu: "GPU-1a2b3c4d5e6f7081".into(),
            mib: 1,
        }];
        let seen: std::collections::HashMap<_, _> =
            environment(&mark, &own, 8123, (&grants, None), file)
                .into_iter()
                .collect();
        assert_eq!(seen["ROCR_VISIBLE_DEVICES"], "GPU-1a2b3c4d5e6f7081");
        assert_eq!(seen["CUDA_VISIBLE_DEVICES"], "");
        assert_eq!(
            environment(&mark, &[], 1, (&[], Some(50)), file)
                .iter()
                .find(|(n, _)| n == "CUDA_VISIBLE_DEVICES")
                .unwrap()
                .1,
            ""
        );
        assert!(!seen.contains_key("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"));
    }
}
