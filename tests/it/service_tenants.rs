//! Services of one tenant and shared ones: whose jobs they take, who sees them, and who may do what to them.

use reqwest::Method;
use serde_json::{Value, json};

use crate::isolation::{call, user};
use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Answer, Gateway, Options, worker_service};

const SERVICES: &str = "/api/gateway/services";

async fn person(gateway: &Gateway, id: &str, tenant: &str, role: &str) -> String {
    let body = json!({"user_id": id, "tenant_id": tenant, "roles": [role]});
    user(gateway, body).await
}

async fn get(gateway: &Gateway, token: &str, path: &str) -> Answer {
    call(gateway, token, Method::GET, path, None).await
}

async fn post(gateway: &Gateway, token: &str, path: &str, body: Value) -> Answer {
    call(gateway, token, Method::POST, path, Some(body)).await
}

async fn register(gateway: &Gateway, token: &str, body: Value) -> Answer {
    post(gateway, token, &format!("{SERVICES}/register"), body).await
}

/// Starts a job and gives its run.
async fn start(gateway: &Gateway, token: &str, job: Value) -> String {
    let body = json!({"job": job});
    let started = post(gateway, token, "/api/gateway/runs/start", body).await;
    started.expect(200)["run_id"].as_str().unwrap().to_owned()
}

async fn completes(gateway: &Gateway, token: &str, run: &str) {
    let path = format!("/api/gateway/runs/{run}");
    until("it completes", || async {
        get(gateway, token, &path).await.json["status"] == "completed"
    })
    .await;
}

#[tokio::test]
async fn an_operators_service_takes_no_other_tenants_jobs() {
    let gateway = Gateway::start(Options::default()).await;
    let g = &gateway;
    let (mallory, mia) = (
        person(g, "mallory", "acme", "operator").await,
        person(g, "mia", "acme", "user").await,
    );
    let ann = person(g, "ann", "default", "user").await;
    let (trap, shared) = (Scripted::start().await, Scripted::start().await);
    let told = register(g, &mallory, trap.service("trap", "work")).await;
    assert_eq!(told.expect(200)["tenant"], "acme");

    let job = |text: &str| json!({"service_type": "work", "payload": {"secret": text}});
    let waits = start(g, &ann, job("of ann")).await;
    let named = json!({"service_name": "trap", "payload": {"secret": "of ann"}});
    let named = start(g, &ann, named).await;
    for (run, told) in [
        (
            &waits,
            "no service of type 'work' is registered; register one",
        ),
        (&named, "service 'trap' is not registered; register it"),
    ] {
        let path = format!("/api/gateway/runs/{run}/why");
        let why = get(g, &ann, &path).await.expect(200);
        assert_eq!(
            why["blocking"],
            json!([{"cause": "no_service", "detail": told}])
        );
    }
    // The tenant's own arrives there, past those that wait.
    let own = start(g, &mia, job("of mia")).await;
    completes(g, &mia, &own).await;
    gateway.register(shared.service("shared", "work")).await;
    completes(g, &ann, &waits).await;
    assert_eq!(trap.jobs().len(), 1);
    assert_eq!(trap.jobs()[0].json()["secret"], "of mia");
    assert_eq!(shared.jobs()[0].json()["secret"], "of ann");

    // What was shared is everybody's still, and what the administrator gives to a tenant is that tenant's.
    let job = json!({"service_name": "shared", "payload": {}});
    let run = start(g, &mia, job).await;
    completes(g, &mia, &run).await;
    let mut given = shared.service("given", "other");
    given["tenant"] = json!("acme");
    assert_eq!(gateway.register(given).await["tenant"], "acme");
    get(g, &mia, &format!("{SERVICES}/given")).await.expect(200);
    get(g, &ann, &format!("{SERVICES}/given")).await.expect(404);
    gateway.get("/api/gateway/ledger/verify").await.expect(200);
}

#[tokio::test]
async fn programs_are_the_administrators_to_register() {
    let gateway = Gateway::start(Options::default()).await;
    let olga = person(&gateway, "olga", "acme", "operator").await;
    let tara = person(&gateway, "tara", "default", "tenant_admin").await;
    let program = worker_service(&gateway, "w", "w", json!({}));
    for token in [&olga, &tara] {
        let refused = register(&gateway, token, program.clone()).await.expect(403);
        assert_eq!(refused["code"], "role_required");
        assert_eq!(refused["errors"][0]["field"], "command");
        let detail = refused["detail"].as_str().unwrap();
        assert!(detail.contains("operators_may_run_commands"), "{detail}");
    }
    // A container that is there already may be anybody's.
    let container =
        json!({"name": "c", "type": "c", "container": "somebodys-database", "port": 5_432});
    for token in [&olga, &tara] {
        let refused = register(&gateway, token, container.clone())
            .await
            .expect(403);
        assert_eq!(refused["code"], "role_required");
        assert_eq!(refused["errors"][0]["field"], "container");
    }
    // One of an image is what the settings allow, with its environment; here they allow none.
    let image = json!({"name": "i", "type": "i", "image": "a:1", "env": {"A": "1"}});
    let refused = register(&gateway, &olga, image).await.expect(403);
    assert_eq!(refused["code"], "container_forbidden");
    // Nor do they get there by way of one that is theirs already.
    let mut own = program.clone();
    own["tenant"] = json!("acme");
    gateway.register(own).await;
    let path = format!("{SERVICES}/w");
    for change in [
        json!({"command": ["/bin/sh"]}),
        json!({"env": {"LD_PRELOAD": "/tmp/x.so"}}),
        json!({"working_dir": null}),
    ] {
        let answer = call(&gateway, &olga, Method::PUT, &path, Some(change.clone())).await;
        assert_eq!(answer.status, 403, "{change}: {}", answer.text);
    }
    let change = json!({"description": "mine"});
    let changed = call(&gateway, &olga, Method::PUT, &path, Some(change)).await;
    assert_eq!(changed.expect(200)["description"], "mine");
    post(&gateway, &olga, &format!("{path}/start"), json!({}))
        .await
        .expect(200);
    get(&gateway, &olga, &format!("{path}/logs"))
        .await
        .expect(200);

    let options = Options::default().set("RUNGATE_OPERATORS_MAY_RUN_COMMANDS", "true");
    let gateway = Gateway::start(options).await;
    let olga = person(&gateway, "olga", "acme", "operator").await;
    let told = register(&gateway, &olga, program).await.expect(200);
    assert_eq!(told["tenant"], "acme");
}

#[tokio::test]
async fn a_shared_service_is_operated_by_its_owners_people_and_changed_by_the_administrator() {
    let gateway = Gateway::start(Options::default()).await;
    let g = &gateway;
    let worker = Scripted::start().await;
    gateway.register(worker.service("shared", "t")).await;
    let dora = person(g, "dora", "default", "operator").await;
    let olga = person(g, "olga", "acme", "operator").await;
    let vera = person(g, "vera", "acme", "viewer").await;
    let path = format!("{SERVICES}/shared");
    for token in [&olga, &vera] {
        // Where it is, and what it runs, is its owner's business.
        let seen = get(g, token, &path).await.expect(200);
        assert_eq!(
            (&seen["tenant"], &seen["url"]),
            (&Value::Null, &Value::Null)
        );
    }
    let seen = get(g, &dora, &path).await.expect(200);
    assert_eq!(seen["url"], worker.url(""));
    for verb in ["start", "stop", "restart", "disable", "enable"] {
        let path = format!("{path}/{verb}");
        let refused = post(g, &olga, &path, json!({})).await.expect(403);
        assert_eq!(refused["reason_code"], "admin_required", "{verb}");
        post(g, &dora, &path, json!({})).await.expect(200);
    }
    for token in [&olga, &dora] {
        // Whoever decides where it is decides where everybody's payloads go.
        let elsewhere = Some(json!({"url": "http://10.0.0.1/"}));
        call(g, token, Method::PUT, &path, elsewhere)
            .await
            .expect(403);
        call(g, token, Method::DELETE, &path, None)
            .await
            .expect(403);
        let refused = get(g, token, &format!("{path}/logs")).await.expect(403);
        assert_eq!(refused["action"], "read");
    }
    let to_all = json!({"name": "x", "type": "t", "url": worker.url(""), "tenant": "default"});
    let refused = register(g, &olga, to_all).await.expect(403);
    assert_eq!(refused["errors"][0]["field"], "tenant");
    let moved = Some(json!({"tenant": "acme"}));
    call(g, gateway.token(), Method::PUT, &path, moved)
        .await
        .expect(422);
    call(g, gateway.token(), Method::DELETE, &path, None)
        .await
        .expect(200);
    // Its log may be there still, so its name is not free for others.
    let again = worker.service("shared", "t");
    let refused = register(g, &olga, again.clone()).await.expect(409);
    assert_eq!(refused["code"], "service_exists");
    gateway.register(again).await;
}

#[tokio::test]
async fn nothing_tells_other_tenants_of_ones_services_and_jobs() {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let g = &gateway;
    let worker = Scripted::start().await;
    let olga = person(g, "olga", "acme", "operator").await;
    let mut service = worker.service("acme-secret-service", "acme-secret-project");
    service["vram_gb"] = json!(20);
    register(g, &olga, service.clone()).await.expect(200);
    let path = format!("{SERVICES}/acme-secret-service/start");
    post(g, &olga, &path, json!({})).await.expect(200);
    let job = json!({"service_type": "acme-secret-project", "payload": {"hold": true}});
    for _ in 0..2 {
        start(g, &olga, job.clone()).await;
    }
    until("one runs", || async { worker.jobs().len() == 1 }).await;

    let others = [
        ("other", "globex", "operator"),
        ("chief", "globex", "tenant_admin"),
        ("dora", "default", "operator"),
        ("vera", "default", "viewer"),
    ];
    for (id, tenant, role) in others {
        let token = person(g, id, tenant, role).await;
        for path in [
            "/queue/stats",
            "/gpu",
            "/vram",
            "/services",
            "/available/acme-secret-project",
            "/available/other",
            "/preempt/check/acme-secret-service",
            "/services/acme-secret-service",
            "/api/gateway/runs",
        ] {
            let told = get(g, &token, path).await;
            let echoed = path.rsplit('/').next().unwrap();
            let text = told.text.replace(echoed, "");
            assert!(!text.contains("acme-secret"), "{id}: {path}: {text}");
        }
        let stats = get(g, &token, "/queue/stats").await.expect(200);
        assert_eq!(
            stats,
            json!({"total_queued": 0, "total_running": 0, "by_type": {}, "by_priority": {}})
        );
        let path = "/available/acme-secret-project";
        let told = get(g, &token, path).await.expect(200);
        assert_eq!(
            (&told["reason"], &told["queue_depth"]),
            (&json!("no_enabled_service"), &json!(0))
        );
        if role == "viewer" {
            continue;
        }
        // The memory is taken; it is not said by whom. The name is taken; no more is said.
        let name = format!("large-{id}");
        let mut large = worker.service(&name, "large");
        large["vram_gb"] = json!(20);
        register(g, &token, large).await.expect(200);
        let path = format!("{SERVICES}/{name}/start");
        let refused = post(g, &token, &path, json!({})).await.expect(409);
        assert_eq!(refused["detail"]["running_services"], json!([]));
        assert_eq!(refused["detail"]["running_vram_mb"], 20 * 1_024);
        let taken = register(g, &token, service.clone()).await.expect(409);
        assert_eq!(
            taken["detail"],
            "The service name 'acme-secret-service' is taken; choose another"
        );
    }
    let own = get(g, &olga, "/queue/stats").await.expect(200);
    assert_eq!(own["by_type"], json!({"acme-secret-project": 1}));
    assert_eq!(
        (&own["total_queued"], &own["total_running"]),
        (&json!(1), &json!(1))
    );
    let all = gateway.get("/queue/stats").await.expect(200);
    assert_eq!(all, own);
    let vram = get(g, &olga, "/vram").await.expect(200);
    assert_eq!(
        vram["allocated_services"][0]["service"],
        "acme-secret-service"
    );
}

/// Numbers over all planes are for those who run the machine: a token for Prometheus is an operator's of `default`.
#[tokio::test]
async fn metrics_are_for_those_who_run_the_machine() {
    let gateway = Gateway::start(Options::default()).await;
    for (tenant, role, status) in [
        ("default", "operator", 200),
        ("default", "user", 403),
        ("acme", "operator", 403),
        ("acme", "tenant_admin", 403),
        ("acme", "admin", 200),
    ] {
        let token = person(&gateway, &format!("{tenant}-{role}"), tenant, role).await;
        get(&gateway, &token, "/metrics").await.expect(status);
    }
}
