//! What an instance lives in: a process of ours, or a container.

use rustix::process::Signal;
use tokio::sync::watch;

use super::blocking;
use super::docker::{Container, Seen};
use super::process::Process;
use crate::domain::event::Exit;

/// Alive, or ended and not yet buried.
pub(super) enum Body {
    Process(std::sync::Arc<Process>),
    Container(Container),
}

impl Body {
    pub fn process(process: Process) -> Body {
        Body::Process(std::sync::Arc::new(process))
    }

    pub fn pid(&self) -> u32 {
        match self {
            Body::Process(process) => process.pid,
            Body::Container(container) => container.pid,
        }
    }

    /// Where it is called.
    pub fn base_url(&self) -> String {
        match self {
            Body::Process(process) => format!("http://127.0.0.1:{}", process.port),
            Body::Container(container) => container.base_url(),
        }
    }

    pub fn port(&self) -> u16 {
        match self {
            Body::Process(process) => process.port,
            Body::Container(container) => container.port,
        }
    }

    /// Field 22 of `/proc/<pid>/stat`; 0 for a container, whose id tells it from others.
    pub fn start_ticks(&self) -> u64 {
        match self {
            Body::Process(process) => process.start_ticks,
            Body::Container(_) => 0,
        }
    }

    /// Returns when it has ended. Can be awaited any number of times.
    pub async fn exited(&self) {
        match self {
            Body::Process(process) => process.exited().await,
            Body::Container(container) => container.exited().await,
        }
    }

    /// Tells whether anyone was there. Waits for a container engine that does not answer.
    pub async fn signal(&self, signal: Signal) -> bool {
        match self {
            Body::Process(process) => {
                let process = process.clone();
                blocking(move || process.signal(signal)).await
            }
            Body::Container(container) => container.signal(signal).await,
        }
    }

    /// After its end: whether something of it had to be killed, and how it ended.
    pub async fn bury(&self) -> (bool, Exit) {
        match self {
            Body::Process(process) => {
                let process = process.clone();
                blocking(move || (process.kill_rest(), process.reap())).await
            }
            Body::Container(container) => (false, container.exit()),
        }
    }

    /// After that: what is left of a container that is ours.
    pub async fn clear(&self) {
        if let Body::Container(container) = self {
            container.clear().await;
        }
    }

    /// The engine's id of a container.
    pub fn container(&self) -> Option<&str> {
        match self {
            Body::Process(_) => None,
            Body::Container(container) => Some(&container.id),
        }
    }

    /// What becomes of a container, from what it is now on.
    pub fn changes(&self) -> Option<watch::Receiver<Seen>> {
        match self {
            Body::Process(_) => None,
            Body::Container(container) => Some(container.changes()),
        }
    }
}
