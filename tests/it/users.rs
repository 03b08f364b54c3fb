//! Users and tokens over HTTP and on the command line: the contract's lifecycle, what becomes of a runtime, and
//! that no secret is kept.

use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::{call, user};
use crate::rungate::{run, rungate};
use crate::support::browser::Browser;
use crate::support::{Gateway, Options};

const USERS: &str = "/api/gateway/admin/users";
const ME: &str = "/api/gateway/me";

/// Of `agw_imported-token-for-tests`, made by Python's hashlib with 1000 rounds, to be quick.
const HASH: &str = "pbkdf2_sha256$1000$73616c7473616c74$eb8a2b4ebad99a2431af0d9e4cd6c6582ca054b45c565089f8a61ddcdd712d9b";
const FINGERPRINT: &str = "546d78c20532";

async fn admin(
    gateway: &Gateway,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> crate::support::Answer {
    call(gateway, gateway.token(), method, path, body).await
}

async fn status(gateway: &Gateway, token: &str) -> u16 {
    call(gateway, token, Method::GET, ME, None)
        .await
        .status
        .as_u16()
}

async fn start_run(gateway: &Gateway, token: &str, payload: Value) -> String {
    let body = json!({"job": {"service_type": "t", "payload": payload}});
    let path = "/api/gateway/runs/start";
    let started = call(gateway, token, Method::POST, path, Some(body))
        .await
        .expect(200);
    started["run_id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_users_life_is_the_contracts() {
    let gateway = Gateway::start(Options::default()).await;
    let me = gateway.get(ME).await.expect(200);
    assert_eq!(me["principal"]["user_id"], "admin");
    assert_eq!(me["principal"]["tenant_id"], "default");
    assert_eq!(me["principal"]["runtime_id"], "default");
    assert_eq!(me["principal"]["roles"], json!(["admin", "user"]));
    assert_eq!(me["principal"]["admin"], true);
    assert_eq!(
        me["auth"],
        json!({"mode": "users", "user_auth_enabled": true})
    );

    let created = gateway
        .post(USERS, json!({"user_id": "alice", "roles": ["user"]}))
        .await
        .expect(200);
    let first = created["token"].as_str().unwrap().to_owned();
    assert!(first.starts_with("rgt_user_"));
    assert_eq!(created["user"]["runtime_id"], "alice");
    assert_eq!(created["user"]["email"], "");
    let again = gateway
        .post(USERS, json!({"user_id": "alice"}))
        .await
        .expect(400);
    assert_eq!(
        again["detail"],
        "Gateway user already exists: default/alice"
    );
    let alice = format!("{USERS}/alice");
    let read = gateway.get(&alice).await.expect(200);
    assert!(read.get("token").is_none());
    let me = call(&gateway, &first, Method::GET, ME, None)
        .await
        .expect(200);
    assert_eq!(me["principal"]["user_id"], "alice");
    assert_eq!(me["principal"]["admin"], false);

    let off = Some(json!({"enabled": false}));
    admin(&gateway, Method::PATCH, &alice, off)
        .await
        .expect(200);
    assert_eq!(status(&gateway, &first).await, 401);
    let rotate = Some(json!({"enabled": true, "rotate_token": true}));
    let rotated = admin(&gateway, Method::PATCH, &alice, rotate)
        .await
        .expect(200);
    let second = rotated["token"].as_str().unwrap();
    assert_eq!(
        (
            status(&gateway, &first).await,
            status(&gateway, second).await
        ),
        (401, 200)
    );
    let chosen = "agw_chosen-by-the-administrator";
    let body = Some(json!({"token": chosen}));
    let told = admin(&gateway, Method::PATCH, &alice, body).await;
    assert_eq!(told.expect(200)["token"], chosen);
    assert_eq!(
        (
            status(&gateway, second).await,
            status(&gateway, chosen).await
        ),
        (401, 200)
    );

    let deleted = gateway.delete(&alice).await.expect(200);
    assert_eq!(
        deleted,
        json!({"ok": true, "deleted": true, "user_id": "alice", "tenant_id": "default"})
    );
    assert_eq!(status(&gateway, chosen).await, 401);
    let gone = gateway.get(&alice).await.expect(404);
    assert_eq!(gone["detail"], "Gateway user not found");
    let taken = gateway
        .post(USERS, json!({"user_id": "alice"}))
        .await
        .expect(400);
    assert_eq!(taken["code"], "runtime_taken");
    for body in [
        json!({}),
        json!({"user_id": "b", "x": 1}),
        json!({"user_id": "b", "token": "short"}),
        json!({"user_id": "__"}),
        json!({"user_id": "b", "roles": ["god"]}),
    ] {
        gateway.post(USERS, body).await.expect(422);
    }
    gateway.delete(&format!("{USERS}/admin")).await.expect(400);
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn a_tenants_administrator_manages_its_tenant_alone() {
    let gateway = Gateway::start(Options::default()).await;
    let tara = json!({"user_id": "tara", "tenant_id": "acme", "roles": ["tenant_admin"]});
    let tara = user(&gateway, tara).await;
    user(
        &gateway,
        json!({"user_id": "boss", "tenant_id": "acme", "roles": ["admin"]}),
    )
    .await;
    user(&gateway, json!({"user_id": "bob"})).await;
    let made = call(
        &gateway,
        &tara,
        Method::POST,
        USERS,
        Some(json!({"user_id": "ann"})),
    )
    .await
    .expect(200);
    assert_eq!(made["user"]["tenant_id"], "acme");
    let list = call(&gateway, &tara, Method::GET, USERS, None)
        .await
        .expect(200);
    let names: Vec<&Value> = list["users"]
        .as_array()
        .unwrap()
        .iter()
        .map(|u| &u["user_id"])
        .collect();
    assert_eq!(names, ["ann", "boss", "tara"]);
    let foreign = format!("{USERS}/bob?tenant_id=default");
    for method in [Method::GET, Method::PATCH, Method::DELETE] {
        call(&gateway, &tara, method, &foreign, Some(json!({})))
            .await
            .expect(404);
    }
    let up = json!({"user_id": "x", "roles": ["admin"]});
    call(&gateway, &tara, Method::POST, USERS, Some(up))
        .await
        .expect(403);
    let out = json!({"user_id": "x", "tenant_id": "default"});
    call(&gateway, &tara, Method::POST, USERS, Some(out))
        .await
        .expect(403);
    let boss = format!("{USERS}/boss");
    call(
        &gateway,
        &tara,
        Method::PATCH,
        &boss,
        Some(json!({"rotate_token": true})),
    )
    .await
    .expect(403);
    call(&gateway, &tara, Method::DELETE, &boss, None)
        .await
        .expect(403);
    let ann = format!("{USERS}/ann");
    call(
        &gateway,
        &tara,
        Method::PATCH,
        &ann,
        Some(json!({"roles": ["admin"]})),
    )
    .await
    .expect(403);
    call(&gateway, &tara, Method::DELETE, &ann, None)
        .await
        .expect(200);
}

#[tokio::test]
async fn an_administrator_lists_and_revokes_single_tokens_of_its_tenants_users() {
    let gateway = Gateway::start(Options::default()).await;
    let tara = json!({"user_id": "tara", "tenant_id": "acme", "roles": ["tenant_admin"]});
    let tara = user(&gateway, tara).await;
    let ann = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let bob = user(&gateway, json!({"user_id": "bob"})).await;
    let tokens = "/api/gateway/tokens";
    let body = Some(json!({"name": "ci"}));
    let made = call(&gateway, &ann, Method::POST, tokens, body).await;
    let ci = made.expect(200);
    let anns = format!("{tokens}?user_id=ann&tenant_id=acme");
    let list = call(&gateway, &tara, Method::GET, &anns, None).await;
    let list = list.expect(200);
    assert_eq!(list["tokens"].as_array().unwrap().len(), 2, "{list}");
    let one = format!("{tokens}/{}?user_id=ann", ci["token_id"].as_str().unwrap());
    for (token, path, expected) in [
        (&bob, anns.as_str(), 403),
        (&ann, &format!("{tokens}?user_id=tara&tenant_id=acme"), 403),
        (
            &tara,
            &format!("{tokens}?user_id=bob&tenant_id=default"),
            404,
        ),
    ] {
        let refused = call(&gateway, token, Method::GET, path, None).await;
        assert_eq!(refused.status, expected, "{}", refused.text);
    }
    call(&gateway, &tara, Method::DELETE, &one, None)
        .await
        .expect(200);
    let ci = ci["token"].as_str().unwrap();
    assert_eq!(
        (status(&gateway, ci).await, status(&gateway, &ann).await),
        (401, 200)
    );
    call(&gateway, &tara, Method::DELETE, &one, None)
        .await
        .expect(404);
    let words = ["token", "list", "--user", "ann", "--tenant", "acme"];
    let (code, out, _) = cli(&gateway, &words).await;
    assert_eq!((code, out.lines().count()), (0, 2), "{out}");
}

#[tokio::test]
async fn a_left_runtime_is_transferred_or_purged() {
    let mut gateway = Gateway::start(Options::default()).await;
    let ann = user(&gateway, json!({"user_id": "ann"})).await;
    let bob = user(&gateway, json!({"user_id": "bob"})).await;
    let kept = start_run(&gateway, &ann, json!({"n": 1})).await;
    let reservations = "/api/gateway/admin/runtime-reservations";
    let purge = format!("{reservations}/ann/purge");
    let confirm = json!({"confirm_runtime_id": "ann"});
    assert_eq!(
        gateway.post(&purge, confirm.clone()).await.expect(409)["code"],
        "runtime_in_use"
    );
    gateway.delete(&format!("{USERS}/ann")).await.expect(200);
    let list = gateway.get(reservations).await.expect(200);
    let one = &list["runtime_reservations"][0];
    assert_eq!(
        (&one["runtime_id"], &one["reason"], &one["data_exists"]),
        (&json!("ann"), &json!("deleted-user"), &json!(true))
    );

    let transfer = format!("{reservations}/ann/transfer");
    let to = |confirm: &str| json!({"target_user_id": "bob", "confirm_runtime_id": confirm});
    gateway.post(&transfer, to("bob")).await.expect(400);
    let done = gateway.post(&transfer, to("ann")).await.expect(200);
    assert_eq!(
        (&done["previous_runtime_id"], &done["user"]["runtime_id"]),
        (&json!("bob"), &json!("ann"))
    );
    let path = format!("/api/gateway/runs/{kept}");
    call(&gateway, &bob, Method::GET, &path, None)
        .await
        .expect(200);
    gateway.post(&transfer, to("ann")).await.expect(400);

    // A command for a run that does not exist has a payload too.
    let canary = "payload-canary-7c1e";
    let body = json!({"command_id": "c", "run_id": "nope", "type": "pause", "payload": {"reason": canary}});
    call(
        &gateway,
        &bob,
        Method::POST,
        "/api/gateway/commands",
        Some(body),
    )
    .await
    .expect(200);
    let body =
        json!({"command_id": "d", "run_id": kept, "type": "pause", "payload": {"x": canary}});
    call(
        &gateway,
        &bob,
        Method::POST,
        "/api/gateway/commands",
        Some(body),
    )
    .await
    .expect(200);
    start_run(&gateway, &bob, json!({"secret": canary})).await;
    gateway.delete(&format!("{USERS}/bob")).await.expect(200);
    gateway
        .post(&purge, json!({"confirm_runtime_id": "bob"}))
        .await
        .expect(400);
    gateway
        .post(
            &purge,
            json!({"confirm_runtime_id": "ann", "delete_data": false}),
        )
        .await
        .expect(400);
    let done = gateway.post(&purge, confirm.clone()).await.expect(200);
    assert_eq!(
        (&done["purged"], &done["runtime_id"], &done["deleted_data"]),
        (&json!(true), &json!("ann"), &json!(true))
    );
    gateway.post(&purge, confirm).await.expect(404);
    // Bob's own, which was given up for ann's, never had anything in it.
    let empty = format!("{reservations}/bob/purge");
    let done = gateway
        .post(&empty, json!({"confirm_runtime_id": "bob"}))
        .await;
    assert_eq!(done.expect(200)["deleted_data"], false);
    let export = gateway.get("/api/gateway/ledger/export").await.text;
    let payloads = export.lines().filter_map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        line["payload"].as_str().map(str::to_owned)
    });
    use base64::Engine;
    for payload in payloads {
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(payload)
            .unwrap();
        assert!(!String::from_utf8_lossy(&bytes).contains(canary));
    }
    assert_eq!(
        gateway.get("/api/gateway/ledger/verify").await.expect(200)["ok"],
        true
    );

    // The next runtime of that name is another plane, after a restart too.
    gateway.stop().await;
    gateway.launch().await;
    let next = user(&gateway, json!({"user_id": "ann"})).await;
    call(&gateway, &next, Method::GET, &path, None)
        .await
        .expect(404);
    let list = call(&gateway, &next, Method::GET, "/api/gateway/runs", None)
        .await
        .expect(200);
    assert_eq!(list["items"], json!([]));
}

#[tokio::test]
async fn no_token_is_in_ledger_files_or_log() {
    let mut gateway = Gateway::start(Options::default()).await;
    let chosen = "canary-token-of-the-administrators-choice";
    let body = json!({"user_id": "ann", "token": chosen});
    gateway.post(USERS, body).await.expect(200);
    let own = call(
        &gateway,
        chosen,
        Method::POST,
        "/api/gateway/tokens",
        Some(json!({"name": "own"})),
    )
    .await;
    let own = own.expect(200)["token"].as_str().unwrap().to_owned();
    let minted = user(&gateway, json!({"user_id": "bob"})).await;
    for token in [chosen, &own, &minted] {
        assert_eq!(status(&gateway, token).await, 200);
        start_run(&gateway, token, json!({})).await;
    }
    // A refusal does not tell the token back.
    let bad = json!({"user_id": "x", "token": "rgt_user_canary-that-is-refused"});
    assert!(!gateway.post(USERS, bad).await.text.contains("canary"));
    let used = call(&gateway, chosen, Method::GET, "/api/gateway/tokens", None)
        .await
        .expect(200);
    assert!(
        used["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .all(|token| token["last_used_at"].is_string())
    );
    let export = gateway.get("/api/gateway/ledger/export").await.text;
    let tokens = [
        chosen.to_owned(),
        own,
        minted,
        "canary-that-is-refused".to_owned(),
    ];
    for token in &tokens {
        assert!(!export.contains(token.as_str()));
        assert!(!gateway.log().contains(token.as_str()));
    }
    gateway.stop().await;
    let contains = |file: &[u8], token: &str| {
        file.windows(token.len())
            .any(|part| part == token.as_bytes())
    };
    let auth = std::fs::read_dir(gateway.data_dir().join("auth")).unwrap();
    for path in auth
        .map(|entry| entry.unwrap().path())
        .chain([gateway.data_dir().join("ledger.redb")])
    {
        let file = std::fs::read(&path).unwrap();
        for token in &tokens {
            assert!(!contains(&file, token), "{}", path.display());
        }
    }
    // Who used which token when is not forgotten over a restart.
    gateway.launch().await;
    let path = "/api/gateway/tokens";
    let used = call(&gateway, chosen, Method::GET, path, None)
        .await
        .expect(200);
    assert!(used["tokens"][0]["last_used_at"].is_string());
}

#[tokio::test]
async fn imported_tokens_go_on_working() {
    let gateway = Gateway::start(Options::default()).await;
    let token = "agw_imported-token-for-tests";
    let registry = json!({"version": 2, "users": [
        {"user_id": "ann", "tenant_id": "default", "email": "", "roles": ["user"], "scopes": [], "enabled": true,
         "runtime_id": "ann", "token_hash": HASH, "token_fingerprint": FINGERPRINT, "created_at": "x"},
        {"user_id": "bad", "token_hash": "md5$x", "token_fingerprint": "x"},
        {"user_id": "odd", "roles": ["entity"], "token_hash": HASH, "token_fingerprint": FINGERPRINT},
    ]});
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), registry.to_string()).unwrap();
    let path = file.path().display().to_string();
    let (code, out, _) = cli(&gateway, &["user", "import", &path]).await;
    assert_eq!(code, 1);
    assert!(out.starts_with("1 imported, 2 refused"), "{out}");
    let tokens = "/api/gateway/tokens";
    assert_eq!(status(&gateway, "agw_another-token-for-tests").await, 401);
    // The first use is checked slowly and leaves a keyed hash.
    assert_eq!(status(&gateway, token).await, 200);
    let list = call(&gateway, token, Method::GET, tokens, None)
        .await
        .expect(200);
    assert_eq!(list["tokens"][0]["imported"], false);
    let told = gateway
        .get("/api/gateway/audit?actor=ann")
        .await
        .expect(200);
    let upgraded = &told["items"][0];
    assert_eq!(
        (&upgraded["event"], &upgraded["route"]),
        (&json!("token_upgraded"), &json!(ME))
    );
    assert!(upgraded["address"].is_string() && upgraded["request_id"].is_string());
    gateway.delete(&format!("{USERS}/ann")).await.expect(200);
    assert_eq!(status(&gateway, token).await, 401);
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn a_token_has_one_owner() {
    let gateway = Gateway::start(Options::default()).await;
    let secret = "a-token-of-the-administrators-choice";
    let chosen = |user: &str| json!({"user_id": user, "token": secret});
    gateway.post(USERS, chosen("ann")).await.expect(200);
    let refused = gateway.post(USERS, chosen("bob")).await.expect(409);
    assert_eq!(refused["code"], "token_taken");
    assert!(!refused.to_string().contains("ann"), "{refused}");

    let user =
        |user: &str| json!({"user_id": user, "token_hash": HASH, "token_fingerprint": FINGERPRINT});
    let path = format!("{USERS}/import");
    let users = json!({"users": [user("carl"), user("dora")]});
    let done = gateway.post(&path, users).await.expect(200);
    assert_eq!(done["imported"], json!(["carl"]), "{done}");
    assert_eq!(done["refused"][0]["code"], "token_taken", "{done}");
    assert_eq!(status(&gateway, "agw_imported-token-for-tests").await, 200);
    gateway.get("/api/gateway/ledger/verify").await.expect(200);

    // What is free again may be somebody else's.
    gateway.delete(&format!("{USERS}/ann")).await.expect(200);
    gateway.post(USERS, chosen("bob")).await.expect(200);
    assert_eq!(status(&gateway, secret).await, 200);
}

/// Runs a command as the administrator.
pub async fn cli(gateway: &Gateway, words: &[&str]) -> (i32, String, String) {
    let (url, token) = (gateway.url(""), gateway.token().to_owned());
    let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    let ran = tokio::task::spawn_blocking(move || {
        let home = tempfile::tempdir().unwrap();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = rungate(home.path(), &words);
        command.env("RUNGATE_URL", url).env("RUNGATE_TOKEN", token);
        run(command)
    });
    ran.await.unwrap()
}

#[tokio::test]
async fn the_command_line_manages_users_and_tokens() {
    let mut gateway = Gateway::start(Options::default()).await;
    let (code, token, note) = cli(&gateway, &["user", "create", "ann", "--role", "operator"]).await;
    assert_eq!((code, note.trim()), (0, "keep it: it is shown only here"));
    assert_eq!(status(&gateway, token.trim()).await, 200);
    let (_, list, _) = cli(&gateway, &["user", "list"]).await;
    assert!(
        list.lines()
            .any(|line| line.starts_with("default  ann    operator")),
        "{list}"
    );
    let (code, shown, _) = cli(&gateway, &["user", "show", "ann", "--json"]).await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((code, &shown["user"]["roles"]), (0, &json!(["operator"])));
    assert_eq!(
        cli(&gateway, &["user", "disable", "ann"]).await.1.trim(),
        "ann disabled"
    );
    assert_eq!(status(&gateway, token.trim()).await, 401);
    assert_eq!(cli(&gateway, &["user", "enable", "ann"]).await.0, 0);
    let (_, rotated, _) = cli(&gateway, &["user", "rotate", "ann"]).await;
    assert_eq!(
        (
            status(&gateway, token.trim()).await,
            status(&gateway, rotated.trim()).await
        ),
        (401, 200)
    );
    assert_eq!(cli(&gateway, &["user", "delete", "ann"]).await.0, 0);
    assert_eq!(cli(&gateway, &["user", "show", "ann"]).await.0, 3);

    let words = [
        "token",
        "create",
        "ci",
        "--scope",
        "runs:read",
        "--expires-in-days",
        "1",
    ];
    let (_, made, _) = cli(&gateway, &words).await;
    assert_eq!(status(&gateway, made.trim()).await, 200);
    let (_, list, _) = cli(&gateway, &["token", "list", "--json"]).await;
    let list: Value = serde_json::from_str(&list).unwrap();
    let id = list["tokens"][0]["token_id"].as_str().unwrap();
    assert_eq!(cli(&gateway, &["token", "revoke", id]).await.0, 0);
    assert_eq!(status(&gateway, made.trim()).await, 401);

    let data = gateway.data_dir().display().to_string();
    let recover = ["user", "recover-admin", "--data-dir", &data];
    let (code, _, error) = cli(&gateway, &recover).await;
    assert_eq!(code, 1, "{error}");
    let old = gateway.token().to_owned();
    let minted = cli(&gateway, &["token", "create", "thiefs"]).await.1;
    let session = Browser::by_token(&gateway, "admin", minted.trim()).await;
    assert_eq!(session.status(&gateway).await, 200);
    // A crash before it is nothing to it.
    gateway.kill();
    assert_eq!(cli(&gateway, &recover).await.0, 0);
    gateway.launch().await;
    assert_ne!(gateway.token(), old);
    // What a thief had made with the old one is over too.
    assert_eq!(status(&gateway, minted.trim()).await, 401);
    assert_eq!(session.status(&gateway).await, 401);
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
    assert_eq!(
        (
            status(&gateway, &old).await,
            status(&gateway, gateway.token()).await
        ),
        (401, 200)
    );
}
