//! Reads of whose a token is: what was committed of tokens, users and tenants counts for the very next one, whatever was
//! read before.

use std::sync::atomic::{AtomicU64, Ordering};

use rungate::domain::event::Event;
use rungate::domain::identity::{
    NewToken, Profile, RevokeCause, Role, Scope, TokenHash, TokenKey, UserKey,
};
use rungate::domain::ids::PlaneId;
use rungate::domain::tenant::{Allowance, TenantProfile};
use rungate::ledger::{Ledger, OpenOptions, TokenOwner, Writer};
use tempfile::TempDir;

use crate::ledger_world::append;

const OLD: [u8; 32] = [1; 32];
const NEW: [u8; 32] = [2; 32];

fn open(directory: &TempDir) -> (Ledger, Writer) {
    Ledger::open(directory.path(), &OpenOptions::default()).unwrap()
}

fn ann() -> UserKey {
    UserKey {
        tenant: "acme".into(),
        user: "ann".into(),
    }
}

fn profile(roles: &[Role], enabled: bool) -> Profile {
    Profile {
        email: String::new(),
        roles: roles.to_vec(),
        scopes: Vec::new(),
        enabled,
        runtime: "ann".into(),
    }
}

fn created() -> Event {
    Event::UserCreated {
        key: ann(),
        profile: profile(&[Role::User], true),
        plane: PlaneId(2),
    }
}

fn updated(profile: Profile) -> Event {
    Event::UserUpdated {
        key: ann(),
        profile,
        plane: PlaneId(2),
    }
}

fn issued(token: &str, digest: [u8; 32]) -> Event {
    Event::TokenIssued {
        owner: ann(),
        token: NewToken {
            token: token.into(),
            name: token.into(),
            scopes: vec![Scope::All],
            hash: TokenHash::Keyed(digest),
            expires_at: None,
        },
    }
}

fn token(token: &str) -> TokenKey {
    TokenKey {
        owner: ann(),
        token: token.into(),
    }
}

fn revoked(name: &str) -> Event {
    Event::TokenRevoked {
        key: token(name),
        cause: RevokeCause::Revoked,
    }
}

fn tenant(enabled: bool) -> Event {
    let tenant = "acme".into();
    let profile = TenantProfile {
        enabled,
        ..TenantProfile::plain(&tenant)
    };
    Event::TenantUpdated { tenant, profile }
}

/// By its digest and by its name, which must be the same.
fn owner(ledger: &Ledger, digest: &[u8; 32]) -> Option<TokenOwner> {
    let by_name = ledger.token(&token("ci")).unwrap();
    let by_digest = ledger.token_owner(digest).unwrap();
    assert!(by_digest.is_none() || by_digest == by_name);
    by_digest
}

#[test]
fn each_change_holds_for_the_very_next_read() {
    let directory = tempfile::tempdir().unwrap();
    let (mut ledger, mut writer) = open(&directory);
    let roles = |owner: Option<TokenOwner>| owner.map(|owner| owner.user.profile.roles);
    let (user, operator) = (vec![Role::User], vec![Role::User, Role::Operator]);
    let created_tenant = Event::TenantCreated {
        tenant: "acme".into(),
        profile: TenantProfile::plain(&"acme".into()),
    };
    let digest = NEW;
    let upgraded = Event::TokenUpgraded {
        key: token("ci"),
        digest,
    };
    // What each event leaves of the old and the new token.
    let steps = [
        (created(), None, None),
        (issued("ci", OLD), Some(&user), None),
        (updated(profile(&operator, true)), Some(&operator), None),
        (created_tenant, Some(&operator), None),
        (tenant(false), None, None),
        (tenant(true), Some(&operator), None),
        (upgraded, None, Some(&operator)),
        (updated(profile(&user, true)), None, Some(&user)),
        (Event::UserDeleted { key: ann() }, None, None),
        (created(), None, Some(&user)),
        (revoked("ci"), None, None),
        (issued("ci", OLD), Some(&user), None),
    ];
    for reopened in [false, true] {
        for (n, (event, old, new)) in steps.iter().enumerate() {
            append(&mut writer, [(event.clone(), "")]);
            if reopened {
                // Nothing is in memory any more.
                drop((ledger, writer));
                (ledger, writer) = open(&directory);
            }
            for _ in 0..2 {
                assert_eq!(roles(owner(&ledger, &OLD)).as_ref(), *old, "step {n}");
                assert_eq!(roles(owner(&ledger, &NEW)).as_ref(), *new, "step {n}");
            }
        }
        append(
            &mut writer,
            [(revoked("ci"), ""), (Event::UserDeleted { key: ann() }, "")],
        );
    }
}

#[test]
fn a_tenants_rate_holds_for_the_very_next_read() {
    let directory = tempfile::tempdir().unwrap();
    let (ledger, mut writer) = open(&directory);
    let rate = || ledger.requests_per_minute("acme").unwrap();
    assert_eq!(rate(), None);
    let created = Event::TenantCreated {
        tenant: "acme".into(),
        profile: TenantProfile::plain(&"acme".into()),
    };
    append(&mut writer, [(created, "")]);
    for requests_per_minute in [Some(60), Some(5), None] {
        let allowance = Allowance {
            requests_per_minute,
            ..Allowance::default()
        };
        let tenant = "acme".into();
        let changed = Event::TenantAllowanceChanged { tenant, allowance };
        append(&mut writer, [(changed, "")]);
        assert_eq!((rate(), rate()), (requests_per_minute, requests_per_minute));
    }
}

/// Tokens are issued and revoked while others show them.
#[test]
fn no_reader_sees_a_token_after_its_revocation_was_committed() {
    const TOKENS: u64 = 150;
    let digest = |n: u64| *blake3::hash(&n.to_be_bytes()).as_bytes();
    let directory = tempfile::tempdir().unwrap();
    let (ledger, mut writer) = open(&directory);
    append(&mut writer, [(created(), "")]);
    let (issued_until, revoking, revoked_until) =
        (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let reader = || {
        let mut seen = 0;
        while revoked_until.load(Ordering::SeqCst) < TOKENS {
            let gone = revoked_until.load(Ordering::SeqCst);
            let found = ledger.token_owner(&digest(gone)).unwrap();
            assert_eq!(found, None, "token {gone} was revoked");
            let last = issued_until.load(Ordering::SeqCst);
            let found = ledger.token_owner(&digest(last)).unwrap();
            let may_be_gone = last == 0 || revoking.load(Ordering::SeqCst) >= last;
            assert!(found.is_some() || may_be_gone, "token {last} was issued");
            seen += u64::from(found.is_some());
        }
        seen
    };
    std::thread::scope(|scope| {
        let readers = [scope.spawn(reader), scope.spawn(reader)];
        for n in 1..=TOKENS {
            let name = n.to_string();
            append(&mut writer, [(issued(&name, digest(n)), "")]);
            issued_until.store(n, Ordering::SeqCst);
            std::thread::yield_now();
            revoking.store(n, Ordering::SeqCst);
            append(&mut writer, [(revoked(&name), "")]);
            revoked_until.store(n, Ordering::SeqCst);
        }
        let seen: u64 = readers.into_iter().map(|r| r.join().unwrap()).sum();
        assert!(seen > 0, "no reader has seen any token");
    });
}
