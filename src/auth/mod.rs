//! Who is calling: tokens and what is kept of them, the administrator's first one, and what a token's user
//! may do; passwords and sessions of browsers; signed tokens.
//!
//! | file | holds |
//! |---|---|
//! | `token` | the form of a token |
//! | `secret` | hashes of tokens, imported ones included |
//! | `uses` | when a token was last used |
//! | `jwt` | signed tokens: their form, the gateway's own keys, tokens for one attempt of a run |
//! | `sso` | tokens of an OpenID Connect issuer |
//! | `password`, `session`, `throttle` | passwords; sessions of browsers; failed logins |
//! | `store`, `logins` | the file of logins; all of those three |
//! | `random` | random bytes |
//! | `checkpoint_key` | what signs the ledger's checkpoints |
//! | `ntfy_token` | access tokens of tenants' ntfy topics |
//! | `bootstrap` | the first administrator's token |

pub mod bootstrap;
pub mod checkpoint_key;
pub mod jwt;
pub mod logins;
pub mod ntfy_token;
pub mod password;
pub mod secret;
pub mod session;
pub mod sso;
pub mod store;
pub mod throttle;
pub mod token;
pub mod uses;

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, header};
use jsonwebtoken::Header;
use secrecy::{ExposeSecret, SecretString};
use smol_str::SmolStr;
use subtle::ConstantTimeEq;

use self::jwt::work::{Work, WorkTokens};
use self::secret::TokenKey as HashKey;
use self::session::{Basis, Digest, Session};
use self::sso::{Person, Sso};
use self::uses::Uses;
use crate::domain::identity::{Role, Scope, Token, TokenHash, TokenKey, User, UserKey, power};
use crate::domain::ids::PlaneId;
use crate::domain::time::Timestamp;

/// Longest token that is looked at.
const MAX_TOKEN_BYTES: usize = 512;

/// Shortest token that an administrator may choose for a user.
const MIN_CHOSEN_BYTES: usize = 16;

/// The kind of users' tokens: `rgt_user_…`.
pub const USER_KIND: &str = "user";

/// Who is calling, what it may do, and whose data plane the call sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    pub plane: PlaneId,
    /// As records show it.
    pub actor: SmolStr,
    pub user: UserKey,
    pub roles: Vec<Role>,
    /// The user's own restriction; empty for none.
    pub user_scopes: Vec<Scope>,
    /// The token's.
    pub token_scopes: Vec<Scope>,
    pub runtime: SmolStr,
    /// How many requests its user may make, where that is said of it.
    pub requests_per_minute: Option<u64>,
    /// The token that it showed, or logged in with; `None` for the first administrator's, for signed ones, and for a
    /// password.
    pub token: Option<TokenKey>,
    /// The signed token that it showed instead.
    pub signed: Option<Signed>,
    /// The browser session that it came by.
    pub session: Option<Arc<LiveSession>>,
    /// Of the token that it showed or logged in with (`fingerprint`); of a session by password, of the session.
    pub fingerprint: String,
}

/// What a signed token binds its bearer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signed {
    /// One attempt of a run, or what an instance works on: four routes of a run (`api::work`), and nothing else.
    Work(Work),
    /// Single sign-on, until then.
    Sso { expires_at: Timestamp },
}

/// A session that a request came by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveSession {
    pub digest: Digest,
    pub session: Session,
}

impl Principal {
    /// The highest of its roles.
    pub fn power(&self) -> Role {
        power(&self.roles)
    }

    /// Whether it reads and steers all runs of its tenant.
    pub fn sees_tenant(&self) -> bool {
        let works = matches!(self.signed, Some(Signed::Work(_)));
        self.power() >= Role::Operator && !works
    }

    /// Whether neither the token nor its user is kept from something.
    pub fn has_scope(&self, scope: Scope) -> bool {
        let within = |scopes: &[Scope]| scopes.contains(&Scope::All) || scopes.contains(&scope);
        within(&self.token_scopes) && (self.user_scopes.is_empty() || within(&self.user_scopes))
    }

    /// Whether it may see to what its user logs in with: by a session that did not begin with a restricted token,
    /// whatever the user itself is restricted to, or by a token that may do all.
    pub fn is_whole(&self) -> bool {
        let may_all = self.token_scopes.contains(&Scope::All);
        may_all && (self.session.is_some() || self.has_scope(Scope::All))
    }

    /// Of a user and the token it showed; `None` when the user is disabled or the token has expired.
    pub fn of(user: &User, token: &Token, digest: &[u8; 32], now: Timestamp) -> Option<Principal> {
        let expired = token.expires_at.is_some_and(|at| at <= now);
        if !user.profile.enabled || expired {
            return None;
        }
        Some(Principal {
            token_scopes: token.scopes.clone(),
            token: Some(token.key.clone()),
            ..Principal::unrestricted(user, digest)
        })
    }

    /// Of a user who showed its password; `None` when it is disabled.
    pub fn of_password(user: &User, digest: &[u8; 32]) -> Option<Principal> {
        let is_enabled = user.profile.enabled;
        is_enabled.then(|| Principal::unrestricted(user, digest))
    }

    fn unrestricted(user: &User, digest: &[u8; 32]) -> Principal {
        Principal {
            plane: user.plane,
            actor: user.key.actor(),
            user: user.key.clone(),
            roles: user.profile.roles.clone(),
            user_scopes: user.profile.scopes.clone(),
            token_scopes: vec![Scope::All],
            runtime: user.profile.runtime.clone(),
            requests_per_minute: user.allowance.requests_per_minute,
            token: None,
            signed: None,
            session: None,
            fingerprint: fingerprint(digest),
        }
    }

    /// The same, come by a session.
    pub fn by_session(self, digest: Digest, session: Session) -> Principal {
        let fingerprint = match session.basis {
            Basis::Password => fingerprint(&digest),
            Basis::Token(_) | Basis::FirstAdmin(_) => self.fingerprint,
        };
        Principal {
            fingerprint,
            session: Some(Arc::new(LiveSession { digest, session })),
            ..self
        }
    }

    /// Of a user whom a token of the issuer names; `None` when the user is disabled. Nobody has more than either its
    /// record or the token gives.
    pub fn of_person(user: &User, person: &Person, digest: &[u8; 32]) -> Option<Principal> {
        let own = &user.profile.roles;
        let roles = match &person.roles {
            Some(roles) if power(roles) < power(own) => roles,
            _ => own,
        };
        user.profile.enabled.then(|| Principal {
            plane: user.plane,
            actor: user.key.actor(),
            user: user.key.clone(),
            roles: roles.clone(),
            user_scopes: user.profile.scopes.clone(),
            token_scopes: vec![Scope::All],
            runtime: user.profile.runtime.clone(),
            requests_per_minute: user.allowance.requests_per_minute,
            token: None,
            session: None,
            signed: Some(Signed::Sso {
                expires_at: person.expires_at,
            }),
            fingerprint: fingerprint(digest),
        })
    }

    /// Of a service that works in a plane of a tenant.
    pub fn of_work(
        work: Work,
        (tenant, plane): (SmolStr, PlaneId),
        digest: &[u8; 32],
    ) -> Principal {
        let user = service_user(tenant, work.service());
        Principal {
            plane,
            actor: user.actor(),
            user,
            roles: vec![Role::User],
            user_scopes: Vec::new(),
            token_scopes: vec![Scope::RunsRead, Scope::RunsWrite],
            runtime: SmolStr::default(),
            requests_per_minute: None,
            token: None,
            session: None,
            signed: Some(Signed::Work(work)),
            fingerprint: fingerprint(digest),
        }
    }
}

/// A token as it was shown.
#[derive(Clone, PartialEq, Eq)]
pub enum Shown {
    /// The first administrator's.
    FirstAdmin(Box<Principal>),
    /// To be looked up by its keyed hash.
    Token { digest: [u8; 32] },
    /// The same, or an imported one.
    Foreign {
        digest: [u8; 32],
        fingerprint: [u8; 6],
        token: Vec<u8>,
    },
    /// One of ours for work: genuine and in time. Whether the work still goes on is to be looked up.
    Work { digest: [u8; 32], work: Work },
    /// To be verified with the issuer's keys.
    Sso {
        digest: [u8; 32],
        header: Box<Header>,
        token: Vec<u8>,
    },
}

/// A new token's secret, shown once.
pub struct Minted {
    pub secret: SecretString,
    pub hash: TokenHash,
}

/// Knows the tokens by their hashes only.
#[derive(Clone)]
pub struct Authenticator {
    key: HashKey,
    admin_digest: [u8; 32],
    uses: Uses,
    work: Option<WorkTokens>,
    sso: Option<Sso>,
}

impl Authenticator {
    /// Accepts the first administrator's token, and hashes the others with `key`.
    pub fn new(admin_token: &SecretString, key: HashKey, uses: Uses) -> Self {
        Self {
            admin_digest: key.digest(admin_token.expose_secret().as_bytes()),
            key,
            uses,
            work: None,
            sso: None,
        }
    }

    /// Accepts signed tokens too: those for work, and those of an issuer.
    pub fn with_signed(self, work: WorkTokens, sso: Option<Sso>) -> Self {
        Self {
            work: Some(work),
            sso,
            ..self
        }
    }

    /// Tokens for work; `None` where they are not in use.
    pub fn work(&self) -> Option<&WorkTokens> {
        self.work.as_ref()
    }

    /// The single sign-on issuer, if there is one.
    pub fn sso(&self) -> Option<&Sso> {
        self.sso.as_ref()
    }

    /// What an `Authorization` header shows; `None` when that can be no token of ours. A token of our form
    /// with a wrong checksum ends here, before anything is looked up.
    ///
    /// Digests are compared, in constant time, so that timing tells nothing of the token.
    pub fn read(&self, authorization: Option<&HeaderValue>, now: Timestamp) -> Option<Shown> {
        let token = bearer(authorization?.as_bytes())?;
        if jwt::has_form(token) {
            return self.read_signed(token, now);
        }
        self.read_token(token)
    }

    /// Whether an `Authorization` header shows a signed token, which is work to verify.
    pub fn is_signed(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(header::AUTHORIZATION);
        shown
            .and_then(|shown| bearer(shown.as_bytes()))
            .is_some_and(jwt::has_form)
    }

    /// What a token shows; the same.
    pub fn read_token(&self, token: &[u8]) -> Option<Shown> {
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let digest = self.key.digest(token);
        if bool::from(digest.ct_eq(&self.admin_digest)) {
            return Some(Shown::FirstAdmin(Box::new(first_admin(&digest))));
        }
        if token.starts_with(b"rgt_") {
            let text = std::str::from_utf8(token).ok()?;
            return token::is_well_formed(text, USER_KIND).then_some(Shown::Token { digest });
        }
        Some(Shown::Foreign {
            digest,
            fingerprint: secret::fingerprint(token),
            token: token.to_vec(),
        })
    }

    /// At most one signature is checked here.
    fn read_signed(&self, token: &[u8], now: Timestamp) -> Option<Shown> {
        let header = jwt::header(token)?;
        let digest = self.key.digest(token);
        if WorkTokens::is_ours(&header) {
            let work = self.work.as_ref()?.read(token, &header, now)?;
            return Some(Shown::Work { digest, work });
        }
        self.sso.as_ref()?.takes(&header).then(|| Shown::Sso {
            digest,
            header: Box::new(header),
            token: token.to_vec(),
        })
    }

    /// Tells the token of an `Authorization` header from others, whether it is accepted or not. `None` for none, and for
    /// one that is too long to be one.
    pub fn fingerprint(&self, headers: &HeaderMap) -> Option<String> {
        let token = bearer(headers.get(header::AUTHORIZATION)?.as_bytes())?;
        let most = match jwt::has_form(token) {
            true => jwt::MAX_BYTES,
            false => MAX_TOKEN_BYTES,
        };
        let fits = !token.is_empty() && token.len() <= most;
        fits.then(|| fingerprint(&self.key.digest(token)))
    }

    /// The first administrator, if its token still has this keyed hash.
    pub fn first_admin(&self, digest: &[u8; 32]) -> Option<Principal> {
        let is_same = bool::from(digest.ct_eq(&self.admin_digest));
        is_same.then(|| first_admin(digest))
    }

    /// The keyed hash of the first administrator's token.
    pub fn admin_digest(&self) -> [u8; 32] {
        self.admin_digest
    }

    /// A fresh token for a user.
    pub fn mint(&self) -> Minted {
        self.minted(SecretString::from(token::generate(USER_KIND)))
    }

    /// A token that an administrator chose; `None` when it is no sound one.
    pub fn adopt(&self, secret: &str) -> Option<Minted> {
        let sound = (MIN_CHOSEN_BYTES..=MAX_TOKEN_BYTES).contains(&secret.len())
            && secret.bytes().all(|byte| byte.is_ascii_graphic())
            && !jwt::has_form(secret.as_bytes())
            && (!secret.starts_with("rgt_") || token::is_well_formed(secret, USER_KIND));
        sound.then(|| self.minted(SecretString::from(secret)))
    }

    fn minted(&self, secret: SecretString) -> Minted {
        let hash = TokenHash::Keyed(self.key.digest(secret.expose_secret().as_bytes()));
        Minted { secret, hash }
    }

    /// Notes that a token was used.
    pub fn note_use(&self, token: &TokenKey, at: Timestamp) {
        self.uses.note(token, at);
    }

    /// When tokens were last used.
    pub fn uses(&self) -> &Uses {
        &self.uses
    }
}

/// As whom a service works for a tenant. Its name is no user's, since `:` is in no user id.
pub fn service_user(tenant: SmolStr, service: &str) -> UserKey {
    UserKey {
        tenant,
        user: SmolStr::new(format!("service:{service}")),
    }
}

fn first_admin(digest: &[u8; 32]) -> Principal {
    let user = UserKey::first_admin();
    Principal {
        plane: PlaneId::ROOT,
        actor: user.actor(),
        user,
        roles: vec![Role::Admin, Role::User],
        user_scopes: Vec::new(),
        token_scopes: vec![Scope::All],
        runtime: SmolStr::new_static("default"),
        requests_per_minute: None,
        token: None,
        signed: None,
        session: None,
        fingerprint: fingerprint(digest),
    }
}

/// The first 12 hex digits of a token's keyed hash: tells tokens apart, and nothing else.
pub fn fingerprint(digest: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*digest).to_hex()[..12].to_owned()
}

/// The credentials of the `Bearer` scheme, whose name is case-insensitive (RFC 9110 section 11.1).
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = header.split_at_checked(7)?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| rest.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth() -> Authenticator {
        Authenticator::new(&"rgt_admin_x".into(), HashKey::random(), Uses::forgotten())
    }

    fn read(auth: &Authenticator, text: &str) -> Option<Shown> {
        auth.read(Some(&HeaderValue::from_str(text).unwrap()), Timestamp(0))
    }

    #[test]
    fn the_first_administrators_token_is_known_as_bearer_only() {
        let auth = auth();
        for good in ["Bearer rgt_admin_x", "bearer  rgt_admin_x "] {
            assert!(
                matches!(read(&auth, good), Some(Shown::FirstAdmin(_))),
                "{good}"
            );
        }
        for bad in [
            "Bearer rgt_admin_y",
            "Bearer ",
            "Bearer",
            "",
            "Basic rgt_admin_x",
            "rgt_admin_x",
        ] {
            assert!(read(&auth, bad).is_none(), "{bad}");
        }
        assert!(auth.read(None, Timestamp(0)).is_none());
    }

    #[test]
    fn a_signed_token_has_a_fingerprint_whatever_its_length_and_another_long_one_has_none() {
        let auth = auth();
        let of = |token: String| {
            let value = HeaderValue::from_str(&format!("Bearer {token}")).unwrap();
            auth.fingerprint(&HeaderMap::from_iter([(header::AUTHORIZATION, value)]))
        };
        let signed = |len| format!("eyJ{}.e30.AA", "A".repeat(len));
        assert_eq!(of(signed(2_000)).map(|text| text.len()), Some(12));
        assert_ne!(of(signed(2_000)), of(signed(2_001)));
        assert_eq!(of(signed(jwt::MAX_BYTES)), None);
        assert_eq!(of("A".repeat(MAX_TOKEN_BYTES + 1)), None);
    }

    #[test]
    fn a_wrong_checksum_ends_before_any_look_up() {
        let auth = auth();
        let minted = auth.mint();
        let secret = minted.secret.expose_secret();
        assert!(matches!(
            read(&auth, &format!("Bearer {secret}")),
            Some(Shown::Token { .. })
        ));
        let last = if secret.ends_with('0') { "1" } else { "0" };
        let changed = format!("Bearer {}{last}", &secret[..secret.len() - 1]);
        assert!(read(&auth, &changed).is_none());
        assert!(read(&auth, &format!("Bearer {}", "x".repeat(513))).is_none());
    }

    #[test]
    fn a_chosen_token_must_be_sound() {
        let auth = auth();
        assert!(auth.adopt("agw_0123456789abcdef").is_some());
        for bad in ["short", "with space in it....", "rgt_user_0123456789abcdef"] {
            assert!(auth.adopt(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn scopes_of_token_and_user_both_count() {
        let mut principal = first_admin(&[0; 32]);
        assert!(principal.has_scope(Scope::RunsRead));
        principal.token_scopes = vec![Scope::RunsRead, Scope::RunsWrite];
        assert!(!principal.has_scope(Scope::All));
        principal.user_scopes = vec![Scope::RunsRead];
        assert!(principal.has_scope(Scope::RunsRead) && !principal.has_scope(Scope::RunsWrite));
    }
}
