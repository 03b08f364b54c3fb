//! Real GPUs, as NVIDIA's library tells of them: what is listed and measured, loss and return, faults and quarantine.
//! The library is a double, except where it is said; on a machine with GPUs the inventory is held against the vendor's tool.

use serde_json::{Value, json};

use crate::support::double::{Double, Gpu, User, library};
use crate::support::wait::until;
use crate::support::{Gateway, Options, binary, worker_service};

/// A small one and a large one.
fn two() -> Double {
    let mut small = Gpu::new("GPU-small", 8_192)
        .with("util=7 temp=41 power=55250 clock=1980 memclock=2619 ecc=0");
    (small.stray, small.reserved) = (100, 300);
    let large = Gpu::new("GPU-large", 24_576);
    Double::new([small, large])
}

async fn gpus(gateway: &Gateway) -> Vec<Value> {
    let answer = gateway.get("/gpu").await.expect(200);
    answer["gpus"].as_array().unwrap().clone()
}

async fn gpu(gateway: &Gateway, uuid: &str) -> Value {
    let all = gpus(gateway).await;
    let found = all.iter().find(|gpu| gpu["uuid"] == uuid);
    found
        .unwrap_or_else(|| panic!("no {uuid} in {all:?}"))
        .clone()
}

/// Waits until a member of a GPU has that value.
async fn gpu_becomes(gateway: &Gateway, uuid: &str, member: &str, value: Value) {
    let what = format!("{member} of {uuid} is {value}");
    until(&what, || async {
        gpus(gateway)
            .await
            .iter()
            .any(|gpu| gpu["uuid"] == uuid && gpu[member] == value)
    })
    .await;
}

/// The UUIDs of those that can be used.
async fn usable(gateway: &Gateway) -> Vec<String> {
    let all = gpus(gateway).await;
    let usable = all.iter().filter(|gpu| gpu["health"] == "ok");
    usable
        .map(|gpu| gpu["uuid"].as_str().unwrap().to_owned())
        .collect()
}

async fn register(gateway: &Gateway, name: &str, vram_gb: u64) {
    let more = json!({"vram_gb": vram_gb});
    gateway
        .register(worker_service(gateway, name, name, more))
        .await;
}

async fn start(gateway: &Gateway, name: &str) {
    let path = format!("/services/{name}/start");
    gateway.post(&path, json!({})).await.expect(200);
}

/// The GPU that a service has.
async fn gpu_of(gateway: &Gateway, name: &str) -> String {
    let records = gateway.service_records(name).await;
    let started = records
        .iter()
        .rev()
        .find(|r| r["effect"]["type"] == "instance_start_requested");
    let grant = &started.expect("it was started")["effect"]["payload"]["grants"][0];
    grant["gpu"].as_str().expect("it has one").to_owned()
}

async fn pid(gateway: &Gateway, name: &str) -> u64 {
    let service = gateway.service(name).await;
    service["instance"]["pid"].as_u64().expect("a pid")
}

#[tokio::test]
async fn two_gpus_of_different_size_are_listed_and_measured() {
    let double = two();
    let gateway = double.gateway().await;
    gpu_becomes(&gateway, "GPU-small", "memory_foreign_mb", json!(400)).await;
    let answer = gateway.get("/gpu").await.expect(200);
    assert_eq!(answer["available"], true);
    assert_eq!(
        (&answer["gpu_name"], &answer["memory_total_mb"]),
        (&json!("Made GPU-small"), &json!(8_192))
    );
    // As the vendor's tool counts: what the driver keeps is neither used nor free.
    assert_eq!(
        (&answer["memory_used_mb"], &answer["memory_free_mb"]),
        (&json!(100), &json!(7_792))
    );
    assert_eq!(
        (
            &answer["gpu_utilization_pct"],
            &answer["temperature_c"],
            &answer["power_draw_w"]
        ),
        (&json!(7), &json!(41), &json!(55.3))
    );
    assert_eq!(
        (&answer["source"], &answer["unified_memory"]),
        (&json!("nvml"), &json!(false))
    );
    let small = gpu(&gateway, "GPU-small").await;
    assert_eq!(
        (&small["clock_mhz"], &small["memory_clock_mhz"]),
        (&json!(1_980), &json!(2_619))
    );
    // What a GPU does not tell is null.
    let large = gpu(&gateway, "GPU-large").await;
    assert_eq!(
        (&large["index"], &large["temperature_c"]),
        (&json!(1), &Value::Null)
    );
    let vram = gateway.get("/vram").await.expect(200);
    assert_eq!(
        (
            &vram["total_mb"],
            &vram["used_mb"],
            &vram["available_for_new_mb"]
        ),
        (&json!(32_768), &json!(100), &json!(32_368))
    );
    for (name, gb) in [("little", 4), ("big", 20)] {
        register(&gateway, name, gb).await;
        start(&gateway, name).await;
    }
    assert_eq!(gpu_of(&gateway, "little").await, "GPU-small");
    assert_eq!(gpu_of(&gateway, "big").await, "GPU-large");
    let metrics = gateway.get("/metrics").await.text;
    for line in [
        "rungate_gpu_temperature_celsius{gpu=\"GPU-small\"} 41",
        "rungate_gpu_utilization_percent{gpu=\"GPU-small\"} 7",
        "rungate_gpu_quarantined{gpu=\"GPU-large\"} 0",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn processes_are_known_by_their_marks() {
    let double = two();
    let gateway = double.gateway().await;
    register(&gateway, "ours", 4).await;
    start(&gateway, "ours").await;
    let own = pid(&gateway, "ours").await;
    let stranger = u64::from(std::process::id());
    double.edit(|machine| {
        for (pid, mib) in [(own, 3_000), (stranger, 500)] {
            let on = "GPU-small";
            machine.users.push(User { on, pid, mib });
        }
    });
    // The driver's share, what no process accounts for, and the stranger: not ours.
    gpu_becomes(&gateway, "GPU-small", "memory_foreign_mb", json!(900)).await;
    let small = gpu(&gateway, "GPU-small").await;
    assert_eq!(small["memory_used_mb"], 3_600);
    assert_eq!(small["memory_reserved_mb"], 4_096);
    let processes = small["processes"].as_array().unwrap();
    let told: Vec<_> = processes
        .iter()
        .map(|p| {
            (
                p["pid"].as_u64().unwrap(),
                p["service"].as_str(),
                p["memory_mb"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(told, [(own, Some("ours"), 3_000), (stranger, None, 500)]);
    assert!(
        processes
            .iter()
            .all(|p| p["type"] == "C" && p["name"] != "")
    );
    // More than was granted is learned, and is not ours until it is granted.
    double.edit(|machine| machine.users[0].mib = 5_000);
    gpu_becomes(&gateway, "GPU-small", "memory_foreign_mb", json!(1_804)).await;
    until("the peak is learned", || async {
        let events = gateway.service_events("ours").await;
        events.contains(&"service_peak_learned".to_owned())
    })
    .await;
    let records = gateway.service_records("ours").await;
    let learned = records
        .iter()
        .find(|r| r["effect"]["type"] == "service_peak_learned");
    assert_eq!(learned.unwrap()["effect"]["payload"]["mib"], 5_056);
}

#[tokio::test]
async fn a_gpu_that_is_lost_takes_nothing_until_it_is_back() {
    let double = two();
    let gateway = double.gateway().await;
    double.edit(|machine| machine.gpu("GPU-large").more = "lost=1".into());
    until("it is gone", || async {
        usable(&gateway).await == ["GPU-small"]
    })
    .await;
    register(&gateway, "big", 20).await;
    let job = json!({"service_type": "big", "payload": {"operation": "sleep", "ms": 1}});
    let run = gateway.start_job(job).await;
    gateway.blocked_by(&run, "vram_impossible").await;
    double.edit(|machine| machine.gpu("GPU-large").more.clear());
    gateway.run_becomes(&run, "completed").await;
    assert_eq!(gpu_of(&gateway, "big").await, "GPU-large");
    // Gone from the list is gone as well.
    double.edit(|machine| machine.gpus.retain(|gpu| gpu.uuid != "GPU-small"));
    until("it is gone", || async {
        usable(&gateway).await == ["GPU-large"]
    })
    .await;
}

#[tokio::test]
async fn a_faulty_gpu_is_quarantined_until_it_is_released() {
    let double = two();
    let gateway = double.gateway().await;
    register(&gateway, "big", 20).await;
    start(&gateway, "big").await;
    // Applications cause these.
    double.edit(|machine| {
        let codes = [13, 31, 43, 45, 68, 109];
        machine.xids.extend(codes.map(|code| ("GPU-large", code)));
    });
    double.edit(|machine| machine.xids.push(("GPU-small", 48)));
    gpu_becomes(&gateway, "GPU-small", "health", json!("quarantined")).await;
    assert_eq!(gpu(&gateway, "GPU-large").await["health"], "ok");
    double.edit(|machine| machine.xids.push(("GPU-large", 79)));
    gpu_becomes(&gateway, "GPU-large", "health", json!("quarantined")).await;
    let large = gpu(&gateway, "GPU-large").await;
    assert_eq!(large["quarantine"]["cause"], "xid");
    assert!(
        large["quarantine"]["detail"]
            .as_str()
            .unwrap()
            .contains("79")
    );
    assert!(large["quarantine"]["since"].is_string());
    assert_eq!(
        gateway.get("/vram").await.expect(200)["available_for_new_mb"],
        0
    );
    // What runs there goes on; nothing else comes.
    let job = json!({"service_type": "big", "payload": {"operation": "sleep", "ms": 1}});
    let run = gateway.start_job(job).await;
    gateway.run_becomes(&run, "completed").await;
    register(&gateway, "little", 4).await;
    let job = json!({"service_type": "little", "payload": {"operation": "sleep", "ms": 1}});
    let run = gateway.start_job(job).await;
    gateway.blocked_by(&run, "gpu_quarantined").await;
    let unknown = gateway.post("/gpu/GPU-none/release", json!({})).await;
    assert_eq!(unknown.expect(404)["code"], "gpu_not_found");
    let released = std::process::Command::new(binary())
        .args(["gpu", "release", "GPU-small"])
        .env("RUNGATE_URL", gateway.url(""))
        .env("RUNGATE_TOKEN", gateway.token())
        .output()
        .unwrap();
    assert!(released.status.success(), "{released:?}");
    gateway.run_becomes(&run, "completed").await;
    assert_eq!(gpu_of(&gateway, "little").await, "GPU-small");
    assert_eq!(gpu(&gateway, "GPU-small").await["quarantine"], Value::Null);
    // It outlives the gateway.
    let mut gateway = gateway;
    gateway.kill();
    gateway.launch().await;
    assert_eq!(gpu(&gateway, "GPU-large").await["health"], "quarantined");
    gateway
        .post("/gpu/GPU-large/release", json!({}))
        .await
        .expect(200);
    gpu_becomes(&gateway, "GPU-large", "health", json!("ok")).await;
    gateway
        .post("/gpu/GPU-large/release", json!({}))
        .await
        .expect(200);
}

#[tokio::test]
async fn errors_of_memory_that_come_up_are_a_fault_and_old_ones_are_not() {
    let double = Double::new([
        Gpu::new("GPU-a", 8_192).with("ecc=3"),
        Gpu::new("GPU-b", 8_192).with("ecc=0"),
    ]);
    let gateway = double.gateway().await;
    gpu_becomes(&gateway, "GPU-a", "ecc_uncorrected", json!(3)).await;
    double.edit(|machine| machine.gpu("GPU-b").more = "ecc=1".into());
    gpu_becomes(&gateway, "GPU-b", "health", json!("quarantined")).await;
    assert_eq!(gpu(&gateway, "GPU-b").await["quarantine"]["cause"], "ecc");
    assert_eq!(gpu(&gateway, "GPU-a").await["health"], "ok");
}

#[tokio::test]
async fn a_gpu_lost_by_an_error_is_quarantined_when_it_is_back() {
    let double = two();
    let gateway = double.gateway().await;
    until("it is sampled", || async {
        !gateway.get("/gpu/samples").await.expect(200)["samples"]
            .as_array()
            .unwrap()
            .is_empty()
    })
    .await;
    double.edit(|machine| {
        machine.gpu("GPU-large").more = "lost=1".into();
        machine.xids.push(("GPU-large", 79));
    });
    gpu_becomes(&gateway, "GPU-large", "health", json!("lost")).await;
    double.edit(|machine| machine.gpu("GPU-large").more.clear());
    gpu_becomes(&gateway, "GPU-large", "health", json!("quarantined")).await;
}

#[tokio::test]
async fn the_parts_of_a_divided_gpu_are_gpus_of_their_own() {
    let part = |uuid, total| Gpu {
        part_of: Some("GPU-whole"),
        ..Gpu::new(uuid, total)
    };
    let double = Double::new([
        Gpu::new("GPU-whole", 81_920).with("divided=1 temp=50 power=90000"),
        part("MIG-one", 19_968),
        part("MIG-two", 9_984),
        Gpu::new("GPU-plain", 8_192),
    ]);
    let gateway = double.gateway().await;
    let all = gpus(&gateway).await;
    let told: Vec<_> = all.iter().map(|g| g["uuid"].as_str().unwrap()).collect();
    assert_eq!(told, ["MIG-one", "MIG-two", "GPU-plain"]);
    gpu_becomes(&gateway, "MIG-one", "parent_uuid", json!("GPU-whole")).await;
    assert_eq!(gpu(&gateway, "MIG-two").await["temperature_c"], 50);
    register(&gateway, "big", 16).await;
    start(&gateway, "big").await;
    assert_eq!(gpu_of(&gateway, "big").await, "MIG-one");
    double.edit(|machine| machine.xids.push(("GPU-whole", 48)));
    for part in ["MIG-one", "MIG-two"] {
        gpu_becomes(&gateway, part, "health", json!("quarantined")).await;
    }
    assert_eq!(gpu(&gateway, "GPU-plain").await["health"], "ok");
}

#[tokio::test]
async fn a_gpu_without_memory_of_its_own_uses_the_systems() {
    let double = Double::new([Gpu::new("GPU-one", 0).with("unified=1 util=3")]);
    let gateway = double.gateway().await;
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib = meminfo.lines().next().unwrap().split_whitespace().nth(1);
    let total = kib.unwrap().parse::<u64>().unwrap() / 1_024;
    gpu_becomes(&gateway, "GPU-one", "unified_memory", json!(true)).await;
    let answer = gateway.get("/gpu").await.expect(200);
    assert_eq!(
        (&answer["unified_memory"], &answer["memory_total_mb"]),
        (&json!(true), &json!(total))
    );
    assert_eq!(answer["memory_used_mb"], 0);
    let free = answer["memory_free_mb"].as_u64().unwrap();
    assert!(free > 0 && free <= total);
    let (on, pid, mib) = ("GPU-one", 1, 50);
    double.edit(|machine| machine.users.push(User { on, pid, mib }));
    gpu_becomes(&gateway, "GPU-one", "memory_used_mb", json!(50)).await;
}

#[tokio::test]
async fn use_is_kept_for_minutes_in_memory_and_for_ever_in_the_ledger() {
    let double = two();
    let options = double.options().set("RUNGATE_GPU_HISTORY_MS", "1000");
    let gateway = Gateway::start(options).await;
    until("two rows are kept", || async {
        let answer = gateway.get("/gpu/history").await.expect(200);
        answer["rows"].as_array().unwrap().len() >= 2
    })
    .await;
    let answer = gateway
        .get("/api/gateway/gpu/history?limit=2")
        .await
        .expect(200);
    let [before, row] = answer["rows"].as_array().unwrap().as_slice() else {
        panic!("{answer}");
    };
    let small = row["gpus"]
        .as_array()
        .unwrap()
        .iter()
        .find(|g| g["uuid"] == "GPU-small");
    let small = small.unwrap();
    assert_eq!(
        small["memory_used_mb"],
        json!({"min": 100, "mean": 100, "max": 100})
    );
    assert_eq!(
        small["power_draw_w"],
        json!({"min": 55.3, "mean": 55.3, "max": 55.3})
    );
    assert!(small["samples"].as_u64().unwrap() >= 2);
    let instant = |row: &Value| row["until"].as_str().unwrap().replace('+', "%2B");
    let (first, last) = (instant(before), instant(row));
    let between = |after: &str, until: &str| format!("/gpu/history?after={after}&before={until}");
    let again = gateway.get(&between(&first, &last)).await.expect(200);
    assert_eq!(again["rows"], json!([row]));
    let none = gateway.get(&between(&last, &last)).await.expect(200);
    assert_eq!(none["rows"], json!([]));
    let samples = gateway.get("/gpu/samples?seconds=5").await.expect(200);
    let samples = samples["samples"].as_array().unwrap();
    assert!(samples.len() >= 5, "{}", samples.len());
    assert_eq!(samples[0]["gpus"][0]["gpu_utilization_pct"], 7);
    let verified = gateway.get("/api/gateway/ledger/verify").await.expect(200);
    assert_eq!(verified["ok"], true, "{verified}");
}

#[tokio::test]
async fn without_the_library_the_same_program_runs_and_says_why() {
    let options = Options::gpus("").set("RUNGATE_NVML_LIBRARY", "/nowhere/libnvidia-ml.so.1");
    let gateway = Gateway::start(options).await;
    let gpu = gateway.get("/gpu").await.expect(200);
    assert_eq!(gpu["available"], false);
    assert!(
        gpu["error"].as_str().unwrap().contains("nvml_library"),
        "{gpu}"
    );
    assert_eq!(
        gateway.get("/gpu/samples").await.expect(200),
        json!({"samples": []})
    );
    assert_eq!(
        gateway.get("/gpu/history").await.expect(200),
        json!({"rows": []})
    );
}

#[tokio::test]
async fn the_live_view_prints_a_frame_for_each_look() {
    let double = two();
    let gateway = double.gateway().await;
    let (on, pid, mib) = ("GPU-small", u64::from(std::process::id()), 700);
    double.edit(|machine| machine.users.push(User { on, pid, mib }));
    gpu_becomes(&gateway, "GPU-small", "memory_used_mb", json!(800)).await;
    let top = |more: &'static [&'static str]| {
        let mut command = std::process::Command::new(binary());
        command
            .args(["gpu", "top", "--interval", "0.1", "--count", "2"])
            .args(more)
            .env("RUNGATE_URL", gateway.url(""))
            .env("RUNGATE_TOKEN", gateway.token());
        let said = command.output().unwrap();
        assert!(said.status.success(), "{said:?}");
        String::from_utf8(said.stdout).unwrap()
    };
    let frames = top(&[]);
    for part in ["Made GPU-small", "41C", "55.3W", "SERVICE  PROCESS"] {
        assert_eq!(frames.matches(part).count(), 2, "{part} in {frames}");
    }
    assert!(!frames.contains('\u{1b}'), "no terminal, no escapes");
    let documents = top(&["--json"]);
    let documents: Vec<Value> = documents
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(documents.len(), 2);
    assert_eq!(documents[1]["gpus"][0]["processes"][0]["memory_mb"], 700);
}

#[test]
fn doctor_names_the_gpus() {
    let double = two();
    let mut command = std::process::Command::new(binary());
    for (name, value) in double.options().env {
        command.env(name, value);
    }
    let dir = tempfile::tempdir().unwrap();
    command
        .env("RUNGATE_GPUS", "")
        .args(["doctor", "--data-dir"])
        .arg(dir.path());
    let said = command.output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.contains("2: Made GPU-small (8192 MiB, GPU-small), Made GPU-large"),
        "{said}"
    );
}

/// On a machine with GPUs, the vendor's tool says what there is; elsewhere the double does.
#[tokio::test]
async fn the_inventory_is_the_vendors() {
    let tool = std::process::Command::new("nvidia-smi")
        .args([
            "--query-gpu=uuid,index,name,memory.total",
            "--format=csv,noheader,nounits",
        ])
        .output();
    let (options, expected, _double) = match tool {
        Ok(said) if said.status.success() => {
            let said = String::from_utf8(said.stdout).unwrap();
            (
                Options::gpus(""),
                said.lines().map(str::to_owned).collect::<Vec<_>>(),
                None,
            )
        }
        _ => {
            let double = two();
            let expected = [
                "GPU-small, 0, Made GPU-small, 8192",
                "GPU-large, 1, Made GPU-large, 24576",
            ];
            (
                double.options(),
                expected.map(str::to_owned).to_vec(),
                Some(double),
            )
        }
    };
    assert!(library().exists());
    let gateway = Gateway::start(options).await;
    let told: Vec<String> = gpus(&gateway)
        .await
        .iter()
        .map(|gpu| {
            let text = |member: &str| gpu[member].as_str().unwrap().to_owned();
            format!(
                "{}, {}, {}, {}",
                text("uuid"),
                gpu["index"],
                text("name"),
                gpu["memory_total_mb"]
            )
        })
        .collect();
    assert_eq!(told, expected);
}
