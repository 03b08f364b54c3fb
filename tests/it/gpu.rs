//! GPUs and their memory over HTTP, with simulated ones: what is told, what is held, what a service gets to see.

use serde_json::{Value, json};

use crate::support::scripted::Scripted;
use crate::support::wait::until;
use crate::support::{Gateway, Options, worker_service};

#[tokio::test]
async fn without_a_gpu_it_says_so_and_work_that_needs_none_runs() {
    let gateway = Gateway::start(Options::default()).await;
    let gpu = gateway.get("/gpu").await.expect(200);
    assert_eq!(gpu["available"], false);
    assert!(gpu["error"].is_string());
    assert_eq!(
        (&gpu["memory_total_mb"], &gpu["processes"], &gpu["gpus"]),
        (&Value::Null, &json!([]), &json!([]))
    );
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(
        (&vram["total_mb"], &vram["available_for_new_mb"]),
        (&json!(0), &json!(0))
    );
    gateway
        .register(worker_service(&gateway, "cpu", "cpu", json!({})))
        .await;
    gateway
        .register(worker_service(
            &gateway,
            "big",
            "big",
            json!({"vram_gb": 1}),
        ))
        .await;
    let job = json!({"service_type": "cpu", "payload": {"operation": "sleep", "ms": 1}});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "completed").await;
    let refused = gateway
        .post("/services/big/start", json!({}))
        .await
        .expect(409);
    assert_eq!(refused["detail"]["error"], "insufficient_vram");
}

#[tokio::test]
async fn memory_is_held_from_the_start_to_the_release_and_never_promised_twice() {
    let gateway = Gateway::start(Options::gpus("sim:24GiB,16GiB")).await;
    let gpu = gateway.get("/gpu").await.expect(200);
    assert_eq!(
        (&gpu["available"], &gpu["source"]),
        (&json!(true), &json!("simulated"))
    );
    assert_eq!(gpu["gpus"].as_array().unwrap().len(), 2);
    assert_eq!(gpu["memory_total_mb"], 24_576);
    for (name, vram_gb) in [("a", 12), ("b", 12), ("c", 12), ("d", 12)] {
        gateway
            .register(worker_service(
                &gateway,
                name,
                name,
                json!({"vram_gb": vram_gb}),
            ))
            .await;
    }
    // All at once: three fit (two on the first, one on the second), the fourth is told who holds what.
    let starts = ["a", "b", "c", "d"].map(|name| {
        let gateway = &gateway;
        async move {
            gateway
                .post(&format!("/services/{name}/start"), json!({}))
                .await
        }
    });
    let answers = futures_util::future::join_all(starts).await;
    let refused: Vec<&Value> = answers
        .iter()
        .filter(|a| a.status == 409)
        .map(|a| &a.json)
        .collect();
    assert_eq!(refused.len(), 1, "{answers:?}");
    let detail = &refused[0]["detail"];
    assert_eq!(
        (&detail["error"], &detail["required_mb"]),
        (&json!("insufficient_vram"), &json!(12_288))
    );
    assert_eq!(detail["available_mb"], 4_096);
    assert_eq!(detail["running_services"].as_array().unwrap().len(), 3);
    assert_eq!(detail["running_vram_mb"], 3 * 12_288);
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(
        (&vram["total_mb"], &vram["reserved_mb"]),
        (&json!(40_960), &json!(36_864))
    );
    assert_eq!(vram["free_mb"], 4_096);
    assert_eq!(vram["available_for_new_mb"], 4_096);
    let gpu = gateway.get("/gpu").await.expect(200);
    let mut sum = 0;
    for one in gpu["gpus"].as_array().unwrap() {
        let held: u64 = one["reservations"]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r["memory_mb"].as_u64().unwrap())
            .sum();
        assert!(held <= one["memory_total_mb"].as_u64().unwrap());
        sum += held;
    }
    assert_eq!(sum, 36_864);
    assert_eq!(gpu["processes"].as_array().unwrap().len(), 2);
    for name in ["a", "b", "c", "d"] {
        gateway
            .post(&format!("/services/{name}/stop"), json!({}))
            .await
            .expect(200);
    }
    until("all memory is free", || async {
        gateway.get("/vram").await.expect(200)["reserved_mb"] == 0
    })
    .await;
}

#[tokio::test]
async fn a_service_sees_the_gpus_that_it_was_given() {
    let gateway = Gateway::start(Options::gpus("sim:8GiB,8GiB,8GiB")).await;
    let script = "echo \"devices=$CUDA_VISIBLE_DEVICES port=$PORT\"; exec sleep 600";
    let service = |name: &str, more: Value| {
        let mut body = json!({
            "name": name, "type": name, "command": ["/bin/sh", "-c", script], "grace_seconds": 1,
            "startup_timeout_seconds": 60,
        });
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body
    };
    gateway.register(service("pair", json!({"gpus": 2}))).await;
    gateway
        .register(service("part", json!({"vram_gb": 4})))
        .await;
    gateway.register(service("none", json!({}))).await;
    let mut starting = Vec::new();
    for name in ["pair", "part", "none"] {
        let request = gateway.request(reqwest::Method::POST, &format!("/services/{name}/start"));
        starting.push(tokio::spawn(request.send()));
        gateway
            .service_becomes(name, "/scheduler_status", json!("starting"))
            .await;
    }
    let devices = |name: &'static str| {
        let gateway = &gateway;
        async move {
            let mut line = String::new();
            until("it has said what it sees", || {
                let path = format!("/services/{name}/logs");
                async move { gateway.get(&path).await.expect(200)["lines"][0].is_string() }
            })
            .await;
            let logs = gateway
                .get(&format!("/services/{name}/logs"))
                .await
                .expect(200);
            line.push_str(logs["lines"][0].as_str().unwrap());
            let part = line
                .split(' ')
                .next()
                .unwrap()
                .strip_prefix("devices=")
                .unwrap();
            part.to_owned()
        }
    };
    let (pair, part, none) = (
        devices("pair").await,
        devices("part").await,
        devices("none").await,
    );
    assert_eq!(pair.split(',').count(), 2, "{pair}");
    assert_eq!(part.split(',').count(), 1);
    assert!(
        !part.is_empty() && !pair.split(',').any(|gpu| gpu == part),
        "{pair} {part}"
    );
    assert_eq!(none, "", "a service that asked for none sees none");
    let refused = gateway
        .post("/services/register", service("all", json!({"gpus": 3})))
        .await;
    refused.expect(200);
    gateway
        .post("/services/all/start", json!({}))
        .await
        .expect(409);
    for task in starting {
        task.abort();
    }
}

#[tokio::test]
async fn it_advises_where_work_is_best_done() {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let available = || async { gateway.get("/available/s").await.expect(200) };
    let none = available().await;
    assert_eq!(
        (
            &none["available"],
            &none["recommendation"],
            &none["service"]
        ),
        (&json!(false), &json!("use_cloud"), &Value::Null)
    );
    assert_eq!(none["services_registered"], json!([]));
    assert!(none["reason"].is_string());
    let scripted = Scripted::start().await;
    gateway.register(scripted.service("s", "s")).await;
    let cold = available().await;
    assert_eq!(
        (&cold["available"], &cold["recommendation"]),
        (&json!(false), &json!("use_cloud"))
    );
    assert_eq!(cold["services_registered"], json!(["s"]));
    gateway
        .post("/services/s/start", json!({}))
        .await
        .expect(200);
    let warm = available().await;
    assert_eq!(
        (
            &warm["available"],
            &warm["recommendation"],
            &warm["service"]
        ),
        (&json!(true), &json!("use_local"), &json!("s"))
    );
    assert_eq!(
        (&warm["healthy_services"], &warm["queue_depth"]),
        (&json!(["s"]), &json!(0))
    );
    assert_eq!(warm["gpu_memory_free_mb"], 24_576);
    let run = gateway
        .start_job(json!({"service_type": "s", "payload": {"hold": true}}))
        .await;
    gateway.job_becomes(&run, "running").await;
    gateway
        .start_job(json!({"service_type": "s", "payload": {}}))
        .await;
    let busy = available().await;
    assert_eq!(
        (
            &busy["available"],
            &busy["recommendation"],
            &busy["queue_depth"]
        ),
        (&json!(true), &json!("queue"), &json!(1))
    );
    scripted.release();
    gateway.run_becomes(&run, "completed").await;
    gateway
        .register(worker_service(
            &gateway,
            "full",
            "full",
            json!({"vram_gb": 23}),
        ))
        .await;
    gateway
        .post("/services/full/start", json!({}))
        .await
        .expect(200);
    until("nothing runs", || async {
        gateway.service("s").await["active_job_id"].is_null()
    })
    .await;
    assert_eq!(
        available().await["recommendation"],
        "queue",
        "the GPU is full"
    );
}
