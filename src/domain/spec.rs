//! What people ask for: the specification of a job and of a service, already parsed and bounded.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::container::ImageSpec;
use super::ids::{RunId, Seq, ServiceName};
use super::ladder::Step;

/// 1 is the most urgent, 5 the least, 3 the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Priority(u8);

impl Priority {
    pub const MOST_URGENT: Priority = Priority(1);
    pub const LEAST_URGENT: Priority = Priority(5);

    /// `None` outside 1 to 5.
    pub fn new(value: u8) -> Option<Priority> {
        (1..=5).contains(&value).then_some(Priority(value))
    }

    pub fn get(self) -> u8 {
        self.0
    }

    /// How many levels `self` is more urgent than `other`; 0 when it is not.
    pub fn gap_to(self, other: Priority) -> u8 {
        other.0.saturating_sub(self.0)
    }
}

impl Default for Priority {
    fn default() -> Self {
        Priority(3)
    }
}

impl TryFrom<u8> for Priority {
    type Error = &'static str;
    fn try_from(value: u8) -> Result<Self, Self::Error> {
        Priority::new(value).ok_or("priority must be 1 (most urgent) to 5")
    }
}

impl From<Priority> for u8 {
    fn from(value: Priority) -> u8 {
        value.0
    }
}

/// What a job needs, which is also its scheduling shape: jobs of one target are interchangeable to the
/// scheduler, so that only the first of them is ever tried.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Any enabled service of this type.
    Type(SmolStr),
    /// This service and no other.
    Service(ServiceName),
    /// A container of its own, which holds so much of the machine.
    Container(Needs),
}

/// What a job's own container needs of the machine's GPUs.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Needs {
    /// MiB of GPU memory on one GPU, or on each of `gpus`; 0 needs none.
    pub vram_mib: u64,
    /// Whole GPUs; 0 shares one GPU by `vram_mib`.
    pub gpus: u32,
}

/// One piece of work, without its payload: that lies beside the event in the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    pub target: Target,
    /// The type as the caller gave it; `None` when only a service was named.
    pub service_type: Option<SmolStr>,
    pub priority: Priority,
    /// Milliseconds that the job may wait for its first dispatch; `None` waits for ever.
    pub ttl_ms: Option<u64>,
    /// Failed attempts after which the job fails, at least 1. Preempted attempts do not count.
    pub max_attempts: u32,
    /// Milliseconds that one attempt's call may take.
    pub timeout_ms: u64,
    /// Where the outcome is posted.
    pub callback_url: Option<SmolStr>,
}

#[cfg(test)]
impl JobSpec {
    /// A job of some type of which nothing else is said.
    pub fn plain() -> JobSpec {
        JobSpec {
            target: Target::Type("t".into()),
            service_type: None,
            priority: Priority::default(),
            ttl_ms: None,
            max_attempts: 1,
            timeout_ms: 1_000,
            callback_url: None,
        }
    }
}

/// How a service comes to life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Worker {
    /// A local process that Rungate starts and stops.
    Process {
        command: Vec<String>,
        env: Vec<(String, String)>,
        working_dir: Option<String>,
    },
    /// Something that runs elsewhere and that Rungate only calls and probes.
    External { url: String },
    /// The container named `ServiceSpec::container`, which is there already: started and stopped, never removed.
    Container,
    /// A container that Rungate makes of an image and removes.
    Image(Box<ImageSpec>),
    /// The container of one attempt of a job: made as the job's payload says, run to its end and removed. The gateway makes
    /// such a service when its job gets going (`scheduler::container`), and nobody else sees it.
    Job {
        run: RunId,
        /// Where the job's payload lies.
        payload: Seq,
    },
}

impl Worker {
    /// Whether a container engine is needed.
    pub fn is_container(&self) -> bool {
        matches!(
            self,
            Worker::Container | Worker::Image(_) | Worker::Job { .. }
        )
    }

    /// Whether it is one job's own.
    pub fn is_job(&self) -> bool {
        matches!(self, Worker::Job { .. })
    }
}

/// How progress reaches the ledger (`contracts/gpu-gateway.md` section 4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgressMode {
    /// The service tells none.
    #[default]
    Stateless,
    /// The service pushes to `POST /queue/{id}/progress`.
    Queue,
    /// Rungate asks `progress_endpoint` while a job runs.
    Poll,
}

/// A registered service. The contract's fields (`contracts/gpu-gateway.md` section 3) and ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSpec {
    pub name: ServiceName,
    pub service_type: SmolStr,
    /// The contract's container name; a label only unless the worker is a container that is there already.
    pub container: String,
    /// TCP port on 127.0.0.1; 0 lets Rungate choose a free one for each instance.
    pub port: u16,
    pub health_endpoint: String,
    pub description: String,
    /// MiB of GPU memory an instance needs on one GPU; 0 needs none.
    pub vram_mib: u64,
    /// Whole GPUs an instance needs for itself; 0 shares one GPU by `vram_mib`.
    pub gpus: u32,
    pub progress_mode: ProgressMode,
    pub progress_endpoint: Option<String>,
    pub worker: Worker,
    /// Jobs that one instance takes at once, at least 1.
    pub concurrency: u32,
    /// Where a job's payload is posted; `None` takes the contract's path of the type.
    pub dispatch_path: Option<String>,
    /// Where a stop of one job is asked for; `None` only drops the call.
    pub cancel_path: Option<String>,
    /// Milliseconds without work after which an instance that the scheduler started is stopped; `None`
    /// takes the gateway's setting.
    pub idle_timeout_ms: Option<u64>,
    /// Milliseconds between TERM and KILL, and for a job's stop.
    pub grace_ms: u64,
    /// Milliseconds from start to the first good health answer.
    pub startup_timeout_ms: u64,
    /// Milliseconds that an attempt runs before it may be preempted; `None` takes the gateway's setting.
    pub min_runtime_ms: Option<u64>,
    /// How its memory is got back, step by step; empty stops it at once.
    pub ladder: Vec<Step>,
    /// Percent of a GPU's threads that it may use under MPS, its grant being the limit of its memory there.
    pub mps_percent: Option<u8>,
}

impl ServiceSpec {
    /// Whether an instance holds GPU memory at all.
    pub fn needs_gpu(&self) -> bool {
        self.vram_mib > 0 || self.gpus > 0
    }

    /// Whether what was learned of the one's need of GPU memory holds for the other.
    pub fn needs_memory_as(&self, other: &ServiceSpec) -> bool {
        (self.vram_mib, self.gpus, &self.worker) == (other.vram_mib, other.gpus, &other.worker)
    }

    /// The path a job is posted to: the service's own or that of its type
    /// (`contracts/gpu-gateway.md` section 4).
    pub fn dispatch_path(&self) -> &str {
        match (&self.dispatch_path, self.service_type.as_str()) {
            (Some(path), _) => path,
            (None, "llm" | "vlm") => "/v1/chat/completions",
            (None, "code-runner") => "/execute",
            (None, _) => "/process",
        }
    }
}

/// What is known of one GPU when it is listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuFacts {
    pub uuid: super::ids::GpuUuid,
    pub index: u32,
    pub name: SmolStr,
    /// All of its memory in MiB.
    pub memory_mib: u64,
    pub source: GpuSource,
}

/// Who told us of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GpuSource {
    Simulated,
    /// NVIDIA's management library.
    Nvml,
    /// The kernel's amdgpu driver.
    Amdgpu,
}

/// A part of one GPU given to an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub gpu: super::ids::GpuUuid,
    pub mib: u64,
}

impl Grant {
    /// Whether there is no such GPU: nothing is to be passed to whoever it was granted to.
    pub fn is_simulated(&self) -> bool {
        self.gpu.starts_with(SIMULATED_GPU)
    }
}

/// What the ids of simulated GPUs begin with.
pub const SIMULATED_GPU: &str = "SIM-";
