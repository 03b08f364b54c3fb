//! People as the gateway knows them: tenants' users, what they may do, their tokens (by hash only) and the
//! runtimes whose data planes are theirs. How events change them is in `state::user`.

use std::fmt;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::ids::PlaneId;
use super::notify::NotifyChange;
use super::tenant::{QuotaHit, QuotasChange, TenantChange, UserAllowance, UserAllowanceChange};
use super::time::Timestamp;

/// What somebody may do, from most to least. A user has the powers of the highest of its roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Reads its own runs, and the services.
    Viewer,
    /// Starts and steers its own runs.
    User,
    /// Registers and operates services, which all planes share.
    Operator,
    /// Manages the users of its own tenant.
    TenantAdmin,
    /// Manages all users, and reads the ledger of the whole gateway.
    Admin,
}

impl Role {
    pub const ALL: [Role; 5] = [
        Role::Admin,
        Role::TenantAdmin,
        Role::Operator,
        Role::User,
        Role::Viewer,
    ];

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::TenantAdmin => "tenant_admin",
            Role::Operator => "operator",
            Role::User => "user",
            Role::Viewer => "viewer",
        }
    }

    pub fn from_name(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// What a token may be used for, within what its user may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Scope {
    #[serde(rename = "*")]
    All,
    #[serde(rename = "runs:read")]
    RunsRead,
    #[serde(rename = "runs:write")]
    RunsWrite,
    #[serde(rename = "services:read")]
    ServicesRead,
    #[serde(rename = "services:write")]
    ServicesWrite,
    #[serde(rename = "ledger:read")]
    LedgerRead,
    #[serde(rename = "inference")]
    Inference,
}

impl Scope {
    pub const ALL: [Scope; 7] = [
        Scope::All,
        Scope::RunsRead,
        Scope::RunsWrite,
        Scope::ServicesRead,
        Scope::ServicesWrite,
        Scope::LedgerRead,
        Scope::Inference,
    ];

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Scope::All => "*",
            Scope::RunsRead => "runs:read",
            Scope::RunsWrite => "runs:write",
            Scope::ServicesRead => "services:read",
            Scope::ServicesWrite => "services:write",
            Scope::LedgerRead => "ledger:read",
            Scope::Inference => "inference",
        }
    }

    pub fn from_name(name: &str) -> Option<Scope> {
        Scope::ALL.into_iter().find(|scope| scope.name() == name)
    }
}

/// Names a user. Both parts are sanitised (`sanitised`) and not empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct UserKey {
    pub tenant: SmolStr,
    pub user: SmolStr,
}

impl UserKey {
    /// The first administrator, who is always there and never loses its powers: whoever can read the data
    /// directory is this user.
    pub fn first_admin() -> UserKey {
        UserKey {
            tenant: SmolStr::new_static("default"),
            user: SmolStr::new_static("admin"),
        }
    }

    /// As records name their actor: the tenant is left out when it is the default one.
    pub fn actor(&self) -> SmolStr {
        match self.tenant.as_str() {
            "default" => self.user.clone(),
            tenant => SmolStr::new(format!("{tenant}/{}", self.user)),
        }
    }
}

impl fmt::Display for UserKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.user)
    }
}

/// Names a runtime of a tenant: its data is one plane.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RuntimeKey {
    pub tenant: SmolStr,
    pub runtime: SmolStr,
}

impl fmt::Display for RuntimeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.runtime)
    }
}

/// Names a token among its user's; public.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TokenKey {
    pub owner: UserKey,
    pub token: SmolStr,
}

/// What is kept of a token's secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenHash {
    /// blake3 of the token, keyed with the gateway's token key.
    Keyed([u8; 32]),
    /// PBKDF2-HMAC-SHA256 as AbstractGateway made it; replaced by a keyed hash when it is first used.
    Pbkdf2 {
        iterations: u32,
        salt: Vec<u8>,
        digest: [u8; 32],
        /// The first bytes of the token's SHA-256: only a token that fits is worth the slow hash.
        fingerprint: [u8; 6],
    },
}

/// What a token is found by when it is shown. No two tokens have the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TokenDigest {
    /// Its keyed hash.
    Keyed([u8; 32]),
    /// The fingerprint of an imported one.
    Fingerprint([u8; 6]),
}

impl TokenDigest {
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            TokenDigest::Keyed(digest) => digest,
            TokenDigest::Fingerprint(fingerprint) => fingerprint,
        }
    }
}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenDigest(..)")
    }
}

impl TokenHash {
    /// What its token is found by.
    pub fn digest(&self) -> TokenDigest {
        match self {
            TokenHash::Keyed(digest) => TokenDigest::Keyed(*digest),
            TokenHash::Pbkdf2 { fingerprint, .. } => TokenDigest::Fingerprint(*fingerprint),
        }
    }
}

/// Hashes are no secrets, yet nobody's log needs them.
impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TokenHash::Keyed(_) => "Keyed(..)",
            TokenHash::Pbkdf2 { .. } => "Pbkdf2(..)",
        })
    }
}

/// What is kept of a password: a PHC string of argon2id, peppered with the gateway's token key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PasswordHash(pub String);

/// Its hash is worth a guess, so nobody's log gets it.
impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordHash(..)")
    }
}

/// What a user logs in with, beside its tokens. There is none for a user who never had a password and whose
/// sessions were never ended. It outlives the user, so that one of the same name inherits no session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    pub key: UserKey,
    pub password: Option<PasswordHash>,
    /// Grows whenever all of the user's sessions end: a session counts only in the era in which it began.
    pub era: u64,
}

/// What an administrator decides about a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    pub email: String,
    pub roles: Vec<Role>,
    /// What all of the user's tokens are restricted to; empty for no restriction.
    pub scopes: Vec<Scope>,
    pub enabled: bool,
    pub runtime: SmolStr,
}

/// What is to become of a profile; `None` leaves a member as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProfileChange {
    pub email: Option<String>,
    pub roles: Option<Vec<Role>>,
    pub scopes: Option<Vec<Scope>>,
    pub enabled: Option<bool>,
    pub runtime: Option<SmolStr>,
}

impl ProfileChange {
    /// The profile with the changes made.
    pub fn of(self, profile: &Profile) -> Profile {
        let old = profile.clone();
        Profile {
            email: self.email.unwrap_or(old.email),
            roles: self.roles.unwrap_or(old.roles),
            scopes: self.scopes.unwrap_or(old.scopes),
            enabled: self.enabled.unwrap_or(old.enabled),
            runtime: self.runtime.unwrap_or(old.runtime),
        }
    }
}

/// A user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub key: UserKey,
    pub profile: Profile,
    /// Its runtime's.
    pub plane: PlaneId,
    pub allowance: UserAllowance,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

impl User {
    /// The highest of its roles.
    pub fn power(&self) -> Role {
        power(&self.profile.roles)
    }
}

/// The highest of some roles; without any, one may only look.
pub fn power(roles: &[Role]) -> Role {
    roles.iter().copied().max().unwrap_or(Role::Viewer)
}

/// A token about to be issued; its secret is known to the caller alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewToken {
    pub token: SmolStr,
    pub name: SmolStr,
    pub scopes: Vec<Scope>,
    pub hash: TokenHash,
    pub expires_at: Option<Timestamp>,
}

/// A token of a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    pub key: TokenKey,
    pub name: SmolStr,
    pub scopes: Vec<Scope>,
    pub hash: TokenHash,
    pub expires_at: Option<Timestamp>,
    pub created_at: Timestamp,
}

/// A runtime of a tenant: in use by a user, or reserved so that nobody takes over what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    pub key: RuntimeKey,
    pub plane: PlaneId,
    pub reservation: Option<Reservation>,
}

/// Why nobody may have a runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// Whose it was.
    pub owner: SmolStr,
    pub reason: ReserveReason,
    /// Its payloads are being removed.
    pub purging: bool,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

/// Why a runtime was reserved (`contracts/run-gateway.md` sections 3.3 and 3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReserveReason {
    DeletedUser,
    RuntimeReassigned,
    RuntimeTransferred,
}

/// Why a token ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevokeCause {
    /// Its user or an administrator said so.
    Revoked,
    /// An administrator gave the user a new one.
    Rotated,
    UserDeleted,
}

/// Something asked about people.
#[derive(Clone, Debug, PartialEq)]
pub enum IdentityCommand {
    CreateUser {
        key: UserKey,
        profile: Profile,
        token: NewToken,
    },
    /// Of somebody whom the single sign-on issuer knows: without a token of ours.
    ProvisionUser {
        key: UserKey,
        profile: Profile,
    },
    /// With `rotate`, every token and the password end and this token begins.
    UpdateUser {
        key: UserKey,
        change: ProfileChange,
        quotas: QuotasChange,
        allowance: UserAllowanceChange,
        rotate: Option<NewToken>,
    },
    DeleteUser {
        key: UserKey,
    },
    IssueToken {
        owner: UserKey,
        token: NewToken,
    },
    RevokeToken {
        key: TokenKey,
    },
    /// An imported token was shown and is right: from now on its keyed hash is kept.
    UpgradeToken {
        key: TokenKey,
        digest: [u8; 32],
    },
    TransferRuntime {
        key: RuntimeKey,
        to: SmolStr,
    },
    /// Marks a reserved runtime, and ends what still runs in its plane.
    BeginPurge {
        key: RuntimeKey,
    },
    /// All runs of the plane have ended: remove all that is in it, then forget the runtime.
    FinishPurge {
        key: RuntimeKey,
    },
    /// `None` takes it away. `replaces` is the one that the caller has shown; when it is another by now, nothing
    /// changes.
    SetPassword {
        key: UserKey,
        password: Option<PasswordHash>,
        replaces: Option<PasswordHash>,
    },
    /// The right password was shown, and its hash is weaker than a new one would be.
    RehashPassword {
        key: UserKey,
        replaces: PasswordHash,
        password: PasswordHash,
    },
    /// All tokens and sessions of the first administrator end: somebody else may have made them.
    RecoverFirstAdmin,
    /// Says something of a tenant. With `create` it must not have been said before.
    SetTenant {
        tenant: SmolStr,
        change: TenantChange,
        create: bool,
    },
    /// Says where a tenant is told of its runs.
    SetNotify {
        tenant: SmolStr,
        change: NotifyChange,
    },
    /// Sends a test to each of its channels.
    TestNotify {
        tenant: SmolStr,
    },
}

impl IdentityCommand {
    /// Whether there is more to be kept after it.
    pub fn adds(&self) -> bool {
        matches!(
            self,
            IdentityCommand::CreateUser { .. }
                | IdentityCommand::ProvisionUser { .. }
                | IdentityCommand::IssueToken { .. }
                | IdentityCommand::SetTenant { create: true, .. }
        )
    }
}

/// Why nothing was changed about people. `Display` is what the caller reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityRejection {
    #[error("Gateway user already exists: {0}")]
    UserExists(UserKey),
    #[error("Gateway user not found")]
    UserNotFound,
    #[error(
        "The first administrator cannot be changed here: its token is the file \
         auth/bootstrap-admin-token of the data directory (see `rungate user recover-admin`)"
    )]
    UserProtected,
    #[error("The gateway holds as many users as it may ({0})")]
    TooManyUsers(usize),
    #[error("Runtime already in use or reserved: {0}")]
    RuntimeTaken(RuntimeKey),
    #[error("Runtime reservation not found")]
    RuntimeNotFound,
    #[error("Runtime {0} belongs to a user; delete the user or give it another runtime first")]
    RuntimeInUse(RuntimeKey),
    #[error("Runtime {0} has no user any more; nothing is started in it")]
    RuntimeLeft(RuntimeKey),
    #[error("User {0} already has this runtime")]
    RuntimeHeld(UserKey),
    #[error("Runtime {0} is being purged")]
    RuntimePurging(RuntimeKey),
    #[error("{runs} runs of the runtime have not ended yet; purge it again in a moment")]
    RunsEnding { runs: u64 },
    #[error("Token not found")]
    TokenNotFound,
    #[error("A token named '{0}' exists already")]
    TokenExists(SmolStr),
    #[error("The token is in use already; choose another")]
    TokenTaken,
    #[error("A user may have {0} tokens; revoke one first")]
    TooManyTokens(usize),
    #[error("The password was changed meanwhile; log in with the new one")]
    PasswordStale,
    #[error("Tenant already exists: {0}")]
    TenantExists(SmolStr),
    #[error("Tenant '{0}' has no channel of notifications; set one first")]
    NothingToTest(SmolStr),
    #[error("Tenant not found")]
    TenantNotFound,
    #[error("The tenant 'default' cannot be disabled: it is the first administrator's")]
    TenantProtected,
    #[error("The gateway holds as many tenants as it may ({0})")]
    TooManyTenants(usize),
    #[error("{0}; {remedy}, or ask an administrator for more", remedy = .0.remedy())]
    QuotaExceeded(Box<QuotaHit>),
}

impl IdentityRejection {
    /// Stable, machine-readable name.
    pub fn code(&self) -> &'static str {
        match self {
            IdentityRejection::UserExists(_) => "user_exists",
            IdentityRejection::UserNotFound => "user_not_found",
            IdentityRejection::UserProtected => "user_protected",
            IdentityRejection::TooManyUsers(_) => "too_many_users",
            IdentityRejection::RuntimeTaken(_) => "runtime_taken",
            IdentityRejection::RuntimeNotFound => "runtime_not_found",
            IdentityRejection::RuntimeInUse(_) => "runtime_in_use",
            IdentityRejection::RuntimeLeft(_) => "runtime_left",
            IdentityRejection::RuntimeHeld(_) => "runtime_held",
            IdentityRejection::RuntimePurging(_) => "runtime_purging",
            IdentityRejection::RunsEnding { .. } => "runs_ending",
            IdentityRejection::TokenNotFound => "token_not_found",
            IdentityRejection::TokenExists(_) => "token_exists",
            IdentityRejection::TokenTaken => "token_taken",
            IdentityRejection::TooManyTokens(_) => "too_many_tokens",
            IdentityRejection::PasswordStale => "password_stale",
            IdentityRejection::TenantExists(_) => "tenant_exists",
            IdentityRejection::NothingToTest(_) => "nothing_to_test",
            IdentityRejection::TenantNotFound => "tenant_not_found",
            IdentityRejection::TenantProtected => "tenant_protected",
            IdentityRejection::TooManyTenants(_) => "too_many_tenants",
            IdentityRejection::QuotaExceeded(_) => "quota_exceeded",
        }
    }
}

/// An id as the contract writes it (section 3.3): other characters than `[A-Za-z0-9_.@-]` become `_`, and
/// `.` and `_` at either end go. May come out empty.
pub fn sanitised(id: &str) -> SmolStr {
    let kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '@' | '-');
    let text: String = id.chars().map(|c| if kept(c) { c } else { '_' }).collect();
    SmolStr::new(text.trim_matches(['.', '_']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_sanitised_as_in_the_contract() {
        assert_eq!(sanitised("alice@example.com"), "alice@example.com");
        assert_eq!(sanitised("../a b/ü."), "a_b");
        assert_eq!(sanitised("___"), "");
    }

    #[test]
    fn names_on_the_wire_are_those_of_serde() {
        for role in Role::ALL {
            assert_eq!(serde_json::to_value(role).unwrap(), role.name());
            assert_eq!(Role::from_name(role.name()), Some(role));
        }
        for scope in Scope::ALL {
            assert_eq!(serde_json::to_value(scope).unwrap(), scope.name());
            assert_eq!(Scope::from_name(scope.name()), Some(scope));
        }
        assert_eq!(power(&[Role::User, Role::Admin]), Role::Admin);
    }
}
