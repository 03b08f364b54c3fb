//! People: creating and changing users, their tokens, and what becomes of the runtimes they leave.

use smol_str::SmolStr;

use super::job::cancelled;
use super::{Context, Decision};
use crate::domain::event::{Event, JobStopCause};
use crate::domain::identity::{
    IdentityCommand, IdentityRejection, NewToken, PasswordHash, Profile, ProfileChange,
    ReserveReason, RevokeCause, Role, Runtime, RuntimeKey, TokenHash, TokenKey, UserKey,
};
use crate::domain::ids::PlaneId;
use crate::domain::state::job::{Job, Phase};
use crate::domain::tenant::{QuotasChange, UserAllowanceChange};

/// Users at most: each costs memory in State.
const MAX_USERS: usize = 100_000;

/// Tokens of one user at most.
const MAX_TOKENS: usize = 50;

/// Runs that a purge ends in one decision.
const ENDED_AT_ONCE: usize = 4_096;

/// Why a purge ends the runs of its plane.
const PURGE_REASON: &str = "The runtime is being purged";

pub(super) type Decided = Result<Vec<Event>, IdentityRejection>;

impl Context<'_> {
    pub(super) fn identity(&self, command: IdentityCommand) -> Result<Decision, IdentityRejection> {
        let events = match command {
            IdentityCommand::CreateUser {
                key,
                profile,
                token,
            } => self.create_user(key, profile, token),
            IdentityCommand::ProvisionUser { key, profile } => self.provision_user(key, profile),
            IdentityCommand::UpdateUser {
                key,
                change,
                quotas,
                allowance,
                rotate,
            } => self.update_user(key, change, (quotas, allowance), rotate),
            IdentityCommand::DeleteUser { key } => self.delete_user(key),
            IdentityCommand::IssueToken { owner, token } => self.issue_token(owner, token),
            IdentityCommand::RevokeToken { key } => self.revoke_token(key),
            IdentityCommand::UpgradeToken { key, digest } => self.upgrade_token(key, digest),
            IdentityCommand::TransferRuntime { key, to } => self.transfer_runtime(key, to),
            IdentityCommand::BeginPurge { key } => self.begin_purge(key),
            IdentityCommand::FinishPurge { key } => self.finish_purge(key),
            IdentityCommand::SetPassword {
                key,
                password,
                replaces,
            } => self.set_password(key, password, replaces.as_ref()),
            IdentityCommand::RehashPassword {
                key,
                replaces,
                password,
            } => self.rehash_password(key, &replaces, password),
            IdentityCommand::RecoverFirstAdmin => Ok(self.recover_first_admin()),
            IdentityCommand::SetTenant {
                tenant,
                change,
                create,
            } => self.set_tenant(tenant, change, create),
            IdentityCommand::SetNotify { tenant, change } => self.set_notify(tenant, change),
            IdentityCommand::TestNotify { tenant } => self.test_notify(tenant),
        };
        events.map(Decision::done)
    }

    /// The first administrator, where the ledger does not know one yet.
    pub(super) fn first_admin(&self) -> Option<Event> {
        let key = UserKey::first_admin();
        if self.state.people.users.contains_key(&key) {
            return None;
        }
        let runtime = self.state.planes.get(&PlaneId::ROOT);
        let runtime = runtime.map_or(SmolStr::new_static("default"), |plane| {
            plane.runtime.clone()
        });
        let profile = Profile {
            email: String::new(),
            roles: vec![Role::Admin, Role::User],
            scopes: Vec::new(),
            enabled: true,
            runtime,
        };
        Some(Event::UserCreated {
            key,
            profile,
            plane: PlaneId::ROOT,
        })
    }

    fn recover_first_admin(&self) -> Vec<Event> {
        let key = UserKey::first_admin();
        let mut events = self.revoke_all(&key, RevokeCause::Revoked);
        events.push(Event::SessionsEnded { key });
        events
    }

    /// The plane for a runtime that is free, and the event that opens it when it is new.
    fn open_runtime(
        &self,
        tenant: &SmolStr,
        runtime: &SmolStr,
    ) -> Result<(PlaneId, Event), IdentityRejection> {
        let key = RuntimeKey {
            tenant: tenant.clone(),
            runtime: runtime.clone(),
        };
        let people = &self.state.people;
        if people.runtimes.contains_key(&key) {
            return Err(IdentityRejection::RuntimeTaken(key));
        }
        let plane = PlaneId(self.state.last_plane.0 + 1);
        let opened = Event::PlaneOpened {
            plane,
            tenant: key.tenant,
            runtime: key.runtime,
        };
        Ok((plane, opened))
    }

    fn create_user(&self, key: UserKey, profile: Profile, token: NewToken) -> Decided {
        let mut events = self.provision_user(key.clone(), profile)?;
        self.check_hash(&token.hash)?;
        events.push(Event::TokenIssued { owner: key, token });
        Ok(events)
    }

    fn provision_user(&self, key: UserKey, profile: Profile) -> Decided {
        let people = &self.state.people;
        if people.users.contains_key(&key) {
            return Err(IdentityRejection::UserExists(key));
        }
        if people.users.len() >= MAX_USERS {
            return Err(IdentityRejection::TooManyUsers(MAX_USERS));
        }
        if let Some(hit) = self.state.users_hit(&key.tenant) {
            return Err(IdentityRejection::QuotaExceeded(Box::new(hit)));
        }
        let (plane, opened) = self.open_runtime(&key.tenant, &profile.runtime)?;
        let created = Event::UserCreated {
            key,
            profile,
            plane,
        };
        Ok(vec![opened, created])
    }

    /// Two tokens with one secret would make whose it is a matter of luck.
    fn check_hash(&self, hash: &TokenHash) -> Result<(), IdentityRejection> {
        match self.state.people.is_taken(&hash.digest()) {
            true => Err(IdentityRejection::TokenTaken),
            false => Ok(()),
        }
    }

    fn update_user(
        &self,
        key: UserKey,
        change: ProfileChange,
        (quotas, allowance): (QuotasChange, UserAllowanceChange),
        rotate: Option<NewToken>,
    ) -> Decided {
        let people = &self.state.people;
        let user = people
            .users
            .get(&key)
            .ok_or(IdentityRejection::UserNotFound)?;
        if key == UserKey::first_admin() {
            return Err(IdentityRejection::UserProtected);
        }
        let profile = change.of(&user.profile);
        let mut events = Vec::new();
        let mut plane = user.plane;
        if profile.runtime != user.profile.runtime {
            let (opened_plane, opened) = self.open_runtime(&key.tenant, &profile.runtime)?;
            plane = opened_plane;
            events.push(opened);
            events.push(Event::RuntimeReserved {
                key: RuntimeKey {
                    tenant: key.tenant.clone(),
                    runtime: user.profile.runtime.clone(),
                },
                owner: key.user.clone(),
                reason: ReserveReason::RuntimeReassigned,
            });
        }
        let disabled = user.profile.enabled && !profile.enabled;
        if disabled || rotate.is_some() {
            events.push(Event::SessionsEnded { key: key.clone() });
        }
        if profile != user.profile {
            events.push(Event::UserUpdated {
                key: key.clone(),
                profile,
                plane,
            });
        }
        events.extend(self.change_quotas(&key, quotas));
        events.extend(Self::change_allowance(user, allowance));
        if let Some(token) = rotate {
            self.check_hash(&token.hash)?;
            events.extend(self.revoke_all(&key, RevokeCause::Rotated));
            // Whoever had a token may have set it.
            if people.password_of(&key).is_some() {
                let (key, password) = (key.clone(), None);
                events.push(Event::PasswordChanged { key, password });
            }
            events.push(Event::TokenIssued { owner: key, token });
        }
        Ok(events)
    }

    fn revoke_all(&self, owner: &UserKey, cause: RevokeCause) -> Vec<Event> {
        let revoked = |key: TokenKey| Event::TokenRevoked { key, cause };
        let tokens = self.state.people.tokens_of(owner);
        tokens.map(|token| revoked(token.key.clone())).collect()
    }

    fn delete_user(&self, key: UserKey) -> Decided {
        let people = &self.state.people;
        let user = people
            .users
            .get(&key)
            .ok_or(IdentityRejection::UserNotFound)?;
        if key == UserKey::first_admin() {
            return Err(IdentityRejection::UserProtected);
        }
        let mut events = self.revoke_all(&key, RevokeCause::UserDeleted);
        if people.password_of(&key).is_some() {
            events.push(Event::PasswordChanged {
                key: key.clone(),
                password: None,
            });
        }
        events.push(Event::RuntimeReserved {
            key: RuntimeKey {
                tenant: key.tenant.clone(),
                runtime: user.profile.runtime.clone(),
            },
            owner: key.user.clone(),
            reason: ReserveReason::DeletedUser,
        });
        events.extend(self.lift_quotas(&key));
        events.push(Event::UserDeleted { key });
        Ok(events)
    }

    fn issue_token(&self, owner: UserKey, token: NewToken) -> Decided {
        let people = &self.state.people;
        if !people.users.contains_key(&owner) {
            return Err(IdentityRejection::UserNotFound);
        }
        let mut count = 0;
        for other in people.tokens_of(&owner) {
            count += 1;
            if other.name == token.name {
                return Err(IdentityRejection::TokenExists(token.name));
            }
        }
        if count >= MAX_TOKENS {
            return Err(IdentityRejection::TooManyTokens(MAX_TOKENS));
        }
        self.check_hash(&token.hash)?;
        Ok(vec![Event::TokenIssued { owner, token }])
    }

    fn revoke_token(&self, key: TokenKey) -> Decided {
        if !self.state.people.tokens.contains_key(&key) {
            return Err(IdentityRejection::TokenNotFound);
        }
        let cause = RevokeCause::Revoked;
        Ok(vec![Event::TokenRevoked { key, cause }])
    }

    /// A second use that came before the first one's upgrade finds it done.
    fn upgrade_token(&self, key: TokenKey, digest: [u8; 32]) -> Decided {
        match self.state.people.tokens.get(&key).map(|token| &token.hash) {
            None => Err(IdentityRejection::TokenNotFound),
            Some(TokenHash::Keyed(_)) => Ok(Vec::new()),
            Some(TokenHash::Pbkdf2 { .. }) => {
                self.check_hash(&TokenHash::Keyed(digest))?;
                Ok(vec![Event::TokenUpgraded { key, digest }])
            }
        }
    }

    fn set_password(
        &self,
        key: UserKey,
        password: Option<PasswordHash>,
        replaces: Option<&PasswordHash>,
    ) -> Decided {
        let people = &self.state.people;
        if !people.users.contains_key(&key) {
            return Err(IdentityRejection::UserNotFound);
        }
        if key == UserKey::first_admin() {
            return Err(IdentityRejection::UserProtected);
        }
        let kept = people.password_of(&key);
        if replaces.is_some() && replaces != kept {
            return Err(IdentityRejection::PasswordStale);
        }
        if password.is_none() && kept.is_none() {
            return Ok(Vec::new());
        }
        Ok(vec![Event::PasswordChanged { key, password }])
    }

    /// Of two logins at once, the second finds it done.
    fn rehash_password(
        &self,
        key: UserKey,
        replaces: &PasswordHash,
        password: PasswordHash,
    ) -> Decided {
        match self.state.people.password_of(&key) {
            Some(kept) if kept == replaces => Ok(vec![Event::PasswordRehashed { key, password }]),
            _ => Ok(Vec::new()),
        }
    }

    fn reserved(&self, key: &RuntimeKey) -> Result<&Runtime, IdentityRejection> {
        let people = &self.state.people;
        match people.runtimes.get(key) {
            Some(runtime) if runtime.reservation.is_some() => Ok(runtime),
            // One that is not reserved is a user's, from the user's creation on.
            Some(_) => Err(IdentityRejection::RuntimeInUse(key.clone())),
            None => Err(IdentityRejection::RuntimeNotFound),
        }
    }

    fn transfer_runtime(&self, key: RuntimeKey, to: SmolStr) -> Decided {
        let target = UserKey {
            tenant: key.tenant.clone(),
            user: to,
        };
        let users = &self.state.people.users;
        let user = users.get(&target).ok_or(IdentityRejection::UserNotFound)?;
        if user.profile.runtime == key.runtime {
            return Err(IdentityRejection::RuntimeHeld(target));
        }
        let runtime = match self.reserved(&key) {
            Err(IdentityRejection::RuntimeInUse(_)) => Err(IdentityRejection::RuntimeNotFound),
            other => other,
        }?;
        if runtime.reservation.as_ref().is_some_and(|r| r.purging) {
            return Err(IdentityRejection::RuntimePurging(key));
        }
        if target == UserKey::first_admin() {
            return Err(IdentityRejection::UserProtected);
        }
        let profile = Profile {
            runtime: key.runtime.clone(),
            ..user.profile.clone()
        };
        Ok(vec![
            Event::RuntimeReserved {
                key: RuntimeKey {
                    tenant: key.tenant.clone(),
                    runtime: user.profile.runtime.clone(),
                },
                owner: target.user.clone(),
                reason: ReserveReason::RuntimeTransferred,
            },
            Event::RuntimeAssigned {
                user: target.user.clone(),
                key,
            },
            Event::UserUpdated {
                key: target,
                profile,
                plane: runtime.plane,
            },
        ])
    }

    /// Asked again it goes on: runs that wait are cancelled, those that work are asked to stop; so many at once.
    fn begin_purge(&self, key: RuntimeKey) -> Decided {
        let runtime = self.reserved(&key)?;
        let plane = runtime.plane;
        let mut events = Vec::new();
        if !runtime.reservation.as_ref().is_some_and(|r| r.purging) {
            events.push(Event::RuntimePurging { key });
        }
        if self.state.accounts.plane(plane).live == 0 {
            return Ok(events);
        }
        let is_ending = |job: &Job| {
            let Phase::Stopping { cause, .. } = &job.phase else {
                return false;
            };
            matches!(cause, JobStopCause::Cancel { .. })
        };
        let jobs = self.state.jobs.iter();
        let jobs = jobs.filter(|(_, job)| job.plane == plane && !is_ending(job));
        let mut jobs: Vec<_> = jobs.take(ENDED_AT_ONCE).collect();
        jobs.sort_unstable_by_key(|(run, _)| **run);
        for (run, job) in jobs {
            let reason = PURGE_REASON.to_owned();
            match &job.phase {
                Phase::Running { .. } | Phase::Stopping { .. } => {
                    events.extend(self.request_stop(*run, job, JobStopCause::Cancel { reason }));
                }
                _ => events.push(cancelled(*run, reason)),
            }
        }
        Ok(events)
    }

    /// Nothing of the plane is seen from then on. The runtime is released when all of it is removed.
    fn finish_purge(&self, key: RuntimeKey) -> Decided {
        let runtime = self.reserved(&key)?;
        let plane = runtime.plane;
        if !runtime.reservation.as_ref().is_some_and(|r| r.purging) {
            return Err(IdentityRejection::RuntimeNotFound);
        }
        match self.state.accounts.plane(plane).live {
            0 if self.state.is_open(plane) => Ok(vec![Event::PlanePurged { plane }]),
            0 => Ok(Vec::new()),
            runs => Err(IdentityRejection::RunsEnding { runs }),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::domain::command::{Command, Origin, Rejection};
    use crate::domain::decide::decide;
    use crate::domain::ids::RunId;
    use crate::domain::settings::Settings;
    use crate::domain::spec::JobSpec;
    use crate::domain::state::State;
    use crate::domain::tenant::Tenancy;
    use crate::domain::time::Timestamp;

    const PLANE: PlaneId = PlaneId(1);

    fn apply(state: &mut State, events: impl IntoIterator<Item = Event>) {
        for event in events {
            state.apply(state.seq + 1, Timestamp(1), PLANE, &event);
        }
    }

    fn decided(state: &State, command: Command) -> Result<Vec<Event>, Rejection> {
        let origin = Origin {
            plane: PLANE,
            actor: SmolStr::default(),
            request_id: None,
            tenancy: Tenancy::All,
            at: Timestamp(1),
        };
        let settings = Settings::default();
        let decision = decide(state, &settings, &origin, command, Timestamp(1))?;
        Ok(decision
            .events
            .into_iter()
            .map(|(event, _)| event)
            .collect())
    }

    #[test]
    fn a_runtime_is_purged_once_its_runs_have_ended() {
        let key = RuntimeKey {
            tenant: "default".into(),
            runtime: "ann".into(),
        };
        let run = RunId(uuid::Uuid::from_u128(7));
        let begin = || IdentityCommand::BeginPurge { key: key.clone() };
        let finish = || IdentityCommand::FinishPurge { key: key.clone() };
        let asked = |state: &State, command| decided(state, Command::Identity(Box::new(command)));
        let mut state = State::new(0);
        let opened = Event::PlaneOpened {
            plane: PLANE,
            tenant: key.tenant.clone(),
            runtime: key.runtime.clone(),
        };
        let reserved = Event::RuntimeReserved {
            key: key.clone(),
            owner: "ann".into(),
            reason: ReserveReason::DeletedUser,
        };
        let queued = Event::JobQueued {
            run,
            spec: JobSpec::plain(),
            session: None,
            labels: Vec::new(),
            container: None,
        };
        apply(&mut state, [opened, reserved, queued]);
        let events = asked(&state, begin()).unwrap();
        assert!(matches!(
            &events[..],
            [Event::RuntimePurging { .. }, Event::JobCancelled { .. }]
        ));
        apply(&mut state, events.into_iter().take(1));
        let ending = IdentityRejection::RunsEnding { runs: 1 };
        assert_eq!(asked(&state, finish()), Err(ending.into()));
        let events = asked(&state, begin()).unwrap();
        apply(&mut state, events);
        let events = asked(&state, finish()).unwrap();
        assert_eq!(events, [Event::PlanePurged { plane: PLANE }]);
        apply(&mut state, events);
        for again in [begin(), finish()] {
            assert_eq!(asked(&state, again).unwrap(), []);
        }
        let late = Command::StartJob {
            run,
            spec: JobSpec::plain(),
            session: None,
            labels: Vec::new(),
            container: None,
            payload: Bytes::new(),
        };
        assert_eq!(
            decided(&state, late),
            Err(IdentityRejection::UserNotFound.into())
        );
    }
}
