//! State: what is live, as the events so far have made it. `apply` is the only way to change it, so that
//! a replay gives the same State; ended runs are not in it.

pub mod account;
pub mod gpu;
pub mod job;
pub mod notices;
pub mod service;
pub mod sleep;
mod tenancy;
pub mod timers;
pub mod user;

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use self::account::Accounts;
use self::gpu::{Gpu, Hold};
use self::job::{Callback, Job};
use self::notices::Notices;
use self::service::{Retired, Service};
use self::timers::Timers;
use self::user::People;
use super::container::Engine;
use super::event::Event;
use super::identity::UserKey;
use super::ids::{GpuUuid, PlaneId, RunId, Seq, ServiceName};
use super::scheduler::fair::Shares;
use super::scheduler::queue::Queue;
use super::tenant::Quotas;
use super::time::Timestamp;

/// Everything that decisions depend on.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// The last event applied.
    pub seq: Seq,
    /// When that event happened.
    pub now: Timestamp,
    /// Gateway processes so far.
    pub epoch: u64,
    /// Those that were not purged.
    pub planes: BTreeMap<PlaneId, Plane>,
    /// The last plane opened: numbers are not used again, as records bear them for ever.
    pub last_plane: PlaneId,
    /// Boxed, so that the table stays small when it grows or is half empty.
    pub jobs: FxHashMap<RunId, Box<Job>>,
    pub services: BTreeMap<ServiceName, Service>,
    pub gpus: BTreeMap<GpuUuid, Gpu>,
    /// Room promised to a service while others leave.
    pub holds: BTreeMap<ServiceName, Hold>,
    /// Removed services: the generations of one registered again under the name count on, so that no late outcome of
    /// the old one is taken for the new one's.
    pub retired: BTreeMap<ServiceName, Retired>,
    /// Outcomes still to be delivered.
    pub callbacks: BTreeMap<RunId, Callback>,
    /// What tenants are still to be told.
    pub notices: Notices,
    /// Users, their tokens and runtimes.
    pub people: People,
    /// What tenants and users have, and had lately.
    pub accounts: Accounts,
    pub engine: Engine,

    // Indexes, made from the above: not part of a snapshot, nor of equality.
    pub queue: Queue,
    pub timers: Timers,
    /// Victims of each preemptor.
    pub preempted_by: BTreeMap<RunId, BTreeSet<RunId>>,
    /// Preemptors that neither wait nor work any more, whose victims may go on.
    pub idle_preemptors: BTreeSet<RunId>,
    /// Waiting runs that a place was promised to, and where.
    pub promises: BTreeMap<RunId, ServiceName>,
    /// Services that changed since the scheduler last looked.
    pub touched: BTreeSet<ServiceName>,
    /// Users with quotas, by their planes.
    pub user_limits: BTreeMap<PlaneId, (UserKey, Quotas)>,
    /// How many bytes users may keep, of those with such a quota; by their planes.
    pub byte_limits: BTreeMap<PlaneId, (UserKey, u64)>,
    /// Whether any quota may make a waiting run wait.
    limited: bool,
    /// Tenants' shares, for as long as they hold.
    pub shares: Shares,
}

/// One user's data plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plane {
    pub tenant: SmolStr,
    pub runtime: SmolStr,
    /// Bytes of the payloads that are kept of its runs.
    pub kept_bytes: u64,
}

/// Two States are equal when all but their indexes are.
impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.seq == other.seq
            && self.epoch == other.epoch
            && self.planes == other.planes
            && self.last_plane == other.last_plane
            && self.jobs == other.jobs
            && self.services == other.services
            && self.gpus == other.gpus
            && self.holds == other.holds
            && self.retired == other.retired
            && self.callbacks == other.callbacks
            && self.notices.lines == other.notices.lines
            && self.people == other.people
            && self.accounts == other.accounts
            && self.engine == other.engine
    }
}

/// What a snapshot holds: State without its indexes, borrowed to be written.
#[derive(Serialize)]
struct SnapshotRef<'a> {
    seq: Seq,
    now: Timestamp,
    epoch: u64,
    planes: &'a BTreeMap<PlaneId, Plane>,
    last_plane: PlaneId,
    jobs: &'a FxHashMap<RunId, Box<Job>>,
    services: &'a BTreeMap<ServiceName, Service>,
    gpus: &'a BTreeMap<GpuUuid, Gpu>,
    holds: &'a BTreeMap<ServiceName, Hold>,
    retired: &'a BTreeMap<ServiceName, Retired>,
    callbacks: &'a BTreeMap<RunId, Callback>,
    notices: &'a Notices,
    people: &'a People,
    accounts: &'a Accounts,
    engine: &'a Engine,
}

/// The same, owned, as it is read.
#[derive(Deserialize)]
struct SnapshotOwned {
    seq: Seq,
    now: Timestamp,
    epoch: u64,
    planes: BTreeMap<PlaneId, Plane>,
    last_plane: PlaneId,
    jobs: FxHashMap<RunId, Box<Job>>,
    services: BTreeMap<ServiceName, Service>,
    gpus: BTreeMap<GpuUuid, Gpu>,
    holds: BTreeMap<ServiceName, Hold>,
    retired: BTreeMap<ServiceName, Retired>,
    callbacks: BTreeMap<RunId, Callback>,
    notices: Notices,
    people: People,
    accounts: Accounts,
    engine: Engine,
}

/// What a snapshot's bytes begin with. One of another form is passed over: the events say the same.
const SNAPSHOT_FORM: &[u8; 8] = b"rgstate5";

impl State {
    /// An empty State. `ageing_ms_per_level` orders the queue (`Settings`).
    pub fn new(ageing_ms_per_level: u64) -> State {
        State {
            queue: Queue::new(ageing_ms_per_level),
            ..State::default()
        }
    }

    /// The bytes of a snapshot.
    pub fn to_snapshot(&self) -> Result<Vec<u8>, postcard::Error> {
        let snapshot = SnapshotRef {
            seq: self.seq,
            now: self.now,
            epoch: self.epoch,
            planes: &self.planes,
            last_plane: self.last_plane,
            jobs: &self.jobs,
            services: &self.services,
            gpus: &self.gpus,
            holds: &self.holds,
            retired: &self.retired,
            callbacks: &self.callbacks,
            notices: &self.notices,
            people: &self.people,
            accounts: &self.accounts,
            engine: &self.engine,
        };
        postcard::to_extend(&snapshot, SNAPSHOT_FORM.to_vec())
    }

    /// State from a snapshot's bytes, its indexes made anew.
    pub fn from_snapshot(bytes: &[u8], ageing_ms_per_level: u64) -> Result<State, postcard::Error> {
        let bytes = bytes.strip_prefix(SNAPSHOT_FORM);
        let bytes = bytes.ok_or(postcard::Error::DeserializeBadEncoding)?;
        let snapshot: SnapshotOwned = postcard::from_bytes(bytes)?;
        let mut state = State::new(ageing_ms_per_level);
        state.seq = snapshot.seq;
        state.now = snapshot.now;
        state.epoch = snapshot.epoch;
        state.planes = snapshot.planes;
        state.last_plane = snapshot.last_plane;
        state.gpus = snapshot.gpus;
        state.holds = snapshot.holds;
        state.retired = snapshot.retired;
        state.callbacks = snapshot.callbacks;
        state.notices = snapshot.notices;
        state.people = snapshot.people;
        state.accounts = snapshot.accounts;
        state.engine = snapshot.engine;
        state.people.index_tokens();
        for (name, service) in &snapshot.services {
            if let Some(instance) = &service.instance {
                for run in &instance.promised {
                    state.promises.insert(*run, name.clone());
                }
            }
            state.touched.insert(name.clone());
        }
        state.services = snapshot.services;
        state.index_limits();
        state.jobs = snapshot.jobs;
        state.index_all_jobs();
        let preemptors: Vec<RunId> = state.preempted_by.keys().copied().collect();
        state.idle_preemptors = preemptors
            .into_iter()
            .filter(|run| !state.is_active(*run))
            .collect();
        Ok(state)
    }

    /// Whether the run waits for its turn or works.
    pub fn is_active(&self, run: RunId) -> bool {
        self.jobs.get(&run).is_some_and(|job| {
            !matches!(job.phase, job::Phase::Paused | job::Phase::Preempted { .. })
        })
    }

    /// The live job of this plane; another plane's is as good as none.
    pub fn job(&self, plane: PlaneId, run: RunId) -> Option<&Job> {
        let job = self.jobs.get(&run)?;
        (job.plane == plane).then_some(&**job)
    }

    /// Takes in one record: its event, and how many bytes its payload had when it was appended.
    pub fn fold(
        &mut self,
        seq: Seq,
        at: Timestamp,
        plane: PlaneId,
        (event, payload_bytes): (&Event, u64),
    ) {
        self.apply(seq, at, plane, event);
        self.keep(plane, event, payload_bytes);
    }

    /// Applies one event, of a record without a payload. An event that no longer fits changes nothing.
    pub fn apply(&mut self, seq: Seq, at: Timestamp, plane: PlaneId, event: &Event) {
        self.seq = seq;
        self.now = at;
        match event {
            Event::GatewayStarted { epoch, .. } => {
                self.epoch = *epoch;
                self.doubt_instances(at);
            }
            Event::PlaneOpened { .. }
            | Event::PlanePurged { .. }
            | Event::UserCreated { .. }
            | Event::UserUpdated { .. }
            | Event::UserDeleted { .. }
            | Event::TokenIssued { .. }
            | Event::TokenRevoked { .. }
            | Event::TokenUpgraded { .. }
            | Event::RuntimeReserved { .. }
            | Event::RuntimeAssigned { .. }
            | Event::RuntimePurging { .. }
            | Event::RuntimeReleased { .. }
            | Event::PasswordChanged { .. }
            | Event::PasswordRehashed { .. }
            | Event::SessionsEnded { .. }
            | Event::TenantCreated { .. }
            | Event::TenantUpdated { .. }
            | Event::TenantAllowanceChanged { .. }
            | Event::TenantNotifyChanged { .. }
            | Event::UserQuotasChanged { .. }
            | Event::UserAllowanceChanged { .. }
            | Event::ShareHalfLifeChanged { .. } => self.apply_people(at, event),
            Event::GatewayStopped { .. }
            | Event::CommandAccepted { .. }
            | Event::CommandApplied { .. }
            | Event::CommandRejected { .. }
            | Event::JobStopped { .. }
            | Event::JobOutcomeStale { .. }
            | Event::InstanceSignalled { .. }
            | Event::InstanceUnhealthy { .. }
            | Event::RunPurged { .. }
            | Event::NotificationTestAsked { .. }
            | Event::NotificationAttempted { .. }
            | Event::WriteAudited { .. } => {}
            Event::JobQueued { .. }
            | Event::JobDispatched { .. }
            | Event::JobProgressed { .. }
            | Event::CheckpointSaved { .. }
            | Event::JobStopRequested { .. }
            | Event::JobPaused { .. }
            | Event::JobResumed { .. }
            | Event::JobPreempted { .. }
            | Event::JobRequeued { .. }
            | Event::JobPriorityChanged { .. }
            | Event::JobAttemptFailed { .. }
            | Event::JobCompleted { .. }
            | Event::JobFailed { .. }
            | Event::JobCancelled { .. }
            | Event::JobRevived { .. }
            | Event::LadderStepBegan { run: Some(_), .. }
            | Event::LadderStepEnded { run: Some(_), .. } => {
                self.apply_job(seq, at, plane, event);
            }
            Event::CallbackAttempted { .. } => self.apply_callback(event),
            Event::PayloadsPurged { bytes, .. } => self.give_back(plane, *bytes),
            of_machine => self.apply_machine(at, of_machine),
        }
        self.apply_notices(seq, at, plane, event);
    }

    /// Applies an event about services, their instances and GPUs.
    fn apply_machine(&mut self, at: Timestamp, event: &Event) {
        match event {
            Event::ServiceRegistered { .. }
            | Event::ServiceAssigned { .. }
            | Event::ServiceUpdated { .. }
            | Event::ServiceEnabled { .. }
            | Event::ServiceDisabled { .. }
            | Event::ServiceRemoved { .. }
            | Event::ServiceCrashLooped { .. }
            | Event::ServicePeakLearned { .. }
            | Event::ServiceNeedRaised { .. } => self.apply_service(event),
            Event::InstanceStartRequested { .. }
            | Event::InstanceSpawned { .. }
            | Event::InstanceReady { .. }
            | Event::InstanceAdopted { .. }
            | Event::InstanceDraining { .. }
            | Event::InstanceStopRequested { .. }
            | Event::InstanceExited { .. }
            | Event::InstanceReleased { .. }
            | Event::ContainerChanged { .. }
            | Event::LadderStepBegan { .. }
            | Event::LadderStepEnded { .. }
            | Event::InstanceSlept { .. }
            | Event::InstanceWakeRequested { .. } => self.apply_instance(at, event),
            Event::EngineChanged { engine } => self.change_engine(engine),
            Event::RoomHeld { .. }
            | Event::RoomReleased { .. }
            | Event::GpusListed { .. }
            | Event::GpuForeignMemoryChanged { .. }
            | Event::GpuQuarantined { .. }
            | Event::GpuQuarantineLifted { .. } => self.apply_gpu(at, event),
            _ => {}
        }
    }

    fn apply_people(&mut self, at: Timestamp, event: &Event) {
        match event {
            Event::PlaneOpened {
                plane,
                tenant,
                runtime,
            } => {
                let value = Plane {
                    tenant: tenant.clone(),
                    runtime: runtime.clone(),
                    kept_bytes: 0,
                };
                self.planes.insert(*plane, value);
                self.last_plane = self.last_plane.max(*plane);
            }
            Event::PlanePurged { plane } => {
                if let Some(purged) = self.planes.remove(plane) {
                    self.accounts.give_back(&purged.tenant, purged.kept_bytes);
                }
                // There is nothing left to tell of.
                self.callbacks
                    .retain(|_, callback| callback.plane != *plane);
            }
            _ => {}
        }
        self.apply_tenancy(at, event);
    }

    fn apply_callback(&mut self, event: &Event) {
        let Event::CallbackAttempted {
            run,
            number,
            delivered,
            next_at,
            ..
        } = event
        else {
            return;
        };
        match (delivered, next_at) {
            (false, Some(next_at)) => {
                if let Some(callback) = self.callbacks.get_mut(run) {
                    callback.number = *number;
                    callback.next_at = *next_at;
                }
            }
            _ => {
                self.callbacks.remove(run);
            }
        }
    }
}
