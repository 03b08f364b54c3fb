//! Servers under measurement, each a process of its own: the real binary, and the floor.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::Server;
use crate::{Failure, child, machine};

pub const START_PATH: &str = "/api/gateway/runs/start";
pub const COMMANDS_PATH: &str = "/api/gateway/commands";
/// Where it is put on the first start, below the data directory.
const TOKEN_FILE: &str = "auth/bootstrap-admin-token";
/// How long a start may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server's process; killed when dropped.
pub struct Process {
    pub server: Server,
    /// From the spawn to the first good answer.
    pub started_in: Duration,
    child: Child,
}

impl Process {
    /// The real gateway over a data directory.
    pub fn gateway(dir: &Path) -> Result<Process, Failure> {
        Self::gateway_with(dir, &[])
    }

    /// The same, with settings.
    pub fn gateway_with(dir: &Path, settings: &[(&str, &str)]) -> Result<Process, Failure> {
        // Free now, and nobody else on this machine is in such a hurry.
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let started = Instant::now();
        let child = Command::new(env!("CARGO_BIN_EXE_rungate"))
            .arg("serve")
            .env("RUNGATE_LISTEN", addr.to_string())
            .env("RUNGATE_DATA_DIR", dir)
            .env("RUNGATE_LOG", "warn")
            .env("RUNGATE_DOCKER_HOST", "none")
            .env("RUNGATE_GPUS", "none")
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let server = Server {
            addr,
            token: String::new(),
        };
        let mut process = Process {
            server,
            started_in: Duration::ZERO,
            child,
        };
        process.await_ready(started)?;
        process.started_in = started.elapsed();
        process.server.token = std::fs::read_to_string(dir.join(TOKEN_FILE))?
            .trim()
            .to_owned();
        Ok(process)
    }

    /// The floor over a directory.
    pub fn floor(dir: &Path) -> Result<Process, Failure> {
        let mut child = child::command("floor", [dir.as_os_str()])?
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("its output is piped")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let addr: SocketAddr = line.trim().parse()?;
        Ok(Process {
            // As long as a real one.
            server: Server {
                addr,
                token: "0".repeat(48),
            },
            started_in: Duration::ZERO,
            child,
        })
    }

    fn await_ready(&mut self, started: Instant) -> Result<(), Failure> {
        while started.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the gateway ended with {status}").into());
            }
            if ready(self.server.addr).unwrap_or(false) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err("the gateway did not answer in time".into())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory now and at most, in bytes.
    pub fn memory(&self) -> Result<(u64, u64), Failure> {
        Ok(machine::memory(self.pid())?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended by itself when it cannot be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ready(addr: SocketAddr) -> std::io::Result<bool> {
    use std::io::Write;
    let mut stream = TcpStream::connect(addr)?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line.contains(" 200 "))
}
