//! What a container is made of: the service's specification, hardened, with its owner's labels.

use std::collections::HashMap;
use std::net::IpAddr;

use bollard::models::{
    ContainerCreateBody, DeviceRequest, EndpointSettings, HostConfig, HostConfigLogConfig, Mount,
    MountType, NetworkingConfig, PortBinding, ResourcesUlimits, RestartPolicy,
    RestartPolicyNameEnum, SystemInfo,
};

use super::checkpoint::{self, CHECKPOINT_DIR};
use super::rules::{ContainerRules, Forbidden};
use crate::domain::container::{ImageSpec, Ipc, Volume};
use crate::domain::ids::{PlaneId, RunId};
use crate::domain::spec::Grant;
use crate::driver::mps;
use crate::driver::procfs::{MARK_VARIABLE, Mark};

/// Whose ledger a container belongs to: one that bears another is never touched.
pub const LABEL_LEDGER: &str = "io.rungate.ledger";
pub const LABEL_SERVICE: &str = "io.rungate.service";
pub const LABEL_GENERATION: &str = "io.rungate.generation";
/// A hash of what it was made of.
pub const LABEL_SPEC: &str = "io.rungate.spec";

/// What tells an instance's container from all others.
pub fn owner_labels(mark: &Mark) -> [(&'static str, String); 3] {
    [
        (LABEL_LEDGER, mark.ledger.hyphenated().to_string()),
        (LABEL_SERVICE, mark.service.to_string()),
        (LABEL_GENERATION, mark.generation.to_string()),
    ]
}

/// Of what the engine keeps of a container's output, before it was read.
const LOG_FILE_BYTES: &str = "16m";
const LOG_FILES: &str = "2";
/// What may be written to `/tmp` at most; it counts as memory.
const TMP_OPTIONS: &str = "rw,nosuid,nodev,size=1g";
const MIB: i64 = 1 << 20;

/// How GPUs are given to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuWay {
    /// By the vendor's runtime.
    Runtime,
    /// By a name of the Container Device Interface.
    Cdi,
}

impl GpuWay {
    /// The way that an engine has, if it has one.
    pub fn of(info: &SystemInfo) -> Option<GpuWay> {
        let runtimes = info.runtimes.iter().flatten();
        if runtimes.into_iter().any(|(name, _)| name == "nvidia") {
            return Some(GpuWay::Runtime);
        }
        let devices = info.discovered_devices.iter().flatten();
        let is_gpu = |id: &String| id.starts_with("nvidia.com/gpu=");
        let has_gpus = devices
            .into_iter()
            .any(|device| device.id.as_ref().is_some_and(is_gpu));
        has_gpus.then_some(GpuWay::Cdi)
    }

    fn request(self, gpus: Vec<String>) -> DeviceRequest {
        match self {
            GpuWay::Runtime => DeviceRequest {
                driver: Some("nvidia".into()),
                device_ids: Some(gpus),
                capabilities: Some(vec![vec!["gpu".into()]]),
                ..DeviceRequest::default()
            },
            GpuWay::Cdi => DeviceRequest {
                driver: Some("cdi".into()),
                device_ids: Some(
                    gpus.iter()
                        .map(|gpu| format!("nvidia.com/gpu={gpu}"))
                        .collect(),
                ),
                ..DeviceRequest::default()
            },
        }
    }
}

/// What the container of a job's attempt gets besides what its job says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobParts {
    pub plane: PlaneId,
    pub run: RunId,
    /// Variables that the job cannot override.
    pub env: Vec<(String, String)>,
}

/// Everything that a container is made of.
pub struct Recipe<'a> {
    pub mark: &'a Mark,
    pub spec: &'a ImageSpec,
    pub rules: &'a ContainerRules,
    pub address: IpAddr,
    /// 0 lets the engine choose.
    pub host_port: u16,
    pub grants: &'a [Grant],
    pub gpu_way: Option<GpuWay>,
    pub mps_percent: Option<u8>,
    /// The engine sees this machine's files.
    pub is_local: bool,
    /// Milliseconds between TERM and KILL, should the engine stop it by itself.
    pub grace_ms: u64,
    /// It is a job's: it listens nowhere, and has its job's checkpoint folder.
    pub job: Option<&'a JobParts>,
}

impl Recipe<'_> {
    /// A name that no other instance of any gateway has.
    pub fn name(&self) -> String {
        let Mark {
            ledger,
            service,
            generation,
        } = self.mark;
        let ledger = ledger.simple().to_string();
        format!("rungate-{}-{service}-{generation}", &ledger[..8])
    }

    /// The request to the engine.
    ///
    /// # Errors
    /// A folder that may not be mounted.
    pub fn body(&self) -> Result<ContainerCreateBody, Forbidden> {
        let spec = self.spec;
        let port = self.job.is_none().then(|| format!("{}/tcp", spec.port));
        Ok(ContainerCreateBody {
            image: Some(spec.image.clone()),
            cmd: (!spec.args.is_empty()).then(|| spec.args.clone()),
            env: Some(self.env()),
            user: spec.user.clone(),
            labels: Some(self.labels()),
            exposed_ports: port.clone().map(|port| vec![port]),
            stop_timeout: i64::try_from(self.grace_ms.div_ceil(1_000)).ok(),
            host_config: Some(self.host_config(port)?),
            networking_config: self.networking(),
            ..ContainerCreateBody::default()
        })
    }

    fn host_config(&self, port: Option<String>) -> Result<HostConfig, Forbidden> {
        let (spec, rules) = (self.spec, self.rules);
        let memory = signed(spec.memory_mib.unwrap_or(rules.memory_max_mib)).saturating_mul(MIB);
        let binding = PortBinding {
            host_ip: Some(self.address.to_string()),
            host_port: Some(match self.host_port {
                0 => String::new(),
                port => port.to_string(),
            }),
        };
        let log = [("max-size", LOG_FILE_BYTES), ("max-file", LOG_FILES)];
        let mut mounts = spec
            .volumes
            .iter()
            .map(|volume| self.mount(volume))
            .collect::<Result<Vec<_>, _>>()?;
        let ledger = self.mark.ledger;
        mounts.extend(
            self.job
                .map(|job| checkpoint::mount(ledger, job.plane, job.run)),
        );
        Ok(HostConfig {
            cap_drop: Some(vec!["ALL".into()]),
            cap_add: Some(rules.capabilities.clone()),
            security_opt: Some(vec!["no-new-privileges".into()]),
            readonly_rootfs: Some(!rules.writable_root),
            tmpfs: Some(HashMap::from([("/tmp".into(), TMP_OPTIONS.into())])),
            pids_limit: Some(signed(rules.pids_max)),
            memory: Some(memory),
            // As much as memory: no swap.
            memory_swap: Some(memory),
            nano_cpus: spec
                .cpus_milli
                .map(|milli| signed(milli).saturating_mul(1_000_000)),
            shm_size: spec.shm_mib.map(|mib| signed(mib).saturating_mul(MIB)),
            ipc_mode: Some(
                if spec.ipc == Ipc::Host {
                    "host"
                } else {
                    "private"
                }
                .into(),
            ),
            ulimits: Some(self.ulimits()),
            init: Some(true),
            mounts: Some(mounts),
            network_mode: spec.networks.first().cloned(),
            port_bindings: port.map(|port| HashMap::from([(port, Some(vec![binding]))])),
            extra_hosts: Some(vec!["host.docker.internal:host-gateway".into()]),
            // Who starts it again is the scheduler.
            restart_policy: Some(RestartPolicy {
                name: Some(RestartPolicyNameEnum::NO),
                maximum_retry_count: None,
            }),
            log_config: Some(HostConfigLogConfig {
                typ: Some("json-file".into()),
                config: Some(
                    log.map(|(name, value)| (name.to_owned(), value.to_owned()))
                        .into(),
                ),
            }),
            device_requests: self.devices(),
            ..HostConfig::default()
        })
    }

    /// The service's own first, then ours: what was granted cannot be overridden.
    fn env(&self) -> Vec<String> {
        let own = self
            .spec
            .env
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        let mut ours = vec![format!("{MARK_VARIABLE}={}", self.mark.text())];
        match self.job {
            Some(job) => {
                ours.push(format!("RUNGATE_CHECKPOINT_DIR={CHECKPOINT_DIR}"));
                let told = job.env.iter();
                ours.extend(told.map(|(name, value)| format!("{name}={value}")));
            }
            None => ours.extend([
                format!("PORT={}", self.spec.port),
                format!("RUNGATE_SERVICE={}", self.mark.service),
                format!("RUNGATE_GENERATION={}", self.mark.generation),
            ]),
        }
        let shared = mps::variables(self.grants, self.mps_percent).into_iter();
        ours.extend(shared.map(|(name, value)| format!("{name}={value}")));
        if self.gpus().is_empty() {
            // Hides every GPU where the vendor's runtime is the engine's default.
            ours.push("NVIDIA_VISIBLE_DEVICES=void".into());
        }
        let named = |entry: &String| entry.split('=').next().unwrap_or_default().to_owned();
        let taken: Vec<String> = ours.iter().map(named).collect();
        own.filter(|entry| !taken.contains(&named(entry)))
            .chain(ours.clone())
            .collect()
    }

    fn labels(&self) -> HashMap<String, String> {
        // Our types hold nothing that JSON cannot write.
        let spec = serde_json::to_vec(self.spec).unwrap_or_default();
        let spec = blake3::hash(&spec).to_hex()[..16].to_owned();
        let owner = owner_labels(self.mark).into_iter();
        let all = owner.chain([(LABEL_SPEC, spec)]);
        all.map(|(label, value)| (label.to_owned(), value))
            .collect()
    }

    fn ulimits(&self) -> Vec<ResourcesUlimits> {
        let limit = |limit: &crate::domain::container::Ulimit| ResourcesUlimits {
            name: Some(limit.name.clone()),
            soft: Some(limit.soft),
            hard: Some(limit.hard),
        };
        self.spec.ulimits.iter().map(limit).collect()
    }

    fn mount(&self, volume: &Volume) -> Result<Mount, Forbidden> {
        let is_path = volume.source.starts_with('/');
        let source = match is_path && self.is_local {
            true => self.rules.resolve(volume)?.display().to_string(),
            false => volume.source.clone(),
        };
        Ok(Mount {
            typ: Some(if is_path {
                MountType::BIND
            } else {
                MountType::VOLUME
            }),
            source: Some(source),
            target: Some(volume.target.clone()),
            read_only: Some(volume.read_only),
            ..Mount::default()
        })
    }

    fn networking(&self) -> Option<NetworkingConfig> {
        let networks = self.spec.networks.iter();
        let endpoints: HashMap<_, _> = networks
            .map(|name| (name.clone(), EndpointSettings::default()))
            .collect();
        (!endpoints.is_empty()).then_some(NetworkingConfig {
            endpoints_config: Some(endpoints),
        })
    }

    /// The real GPUs among the grants.
    fn gpus(&self) -> Vec<String> {
        let real = self.grants.iter().filter(|grant| !grant.is_simulated());
        real.map(|grant| grant.gpu.to_string()).collect()
    }

    fn devices(&self) -> Option<Vec<DeviceRequest>> {
        let gpus = self.gpus();
        let way = self.gpu_way.filter(|_| !gpus.is_empty())?;
        Some(vec![way.request(gpus)])
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::domain::ids::Generation;

    fn mark() -> Mark {
        Mark {
            ledger: Uuid::nil(),
            service: "s".into(),
            generation: Generation(3),
        }
    }

    fn recipe<'a>(
        mark: &'a Mark,
        spec: &'a ImageSpec,
        rules: &'a ContainerRules,
        grants: &'a [Grant],
    ) -> Recipe<'a> {
        Recipe {
            mark,
            spec,
            rules,
            address: std::net::Ipv4Addr::LOCALHOST.into(),
            host_port: 4_000,
            grants,
            gpu_way: Some(GpuWay::Runtime),
            mps_percent: None,
            is_local: true,
            grace_ms: 1_500,
            job: None,
        }
    }

    #[test]
    fn a_container_is_hardened_unless_the_operator_says_otherwise() {
        let (mark, spec) = (
            mark(),
            ImageSpec {
                port: 80,
                ..ImageSpec::default()
            },
        );
        let rules = ContainerRules {
            memory_max_mib: 64,
            pids_max: 9,
            ..ContainerRules::default()
        };
        let body = recipe(&mark, &spec, &rules, &[]).body().unwrap();
        let host = body.host_config.unwrap();
        assert_eq!(host.cap_drop, Some(vec!["ALL".to_owned()]));
        assert_eq!(
            host.security_opt,
            Some(vec!["no-new-privileges".to_owned()])
        );
        assert_eq!((host.readonly_rootfs, host.privileged), (Some(true), None));
        assert_eq!(
            (host.memory, host.memory_swap, host.pids_limit),
            (Some(64 << 20), Some(64 << 20), Some(9))
        );
        let ports = host.port_bindings.unwrap();
        let bound = ports["80/tcp"].as_ref().unwrap();
        assert_eq!(bound[0].host_ip.as_deref(), Some("127.0.0.1"));
    }

    #[test]
    fn granted_gpus_are_pinned_by_uuid_and_all_others_hidden() {
        let (mark, spec, rules) = (mark(), ImageSpec::default(), ContainerRules::default());
        let grants = ["GPU-1", "SIM-0"].map(|gpu| Grant {
            gpu: gpu.into(),
            mib: 1,
        });
        let body = recipe(&mark, &spec, &rules, &grants).body().unwrap();
        let request = &body.host_config.unwrap().device_requests.unwrap()[0];
        assert_eq!(
            (request.device_ids.clone(), request.count),
            (Some(vec!["GPU-1".to_owned()]), None)
        );
        let none = recipe(&mark, &spec, &rules, &grants[1..]).body().unwrap();
        assert!(
            none.env
                .unwrap()
                .contains(&"NVIDIA_VISIBLE_DEVICES=void".to_owned())
        );
        assert_eq!(none.host_config.unwrap().device_requests, None);
    }

    #[test]
    fn mps_is_told_what_was_granted_when_it_is_asked_for() {
        let (mark, spec, rules) = (mark(), ImageSpec::default(), ContainerRules::default());
        let grants = [Grant {
            gpu: "GPU-1".into(),
            mib: 4_096,
        }];
        let told = |mps_percent| {
            let recipe = Recipe {
                mps_percent,
                ..recipe(&mark, &spec, &rules, &grants)
            };
            let mut env = recipe.body().unwrap().env.unwrap();
            env.retain(|entry| entry.starts_with("CUDA_MPS"));
            env
        };
        assert_eq!(told(None), Vec::<String>::new());
        let wanted = [
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=30",
            "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=4096M",
        ];
        assert_eq!(told(Some(30)), wanted);
    }

    #[test]
    fn a_service_cannot_override_its_mark() {
        let spec = ImageSpec {
            env: vec![(MARK_VARIABLE.into(), "x".into()), ("A".into(), "1".into())],
            ..ImageSpec::default()
        };
        let (mark, rules) = (mark(), ContainerRules::default());
        let env = recipe(&mark, &spec, &rules, &[])
            .body()
            .unwrap()
            .env
            .unwrap();
        let marks: Vec<_> = env
            .iter()
            .filter(|entry| entry.starts_with(MARK_VARIABLE))
            .collect();
        assert_eq!(marks, [&format!("{MARK_VARIABLE}={}", mark.text())]);
        assert!(env.contains(&"A=1".to_owned()));
    }
}
