//! Browser sessions over HTTP: logging in, what ends a session, cookies, other sites' pages, and that no secret is kept.

use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::{call, user};
use crate::support::browser::{Browser, LOGIN, LOGOUT};
use crate::support::wait::until;
use crate::support::{Answer, Gateway, Options, answer};

const USERS: &str = "/api/gateway/admin/users";
const SESSIONS: &str = "/api/gateway/sessions";
const ME: &str = "/api/gateway/me";
const PASSWORD: &str = "correct horse battery";

async fn admin(gateway: &Gateway, method: Method, path: &str, body: Option<Value>) -> Answer {
    call(gateway, gateway.token(), method, path, body).await
}

/// A user with a password; its token.
pub async fn user_with_password(gateway: &Gateway, name: &str) -> String {
    let token = user(gateway, json!({"user_id": name})).await;
    set_password(gateway, name, json!(PASSWORD)).await;
    token
}

async fn set_password(gateway: &Gateway, name: &str, password: Value) {
    let path = format!("{USERS}/{name}/password");
    let body = json!({"password": password});
    gateway.post(&path, body).await.expect(200);
}

async fn login(gateway: &Gateway, body: Value) -> Answer {
    answer(gateway.bare(Method::POST, LOGIN).json(&body)).await
}

async fn by_password(gateway: &Gateway, name: &str) -> Browser {
    Browser::login(gateway, json!({"user_id": name, "password": PASSWORD})).await
}

#[tokio::test]
async fn a_session_begins_by_password_or_token_and_works_as_its_user() {
    let gateway = Gateway::start(Options::default()).await;
    let token = user_with_password(&gateway, "ann").await;
    for browser in [
        by_password(&gateway, "ann").await,
        Browser::by_token(&gateway, "ann", &token).await,
    ] {
        let body = &browser.body;
        assert_eq!(body["ok"], true);
        assert_eq!(body["auth"]["session"], "gateway-browser-session");
        assert_eq!(body["principal"]["user_id"], "ann");
        assert!(body["session"]["expires_at"].is_string());
        let text = body.to_string();
        assert!(!text.contains(&browser.secret) && !text.contains(&browser.csrf));
        assert!(browser.secret.starts_with("agws_") && browser.csrf.starts_with("agcsrf_"));
        let me = browser.call(&gateway, Method::GET, ME, None).await;
        assert_eq!(me.expect(200)["principal"]["user_id"], "ann");
        let job = json!({"job": {"service_type": "t", "payload": {}}});
        let path = "/api/gateway/runs/start";
        let run = browser.call(&gateway, Method::POST, path, Some(job)).await;
        let run = run.expect(200)["run_id"].as_str().unwrap().to_owned();
        let path = format!("/api/gateway/runs/{run}");
        call(&gateway, &token, Method::GET, &path, None)
            .await
            .expect(200);
        let users = browser.call(&gateway, Method::GET, USERS, None).await;
        assert_eq!(users.expect(403)["reason_code"], "admin_required");
    }
    // The first administrator logs in with its token; a session of a restricted token is restricted.
    let admin = Browser::by_token(&gateway, "admin", gateway.token()).await;
    admin
        .call(&gateway, Method::GET, USERS, None)
        .await
        .expect(200);
    let body = json!({"name": "reader", "scopes": ["runs:read"]});
    let reader = call(
        &gateway,
        &token,
        Method::POST,
        "/api/gateway/tokens",
        Some(body),
    )
    .await
    .expect(200);
    let reader = reader["token"].as_str().unwrap();
    let reader = Browser::by_token(&gateway, "ann", reader).await;
    let lists = reader
        .call(&gateway, Method::GET, "/api/gateway/services", None)
        .await;
    assert_eq!(lists.expect(403)["reason_code"], "scope_required");

    // Clients without cookies send both values as headers.
    let browser = by_password(&gateway, "ann").await;
    let request = gateway.bare(Method::POST, LOGOUT);
    let request = request
        .header("x-abstractgateway-session", &browser.secret)
        .header("x-abstractgateway-csrf", &browser.csrf);
    assert_eq!(answer(request).await.expect(200)["deleted"], true);
    assert_eq!(browser.status(&gateway).await, 401);
}

#[tokio::test]
async fn a_session_is_dead_after_each_event_that_ends_it() {
    let mut gateway = Gateway::start(Options::default()).await;
    let token = user_with_password(&gateway, "ann").await;
    let ann = format!("{USERS}/ann");
    let patch = async |gateway: &Gateway, body: Value| {
        let answer = admin(gateway, Method::PATCH, &ann, Some(body)).await;
        answer.expect(200)
    };
    let both = async |gateway: &Gateway, token: &str| {
        let by_token = Browser::by_token(gateway, "ann", token).await;
        let both = [by_password(gateway, "ann").await, by_token];
        for browser in &both {
            assert_eq!(browser.status(gateway).await, 200);
        }
        both
    };
    let dead = async |gateway: &Gateway, browsers: &[Browser], after: &str| {
        for browser in browsers {
            assert_eq!(browser.status(gateway).await, 401, "after {after}");
        }
    };

    let browsers = both(&gateway, &token).await;
    for browser in &browsers {
        let out = browser.call(&gateway, Method::POST, LOGOUT, None).await;
        assert!(
            out.headers
                .get_all("set-cookie")
                .iter()
                .all(|line| line.to_str().unwrap().contains("Max-Age=0"))
        );
        assert_eq!(out.expect(200), json!({"ok": true, "deleted": true}));
    }
    dead(&gateway, &browsers, "the logout").await;

    let disabled = both(&gateway, &token).await;
    patch(&gateway, json!({"enabled": false})).await;
    dead(&gateway, &disabled, "disabling").await;
    patch(&gateway, json!({"enabled": true})).await;
    dead(&gateway, &disabled, "enabling again").await;

    let rotated = both(&gateway, &token).await;
    let token = patch(&gateway, json!({"rotate_token": true})).await["token"].clone();
    let token = token.as_str().unwrap();
    dead(&gateway, &rotated, "the rotation").await;
    // Whoever had the token may have set the password: that is over too.
    let refused = login(&gateway, json!({"user_id": "ann", "password": PASSWORD})).await;
    refused.expect(401);
    set_password(&gateway, "ann", json!(PASSWORD)).await;

    let changed = both(&gateway, token).await;
    let body = json!({"current_password": PASSWORD, "password": "another horse battery"});
    let path = format!("{ME}/password");
    let set = changed[0].call(&gateway, Method::POST, &path, Some(body));
    set.await.expect(200);
    dead(&gateway, &changed, "one's own new password").await;
    set_password(&gateway, "ann", json!(PASSWORD)).await;

    let ended = both(&gateway, token).await;
    for browser in &ended {
        let id = browser.body["session"]["session_id"].as_str().unwrap();
        let path = format!("{SESSIONS}/{id}");
        call(&gateway, token, Method::DELETE, &path, None)
            .await
            .expect(200);
    }
    dead(&gateway, &ended, "ending it by its id").await;

    // Of the two only the one that began with it stands on a token.
    let [by_password, by_token] = both(&gateway, token).await;
    let tokens = "/api/gateway/tokens";
    let list = call(&gateway, token, Method::GET, tokens, None).await;
    let id = list.expect(200)["tokens"][0]["token_id"].clone();
    let path = format!("{tokens}/{}", id.as_str().unwrap());
    let spare = json!({"name": "spare"});
    let spare = call(&gateway, token, Method::POST, tokens, Some(spare)).await;
    let spare = spare.expect(200)["token"].clone();
    let token = spare.as_str().unwrap();
    call(&gateway, token, Method::DELETE, &path, None)
        .await
        .expect(200);
    dead(&gateway, &[by_token], "revoking its token").await;
    assert_eq!(by_password.status(&gateway).await, 200);

    // Over a restart what lives lives on, and what is dead stays dead.
    let living = both(&gateway, token).await;
    gateway.kill();
    gateway.launch().await;
    for browser in &living {
        assert_eq!(browser.status(&gateway).await, 200);
    }
    for old in [&browsers, &disabled, &rotated, &changed, &ended] {
        dead(&gateway, old, "a restart").await;
    }

    set_password(&gateway, "ann", Value::Null).await;
    dead(&gateway, &living, "taking the password away").await;
    let by_token = Browser::by_token(&gateway, "ann", token).await;
    let refused = login(&gateway, json!({"user_id": "ann", "password": PASSWORD})).await;
    refused.expect(401);
    set_password(&gateway, "ann", json!(PASSWORD)).await;
    dead(&gateway, &[by_token], "a first password").await;
    let deleted = both(&gateway, token).await;
    admin(&gateway, Method::DELETE, &ann, None)
        .await
        .expect(200);
    dead(&gateway, &deleted, "deleting the user").await;
    // Somebody else of that name inherits nothing.
    let again = json!({"user_id": "ann", "runtime_id": "ann2", "token": token});
    gateway.post(USERS, again).await.expect(200);
    set_password(&gateway, "ann", json!(PASSWORD)).await;
    dead(&gateway, &deleted, "a new user of the name").await;
    dead(&gateway, &living, "a new user of the name").await;
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn a_session_ends_when_it_is_idle_or_old_and_the_first_administrators_with_its_token() {
    let options = Options::default()
        .set("RUNGATE_SESSION_IDLE_MS", "1000")
        .set("RUNGATE_SESSION_TTL_MS", "3000");
    let mut gateway = Gateway::start(options).await;
    let token = user(&gateway, json!({"user_id": "ann"})).await;
    let idle = Browser::by_token(&gateway, "ann", &token).await;
    let used = Browser::by_token(&gateway, "ann", &token).await;
    let remember = json!({"user_id": "admin", "token": gateway.token(), "remember": true});
    let remembered = Browser::login(&gateway, remember).await;
    let started = std::time::Instant::now();
    until("its time is over, though it is in use", || async {
        used.status(&gateway).await == 401
    })
    .await;
    assert!(started.elapsed().as_millis() >= 2_500);
    assert_eq!(idle.status(&gateway).await, 401);
    assert_eq!(remembered.status(&gateway).await, 200);

    gateway.stop().await;
    std::fs::remove_file(gateway.token_path()).unwrap();
    gateway.launch().await;
    assert_eq!(remembered.status(&gateway).await, 401);
}

#[tokio::test]
async fn a_session_ends_when_its_token_expires() {
    let gateway = Gateway::start(Options::default()).await;
    let ann = user(&gateway, json!({"user_id": "ann"})).await;
    let body = json!({"name": "short", "expires_in_s": 2});
    let path = "/api/gateway/tokens";
    let short = call(&gateway, &ann, Method::POST, path, Some(body)).await;
    let short = short.expect(200)["token"].as_str().unwrap().to_owned();
    let browser = Browser::by_token(&gateway, "ann", &short).await;
    assert_eq!(browser.status(&gateway).await, 200);
    until("its token has expired", || async {
        browser.status(&gateway).await == 401
    })
    .await;
    let listed = call(&gateway, &ann, Method::GET, SESSIONS, None).await;
    assert_eq!(listed.expect(200)["sessions"], json!([]));
}

/// Enabling the tenant again revived them.
#[tokio::test]
async fn a_disabled_tenants_sessions_are_over_for_good() {
    let gateway = Gateway::start(Options::default()).await;
    let ann = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let path = "/api/gateway/admin/tenants";
    let enable = async |enabled: bool| {
        let body = Some(json!({"enabled": enabled}));
        let path = format!("{path}/acme");
        admin(&gateway, Method::PATCH, &path, body)
            .await
            .expect(200);
    };
    // The first time it is the tenant's first word, then a change of it.
    for _ in 0..2 {
        let browser = Browser::by_token(&gateway, "ann", &ann).await;
        assert_eq!(browser.status(&gateway).await, 200);
        let body = Some(json!({"weight": 200}));
        let weigh = format!("{path}/acme");
        enable(false).await;
        assert_eq!(browser.status(&gateway).await, 401);
        enable(true).await;
        assert_eq!(browser.status(&gateway).await, 401, "it came back");
        let again = Browser::by_token(&gateway, "ann", &ann).await;
        admin(&gateway, Method::PATCH, &weigh, body)
            .await
            .expect(200);
        assert_eq!(again.status(&gateway).await, 200, "other changes end none");
    }
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

/// Who was restricted could neither end a session nor change the password.
#[tokio::test]
async fn a_restricted_user_sees_to_its_own_logins_by_a_session() {
    let gateway = Gateway::start(Options::default()).await;
    let body = json!({"user_id": "ann", "scopes": ["runs:read"]});
    let ann = user(&gateway, body).await;
    set_password(&gateway, "ann", json!(PASSWORD)).await;
    let (browser, other) = (
        by_password(&gateway, "ann").await,
        Browser::by_token(&gateway, "ann", &ann).await,
    );
    let id = other.body["session"]["session_id"].as_str().unwrap();
    let end = format!("{SESSIONS}/{id}");
    for (method, path) in [(Method::GET, SESSIONS), (Method::DELETE, end.as_str())] {
        let refused = call(&gateway, &ann, method.clone(), path, None).await;
        assert_eq!(
            refused.expect(403)["required_scope"],
            "*",
            "a token is not it"
        );
        browser.call(&gateway, method, path, None).await.expect(200);
    }
    assert_eq!(other.status(&gateway).await, 401);
    let start = "/api/gateway/runs/start";
    let start = browser
        .call(&gateway, Method::POST, start, Some(json!({})))
        .await;
    start.expect(403);
    let body = json!({"current_password": PASSWORD, "password": "another horse battery"});
    let path = format!("{ME}/password");
    browser
        .call(&gateway, Method::POST, &path, Some(body))
        .await
        .expect(200);
    assert_eq!(browser.status(&gateway).await, 401);
}

#[tokio::test]
async fn no_session_is_taken_over_from_outside() {
    let gateway = Gateway::start(Options::default()).await;
    let token = user(&gateway, json!({"user_id": "ann"})).await;
    let mallory = user(&gateway, json!({"user_id": "mallory"})).await;
    // A page that could set a cookie gives its visitor the session of the attacker, or one that it made up.
    let planted = Browser::by_token(&gateway, "mallory", &mallory).await;
    for secret in [planted.secret.as_str(), "agws_AAAAAAAAAAAAAAAAAAAAAA"] {
        let body = json!({"user_id": "ann", "token": token});
        let request = gateway.bare(Method::POST, LOGIN).json(&body);
        let request = request.header("cookie", format!("abstractgateway_session={secret}"));
        let browser = Browser::of(&answer(request).await);
        assert_ne!(browser.secret, secret);
        assert_eq!(browser.status(&gateway).await, 200);
    }
    assert_eq!(planted.status(&gateway).await, 401);
    for secret in ["", "agws_", "agws_AAAAAAAAAAAAAAAAAAAAAA", "x"] {
        let request = gateway.bare(Method::GET, ME);
        let request = request.header("cookie", format!("abstractgateway_session={secret}"));
        assert_eq!(answer(request).await.status, 401, "{secret}");
    }
    // A wrong bearer is not made good by a right cookie.
    let browser = Browser::by_token(&gateway, "ann", &token).await;
    let request = browser.bare(&gateway, Method::GET, ME).bearer_auth("x");
    assert_eq!(answer(request).await.status, 401);
}

/// Each login sets both cookies as the baseline has it.
#[tokio::test]
async fn cookies_are_as_the_connection_wants_them() {
    let options = Options::default()
        .set("RUNGATE_TRUSTED_PROXIES", "1")
        .set("RUNGATE_ALLOWED_HOSTS", "gpu.example")
        .set("RUNGATE_ALLOWED_ORIGINS", "https://gpu.example");
    let gateway = Gateway::start(options).await;
    let token = user(&gateway, json!({"user_id": "ann"})).await;
    let post = async |headers: &[(&str, &str)], remember: bool| {
        let body = json!({"user_id": "ann", "token": token, "remember": remember});
        let mut request = gateway.bare(Method::POST, LOGIN).json(&body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        answer(request).await
    };
    let shape = |answer: &Answer| {
        let browser = Browser::of(answer);
        let hidden = |line: &String| {
            line.replace(&browser.secret, "SECRET")
                .replace(&browser.csrf, "CSRF")
        };
        browser.lines.iter().map(hidden).collect::<Vec<_>>()
    };
    assert_eq!(
        shape(&post(&[], false).await),
        [
            "abstractgateway_session=SECRET; HttpOnly; SameSite=Lax; Path=/",
            "abstractgateway_csrf=CSRF; SameSite=Lax; Path=/",
        ]
    );
    assert_eq!(
        shape(&post(&[], true).await),
        [
            "abstractgateway_session=SECRET; HttpOnly; SameSite=Lax; Path=/; Max-Age=2592000",
            "abstractgateway_csrf=CSRF; SameSite=Lax; Path=/; Max-Age=2592000",
        ]
    );
    let https = [("host", "gpu.example"), ("x-forwarded-proto", "https")];
    let secure = post(&https, false).await;
    assert_eq!(
        shape(&secure),
        [
            "__Host-rungate_session=SECRET; HttpOnly; SameSite=Lax; Secure; Path=/",
            "__Host-rungate_csrf=CSRF; SameSite=Lax; Secure; Path=/",
        ]
    );
    // They count where they were given, and nowhere else.
    let secure = Browser::of(&secure);
    let me = |headers: &[(&str, &str)]| {
        let request = secure.bare(&gateway, Method::GET, ME);
        let with = headers.iter().fold(request, |request, (name, value)| {
            request.header(*name, *value)
        });
        answer(with)
    };
    assert_eq!(me(&https).await.status, 200);
    assert_eq!(me(&[]).await.status, 401);
    let plain = post(&[("host", "gpu.example")], false).await;
    assert_eq!(plain.expect(403)["code"], "https_required");
}

/// Who may write in the name of whom is logged in: origin, what the browser says of the site, and the CSRF token.
#[tokio::test]
async fn other_sites_pages_cannot_write() {
    let gateway = Gateway::start(Options::default()).await;
    let token = user(&gateway, json!({"user_id": "ann"})).await;
    let browser = Browser::by_token(&gateway, "ann", &token).await;
    let stranger = Browser::by_token(&gateway, "admin", gateway.token()).await;
    let own = gateway.url("");
    let origins: [(Option<&str>, Option<&str>, bool); 11] = [
        (None, None, true),
        (Some(own.as_str()), Some("same-origin"), true),
        (None, Some("same-origin"), true),
        (None, Some("none"), true),
        (Some("http://localhost:3000"), Some("same-site"), true),
        (None, Some("same-site"), false),
        (Some("http://localhost:3000"), Some("cross-site"), false),
        (None, Some("cross-site"), false),
        (Some("https://evil.example"), None, false),
        (Some("https://evil.example"), Some("same-origin"), false),
        (Some("null"), Some("cross-site"), false),
    ];
    let job = json!({"job": {"service_type": "t", "payload": {}}});
    let credentials = json!({"user_id": "ann", "token": token});
    for (origin, site, passes) in origins {
        let from = |mut request: reqwest::RequestBuilder| {
            for (name, value) in [("origin", origin), ("sec-fetch-site", site)] {
                if let Some(value) = value {
                    request = request.header(name, value);
                }
            }
            answer(request)
        };
        let shown = format!("{origin:?} {site:?}");
        let path = "/api/gateway/runs/start";
        let post = |csrf: Option<&str>| {
            let request = browser.bare(&gateway, Method::POST, path).json(&job);
            from(match csrf {
                Some(csrf) => request.header("x-abstractgateway-csrf", csrf),
                None => request,
            })
        };
        let expected = if passes { 200 } else { 403 };
        assert_eq!(post(Some(&browser.csrf)).await.status, expected, "{shown}");
        for wrong in [None, Some("x"), Some(stranger.csrf.as_str())] {
            let refused = post(wrong).await;
            let code = refused.json["code"].clone();
            refused.expect(403);
            assert!(!passes || code == "csrf_required", "{shown}: {code}");
        }
        let login = gateway.bare(Method::POST, LOGIN).json(&credentials);
        assert_eq!(from(login).await.status, expected, "login {shown}");
        // Reading changes nothing, and the page cannot see the answer.
        let read = from(browser.bare(&gateway, Method::GET, ME)).await;
        let is_ours = !matches!(origin, Some("https://evil.example" | "null"));
        assert_eq!(read.status, if is_ours { 200 } else { 403 }, "read {shown}");
    }
    let refused = browser
        .bare(&gateway, Method::DELETE, "/queue/nothing")
        .send();
    assert_eq!(refused.await.unwrap().status(), 403);
    // A form cannot send JSON, and a bearer needs no CSRF token.
    let form = gateway.bare(Method::POST, LOGIN);
    let form = form
        .header("content-type", "text/plain")
        .body(credentials.to_string());
    assert_eq!(answer(form).await.status, 415);
    let path = "/api/gateway/runs/start";
    call(&gateway, &token, Method::POST, path, Some(job))
        .await
        .expect(200);
}

/// A form or a beacon of another site's page has no type of its own choice.
#[tokio::test]
async fn a_login_and_a_sessions_write_say_what_they_send() {
    let gateway = Gateway::start(Options::default()).await;
    let token = user_with_password(&gateway, "ann").await;
    let body = json!({"user_id": "ann", "token": token}).to_string();
    let login = |kind: Option<&str>| {
        let request = gateway.bare(Method::POST, LOGIN).body(body.clone());
        answer(match kind {
            Some(kind) => request.header("content-type", kind),
            None => request,
        })
    };
    for kind in [
        None,
        Some("text/plain"),
        Some("application/x-www-form-urlencoded"),
    ] {
        let refused = login(kind).await.expect(415);
        assert_eq!(refused["code"], "unsupported_media_type", "{kind:?}");
    }
    let browser = Browser::of(&login(Some("application/json; charset=utf-8")).await);
    let path = "/api/gateway/runs/start";
    let job = json!({"job": {"service_type": "t", "payload": {}}}).to_string();
    let write = browser.request(&gateway, Method::POST, path);
    answer(write.body(job.clone())).await.expect(415);
    // Existing clients with a token may leave it out.
    let write = gateway.bare(Method::POST, path).bearer_auth(&token);
    answer(write.body(job)).await.expect(200);
}

#[tokio::test]
async fn sessions_are_listed_ended_and_bounded() {
    let gateway = Gateway::start(Options::default().set("RUNGATE_MAX_SESSIONS", "3")).await;
    let token = user_with_password(&gateway, "ann").await;
    let tara = json!({"user_id": "tara", "roles": ["tenant_admin"]});
    let tara = user(&gateway, tara).await;
    let bob = user(&gateway, json!({"user_id": "bob"})).await;
    let mut browsers = Vec::new();
    for _ in 0..5 {
        browsers.push(by_password(&gateway, "ann").await);
    }
    let mut alive = Vec::new();
    for browser in &browsers {
        alive.push(browser.status(&gateway).await);
    }
    assert_eq!(alive, [401, 401, 200, 200, 200]);
    let list = browsers[4]
        .call(&gateway, Method::GET, SESSIONS, None)
        .await;
    let list = list.expect(200)["sessions"].clone();
    let list = list.as_array().unwrap();
    let current: Vec<&Value> = list.iter().map(|session| &session["current"]).collect();
    assert_eq!(current, [false, false, true]);
    assert_eq!(list[0]["login"], "password");
    assert_eq!(list[0]["address"], "127.0.0.1");
    assert!(!list.iter().any(|s| s.to_string().contains("agws_")));
    let id = list[0]["session_id"].as_str().unwrap();

    // Not by others; by the tenant's administrator and the gateway's.
    let of_ann = |path: &str| format!("{path}?user_id=ann");
    let path = format!("{SESSIONS}/{id}");
    call(&gateway, &bob, Method::DELETE, &path, None)
        .await
        .expect(404);
    call(&gateway, &bob, Method::GET, &of_ann(SESSIONS), None)
        .await
        .expect(403);
    let seen = call(&gateway, &tara, Method::GET, &of_ann(SESSIONS), None).await;
    assert_eq!(seen.expect(200)["sessions"].as_array().unwrap().len(), 3);
    call(&gateway, &tara, Method::DELETE, &of_ann(&path), None)
        .await
        .expect(200);
    call(&gateway, &tara, Method::DELETE, &of_ann(&path), None)
        .await
        .expect(404);
    let admins = format!("{SESSIONS}?user_id=admin");
    call(&gateway, &tara, Method::GET, &admins, None)
        .await
        .expect(403);
    let nobodys = format!("{SESSIONS}?user_id=nobody");
    call(&gateway, &tara, Method::GET, &nobodys, None)
        .await
        .expect(404);
    assert_eq!(browsers[2].status(&gateway).await, 401);
    let own = call(&gateway, &token, Method::GET, SESSIONS, None).await;
    assert_eq!(own.expect(200)["sessions"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn passwords_are_set_by_those_who_may() {
    let gateway = Gateway::start(Options::default()).await;
    let token = user(&gateway, json!({"user_id": "ann"})).await;
    let bob = user(&gateway, json!({"user_id": "bob"})).await;
    let own = "/api/gateway/me/password";
    let set = async |token: &str, path: &str, body: Value| {
        call(&gateway, token, Method::POST, path, Some(body)).await
    };
    // The first needs no current one; then it does.
    set(&token, own, json!({"password": PASSWORD}))
        .await
        .expect(200);
    let next = json!({"password": "another horse battery"});
    let refused = set(&token, own, next).await.expect(403);
    assert_eq!(refused["code"], "password_wrong");
    let wrong = json!({"password": "another horse battery", "current_password": "x"});
    set(&token, own, wrong).await.expect(403);
    by_password(&gateway, "ann").await;
    for short in ["elevenchars", "", &"x".repeat(257)] {
        let refused = set(&token, own, json!({"password": short})).await;
        assert!(short.len() < 5 || !refused.text.contains(short));
        refused.expect(422);
    }
    let anns = format!("{USERS}/ann/password");
    set(&bob, &anns, json!({"password": PASSWORD}))
        .await
        .expect(403);
    let tara = json!({"user_id": "tara", "roles": ["tenant_admin"]});
    let tara = user(&gateway, tara).await;
    let boss = json!({"user_id": "boss", "roles": ["admin"]});
    user(&gateway, boss).await;
    set(&tara, &anns, json!({"password": "tara's choice, not mine"}))
        .await
        .expect(200);
    let boss = format!("{USERS}/boss/password");
    set(&tara, &boss, json!({"password": PASSWORD}))
        .await
        .expect(403);
    let first = json!({"password": PASSWORD});
    let refused = gateway.post(own, first).await.expect(400);
    assert_eq!(refused["code"], "user_protected");
    let records = gateway
        .get("/api/gateway/ledger?limit=2000")
        .await
        .expect(200);
    let changes: Vec<&Value> = records["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|record| record["effect"]["type"] == "password_changed")
        .map(|record| &record["effect"]["payload"]["password"])
        .collect();
    assert_eq!(changes, [true, true]);
}

#[tokio::test]
async fn a_stream_needs_the_cookie_alone_and_ends_with_its_session() {
    let gateway = Gateway::start(Options::default()).await;
    let token = user(&gateway, json!({"user_id": "ann"})).await;
    let browser = Browser::by_token(&gateway, "ann", &token).await;
    // The long heartbeat must not delay the end.
    let path = "/api/gateway/plane/ledger/stream?heartbeat_s=60";
    let request = browser.bare(&gateway, Method::GET, path);
    let mut response = request
        .header("accept", "text/event-stream")
        .header("sec-fetch-site", "same-origin")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.chunk().await.unwrap().is_some());
    browser
        .call(&gateway, Method::POST, LOGOUT, None)
        .await
        .expect(200);
    let ended = std::time::Instant::now();
    while response.chunk().await.unwrap().is_some() {}
    assert!(ended.elapsed().as_secs() < 10);
    let again = answer(browser.bare(&gateway, Method::GET, path)).await;
    assert_eq!(again.status, 401);
}

#[tokio::test]
async fn no_secret_of_a_login_is_in_any_file_or_answer() {
    let mut gateway = Gateway::start(Options::default().set("RUNGATE_LOG", "trace")).await;
    user_with_password(&gateway, "ann").await;
    let browser = by_password(&gateway, "ann").await;
    browser.status(&gateway).await;
    let own = json!({"current_password": PASSWORD, "password": "canary of the second password"});
    let path = format!("{ME}/password");
    browser
        .call(&gateway, Method::POST, &path, Some(own))
        .await
        .expect(200);
    let wrong = "canary-of-a-wrong-password";
    for body in [
        json!({"user_id": "ann", "password": wrong}),
        json!({"user_id": "ann", "token": wrong}),
        json!({"password": wrong}),
        json!({"user_id": "ann", "password": [wrong]}),
        json!({"user_id": "ann", "password": wrong, "token": wrong}),
    ] {
        let refused = login(&gateway, body).await;
        assert!(!refused.text.contains("canary"), "{}", refused.text);
    }
    let export = gateway.get("/api/gateway/ledger/export").await.text;
    gateway.stop().await;
    let canaries = [
        PASSWORD,
        "canary of the second password",
        wrong,
        &browser.secret,
        &browser.csrf,
        browser.secret.trim_start_matches("agws_"),
        browser.csrf.trim_start_matches("agcsrf_"),
    ];
    let mut texts = vec![
        ("export".to_owned(), export.into_bytes()),
        ("log".to_owned(), gateway.log().into_bytes()),
    ];
    let data = gateway.data_dir();
    for folder in [data.join("auth"), data] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                texts.push((path.display().to_string(), std::fs::read(&path).unwrap()));
            }
        }
    }
    assert!(texts.iter().any(|(name, _)| name.ends_with("logins.redb")));
    for (name, text) in &texts {
        for canary in canaries {
            let holds = text
                .windows(canary.len())
                .any(|part| part == canary.as_bytes());
            assert!(!holds, "{name} holds {canary}");
        }
    }
}
