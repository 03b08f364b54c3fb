//! The rules of an issuer: read from the settings once, and applied to the claims of each token.

use std::str::FromStr;

use jsonwebtoken::{Algorithm, AlgorithmFamily};
use serde_json::Value;
use smol_str::SmolStr;
use url::Url;

use super::{Claims, LEEWAY_S};
use crate::domain::identity::{Role, UserKey, sanitised};
use crate::domain::time::Timestamp;

/// Longest claim that becomes an id; OpenID Connect allows 255 characters for `sub`.
const MAX_CLAIM_CHARS: usize = 512;

/// Longest user or tenant id, as of other users.
const MAX_ID_CHARS: usize = 64;

/// Hexadecimal digits of the hash that tells ids apart which look alike once they are sanitised.
const HASH_CHARS: usize = 16;

/// Longest e-mail address that is kept (RFC 5321).
const MAX_EMAIL_CHARS: usize = 254;

/// The settings of single sign-on, as texts.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Empty for no single sign-on.
    pub issuer: String,
    pub audience: String,
    /// Empty for discovery.
    pub jwks_url: String,
    pub algorithms: Vec<String>,
    pub token_types: Vec<String>,
    pub user_claim: String,
    pub tenant: String,
    /// Empty for `tenant`.
    pub tenant_claim: String,
    pub roles_claim: String,
    /// `VALUE=ROLE` each.
    pub roles: Vec<String>,
    /// `none` or empty for none.
    pub default_role: String,
    pub provision: bool,
    pub allow_private: bool,
}

/// A setting that cannot be gone by.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("setting '{setting}' {problem}")]
pub struct SettingsError {
    pub setting: &'static str,
    pub problem: String,
}

fn wrong<T>(setting: &'static str, problem: impl Into<String>) -> Result<T, SettingsError> {
    Err(SettingsError {
        setting,
        problem: problem.into(),
    })
}

/// What a token says of its bearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    pub key: UserKey,
    /// Empty when it says none.
    pub email: String,
    /// By the rule; `None` when there is none, and the user's own count.
    pub roles: Option<Vec<Role>>,
    /// Of somebody who is made known now.
    pub first_roles: Vec<Role>,
    /// Whether somebody who is not known is made known.
    pub provision: bool,
    pub issued_at: Option<Timestamp>,
    pub expires_at: Timestamp,
}

/// What is asked of an issuer's tokens.
pub(super) struct Rules {
    pub issuer: String,
    pub audience: String,
    pub algorithms: Vec<Algorithm>,
    types: Vec<String>,
    user_claim: String,
    tenant: SmolStr,
    tenant_claim: Option<String>,
    roles_claim: String,
    roles: Vec<(String, Role)>,
    default_role: Option<Role>,
    provision: bool,
}

impl Rules {
    /// `None` when no issuer is set.
    pub fn read(settings: &Settings) -> Result<Option<Rules>, SettingsError> {
        if settings.issuer.is_empty() {
            return Ok(None);
        }
        check_url("sso_issuer", &settings.issuer, settings.allow_private)?;
        if !settings.jwks_url.is_empty() {
            check_url("sso_jwks_url", &settings.jwks_url, settings.allow_private)?;
        }
        if settings.audience.is_empty() {
            return wrong(
                "sso_audience",
                "must be set: tokens made for others are not taken",
            );
        }
        let tenant = sanitised(&settings.tenant);
        if tenant.is_empty() || tenant != settings.tenant {
            return wrong(
                "sso_tenant",
                "must be made of letters, digits, '_', '.', '@' and '-'",
            );
        }
        if settings.user_claim.is_empty() {
            return wrong("sso_user_claim", "must name a claim, such as sub");
        }
        let roles = read_roles(settings)?;
        let default_role = match settings.default_role.as_str() {
            "" | "none" => None,
            name => Some(read_role("sso_default_role", name)?),
        };
        Ok(Some(Rules {
            issuer: settings.issuer.clone(),
            audience: settings.audience.clone(),
            algorithms: read_algorithms(settings)?,
            types: settings.token_types.iter().map(|t| bare_type(t)).collect(),
            user_claim: settings.user_claim.clone(),
            tenant,
            tenant_claim: Some(settings.tenant_claim.clone()).filter(|claim| !claim.is_empty()),
            roles_claim: settings.roles_claim.clone(),
            roles,
            default_role,
            provision: settings.provision,
        }))
    }

    /// Media types are compared without regard to case, and `application/` may be left out (RFC 7515 section 4.1.9).
    pub fn takes_type(&self, kind: &str) -> bool {
        self.types.contains(&bare_type(kind))
    }

    /// Whether a token that is not verified yet could be accepted once it is.
    pub fn is_promising(&self, claims: &Claims, now_s: u64) -> bool {
        let in_time = |exp: &Value| {
            exp.as_f64()
                .is_some_and(|exp| exp + LEEWAY_S as f64 >= now_s as f64)
        };
        claims.get("iss").and_then(Value::as_str) == Some(&self.issuer)
            && claims.get("exp").is_some_and(in_time)
    }

    /// Whom verified claims name; `None` when nobody, or nobody with a role.
    pub fn person(&self, claims: &Claims) -> Option<Person> {
        // The library takes lists that hold our issuer among others; a token has one.
        if claims.get("iss")?.as_str()? != self.issuer {
            return None;
        }
        let tenant = match &self.tenant_claim {
            Some(claim) => id_of(find(claims, claim)?.as_str()?)?,
            None => self.tenant.clone(),
        };
        let user = id_of(find(claims, &self.user_claim)?.as_str()?)?;
        let key = UserKey { tenant, user };
        // Whoever reads the data directory is the first administrator, and nobody else.
        if key == UserKey::first_admin() {
            return None;
        }
        let default: Vec<Role> = self.default_role.into_iter().collect();
        let (roles, first_roles) = match self.roles.is_empty() {
            true => (None, default),
            false => {
                let mapped = self.mapped(claims);
                let roles = if mapped.is_empty() { default } else { mapped };
                if roles.is_empty() {
                    return None;
                }
                (Some(roles.clone()), roles)
            }
        };
        let email = claims
            .get("email")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let short = email.chars().count() <= MAX_EMAIL_CHARS && !email.contains(char::is_control);
        Some(Person {
            key,
            email: if short {
                email.to_owned()
            } else {
                String::new()
            },
            provision: self.provision && !first_roles.is_empty(),
            roles,
            first_roles,
            issued_at: claims.get("iat").and_then(instant),
            expires_at: instant(claims.get("exp")?)?,
        })
    }

    /// The roles that the rule gives for the values of the claim, each once, the highest first.
    fn mapped(&self, claims: &Claims) -> Vec<Role> {
        let Some(claim) = find(claims, &self.roles_claim) else {
            return Vec::new();
        };
        let values: Vec<&str> = match claim {
            Value::String(text) => text.split_whitespace().collect(),
            Value::Array(items) => items.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        let given = |role: &Role| {
            let mut rule = self.roles.iter();
            rule.any(|(value, gives)| gives == role && values.contains(&value.as_str()))
        };
        Role::ALL.into_iter().filter(given).collect()
    }
}

/// A claim by its name, or by a path of names with points between them.
fn find<'a>(claims: &'a Claims, name: &str) -> Option<&'a Value> {
    if let Some(value) = claims.get(name) {
        return Some(value);
    }
    let (first, rest) = name.split_once('.')?;
    let within = claims.get(first)?.as_object()?;
    rest.split_once('.')
        .map_or_else(|| within.get(rest), |_| find(within, rest))
}

/// Seconds since the epoch as an instant; a fraction is dropped.
fn instant(value: &Value) -> Option<Timestamp> {
    let s = value
        .as_f64()
        .filter(|s| (0.0..253_402_300_800.0).contains(s))?;
    Some(Timestamp::from_millis(s as i64 * 1_000))
}

/// An id for a claim: the claim itself where it is one, else its sanitised form and a hash of the claim, so that no
/// two claims share an id.
fn id_of(claim: &str) -> Option<SmolStr> {
    let chars = claim.chars().count();
    if chars == 0 || chars > MAX_CLAIM_CHARS {
        return None;
    }
    let plain = sanitised(claim);
    if plain == claim && chars <= MAX_ID_CHARS && !ends_in_hash(claim) {
        return Some(plain);
    }
    let hash = blake3::hash(claim.as_bytes()).to_hex();
    let kept: String = plain.chars().take(MAX_ID_CHARS - HASH_CHARS - 1).collect();
    Some(SmolStr::new(format!("{kept}-{}", &hash[..HASH_CHARS])))
}

fn ends_in_hash(text: &str) -> bool {
    text.rsplit_once('-').is_some_and(|(_, end)| {
        end.len() == HASH_CHARS && end.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

fn bare_type(kind: &str) -> String {
    let lower = kind.to_ascii_lowercase();
    lower
        .strip_prefix("application/")
        .unwrap_or(&lower)
        .to_owned()
}

/// Keys that came over plain http could be anybody's.
fn check_url(setting: &'static str, text: &str, allow_private: bool) -> Result<(), SettingsError> {
    match Url::parse(text) {
        Ok(url) if url.host_str().is_none_or(str::is_empty) => wrong(setting, "must name a host"),
        Ok(url) if url.scheme() == "https" || (allow_private && url.scheme() == "http") => Ok(()),
        Ok(_) => wrong(
            setting,
            "must be an https URL (http only within a private network, with sso_allow_private)",
        ),
        Err(error) => wrong(setting, format!("must be a URL: {error}")),
    }
}

fn read_algorithms(settings: &Settings) -> Result<Vec<Algorithm>, SettingsError> {
    let setting = "sso_algorithms";
    let read = |name: &String| match Algorithm::from_str(name) {
        // With a shared secret, whoever can verify a token can make one.
        Ok(algorithm) if algorithm.family() != AlgorithmFamily::Hmac => Ok(algorithm),
        _ => wrong(
            setting,
            format!(
                "has '{name}'; it may have RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 and EdDSA"
            ),
        ),
    };
    let algorithms: Vec<Algorithm> = settings
        .algorithms
        .iter()
        .map(read)
        .collect::<Result<_, _>>()?;
    match algorithms.is_empty() {
        true => wrong(
            setting,
            "must name the algorithms that the issuer signs with",
        ),
        false => Ok(algorithms),
    }
}

fn read_roles(settings: &Settings) -> Result<Vec<(String, Role)>, SettingsError> {
    let setting = "sso_roles";
    if !settings.roles.is_empty() && settings.roles_claim.is_empty() {
        return wrong(
            "sso_roles_claim",
            "must name the claim that sso_roles is about",
        );
    }
    let read = |rule: &String| match rule.rsplit_once('=') {
        Some((value, name)) if !value.trim().is_empty() => {
            Ok((value.trim().to_owned(), read_role(setting, name.trim())?))
        }
        _ => wrong(setting, format!("has '{rule}', which is not VALUE=ROLE")),
    };
    settings.roles.iter().map(read).collect()
}

fn read_role(setting: &'static str, name: &str) -> Result<Role, SettingsError> {
    match Role::from_name(name) {
        Some(role) => Ok(role),
        None => wrong(
            setting,
            format!(
                "has '{name}', which is none of admin, tenant_admin, operator, user and viewer"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings() -> Settings {
        Settings {
            issuer: "https://id.example".to_owned(),
            audience: "rungate".to_owned(),
            algorithms: vec!["RS256".to_owned()],
            token_types: vec!["at+jwt".to_owned()],
            user_claim: "sub".to_owned(),
            tenant: "sso".to_owned(),
            default_role: "user".to_owned(),
            provision: true,
            ..Settings::default()
        }
    }

    fn rules(change: impl FnOnce(&mut Settings)) -> Rules {
        let mut settings = settings();
        change(&mut settings);
        Rules::read(&settings).unwrap().unwrap()
    }

    fn person(rules: &Rules, more: Value) -> Option<Person> {
        let mut claims =
            json!({"iss": "https://id.example", "sub": "ann", "exp": 2_000_000_000u64});
        for (name, value) in more.as_object().unwrap() {
            claims[name] = value.clone();
        }
        rules.person(claims.as_object().unwrap())
    }

    #[test]
    fn claims_name_a_user_with_roles() {
        let plain = rules(|_| ());
        let ann = person(
            &plain,
            json!({"email": "ann@example.com", "iat": 1_900_000_000.5}),
        )
        .unwrap();
        assert_eq!(ann.key.to_string(), "sso/ann");
        assert_eq!((ann.roles, ann.first_roles), (None, vec![Role::User]));
        assert_eq!(
            ann.issued_at,
            Some(Timestamp::from_millis(1_900_000_000_000))
        );

        let mapped = rules(|s| {
            s.tenant_claim = "org".to_owned();
            s.roles_claim = "realm.roles".to_owned();
            s.roles = vec!["gpu=operator".to_owned(), "staff=user".to_owned()];
            s.default_role = String::new();
        });
        let roles = |roles: Value| {
            let claims = json!({"org": "acme", "realm": {"roles": roles}});
            person(&mapped, claims).and_then(|person| person.roles)
        };
        assert_eq!(
            roles(json!(["staff", "x", "gpu"])),
            Some(vec![Role::Operator, Role::User])
        );
        assert_eq!(roles(json!("x staff")), Some(vec![Role::User]));
        assert_eq!(roles(json!(["x"])), None);
        assert_eq!(roles(json!({"gpu": true})), None);
        assert_eq!(person(&mapped, json!({"realm": {"roles": ["gpu"]}})), None);
        let namespaced = rules(|s| {
            s.roles_claim = "https://x.example/roles".to_owned();
            s.roles = vec!["a=b=viewer".to_owned()];
        });
        let claims = json!({"https://x.example/roles": ["a=b"]});
        assert_eq!(
            person(&namespaced, claims).unwrap().roles,
            Some(vec![Role::Viewer])
        );
    }

    #[test]
    fn no_two_claims_share_an_id() {
        let plain = id_of("auth0_1").unwrap();
        let odd = id_of("auth0|1").unwrap();
        assert_eq!(plain, "auth0_1");
        assert!(
            odd.starts_with("auth0_1-") && odd.len() == 7 + 1 + HASH_CHARS,
            "{odd}"
        );
        // Who could choose its claim could not take another's id.
        assert_ne!(id_of(&odd).unwrap(), odd);
        assert_ne!(id_of("a b").unwrap(), id_of("a/b").unwrap());
        let long = "x".repeat(MAX_ID_CHARS + 1);
        assert_eq!(id_of(&long).unwrap().len(), MAX_ID_CHARS);
        assert!(id_of("").is_none() && id_of(&"x".repeat(MAX_CLAIM_CHARS + 1)).is_none());
        assert!(id_of("...").unwrap().starts_with('-'));
    }

    #[test]
    fn nobody_becomes_the_first_administrator() {
        let joined = rules(|s| s.tenant = "default".to_owned());
        assert!(person(&joined, json!({"sub": "admin"})).is_none());
        assert!(person(&joined, json!({"iss": ["https://id.example"]})).is_none());
        assert!(person(&joined, json!({"sub": 7})).is_none());
    }

    #[test]
    fn a_setting_that_cannot_be_gone_by_is_named() {
        let problem = |change: &dyn Fn(&mut Settings)| {
            let mut settings = settings();
            change(&mut settings);
            Rules::read(&settings).err().map(|error| error.setting)
        };
        assert_eq!(problem(&|_| ()), None);
        assert_eq!(
            problem(&|s| s.issuer = "http://id.example".into()),
            Some("sso_issuer")
        );
        assert_eq!(
            problem(&|s| s.jwks_url = "file:///x".into()),
            Some("sso_jwks_url")
        );
        assert_eq!(problem(&|s| s.audience.clear()), Some("sso_audience"));
        assert_eq!(problem(&|s| s.algorithms.clear()), Some("sso_algorithms"));
        for algorithm in ["HS256", "none", "rs256"] {
            let change = |s: &mut Settings| s.algorithms = vec![algorithm.to_owned()];
            assert_eq!(problem(&change), Some("sso_algorithms"));
        }
        assert_eq!(
            problem(&|s| s.roles = vec!["a=user".into()]),
            Some("sso_roles_claim")
        );
        assert_eq!(
            problem(&|s| s.default_role = "god".into()),
            Some("sso_default_role")
        );
        assert_eq!(problem(&|s| s.tenant = "a b".into()), Some("sso_tenant"));
        assert!(Rules::read(&Settings::default()).unwrap().is_none());
    }
}
