//! Single sign-on against a real issuer on this machine: whom its tokens let in and as what, and what is refused
//! at how small a price.

use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::{call, user};
use crate::support::issuer::Issuer;
use crate::support::keys::Key;
use crate::support::wait::until;
use crate::support::{Answer, Gateway, Options, answer};

const ME: &str = "/api/gateway/me";
const USERS: &str = "/api/gateway/admin/users";

fn options(issuer: &Issuer) -> Options {
    Options::default()
        .set("RUNGATE_SSO_ISSUER", issuer.url())
        .set("RUNGATE_SSO_AUDIENCE", "rungate-test")
        .set("RUNGATE_SSO_ALGORITHMS", "RS256,ES256,EdDSA")
        .set("RUNGATE_SSO_ALLOW_PRIVATE", "true")
}

async fn me(gateway: &Gateway, token: &str) -> Answer {
    call(gateway, token, Method::GET, ME, None).await
}

async fn status(gateway: &Gateway, token: &str) -> u16 {
    me(gateway, token).await.status.as_u16()
}

fn with(mut claims: Value, more: Value) -> Value {
    let members = claims.as_object_mut().unwrap();
    members.extend(more.as_object().unwrap().clone());
    claims
}

#[tokio::test]
async fn a_person_is_made_known_once_and_keeps_its_plane() {
    let keys = [
        Key::new("rsa", Algorithm::RS256),
        Key::new("ec", Algorithm::ES256),
        Key::new("ed", Algorithm::EdDSA),
    ];
    let issuer = Issuer::start(&[&keys[0], &keys[1], &keys[2]]).await;
    let mut gateway = Gateway::start(options(&issuer)).await;
    assert_eq!(issuer.discovered(), 0, "a start needs no issuer");
    let claims = with(issuer.claims("ann"), json!({"email": "ann@example.com"}));
    for key in &keys {
        let told = me(&gateway, &key.sign(&claims)).await.expect(200);
        assert_eq!(told["principal"]["tenant_id"], "sso");
        assert_eq!(told["principal"]["user_id"], "ann");
        assert_eq!(told["principal"]["roles"], json!(["user"]));
    }
    assert_eq!((issuer.discovered(), issuer.asked()), (1, 1));

    // Whence it came is told, though all that it asked for was to read.
    let told = gateway.get("/api/gateway/audit?actor=sso/ann").await;
    let told = told.expect(200);
    let made = &told["items"][0];
    assert_eq!(told["items"].as_array().unwrap().len(), 1, "{told}");
    assert_eq!(made["event"], "plane_opened", "{made}");
    assert_eq!(
        (&made["route"], &made["address"]),
        (&json!(ME), &json!("127.0.0.1"))
    );
    assert!(made["request_id"].is_string() && made["token_fingerprint"].is_string());

    let token = keys[0].sign_as("JWT", &claims);
    let body = json!({"job": {"service_type": "t", "payload": {}}});
    let path = "/api/gateway/runs/start";
    let started = call(&gateway, &token, Method::POST, path, Some(body)).await;
    let run = started.expect(200)["run_id"].as_str().unwrap().to_owned();
    let run = format!("/api/gateway/runs/{run}");
    gateway.get(&run).await.expect(404);
    let bob = keys[1].sign(&issuer.claims("bob"));
    call(&gateway, &bob, Method::GET, &run, None)
        .await
        .expect(404);

    // Like any other user: in the ledger, on the list, kept over a restart, and ended by disabling it.
    let ann = format!("{USERS}/ann?tenant_id=sso");
    let record = gateway.get(&ann).await.expect(200);
    assert_eq!(record["user"]["email"], "ann@example.com");
    gateway.stop().await;
    gateway.launch().await;
    call(&gateway, &token, Method::GET, &run, None)
        .await
        .expect(200);
    let ledger = gateway.get("/api/gateway/ledger?limit=2000").await.text;
    assert_eq!(
        ledger.matches("\"type\":\"user_created\"").count(),
        3,
        "{ledger}"
    );
    assert!(!ledger.contains(&token) && !gateway.log().contains(&token));
    let off = Some(json!({"enabled": false}));
    call(&gateway, gateway.token(), Method::PATCH, &ann, off)
        .await
        .expect(200);
    assert_eq!(status(&gateway, &token).await, 401);
    call(&gateway, gateway.token(), Method::DELETE, &ann, None)
        .await
        .expect(200);
    assert_eq!(
        status(&gateway, &token).await,
        401,
        "its runtime is reserved"
    );
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn roles_come_from_the_issuers_youngest_word() {
    let key = Key::new("k", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&key]).await;
    let options = options(&issuer)
        .set("RUNGATE_SSO_TENANT_CLAIM", "org")
        .set("RUNGATE_SSO_ROLES_CLAIM", "realm_access.roles")
        .set("RUNGATE_SSO_ROLES", "gpu-ops=operator,staff=user")
        .set("RUNGATE_SSO_DEFAULT_ROLE", "none");
    let gateway = Gateway::start(options).await;
    let now = jsonwebtoken::get_current_timestamp();
    let token = |roles: Value, iat: u64| {
        let more = json!({"org": "acme", "iat": iat, "realm_access": {"roles": roles}});
        key.sign(&with(issuer.claims("auth0|ann"), more))
    };
    assert_eq!(status(&gateway, &token(json!(["guests"]), now)).await, 401);
    let staff = token(json!(["staff"]), now - 60);
    let told = me(&gateway, &staff).await.expect(200);
    assert_eq!(told["principal"]["tenant_id"], "acme");
    let id = told["principal"]["user_id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("auth0_ann-"), "{id}");

    // Issued after the last change of the user: its roles are the user's from now on.
    let promoted = token(json!(["gpu-ops", "staff"]), now + 30);
    let told = me(&gateway, &promoted).await.expect(200);
    assert_eq!(told["principal"]["roles"], json!(["operator", "user"]));
    let whole = "/api/gateway/runs?scope=tenant";
    call(&gateway, &promoted, Method::GET, whole, None)
        .await
        .expect(200);
    // An older one that is still good gives no more than it says, and turns nothing back.
    call(&gateway, &staff, Method::GET, whole, None)
        .await
        .expect(403);
    call(&gateway, &promoted, Method::GET, whole, None)
        .await
        .expect(200);
    // A token that it makes would have the user's roles: it makes none, nor a password.
    let tokens = "/api/gateway/tokens";
    let mint = async |token: &str| {
        let body = Some(json!({"name": "own"}));
        call(&gateway, token, Method::POST, tokens, body).await
    };
    assert_eq!(mint(&staff).await.expect(403)["code"], "role_required");
    let first = Some(json!({"password": "correct horse battery"}));
    let path = format!("{ME}/password");
    let refused = call(&gateway, &staff, Method::POST, &path, first).await;
    assert_eq!(refused.expect(403)["code"], "role_required");
    assert_eq!(mint(&promoted).await.expect(200)["expires_at"], Value::Null);
    let record = gateway
        .get(&format!("{USERS}/{id}?tenant_id=acme"))
        .await
        .expect(200);
    assert_eq!(record["user"]["roles"], json!(["operator", "user"]));
}

#[tokio::test]
async fn only_those_who_exist_come_in_where_nobody_is_made_known() {
    let key = Key::new("k", Algorithm::ES256);
    let issuer = Issuer::start(&[&key]).await;
    let options = options(&issuer)
        .set("RUNGATE_SSO_JWKS_URL", &format!("{}/keys", issuer.url()))
        .set("RUNGATE_SSO_TENANT", "default")
        .set("RUNGATE_SSO_PROVISION", "false");
    let gateway = Gateway::start(options).await;
    user(&gateway, json!({"user_id": "vera", "roles": ["viewer"]})).await;
    let vera = key.sign(&issuer.claims("vera"));
    let told = me(&gateway, &vera).await.expect(200);
    assert_eq!(told["principal"]["roles"], json!(["viewer"]));
    assert_eq!(issuer.discovered(), 0, "the keys' address is set");
    let path = "/api/gateway/runs/start";
    call(&gateway, &vera, Method::POST, path, Some(json!({})))
        .await
        .expect(403);
    for nobody in ["admin", "new"] {
        assert_eq!(
            status(&gateway, &key.sign(&issuer.claims(nobody))).await,
            401,
            "{nobody}"
        );
    }
}

/// An unsigned token of that header and these claims.
fn raw(header: &Value, claims: &Value, signature: &str) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.{signature}", part(header), part(claims))
}

#[tokio::test]
async fn forged_and_foreign_tokens_are_refused_at_a_bounded_price() {
    let key = Key::new("k", Algorithm::RS256);
    let other = Key::new("k", Algorithm::EdDSA);
    let unlisted = Key::new("elsewhere", Algorithm::RS256);
    let issuer = Issuer::start(&[&key]).await;
    let gateway = Gateway::start(options(&issuer)).await;
    let good = issuer.claims("ann");
    let accepted = key.sign(&good);
    assert_eq!(status(&gateway, &accepted).await, 200);
    assert_eq!(issuer.asked(), 1);
    let now = jsonwebtoken::get_current_timestamp();

    let mut forged = Vec::new();
    for (claim, wrong) in [
        ("iss", json!("https://elsewhere.example")),
        ("iss", json!([issuer.url()])),
        ("aud", json!("another")),
        ("aud", json!(["another", "yet another"])),
        ("aud", Value::Null),
        ("exp", json!(now - 120)),
        ("exp", json!("later")),
        ("exp", Value::Null),
        ("nbf", json!(now + 600)),
        ("iat", json!(now + 600)),
        ("sub", Value::Null),
        ("sub", json!(7)),
        ("sub", json!("")),
    ] {
        forged.push(key.sign(&with(good.clone(), json!({claim: wrong}))));
    }
    for kind in ["rungate-job+jwt", "rungate-instance+jwt", "logout+jwt", ""] {
        forged.push(key.sign_as(kind, &good));
    }
    let (head, signature) = accepted.rsplit_once('.').unwrap();
    let (head, _) = head.split_once('.').unwrap();
    let root = URL_SAFE_NO_PAD.encode(with(good.clone(), json!({"sub": "root"})).to_string());
    forged.push(format!("{head}.{root}.{signature}"));
    let mut typed = json!({"alg": "none", "typ": "at+jwt", "kid": "k"});
    for alg in ["none", "None", "RS256", "HS256"] {
        typed["alg"] = json!(alg);
        forged.push(raw(&typed, &good, ""));
    }
    // The public key as a shared secret.
    let public = key.jwk();
    let modulus = URL_SAFE_NO_PAD
        .decode(public["n"].as_str().unwrap())
        .unwrap();
    for secret in [modulus, public.to_string().into_bytes()] {
        let mut header = Header::new(Algorithm::HS256);
        header.typ = Some("at+jwt".to_owned());
        header.kid = Some("k".to_owned());
        forged.push(encode(&header, &good, &EncodingKey::from_secret(&secret)).unwrap());
    }
    // Another kind of key under the same id, and a key that the token brings along.
    forged.push(other.sign(&good));
    let mut header = Header::new(Algorithm::RS256);
    header.typ = Some("at+jwt".to_owned());
    header.kid = Some("k".to_owned());
    header.jwk = Some(serde_json::from_value(unlisted.jwk()).unwrap());
    header.jku = Some(format!("{}/keys", issuer.url()));
    forged.push(encode(&header, &good, &unlisted.secret).unwrap());
    for token in &forged {
        assert_eq!(status(&gateway, token).await, 401, "{token}");
    }
    assert_eq!(issuer.asked(), 1, "none of them costs the issuer anything");

    for n in 0..200 {
        let kid = format!("made-up-{n}");
        let unknown = Key {
            kid,
            ..unlisted.clone()
        };
        assert_eq!(status(&gateway, &unknown.sign(&good)).await, 401);
    }
    assert!(issuer.asked() <= 4, "{}", issuer.asked());
    assert_eq!(status(&gateway, &accepted).await, 200);
    let users = gateway.get(USERS).await.expect(200);
    assert_eq!(users["users"].as_array().unwrap().len(), 2, "{users}");
}

#[tokio::test]
async fn keys_are_rotated_and_an_issuer_that_is_away_is_told() {
    let (first, second) = (
        Key::new("1", Algorithm::EdDSA),
        Key::new("2", Algorithm::EdDSA),
    );
    let issuer = Issuer::start(&[&first]).await;
    issuer.set_away(true);
    let gateway = Gateway::start(options(&issuer)).await;
    let claims = issuer.claims("ann");
    let refused = me(&gateway, &first.sign(&claims)).await;
    assert_eq!(refused.headers["retry-after"], "10");
    assert_eq!(refused.expect(503)["code"], "issuer_unavailable");
    // Everyone else is served.
    gateway.get(ME).await.expect(200);
    issuer.set_away(false);
    assert_eq!(status(&gateway, &first.sign(&claims)).await, 200);
    issuer.publish(&[&second]);
    assert_eq!(status(&gateway, &second.sign(&claims)).await, 200);
    assert_eq!(
        status(&gateway, &first.sign(&claims)).await,
        401,
        "it was withdrawn"
    );
    let text = gateway.get("/metrics").await.text;
    assert!(
        text.contains("rungate_sso_key_fetches_total{result=\"failed\"} 1"),
        "{text}"
    );
}

/// Keys are the issuer's where the settings say, not where that sends one on to.
#[tokio::test]
async fn keys_elsewhere_are_not_fetched() {
    let key = Key::new("k", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&key]).await;
    let target = format!("{}/keys", issuer.url());
    let moved = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/keys", moved.local_addr().unwrap());
    let answer = move || async move { (StatusCode::FOUND, [("location", target)]).into_response() };
    let router = Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(moved, router).await });
    let gateway = Gateway::start(options(&issuer).set("RUNGATE_SSO_JWKS_URL", &url)).await;
    let token = key.sign(&issuer.claims("ann"));
    let refused = me(&gateway, &token).await.expect(503);
    assert_eq!(refused["code"], "issuer_unavailable");
    assert_eq!(issuer.asked(), 0);
}

/// Each was worth a signature, however many an address had shown.
#[tokio::test]
async fn past_the_limit_of_an_address_no_signature_is_checked() {
    let key = Key::new("k", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&key]).await;
    let options = options(&issuer)
        .set("RUNGATE_TRUSTED_PROXIES", "1")
        .set("RUNGATE_RATE_LIMIT_ADDRESS", "3");
    let gateway = Gateway::start(options).await;
    let good = key.sign(&issuer.claims("ann"));
    let mut bad = good.clone();
    let last = if bad.pop() == Some('A') { 'Q' } else { 'A' };
    bad.push(last);
    let from = async |address: &str, token: &str| {
        let request = gateway.bare(Method::GET, ME).bearer_auth(token);
        let answer = answer(request.header("x-forwarded-for", address)).await;
        answer.status.as_u16()
    };
    assert_eq!(from("5.5.5.5", &good).await, 200);
    for _ in 0..3 {
        assert_eq!(from("5.5.5.5", &bad).await, 401);
    }
    assert_eq!(from("5.5.5.5", &good).await, 429);
    assert_eq!(from("5.5.5.5", gateway.token()).await, 200);
    assert_eq!(from("5.5.5.6", &good).await, 200);
    // Services on this machine show signed tokens whatever else goes on here.
    for _ in 0..4 {
        from("127.0.0.1", &bad).await;
    }
    assert_eq!(from("127.0.0.1", &good).await, 200);
}

#[tokio::test]
async fn a_discovery_document_about_another_issuer_is_not_gone_by() {
    let key = Key::new("k", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&key]).await;
    issuer.lie();
    let gateway = Gateway::start(options(&issuer)).await;
    assert_eq!(
        status(&gateway, &key.sign(&issuer.claims("ann"))).await,
        503
    );
    assert_eq!(issuer.asked(), 0);
}

#[tokio::test]
async fn a_stream_ends_with_its_readers_token() {
    let key = Key::new("k", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&key]).await;
    let gateway = Gateway::start(options(&issuer)).await;
    let path = "/api/gateway/plane/ledger/stream?heartbeat_s=0.2";
    let now = jsonwebtoken::get_current_timestamp();
    let brief = key.sign(&with(issuer.claims("ann"), json!({"exp": now + 2})));
    let request = gateway.bare(Method::GET, path).bearer_auth(&brief);
    let mut response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    // The client's own time limit fails the test when it does not end.
    while response.chunk().await.unwrap().is_some() {}
    assert!(jsonwebtoken::get_current_timestamp() >= now + 2);
}

#[tokio::test]
async fn a_setting_that_cannot_be_gone_by_keeps_the_gateway_from_starting() {
    let key = Key::new("k", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&key]).await;
    let mut gateway = Gateway::start(Options::default()).await;
    gateway.stop().await;
    for (name, value, told) in [
        ("RUNGATE_SSO_ISSUER", "http://id.example", "sso_issuer"),
        ("RUNGATE_SSO_AUDIENCE", "", "sso_audience"),
        ("RUNGATE_SSO_ALGORITHMS", "HS256", "sso_algorithms"),
    ] {
        let mut command = std::process::Command::new(crate::support::binary());
        command.arg("serve").args(["--listen", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(gateway.data_dir());
        command.env("RUNGATE_SSO_ISSUER", issuer.url());
        command.env("RUNGATE_SSO_AUDIENCE", "a");
        if name == "RUNGATE_SSO_ISSUER" {
            command.env(name, value);
        } else {
            command
                .env("RUNGATE_SSO_ALLOW_PRIVATE", "true")
                .env(name, value);
        }
        let output = tokio::task::spawn_blocking(move || command.output()).await;
        let output = output.unwrap().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && error.contains(told),
            "{name}: {error}"
        );
    }
    gateway.launch().await;
    until("it starts without", || async {
        gateway.get(ME).await.status == 200
    })
    .await;
}
