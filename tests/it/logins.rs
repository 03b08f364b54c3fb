//! Failed logins: throttled per account and address, over a crash too, and the same for those who do not exist. And the
//! command line of passwords and sessions.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::user;
use crate::rungate::rungate;
use crate::sessions::user_with_password;
use crate::support::browser::{Browser, LOGIN};
use crate::support::{Answer, Gateway, Options, answer};

const PASSWORD: &str = "correct horse battery";

async fn login(gateway: &Gateway, from: &str, user: &str, password: &str) -> Answer {
    let body = json!({"user_id": user, "password": password});
    let request = gateway.bare(Method::POST, LOGIN).json(&body);
    answer(request.header("x-forwarded-for", from)).await
}

fn options() -> Options {
    // Each test's callers come from wherever they say.
    Options::default().set("RUNGATE_TRUSTED_PROXIES", "1")
}

#[tokio::test]
async fn failed_logins_lock_the_account_over_a_crash() {
    let mut gateway = Gateway::start(options()).await;
    user_with_password(&gateway, "ann").await;
    user_with_password(&gateway, "bob").await;
    let living = Browser::login(&gateway, json!({"user_id": "ann", "password": PASSWORD})).await;
    for address in 1..=5 {
        let from = format!("192.0.2.{address}");
        let wrong = login(&gateway, &from, "ann", "wrong").await;
        assert_eq!(wrong.expect(401)["code"], "login_failed");
    }
    for restarted in [false, true] {
        if restarted {
            gateway.kill();
            gateway.launch().await;
        }
        let locked = login(&gateway, "192.0.2.99", "ann", PASSWORD).await;
        let seconds: u64 = locked.headers["retry-after"]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!((1..=30).contains(&seconds), "{seconds}");
        assert_eq!(locked.expect(429)["code"], "login_throttled");
        // It locks nobody else out, and nobody who is in.
        login(&gateway, "192.0.2.1", "bob", PASSWORD)
            .await
            .expect(200);
        assert_eq!(living.status(&gateway).await, 200);
    }
}

/// Whoever failed at an account, from anywhere, kept its owner out for as long as it liked.
#[tokio::test]
async fn who_guesses_elsewhere_keeps_nobody_from_logging_in_at_home() {
    let mut gateway = Gateway::start(options()).await;
    user_with_password(&gateway, "ann").await;
    let home = "198.51.100.7";
    login(&gateway, home, "ann", PASSWORD).await.expect(200);
    for address in 1..=5 {
        let from = format!("192.0.2.{address}");
        login(&gateway, &from, "ann", "wrong").await.expect(401);
    }
    for restarted in [false, true] {
        if restarted {
            gateway.kill();
            gateway.launch().await;
        }
        login(&gateway, "192.0.2.99", "ann", PASSWORD)
            .await
            .expect(429);
        login(&gateway, home, "ann", PASSWORD).await.expect(200);
    }
    // At home, too, one cannot guess for long.
    for _ in 0..5 {
        login(&gateway, home, "ann", "wrong").await.expect(401);
    }
    login(&gateway, home, "ann", PASSWORD).await.expect(429);
}

/// A token is no guess: its login is held up by its address alone, and clears nobody's failures but its own.
#[tokio::test]
async fn logins_by_token_neither_know_an_accounts_lock_nor_lift_it() {
    let gateway = Gateway::start(options()).await;
    let token = user_with_password(&gateway, "ann").await;
    let namesake = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let by_token = async |from: &str, token: &str| {
        let body = json!({"user_id": "ann", "token": token});
        let request = gateway.bare(Method::POST, LOGIN).json(&body);
        answer(request.header("x-forwarded-for", from)).await
    };
    for _ in 0..4 {
        login(&gateway, "192.0.2.1", "ann", "wrong")
            .await
            .expect(401);
    }
    // One of that name in another tenant clears nothing of hers.
    by_token("192.0.2.2", &namesake).await.expect(200);
    login(&gateway, "192.0.2.1", "ann", "wrong")
        .await
        .expect(401);
    login(&gateway, "192.0.2.3", "ann", PASSWORD)
        .await
        .expect(429);
    by_token("192.0.2.3", &token).await.expect(200);
    for _ in 0..20 {
        by_token("192.0.2.4", "rgt_user_x").await.expect(401);
    }
    by_token("192.0.2.4", &token).await.expect(429);
    by_token("192.0.2.5", &token).await.expect(200);
}

#[tokio::test]
async fn who_is_in_changes_its_password_whatever_is_locked() {
    let gateway = Gateway::start(options()).await;
    user_with_password(&gateway, "ann").await;
    let log_in = || Browser::login(&gateway, json!({"user_id": "ann", "password": PASSWORD}));
    let (one, two) = (log_in().await, log_in().await);
    for _ in 0..20 {
        let body = json!({"user_id": "ann", "password": "wrong"});
        let request = gateway.bare(Method::POST, LOGIN).json(&body);
        answer(request).await;
        login(&gateway, "192.0.2.1", "ann", "wrong").await;
    }
    let change = async |browser: &Browser, current: &str| {
        let body = json!({"current_password": current, "password": "wrong zebra staple"});
        let path = "/api/gateway/me/password";
        let answer = browser.call(&gateway, Method::POST, path, Some(body)).await;
        answer.status.as_u16()
    };
    for _ in 0..5 {
        assert_eq!(change(&one, "wrong").await, 403);
    }
    assert_eq!(change(&one, PASSWORD).await, 429);
    assert_eq!(change(&two, PASSWORD).await, 200);
}

#[tokio::test]
async fn an_address_is_locked_whatever_accounts_it_tries() {
    let options = options().set("RUNGATE_LOGIN_ATTEMPTS", "1");
    let mut gateway = Gateway::start(options).await;
    user_with_password(&gateway, "ann").await;
    for name in ["a", "b", "c", "d"] {
        login(&gateway, "192.0.2.1", name, "wrong")
            .await
            .expect(401);
    }
    gateway.kill();
    gateway.launch().await;
    login(&gateway, "192.0.2.1", "ann", PASSWORD)
        .await
        .expect(429);
    login(&gateway, "192.0.2.2", "ann", PASSWORD)
        .await
        .expect(200);
    // What a client writes itself into the header does not count.
    login(&gateway, "192.0.2.7, 192.0.2.1", "ann", PASSWORD)
        .await
        .expect(429);
}

#[tokio::test]
async fn a_lock_ends_and_a_success_clears_the_account() {
    let options = options()
        .set("RUNGATE_LOGIN_ATTEMPTS", "2")
        .set("RUNGATE_LOGIN_LOCKOUT_MS", "1000");
    let gateway = Gateway::start(options).await;
    user_with_password(&gateway, "ann").await;
    for from in ["192.0.2.1", "192.0.2.2"] {
        login(&gateway, from, "ann", "wrong").await.expect(401);
    }
    login(&gateway, "192.0.2.3", "ann", PASSWORD)
        .await
        .expect(429);
    crate::support::wait::until("the lock has ended", || async {
        let tried = login(&gateway, "192.0.2.3", "ann", PASSWORD).await;
        tried.status == 200
    })
    .await;
    login(&gateway, "192.0.2.1", "ann", "wrong")
        .await
        .expect(401);
    login(&gateway, "192.0.2.1", "ann", PASSWORD)
        .await
        .expect(200);
}

/// How many slow hashes were computed.
async fn hashes(gateway: &Gateway) -> u64 {
    let metrics = gateway.get("/metrics").await.text;
    let counted = |line: &str| {
        line.strip_prefix("rungate_slow_hashes_total ")?
            .parse()
            .ok()
    };
    metrics.lines().find_map(counted).unwrap_or(0)
}

/// Who does not exist, is disabled or has no password is told the same after the same work.
#[tokio::test]
async fn who_does_not_exist_is_told_the_same_after_the_same_work() {
    let options = options().set("RUNGATE_LOGIN_ATTEMPTS", "1000");
    let gateway = Gateway::start(options).await;
    user_with_password(&gateway, "ann").await;
    user_with_password(&gateway, "dora").await;
    user(&gateway, json!({"user_id": "tom"})).await;
    let off = json!({"enabled": false});
    let dora = "/api/gateway/admin/users/dora";
    let request = gateway.request(Method::PATCH, dora).json(&off);
    answer(request).await.expect(200);
    let tries = [
        ("ann", "wrong password"),
        ("nobody", "wrong password"),
        ("dora", PASSWORD),
        ("tom", "wrong password"),
    ];
    let mut told = Vec::new();
    let mut fastest = [Duration::MAX; 4];
    for _ in 0..5 {
        for (index, (name, password)) in tries.iter().enumerate() {
            let (before, started) = (hashes(&gateway).await, Instant::now());
            let refused = login(&gateway, "192.0.2.1", name, password).await;
            fastest[index] = fastest[index].min(started.elapsed());
            assert_eq!(hashes(&gateway).await, before + 1, "{name}");
            let headers: Vec<String> = refused.headers.keys().map(ToString::to_string).collect();
            let mut body = refused.expect(401);
            body["request_id"] = Value::Null;
            told.push((headers, body));
        }
    }
    assert!(told.iter().all(|one| *one == told[0]), "{told:#?}");
    // The hash is nearly all of the time, so one who skipped it would be twenty times as fast.
    let slowest = fastest.iter().max().unwrap();
    assert!(
        fastest.iter().all(|time| *time * 5 > *slowest),
        "{fastest:?}"
    );
    // A user who does not exist is locked like one who does.
    let strict = Gateway::start(self::options().set("RUNGATE_LOGIN_ATTEMPTS", "1")).await;
    login(&strict, "192.0.2.1", "nobody", "x").await.expect(401);
    login(&strict, "192.0.2.2", "nobody", "x").await.expect(429);
}

#[tokio::test]
async fn a_token_must_be_its_users() {
    let gateway = Gateway::start(options()).await;
    let ann = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let post = async |body: Value| answer(gateway.bare(Method::POST, LOGIN).json(&body)).await;
    let other = post(json!({"user_id": "bob", "token": ann})).await;
    assert_eq!(
        other.expect(401)["detail"],
        "Gateway token resolved to user 'ann', not 'bob'."
    );
    let wrong = post(json!({"user_id": "ann", "token": "rgt_user_x"})).await;
    assert_eq!(wrong.expect(401)["detail"], "Invalid Gateway user token");
    let elsewhere = json!({"user_id": "ann", "tenant_id": "default", "token": ann});
    post(elsewhere).await.expect(401);
    for tenant in [None, Some("acme")] {
        let body = json!({"user_id": "ann", "tenant_id": tenant, "token": ann});
        let body = post(body).await.expect(200);
        assert_eq!(body["principal"]["tenant_id"], "acme");
    }
}

/// Runs a command as the holder of a token, with this on its standard input.
async fn cli(gateway: &Gateway, token: &str, words: &[&str], input: &str) -> (i32, String) {
    let (url, token, input) = (gateway.url(""), token.to_owned(), input.to_owned());
    let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    let ran = tokio::task::spawn_blocking(move || {
        let home = tempfile::tempdir().unwrap();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = rungate(home.path(), &words);
        command.env("RUNGATE_URL", url).env("RUNGATE_TOKEN", token);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code().unwrap(), text.trim().to_owned())
    });
    ran.await.unwrap()
}

#[tokio::test]
async fn the_command_line_sets_passwords_and_ends_sessions() {
    let gateway = Gateway::start(options()).await;
    let ann = user(&gateway, json!({"user_id": "ann"})).await;
    let admin = gateway.token().to_owned();
    let set = ["user", "password", "ann"];
    let done = cli(&gateway, &admin, &set, "correct horse battery\n").await;
    assert_eq!(done, (0, "ann has a new password".to_owned()));
    login(&gateway, "192.0.2.1", "ann", PASSWORD)
        .await
        .expect(200);
    let own = ["user", "password"];
    let lines = "correct horse battery\nanother horse battery\n";
    assert_eq!(cli(&gateway, &ann, &own, lines).await.0, 0);
    let wrong = cli(&gateway, &ann, &own, "wrong\nanother horse battery\n").await;
    assert_eq!(wrong.0, 4);
    login(&gateway, "192.0.2.1", "ann", "another horse battery")
        .await
        .expect(200);

    let list = ["session", "list", "--user", "ann", "--json"];
    let (code, text) = cli(&gateway, &admin, &list, "").await;
    let list: Value = serde_json::from_str(&text).unwrap();
    let id = list["sessions"][0]["session_id"].as_str().unwrap();
    assert_eq!((code, list["sessions"].as_array().unwrap().len()), (0, 1));
    let (_, table) = cli(&gateway, &ann, &["session", "list"], "").await;
    assert!(
        table.contains(id) && table.starts_with("SESSION"),
        "{table}"
    );
    let end = ["session", "end", id, "--user", "ann"];
    assert_eq!(
        cli(&gateway, &admin, &end, "").await,
        (0, format!("{id} ended"))
    );
    assert_eq!(cli(&gateway, &ann, &["session", "end", id], "").await.0, 3);
    let remove = ["user", "password", "ann", "--remove"];
    assert_eq!(cli(&gateway, &admin, &remove, "").await.0, 0);
    login(&gateway, "192.0.2.1", "ann", "another horse battery")
        .await
        .expect(401);
}
