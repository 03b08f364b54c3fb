//! Tenants and quotas over HTTP and on the command line, and what those who operate a tenant see of it.

use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::{call, user};
use crate::support::wait::until;
use crate::support::{Gateway, Options, worker_service};
use crate::users::cli;

const TENANTS: &str = "/api/gateway/admin/tenants";
const RUNS: &str = "/api/gateway/runs";

async fn start(gateway: &Gateway, token: &str) -> String {
    let body = json!({"job": {"service_type": "t", "payload": {}}});
    let path = format!("{RUNS}/start");
    let started = call(gateway, token, Method::POST, &path, Some(body)).await;
    started.expect(200)["run_id"].as_str().unwrap().to_owned()
}

fn ids(list: &Value) -> Vec<&str> {
    let items = list["items"].as_array().unwrap();
    items
        .iter()
        .map(|run| run["run_id"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn a_tenant_is_created_changed_and_listed() {
    let gateway = Gateway::start(Options::default()).await;
    user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let path = format!("{TENANTS}/acme");
    let plain = gateway.get(&path).await.expect(200);
    assert_eq!(plain["tenant"]["weight"], 100);
    assert_eq!(plain["tenant"]["users"], 1);
    assert_eq!(plain["tenant"]["created_at"], Value::Null);

    let body = json!({"weight": 250, "quotas": {"queued_runs": 5, "gpus": 2}});
    let admin = gateway.token();
    let changed = call(&gateway, admin, Method::PATCH, &path, Some(body))
        .await
        .expect(200);
    assert_eq!(changed["tenant"]["quotas"]["queued_runs"], 5);
    assert!(changed["tenant"]["created_at"].is_string());
    let body = json!({"quotas": {"queued_runs": null}});
    let changed = call(&gateway, admin, Method::PATCH, &path, Some(body))
        .await
        .expect(200);
    assert_eq!(changed["tenant"]["quotas"]["queued_runs"], Value::Null);
    assert_eq!(changed["tenant"]["quotas"]["gpus"], 2);
    assert_eq!(changed["tenant"]["weight"], 250);

    let made = gateway
        .post(TENANTS, json!({"tenant_id": "new", "name": "New Ltd"}))
        .await;
    assert_eq!(made.expect(200)["tenant"]["name"], "New Ltd");
    let again = gateway
        .post(TENANTS, json!({"tenant_id": "new"}))
        .await
        .expect(400);
    assert_eq!(again["code"], "tenant_exists");
    let list = gateway.get(TENANTS).await.expect(200);
    let names: Vec<&str> = list["tenants"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["tenant_id"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["acme", "default", "new"]);

    // Its own administrator sees it, and nothing else.
    let tara = user(
        &gateway,
        json!({"user_id": "tara", "tenant_id": "acme", "roles": ["tenant_admin"]}),
    )
    .await;
    let list = call(&gateway, &tara, Method::GET, TENANTS, None)
        .await
        .expect(200);
    assert_eq!(list["tenants"].as_array().unwrap().len(), 1);
    let other = format!("{TENANTS}/new");
    call(&gateway, &tara, Method::GET, &other, None)
        .await
        .expect(404);
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn a_disabled_tenants_users_are_refused() {
    let gateway = Gateway::start(Options::default()).await;
    let ann = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let path = format!("{TENANTS}/acme");
    let set = async |enabled: bool| {
        let body = json!({"enabled": enabled});
        let admin = gateway.token();
        call(&gateway, admin, Method::PATCH, &path, Some(body))
            .await
            .expect(200);
    };
    call(&gateway, &ann, Method::GET, RUNS, None)
        .await
        .expect(200);
    set(false).await;
    call(&gateway, &ann, Method::GET, RUNS, None)
        .await
        .expect(401);
    set(true).await;
    call(&gateway, &ann, Method::GET, RUNS, None)
        .await
        .expect(200);
}

#[tokio::test]
async fn a_start_over_the_quota_is_refused_and_changes_nothing() {
    let mut gateway = Gateway::start(Options::default()).await;
    let ann = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let path = "/api/gateway/admin/users/ann?tenant_id=acme";
    let body = json!({"quotas": {"queued_runs": 1}});
    let admin = gateway.token();
    let changed = call(&gateway, admin, Method::PATCH, path, Some(body))
        .await
        .expect(200);
    assert_eq!(changed["user"]["quotas"]["queued_runs"], 1);
    let run = start(&gateway, &ann).await;
    let body = json!({"job": {"service_type": "t", "payload": {}}});
    let start_path = format!("{RUNS}/start");
    let refused = call(
        &gateway,
        &ann,
        Method::POST,
        &start_path,
        Some(body.clone()),
    )
    .await;
    assert!(refused.headers.contains_key("retry-after"));
    let refused = refused.expect(429);
    assert_eq!(refused["code"], "quota_exceeded");
    assert_eq!(refused["quota"], "queued_runs");
    assert_eq!(
        (&refused["limit"], &refused["used"]),
        (&json!(1), &json!(1))
    );
    let list = call(&gateway, &ann, Method::GET, RUNS, None)
        .await
        .expect(200);
    assert_eq!(ids(&list), [run.as_str()]);

    // It holds after a restart too, and ends with the user.
    gateway.stop().await;
    gateway.launch().await;
    call(&gateway, &ann, Method::POST, &start_path, Some(body))
        .await
        .expect(429);
    let admin = gateway.token();
    call(&gateway, admin, Method::DELETE, path, None)
        .await
        .expect(200);
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn a_tenants_bytes_in_the_ledger_are_counted_over_restarts_and_given_back_by_a_purge() {
    let mut gateway = Gateway::start(Options::default()).await;
    let body = json!({"tenant_id": "acme", "quotas": {"ledger_bytes": 1_000}});
    let created = gateway.post(TENANTS, body).await.expect(200);
    assert_eq!(created["tenant"]["quotas"]["ledger_bytes"], 1_000);
    let ann = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let bob = user(&gateway, json!({"user_id": "bob", "tenant_id": "acme"})).await;
    let path = format!("{RUNS}/start");
    let body = json!({"job": {"service_type": "t", "payload": {"text": "x".repeat(600)}}});
    let first = call(&gateway, &ann, Method::POST, &path, Some(body.clone())).await;
    let run = first.expect(200)["run_id"].as_str().unwrap().to_owned();
    // It holds for the tenant as a whole, and after a restart that finds no snapshot.
    for _ in 0..2 {
        let refused = call(&gateway, &bob, Method::POST, &path, Some(body.clone())).await;
        let refused = refused.expect(429);
        assert_eq!(
            (&refused["code"], &refused["quota"]),
            (&json!("quota_exceeded"), &json!("ledger_bytes"))
        );
        assert!(
            refused["detail"]
                .as_str()
                .unwrap()
                .contains("purge ended runs")
        );
        start(&gateway, &bob).await;
        gateway.kill();
        gateway.launch().await;
    }
    let command = json!({"command_id": "c-1", "run_id": run, "type": "cancel"});
    let commands = "/api/gateway/commands";
    call(&gateway, &ann, Method::POST, commands, Some(command))
        .await
        .expect(200);
    let purge = format!("{RUNS}/{run}/purge");
    for _ in 0..2 {
        call(&gateway, &ann, Method::POST, &purge, Some(json!({})))
            .await
            .expect(200);
        gateway.kill();
        gateway.launch().await;
    }
    call(&gateway, &bob, Method::POST, &path, Some(body.clone()))
        .await
        .expect(200);
    call(&gateway, &bob, Method::POST, &path, Some(body))
        .await
        .expect(429);
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn a_user_keeps_and_asks_no_more_than_it_may() {
    let mut gateway = Gateway::start(Options::default()).await;
    let of_acme = |name: &str| json!({"user_id": name, "tenant_id": "acme"});
    let ann = user(&gateway, of_acme("ann")).await;
    let bob = user(&gateway, of_acme("bob")).await;
    let admin = gateway.token().to_owned();
    let path = |name: &str| format!("/api/gateway/admin/users/{name}?tenant_id=acme");
    let body = json!({"quotas": {"ledger_bytes": 1_000, "requests_per_minute": 7}});
    let patched = call(&gateway, &admin, Method::PATCH, &path("ann"), Some(body)).await;
    let quotas = patched.expect(200)["user"]["quotas"].clone();
    assert_eq!(
        (
            &quotas["ledger_bytes"],
            &quotas["requests_per_minute"],
            &quotas["gpus"]
        ),
        (&json!(1_000), &json!(7), &json!(null))
    );
    let start = format!("{RUNS}/start");
    let body = json!({"job": {"service_type": "t", "payload": {"text": "x".repeat(600)}}});
    call(&gateway, &ann, Method::POST, &start, Some(body.clone()))
        .await
        .expect(200);
    // It is the user's alone, and holds after a restart that finds no snapshot.
    for _ in 0..2 {
        let refused = call(&gateway, &ann, Method::POST, &start, Some(body.clone())).await;
        let refused = refused.expect(429);
        assert_eq!(refused["quota"], "ledger_bytes");
        assert!(refused["detail"].as_str().unwrap().contains("user 'ann'"));
        call(&gateway, &bob, Method::POST, &start, Some(body.clone()))
            .await
            .expect(200);
        gateway.kill();
        gateway.launch().await;
    }
    // The buckets are full again after the restart.
    for _ in 0..7 {
        call(&gateway, &ann, Method::GET, RUNS, None)
            .await
            .expect(200);
    }
    let refused = call(&gateway, &ann, Method::GET, RUNS, None)
        .await
        .expect(429);
    assert_eq!(refused["code"], "rate_limited");
    call(&gateway, &bob, Method::GET, RUNS, None)
        .await
        .expect(200);
    // More than the settings allow is no more.
    let lifted = json!({"quotas": {"ledger_bytes": null, "requests_per_minute": 1_000_000_000}});
    call(&gateway, &admin, Method::PATCH, &path("ann"), Some(lifted))
        .await
        .expect(200);
    call(&gateway, &ann, Method::POST, &start, Some(body))
        .await
        .expect(200);
    let lifted = json!({"quotas": null});
    let user = call(&gateway, &admin, Method::PATCH, &path("ann"), Some(lifted))
        .await
        .expect(200);
    assert_eq!(user["user"]["quotas"], json!(null));
    for wrong in [
        json!({"requests_per_minute": 0}),
        json!({"ledger_bytes": -1}),
        json!({"users": 3}),
    ] {
        let body = json!({"quotas": wrong});
        call(&gateway, &admin, Method::PATCH, &path("ann"), Some(body))
            .await
            .expect(422);
    }
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn a_tenant_has_as_many_users_and_requests_as_it_may() {
    let gateway = Gateway::start(Options::default()).await;
    let body = json!({"tenant_id": "acme", "quotas": {"users": 2, "requests_per_minute": 3}});
    gateway.post(TENANTS, body).await.expect(200);
    let of_acme = |name: &str| json!({"user_id": name, "tenant_id": "acme"});
    let ann = user(&gateway, of_acme("ann")).await;
    let bob = user(&gateway, of_acme("bob")).await;
    let users = "/api/gateway/admin/users";
    let refused = gateway.post(users, of_acme("cy")).await.expect(429);
    assert_eq!(
        (&refused["quota"], &refused["limit"]),
        (&json!("users"), &json!(2))
    );
    let cy = user(&gateway, json!({"user_id": "cy", "tenant_id": "other"})).await;

    // A user more is no way to ask more.
    for token in [&ann, &bob, &ann] {
        call(&gateway, token, Method::GET, RUNS, None)
            .await
            .expect(200);
    }
    for token in [&bob, &ann] {
        let refused = call(&gateway, token, Method::GET, RUNS, None).await;
        assert!(refused.headers.contains_key("retry-after"));
        let refused = refused.expect(429);
        assert_eq!(refused["code"], "rate_limited");
        assert_eq!(refused["violated-policies"], json!(["tenant"]));
    }
    for _ in 0..4 {
        call(&gateway, &cy, Method::GET, RUNS, None)
            .await
            .expect(200);
    }
}

#[tokio::test]
async fn a_run_over_the_running_quota_waits_and_says_why() {
    let gateway = Gateway::start(Options::default()).await;
    let service = worker_service(&gateway, "t", "t", json!({"concurrency": 4}));
    gateway.register(service).await;
    let body = json!({"tenant_id": "acme", "quotas": {"running_runs": 1}});
    gateway.post(TENANTS, body).await.expect(200);
    let ann = user(&gateway, json!({"user_id": "ann", "tenant_id": "acme"})).await;
    let sleep = async || {
        let payload = json!({"operation": "sleep", "ms": 600_000});
        let body = json!({"job": {"service_type": "t", "payload": payload}});
        let path = format!("{RUNS}/start");
        let started = call(&gateway, &ann, Method::POST, &path, Some(body))
            .await
            .expect(200);
        started["run_id"].as_str().unwrap().to_owned()
    };
    let running = async |run: &str| {
        let path = format!("{RUNS}/{run}");
        let read = call(&gateway, &ann, Method::GET, &path, None).await;
        read.json["job"]["state"] == "running"
    };
    let first = sleep().await;
    until("the first runs", || running(&first)).await;
    let second = sleep().await;
    let path = format!("{RUNS}/{second}/why");
    let why = call(&gateway, &ann, Method::GET, &path, None)
        .await
        .expect(200);
    assert_eq!(why["blocking"][0]["cause"], "quota");
    let detail = why["blocking"][0]["detail"].as_str().unwrap();
    assert!(detail.contains("1 of 1 running runs"), "{detail}");
    let path = format!("{TENANTS}/acme");
    let body = json!({"quotas": {"running_runs": 2}});
    let admin = gateway.token();
    call(&gateway, admin, Method::PATCH, &path, Some(body))
        .await
        .expect(200);
    until("the second runs", || running(&second)).await;
}

#[tokio::test]
async fn an_operator_reads_and_steers_all_runs_of_its_tenant_and_no_other() {
    let gateway = Gateway::start(Options::default()).await;
    let person = async |user_id: &str, tenant: &str, role: &str| {
        let body = json!({"user_id": user_id, "tenant_id": tenant, "roles": [role]});
        user(&gateway, body).await
    };
    let ann = person("ann", "acme", "user").await;
    let bob = person("bob", "acme", "user").await;
    let olga = person("olga", "acme", "operator").await;
    let zoe = person("zoe", "other", "user").await;
    let mut runs = vec![start(&gateway, &ann).await, start(&gateway, &bob).await];
    let own = start(&gateway, &olga).await;
    let foreign = start(&gateway, &zoe).await;
    runs.push(own.clone());
    runs.reverse();

    let get = async |token: &str, path: &str| call(&gateway, token, Method::GET, path, None).await;
    let path = format!("{RUNS}?scope=tenant");
    let list = get(&olga, &path).await.expect(200);
    assert_eq!(ids(&list), runs);
    let whose: Vec<&str> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["runtime_id"].as_str().unwrap())
        .collect();
    assert_eq!(whose, ["olga", "bob", "ann"]);
    assert_eq!(ids(&get(&olga, RUNS).await.expect(200)), [own.as_str()]);
    let denied = get(&ann, &path).await.expect(403);
    assert_eq!(denied["reason_code"], "operator_required");
    get(&olga, &format!("{RUNS}?scope=all")).await.expect(422);
    // Page by page it is the same.
    let (mut paged, mut next) = (Vec::new(), format!("{path}&limit=1"));
    loop {
        let page = get(&olga, &next).await.expect(200);
        paged.extend(ids(&page).into_iter().map(str::to_owned));
        let Some(after) = page["next_cursor"].as_str() else {
            break;
        };
        next = format!("{path}&limit=1&after={after}");
    }
    assert_eq!(paged, runs);

    let asked: Vec<Value> = runs
        .iter()
        .chain([&foreign])
        .map(|run| json!({"run_id": run}))
        .collect();
    let batch = format!("{RUNS}/ledger/batch");
    let body = json!({"runs": asked});
    let pages = call(&gateway, &olga, Method::POST, &batch, Some(body))
        .await
        .expect(200);
    assert_eq!(pages["runs"].as_object().unwrap().len(), 3);

    // A command lies in the inbox of the plane that its run is of, and says who gave it.
    let of_ann = runs.last().unwrap();
    for (run, state) in [(of_ann, "applied"), (&foreign, "rejected")] {
        let id = uuid::Uuid::new_v4().to_string();
        let body = json!({"command_id": id, "run_id": run, "type": "pause"});
        let path = "/api/gateway/commands";
        call(&gateway, &olga, Method::POST, path, Some(body))
            .await
            .expect(200);
        let view = get(&olga, &format!("{path}/{id}")).await.expect(200);
        assert_eq!(view["state"], state);
    }
    let path = format!("{RUNS}/{of_ann}/ledger");
    let text = get(&ann, &path).await.text;
    assert!(
        text.contains("job_paused") && text.contains("acme/olga"),
        "{text}"
    );
    let path = format!("{RUNS}/{foreign}");
    assert_eq!(get(&zoe, &path).await.expect(200)["paused"], false);
    for path in [
        path.clone(),
        format!("{path}/ledger"),
        format!("/queue/{foreign}"),
    ] {
        get(&olga, &path).await.expect(404);
    }
}

#[tokio::test]
async fn a_stream_of_anothers_run_ends_with_the_role_that_let_it() {
    let gateway = Gateway::start(Options::default()).await;
    let ann = user(&gateway, json!({"user_id": "ann"})).await;
    let olga = user(&gateway, json!({"user_id": "olga", "roles": ["operator"]})).await;
    let run = start(&gateway, &ann).await;
    let path = format!("{RUNS}/{run}/ledger/stream?heartbeat_s=0.2");
    let request = gateway.bare(Method::GET, &path).bearer_auth(&olga);
    let mut response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.chunk().await.unwrap().is_some());
    let body = Some(json!({"roles": ["user"]}));
    let path = "/api/gateway/admin/users/olga";
    call(&gateway, gateway.token(), Method::PATCH, path, body)
        .await
        .expect(200);
    // The client's own time limit fails the test when it does not end.
    while response.chunk().await.unwrap().is_some() {}
}

#[tokio::test]
async fn the_command_line_sets_and_shows_tenants() {
    let gateway = Gateway::start(Options::default()).await;
    let set = [
        "tenant",
        "set",
        "acme",
        "--weight",
        "300",
        "--running-runs",
        "8",
    ];
    let (code, text, errors) = cli(&gateway, &set).await;
    assert_eq!(code, 0, "{errors}");
    assert!(text.contains("300"), "{text}");
    let lift = [
        "tenant",
        "set",
        "acme",
        "--running-runs",
        "none",
        "--gpus",
        "2",
    ];
    cli(&gateway, &lift).await;
    let (_, text, _) = cli(&gateway, &["--json", "tenant", "show", "acme"]).await;
    let shown: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(shown["tenant"]["weight"], 300);
    assert_eq!(shown["tenant"]["quotas"]["running_runs"], Value::Null);
    assert_eq!(shown["tenant"]["quotas"]["gpus"], 2);
    let (_, list, _) = cli(&gateway, &["tenant", "list"]).await;
    assert!(list.contains("acme") && list.contains("default"), "{list}");
    let (code, _, errors) = cli(&gateway, &["tenant", "set", "acme", "--gpus", "many"]).await;
    assert_eq!(code, 2, "{errors}");
    let (code, _, _) = cli(&gateway, &["tenant", "show", "nobody"]).await;
    assert_ne!(code, 0);
}
