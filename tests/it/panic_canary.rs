//! No secret gets out when the gateway panics. The machine refuses the real binary first threads, then random bytes
//! (a preloaded library plays that), which the runtime and the generator answer with a panic: in the middle of requests
//! with secrets, and with `RUST_BACKTRACE=full`.

use std::path::{Path, PathBuf};
use std::process::Command;

use jsonwebtoken::Algorithm;
use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::user;
use crate::support::issuer::Issuer;
use crate::support::keys::Key;
use crate::support::wait::until;
use crate::support::{Gateway, Options, answer, worker_service};

/// What the kernel says where it has none: no thread while `$REFUSE/threads` is there, no random bytes while
/// `$REFUSE/random` is.
const REFUSING: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

static int refuses(const char *what) {
    const char *folder = getenv("REFUSE");
    char path[4096];
    if (folder == NULL) return 0;
    snprintf(path, sizeof path, "%s/%s", folder, what);
    return access(path, F_OK) == 0;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*work)(void *), void *with) {
    if (refuses("threads")) return ENOMEM;
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
    return real(thread, how, work, with);
}

ssize_t getrandom(void *bytes, size_t length, unsigned int flags) {
    if (refuses("random")) { errno = EIO; return -1; }
    ssize_t (*real)(void *, size_t, unsigned int) = dlsym(RTLD_NEXT, "getrandom");
    return real(bytes, length, flags);
}
"#;

fn refusing_library(folder: &Path) -> PathBuf {
    let (source, library) = (folder.join("refusing.c"), folder.join("refusing.so"));
    std::fs::write(&source, REFUSING).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]);
    let compiled = compiler.arg(&library).arg(&source).arg("-ldl").status();
    assert!(compiled.unwrap().success());
    library
}

/// Secrets by what they are. The first ones are sent while the gateway panics; none may be told.
struct Secrets {
    /// Of a user that an administrator chose; shown in a header.
    token: String,
    /// Made by the gateway; shown in a header.
    minted: String,
    /// A signed one of an issuer; shown in a header.
    signed: String,
    /// Nobody's; shown in a header.
    wrong: String,
    password: String,
    new_password: String,
    key: String,
    environment: String,
    payload: String,
    admin: String,
}

impl Secrets {
    fn all(&self) -> [&str; 10] {
        [
            &self.token,
            &self.minted,
            &self.signed,
            &self.wrong,
            &self.password,
            &self.new_password,
            &self.key,
            &self.environment,
            &self.payload,
            &self.admin,
        ]
    }
}

fn fresh(kind: &str) -> String {
    format!("canary{kind}{}", uuid::Uuid::new_v4().simple())
}

/// A gateway with a user who has all kinds of credentials, and a service with a secret in its environment.
async fn set_up(gateway: &Gateway, signed: String) -> Secrets {
    let secrets = Secrets {
        token: fresh("token"),
        minted: user(gateway, json!({"user_id": "mia"})).await,
        signed,
        wrong: fresh("wrong"),
        password: fresh("password"),
        new_password: fresh("newpassword"),
        key: fresh("key"),
        environment: fresh("environment"),
        payload: fresh("payload"),
        admin: gateway.token().to_owned(),
    };
    user(gateway, json!({"user_id": "ann", "token": secrets.token})).await;
    let password = json!({"password": secrets.password});
    let path = "/api/gateway/admin/users/ann/password";
    gateway.post(path, password).await.expect(200);
    for name in ["w", "v"] {
        let mut service = worker_service(gateway, name, name, json!({}));
        service["env"]["SECRET"] = json!(secrets.environment);
        gateway.register(service).await;
    }
    secrets
}

/// Requests with each of the secrets, all at once; what comes of them does not matter here.
async fn send_all(gateway: &Gateway, secrets: &Secrets, round: usize) {
    let job = json!({"job": {"service_type": "w", "payload": {"secret": secrets.payload}}});
    let login = json!({"user_id": "ann", "password": secrets.password});
    let wrong_login = json!({"user_id": "ann", "token": secrets.wrong});
    let change = json!({"password": secrets.new_password});
    let service = ["w", "v"][round % 2];
    let bodies: [(Method, String, Value); 8] = [
        (Method::POST, "/api/gateway/session/login".into(), login),
        (
            Method::POST,
            "/api/gateway/session/login".into(),
            wrong_login,
        ),
        (
            Method::POST,
            "/api/gateway/admin/users/ann/password".into(),
            change,
        ),
        (Method::POST, "/api/gateway/runs/start".into(), job),
        (
            Method::POST,
            "/api/gateway/tokens".into(),
            json!({"name": "lasting"}),
        ),
        (
            Method::POST,
            format!("/services/{service}/restart"),
            json!({}),
        ),
        (Method::GET, "/services".into(), Value::Null),
        (
            Method::GET,
            "/api/gateway/ledger/verify".into(),
            Value::Null,
        ),
    ];
    let [token, minted, signed, wrong, .., admin] = secrets.all();
    let requests = bodies.into_iter().flat_map(|(method, path, body)| {
        [token, minted, signed, wrong, admin].map(|shown| {
            let request = gateway.bare(method.clone(), &path).bearer_auth(shown);
            let request = request.header("idempotency-key", &secrets.key);
            let request = request.timeout(std::time::Duration::from_secs(5));
            match &body {
                Value::Null => request.send(),
                body => request.json(body).send(),
            }
        })
    });
    futures_util::future::join_all(requests).await;
}

fn panics(gateway: &Gateway) -> Vec<Value> {
    let log = gateway.log();
    let lines = log
        .lines()
        .filter(|line| line.contains("a thread panicked"));
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Sends secrets while the machine has none of `what`, until code of `module` panics for it.
async fn panic_without(
    what: &str,
    module: &str,
    refuse: &Path,
    gateway: &Gateway,
    secrets: &Secrets,
) {
    let switch = refuse.join(what);
    std::fs::write(&switch, "").unwrap();
    let round = std::cell::Cell::new(0);
    until(
        &format!("a panic in {module} for want of {what}"),
        || async {
            send_all(gateway, secrets, round.replace(round.get() + 1)).await;
            let found = panics(gateway);
            let mut frames = found
                .iter()
                .filter_map(|panic| panic["panic.backtrace"].as_str());
            frames.any(|frames| frames.contains(module))
        },
    )
    .await;
    std::fs::remove_file(&switch).unwrap();
}

#[tokio::test]
async fn a_panic_and_its_backtrace_tell_no_secret() {
    let folder = tempfile::tempdir().unwrap();
    let library = refusing_library(folder.path());
    let key = Key::new("ed", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&key]).await;
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let options = Options::default()
        .set("LD_PRELOAD", &path(&library))
        .set("REFUSE", &path(folder.path()))
        .set("RUST_BACKTRACE", "full")
        .set("RUNGATE_LOG", "trace")
        .set("RUNGATE_LOG_FORMAT", "json")
        .set("RUNGATE_SSO_ISSUER", issuer.url())
        .set("RUNGATE_SSO_AUDIENCE", "rungate-test")
        .set("RUNGATE_SSO_ALGORITHMS", "EdDSA")
        .set("RUNGATE_SSO_ALLOW_PRIVATE", "true");
    let gateway = Gateway::start(options).await;
    let signed = key.sign(&issuer.claims("sue"));
    let secrets = set_up(&gateway, signed).await;
    send_all(&gateway, &secrets, 0).await;
    assert_eq!(panics(&gateway).len(), 0, "all goes well so far");

    panic_without(
        "threads",
        "rungate::api::",
        folder.path(),
        &gateway,
        &secrets,
    )
    .await;
    panic_without(
        "random",
        "rungate::auth::password::",
        folder.path(),
        &gateway,
        &secrets,
    )
    .await;
    // Others are served as before.
    gateway.get("/services").await.expect(200);

    let log = gateway.log();
    for line in log.lines().filter(|line| {
        !line.starts_with("Rungate listens") && !line.starts_with("the administrator's token is in")
    }) {
        let event: Result<Value, _> = serde_json::from_str(line);
        assert!(event.is_ok(), "not an event of the log: {line}");
    }
    let mut told = vec![("the log".to_owned(), log)];
    for path in ["/metrics", "/api/gateway/audit?limit=500"] {
        let answered = answer(gateway.request(Method::GET, path)).await;
        assert_eq!(answered.status, 200, "{}", answered.text);
        told.push((path.to_owned(), answered.text));
    }
    for file in ["environ", "cmdline"] {
        let path = format!("/proc/{}/{file}", gateway.pid());
        let bytes = std::fs::read(&path).unwrap();
        told.push((path, String::from_utf8_lossy(&bytes).into_owned()));
    }
    for (place, text) in &told {
        for secret in secrets.all() {
            assert!(!text.contains(secret), "{secret} is in {place}");
        }
    }
}
