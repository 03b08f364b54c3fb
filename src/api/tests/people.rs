//! Logins, old sessions and who is gone, in a gateway whose coordinator may be busy or have ended.

use smol_str::SmolStr;

use super::*;
use crate::auth::session::{Basis, Login, Opened};
use crate::coordinator::SubmitError;
use crate::domain::command::{InboxAction, InboxCommand, Reply};
use crate::domain::identity::TokenKey as UserToken;
use crate::domain::tenant::Tenancy;
use crate::domain::time::Timestamp;
use crate::ledger::AuditFilter;

/// Whence commands come that no request asked for.
pub(super) fn nobody() -> Origin {
    Origin {
        plane: PlaneId::ROOT,
        actor: SmolStr::default(),
        request_id: None,
        tenancy: Tenancy::All,
        at: crate::clock::now(),
    }
}

impl Gateway {
    /// Its coordinator has ended: nothing can be recorded any more.
    pub(super) async fn without_coordinator(mut self) -> Gateway {
        self.coordinator.handle.stop().await;
        let gone = std::thread::spawn(|| Ok(()));
        let ended = std::mem::replace(&mut self.coordinator.thread, gone);
        ended.join().unwrap().unwrap();
        self
    }

    /// As if it had come up: from then on things are done without being asked for.
    pub(super) async fn has_begun(&self) {
        let started = Command::GatewayStarted {
            epoch: 1,
            version: SmolStr::default(),
        };
        self.handle.submit(nobody(), started).await.unwrap();
    }

    /// A session of the first administrator, as old as that.
    async fn session(&self, age: Duration) -> Opened {
        let basis = Basis::FirstAdmin(self.app.auth.admin_digest());
        self.session_of(UserKey::first_admin(), basis, age).await
    }

    async fn session_of(&self, user: UserKey, basis: Basis, age: Duration) -> Opened {
        let login = Login {
            basis,
            user,
            era: 0,
            is_remembered: false,
            address: [127, 0, 0, 1].into(),
            user_agent: String::new(),
        };
        let age_us = i64::try_from(age.as_micros()).unwrap();
        let at = Timestamp(crate::clock::now().0 - age_us);
        self.logins.sessions.begin(login, at).await.unwrap()
    }

    async fn by_session(&self, session: &Opened, method: Method, path: &str) -> Answer {
        self.send(
            as_session(session, method, path)
                .body(Body::empty())
                .unwrap(),
        )
        .await
    }
}

const TOKENS: &str = "/api/gateway/tokens";

/// A request with a body, and what was answered: status and code.
async fn asked(gateway: &Gateway, request: http::request::Builder, body: Value) -> (u16, Value) {
    let request = request.body(Body::from(body.to_string())).unwrap();
    let answer = gateway.send(request).await;
    (answer.status.as_u16(), answer.json["code"].clone())
}

/// Who has got hold of a session that was left open makes nothing of it that lasts.
#[tokio::test]
async fn an_old_session_shows_again_who_it_is_before_it_makes_something_that_lasts() {
    let gateway = gateway();
    gateway.has_begun().await;
    let users = "/api/gateway/admin/users";
    for name in ["ann", "left"] {
        let made = gateway.post(users, json!({"user_id": name})).await;
        assert_eq!(made.status, 200, "{}", made.json);
    }
    let gone = format!("{users}/left");
    let deleted = gateway.call(Method::DELETE, &gone, None).await;
    assert_eq!(deleted.status, 200);
    let boss = UserKey {
        tenant: "default".into(),
        user: "boss".into(),
    };
    let made = json!({"user_id": "boss", "roles": ["admin"]});
    let made = gateway.post(users, made).await.json;
    let own = made["token"].as_str().unwrap();
    let key = gateway.ledger.tokens(&boss).unwrap()[0].key.clone();
    let session = |age| gateway.session_of(boss.clone(), Basis::Token(key.clone()), age);
    let old = session(Duration::from_secs(15 * 60 + 1)).await;
    let fresh = session(Duration::from_secs(14 * 60)).await;
    let anns = format!("{users}/ann");
    let purge = "/api/gateway/admin/runtime-reservations/left/purge";
    let cases = [
        (Method::POST, TOKENS, json!({"name": "lasting"})),
        (
            Method::PATCH,
            anns.as_str(),
            json!({"email": "a@b.example"}),
        ),
        (Method::POST, purge, json!({"confirm_runtime_id": "left"})),
    ];
    let required = (403, json!("reauthentication_required"));
    for (method, path, body) in cases {
        let by = |session| as_session(session, method.clone(), path);
        let with = |token: &str| {
            let mut body = body.clone();
            body["current_token"] = token.into();
            body
        };
        assert_eq!(
            asked(&gateway, by(&old), body.clone()).await,
            required,
            "{path}"
        );
        let wrong = asked(&gateway, by(&old), with("rgt_user_wrong")).await;
        assert_eq!(wrong, (403, json!("password_wrong")), "{path}");
        assert_eq!(asked(&gateway, by(&old), with(own)).await.0, 200, "{path}");
    }
    let body = json!({"name": "another"});
    let made = asked(&gateway, as_session(&fresh, Method::POST, TOKENS), body);
    assert_eq!(made.await.0, 200, "a login just now is proof enough");
    let same = json!({"email": "a@b.example", "roles": ["viewer"]});
    let kept = asked(&gateway, as_session(&old, Method::PATCH, &anns), same);
    assert_eq!(kept.await.0, 200, "no address is changed");
}

#[tokio::test]
async fn a_token_makes_nothing_that_outlives_it_unless_the_password_is_shown() {
    let gateway = gateway();
    let users = "/api/gateway/admin/users";
    let made = gateway.post(users, json!({"user_id": "ann"})).await.json;
    let ann = UserKey {
        tenant: "default".into(),
        user: "ann".into(),
    };
    let first_token = gateway.ledger.tokens(&ann).unwrap()[0].key.token.clone();
    let bearer = |token: &Value| format!("Bearer {}", token.as_str().unwrap());
    let with = |token: &Value, path| {
        Request::post(path)
            .header("host", "localhost")
            .header("authorization", bearer(token))
    };
    let mint = async |token: &Value, body: Value| {
        let request = with(token, TOKENS).body(Body::from(body.to_string()));
        gateway.send(request.unwrap()).await
    };
    let body = json!({"name": "short", "expires_in_s": 600});
    let short = mint(&made["token"], body).await.json;
    let child = mint(&short["token"], json!({"name": "child"})).await.json;
    assert_eq!(child["expires_at"], short["expires_at"]);
    let longer = json!({"name": "longer", "expires_in_s": 1_000});
    let refused = mint(&short["token"], longer.clone()).await;
    assert_eq!(refused.status, 422, "{}", refused.json);
    assert_eq!(refused.json["errors"][0]["field"], "expires_in_s");
    // Nor by a session that began with it.
    let key = UserToken {
        owner: ann.clone(),
        token: short["token_id"].as_str().unwrap().into(),
    };
    let session = gateway.session_of(ann.clone(), Basis::Token(key), Duration::ZERO);
    let session = session.await;
    let by_session = asked(
        &gateway,
        as_session(&session, Method::POST, TOKENS),
        longer.clone(),
    );
    assert_eq!(by_session.await.0, 422);

    let own = "/api/gateway/me/password";
    let first = json!({"password": "correct horse battery"});
    let refused = asked(&gateway, with(&short["token"], own), first.clone()).await;
    assert_eq!(refused, (403, json!("reauthentication_required")));
    let old = gateway.session_of(
        ann.clone(),
        Basis::Token(UserToken {
            owner: ann,
            token: first_token.clone(),
        }),
        Duration::from_secs(1_000),
    );
    let old = old.await;
    let refused = asked(&gateway, as_session(&old, Method::POST, own), first.clone()).await;
    assert_eq!(refused, (403, json!("reauthentication_required")));
    let set = asked(&gateway, with(&made["token"], own), first).await;
    assert_eq!(set.0, 200, "{set:?}");
    let mut shown = longer;
    shown["current_password"] = json!("correct horse battery");
    let made = mint(&short["token"], shown).await;
    assert_eq!(made.status, 200, "{}", made.json);
}

/// A request by a session.
fn as_session(session: &Opened, method: Method, path: &str) -> http::request::Builder {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost")
        .header("x-abstractgateway-session", &session.secret)
        .header("x-abstractgateway-csrf", &session.csrf)
        .header("content-type", "application/json")
}

const LOGIN: &str = "/api/gateway/session/login";

/// Sessions are in no ledger: what is refused because it cannot be recorded was done all the same.
#[tokio::test]
async fn a_login_or_logout_that_cannot_be_recorded_is_not_done_when_that_is_required() {
    for (audit, status) in [(AuditMode::On, 200), (AuditMode::Required, 503)] {
        let gateway = gateway_with(|config| config.audit = audit);
        let sessions = [
            gateway.session(Duration::ZERO).await,
            gateway.session(Duration::ZERO).await,
        ];
        let gateway = gateway.without_coordinator().await;
        let admin = UserKey::first_admin();
        let count = || gateway.logins.sessions.of_user(&admin).unwrap().len();
        let body = json!({"user_id": "admin", "token": TOKEN});
        let is_done = status == 200;
        assert_eq!(gateway.post(LOGIN, body).await.status, status);
        assert_eq!(count(), if is_done { 3 } else { 2 });
        let logout = "/api/gateway/session/logout";
        let out = gateway.by_session(&sessions[0], Method::POST, logout);
        assert_eq!(out.await.status, status);
        let other = format!("/api/gateway/sessions/{}", sessions[1].session.id);
        let end = gateway.call(Method::DELETE, &other, None).await;
        assert_eq!(end.status, status, "{}", end.json);
        assert_eq!(count(), if is_done { 1 } else { 2 });
    }
}

/// A crash right after the answer lost the record of who had logged in.
#[tokio::test]
async fn a_login_is_answered_when_its_record_is_on_disk() {
    let gateway = gateway();
    let (enter, mut entered) = tokio::sync::mpsc::channel(1);
    let (release, held) = std::sync::mpsc::channel::<()>();
    let handle = gateway.handle.clone();
    let busy = tokio::spawn(async move {
        let wait = move |_: &_, _: &_, _| {
            enter.blocking_send(()).unwrap();
            let _ = held.recv();
        };
        handle.ask(wait).await.unwrap();
    });
    entered.recv().await.unwrap();
    let body = json!({"user_id": "admin", "token": TOKEN});
    let mut login = std::pin::pin!(gateway.post(LOGIN, body));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut login).await;
    assert!(early.is_err(), "answered while nothing could be written");
    release.send(()).unwrap();
    busy.await.unwrap();
    assert_eq!(login.await.status, 200);
    let page = gateway
        .ledger
        .audit(&AuditFilter::default(), None, 10)
        .unwrap();
    assert_eq!(page.items.len(), 1, "{:?}", page.items);
    let source = &page.items[0].source;
    assert_eq!(source.user, Some(UserKey::first_admin()));
    assert_eq!(source.details.tried, Some(UserKey::first_admin()));
}

/// A start that was let in before a purge, and decided after it, left a run in a plane that nobody has.
#[tokio::test]
async fn nothing_is_started_in_a_plane_that_nobody_has() {
    let gateway = gateway();
    gateway.has_begun().await;
    let made = gateway
        .post("/api/gateway/admin/users", json!({"user_id": "ann"}))
        .await;
    assert_eq!(made.status, 200, "{}", made.json);
    let ann = UserKey {
        tenant: "default".into(),
        user: "ann".into(),
    };
    let plane = gateway.ledger.user(&ann).unwrap().unwrap().plane;
    let submit = |command| {
        let origin = Origin {
            plane,
            actor: "ann".into(),
            request_id: None,
            tenancy: Tenancy::All,
            at: crate::clock::now(),
        };
        gateway.handle.submit(origin, command)
    };
    let start = || {
        let body = r#"{"job": {"service_type": "t", "payload": {}}}"#;
        let fields = crate::api::fields::Fields::of_body(body).unwrap();
        crate::api::runs::read_start(&fields).unwrap()
    };
    let Reply::Started { run, .. } = submit(start()).await.unwrap() else {
        panic!("it was started");
    };
    submit(Command::CancelQueued { run }).await.unwrap();
    let retry = |id: &str| {
        Command::Inbox(InboxCommand {
            command: id.into(),
            run_text: run.to_string().into(),
            run: Some(run),
            action: InboxAction::Retry,
            client_id: None,
            payload: Bytes::new(),
            ended: None,
        })
    };
    let path = "/api/gateway/admin/users/ann";
    let deleted = gateway.call(Method::DELETE, path, None).await;
    assert_eq!(deleted.status, 200, "{}", deleted.json);
    let is_refused = async |id: &str| {
        let started = submit(start()).await;
        let left = |error: &SubmitError| error.to_string().contains("has no user any more");
        assert!(started.as_ref().is_err_and(left), "{started:?}");
        submit(retry(id)).await.unwrap();
        let entry = gateway.ledger.command(plane, id).unwrap().unwrap();
        format!("{entry:?}").contains("runtime_left")
    };
    assert!(is_refused("while it is reserved").await);
    let path = "/api/gateway/admin/runtime-reservations/ann/purge";
    let purged = gateway
        .post(path, json!({"confirm_runtime_id": "ann"}))
        .await;
    assert_eq!(purged.status, 200, "{}", purged.json);
    let started = submit(start()).await;
    assert!(started.is_err(), "{started:?}");
    // Of the same name, and another plane.
    let made = gateway
        .post("/api/gateway/admin/users", json!({"user_id": "ann"}))
        .await;
    assert_eq!(made.status, 200, "{}", made.json);
    assert!(submit(start()).await.is_err());
}
