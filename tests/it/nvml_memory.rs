//! GPU memory told truly: strangers' memory is not given away, what is reserved stays so until it is seen free, and who
//! had too little gets more the next time.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::double::{Double, Gpu, User};
use crate::support::wait::until;
use crate::support::{Gateway, binary, worker_service};

const ON: &str = "GPU-one";

fn one() -> Double {
    Double::new([Gpu::new(ON, 16_384)])
}

async fn gpu(gateway: &Gateway) -> Value {
    let answer = gateway.get("/gpu").await.expect(200);
    answer["gpus"][0].clone()
}

async fn gpu_becomes(gateway: &Gateway, member: &str, value: Value) {
    let what = format!("{member} is {value}");
    until(&what, || async { gpu(gateway).await[member] == value }).await;
}

async fn register(gateway: &Gateway, name: &str, more: Value) {
    gateway
        .register(worker_service(gateway, name, name, more))
        .await;
}

async fn start(gateway: &Gateway, name: &str) -> u64 {
    let path = format!("/services/{name}/start");
    gateway.post(&path, json!({})).await.expect(200);
    let service = gateway.service(name).await;
    service["instance"]["pid"].as_u64().expect("a pid")
}

fn sleep(service_type: &str) -> Value {
    json!({"service_type": service_type, "payload": {"operation": "sleep", "ms": 1}})
}

#[tokio::test]
async fn strangers_memory_refuses_room_and_freed_room_is_used() {
    let double = one();
    let gateway = double.gateway().await;
    register(&gateway, "ours", json!({"vram_gb": 12})).await;
    let stranger = u64::from(std::process::id());
    double.edit(|machine| {
        let (on, pid, mib) = (ON, stranger, 8_192);
        machine.users.push(User { on, pid, mib });
    });
    gpu_becomes(&gateway, "memory_foreign_mb", json!(8_192)).await;
    let refused = gateway.post("/services/ours/start", json!({})).await;
    let refused = refused.expect(409);
    assert_eq!(refused["detail"]["error"], "insufficient_vram");
    assert_eq!(refused["detail"]["available_mb"], 8_192);
    let run = gateway.start_job(sleep("ours")).await;
    gateway.blocked_by(&run, "vram_impossible").await;
    double.edit(|machine| machine.users.clear());
    gateway.run_becomes(&run, "completed").await;
    assert_eq!(gpu(&gateway).await["memory_reserved_mb"], 12_288);
}

#[tokio::test]
async fn a_reservation_ends_when_the_memory_is_seen_free() {
    let double = one();
    let gateway = double.gateway().await;
    register(&gateway, "ours", json!({"vram_gb": 12})).await;
    register(&gateway, "next", json!({"vram_gb": 12})).await;
    let pid = start(&gateway, "ours").await;
    double.edit(|machine| {
        let (on, mib) = (ON, 10_000);
        machine.users.push(User { on, pid, mib });
    });
    gpu_becomes(&gateway, "memory_used_mb", json!(10_000)).await;
    let stopping = gateway.request(reqwest::Method::POST, "/services/ours/stop");
    let stopping = tokio::spawn(stopping.send());
    let ended = || async {
        let events = gateway.service_events("ours").await;
        events.contains(&"instance_exited".to_owned())
    };
    until("it has ended", ended).await;
    let run = gateway.start_job(sleep("next")).await;
    // Its process is gone, and the driver still lists it; then memory that nobody accounts for.
    for stray in [false, true] {
        double.edit(|machine| {
            if stray {
                machine.users.clear();
                machine.gpu(ON).stray = 10_000;
            }
        });
        tokio::time::sleep(Duration::from_millis(500)).await;
        let events = gateway.service_events("ours").await;
        assert!(
            !events.contains(&"instance_released".to_owned()),
            "{events:?}"
        );
        assert_eq!(gpu(&gateway).await["memory_reserved_mb"], 12_288);
        assert_eq!(gateway.run(&run).await["job"]["state"], "queued");
    }
    double.edit(|machine| machine.gpu(ON).stray = 0);
    gateway.run_becomes(&run, "completed").await;
    assert_eq!(gpu(&gateway).await["health"], "ok");
    assert_eq!(stopping.await.unwrap().unwrap().status().as_u16(), 200);
}

#[tokio::test]
async fn a_release_does_not_wait_until_the_next_sample_is_due() {
    let double = one();
    let options = double.options().set("RUNGATE_GPU_SAMPLE_MS", "30000");
    let gateway = Gateway::start(options).await;
    register(&gateway, "ours", json!({"vram_gb": 12})).await;
    start(&gateway, "ours").await;
    let began = std::time::Instant::now();
    gateway
        .post("/services/ours/stop", json!({}))
        .await
        .expect(200);
    assert_eq!(gpu(&gateway).await["memory_reserved_mb"], 0);
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn memory_that_is_never_seen_free_quarantines_the_gpu() {
    let double = one();
    let options = double.options().set("RUNGATE_GPU_RELEASE_WAIT_MS", "1000");
    let gateway = Gateway::start(options).await;
    register(&gateway, "ours", json!({"vram_gb": 6})).await;
    register(&gateway, "next", json!({"vram_gb": 6})).await;
    let pid = start(&gateway, "ours").await;
    double.edit(|machine| {
        let (on, mib) = (ON, 5_000);
        machine.users.push(User { on, pid, mib });
    });
    gpu_becomes(&gateway, "memory_used_mb", json!(5_000)).await;
    gateway
        .post("/services/ours/stop", json!({}))
        .await
        .expect(200);
    let events = gateway.service_events("ours").await;
    assert_eq!(events.last().unwrap(), "instance_released");
    let page = gateway
        .get("/api/gateway/ledger?limit=2000")
        .await
        .expect(200);
    let names: Vec<&str> = page["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["effect"]["type"].as_str().unwrap())
        .collect();
    let at = |name| names.iter().position(|found| *found == name).unwrap();
    assert!(
        at("gpu_quarantined") < at("instance_released"),
        "nothing is started in between"
    );
    let one = gpu(&gateway).await;
    assert_eq!(one["health"], "quarantined");
    assert_eq!(one["quarantine"]["cause"], "memory_held");
    assert!(
        one["quarantine"]["detail"]
            .as_str()
            .unwrap()
            .contains("5000 MiB"),
        "{one}"
    );
    let run = gateway.start_job(sleep("next")).await;
    gateway.blocked_by(&run, "gpu_quarantined").await;
    double.edit(|machine| machine.users.clear());
    gateway
        .post(&format!("/gpu/{ON}/release"), json!({}))
        .await
        .expect(200);
    gateway.run_becomes(&run, "completed").await;
}

#[tokio::test]
async fn a_job_that_had_too_little_memory_raises_the_need() {
    let double = one();
    let gateway = double.gateway().await;
    let server = "import http.server\nclass H(http.server.BaseHTTPRequestHandler):\n  def do_GET(self):\n    self.send_response(200); self.end_headers()\n  def do_POST(self):\n    body=b'{\"code\": \"out_of_memory\"}'\n    self.send_response(500); self.send_header('content-length', str(len(body))); self.end_headers(); self.wfile.write(body)\n  def log_message(self, *a): pass\nimport os\nhttp.server.HTTPServer(('127.0.0.1', int(os.environ['PORT'])), H).serve_forever()";
    let more = json!({"vram_gb": 4, "command": ["python3", "-c", server]});
    register(&gateway, "ours", more).await;
    let run = gateway
        .start_job(json!({"service_type": "ours", "payload": {}, "max_attempts": 2}))
        .await;
    gateway.run_becomes(&run, "failed").await;
    let failed = gateway.recorded(&run, "job_attempt_failed").await;
    assert_eq!(failed["effect"]["payload"]["code"], "out_of_memory");
    // Once for an instance, however many of its jobs fail: 4096 and a quarter.
    let records = gateway.service_records("ours").await;
    let raised: Vec<&Value> = records
        .iter()
        .filter(|r| r["effect"]["type"] == "service_need_raised")
        .map(|r| &r["effect"]["payload"]["mib"])
        .collect();
    assert_eq!(raised, [&json!(5_120)]);
    assert_eq!(gpu(&gateway).await["memory_reserved_mb"], 4_096);
    gateway
        .post("/services/ours/restart", json!({}))
        .await
        .expect(200);
    gpu_becomes(&gateway, "memory_reserved_mb", json!(5_120)).await;
}

#[tokio::test]
async fn a_death_for_want_of_memory_raises_the_need_up_to_the_largest_gpu() {
    let double = one();
    let options = double
        .options()
        .set("RUNGATE_RESTART_BASE_MS", "50")
        .set("RUNGATE_RESTART_MAX_MS", "100");
    let gateway = Gateway::start(options).await;
    // It dies after each start, and says why; when it has all there is, it lives.
    let script = format!(
        "if [ \"$RUNGATE_GENERATION\" -lt 3 ]; then echo 'torch.OutOfMemoryError: CUDA out of memory.'; exit 1; fi; exec {} worker",
        binary().display()
    );
    let more = json!({"vram_gb": 12, "command": ["/bin/sh", "-c", script]});
    register(&gateway, "ours", more).await;
    let run = gateway.start_job(sleep("ours")).await;
    gateway.run_becomes(&run, "completed").await;
    let records = gateway.service_records("ours").await;
    let raised: Vec<&Value> = records
        .iter()
        .filter(|r| r["effect"]["type"] == "service_need_raised")
        .map(|r| &r["effect"]["payload"]["mib"])
        .collect();
    assert_eq!(raised, [&json!(15_360), &json!(16_384)]);
    assert_eq!(gpu(&gateway).await["memory_reserved_mb"], 16_384);
}

/// Takes 8 GiB of the GPU by CUDA's driver interface, says so, and waits.
const HOLDER: &str = "
import ctypes, sys, time
cuda = ctypes.CDLL('libcuda.so.1')
def ok(result):
    if result: sys.exit(f'CUDA error {result}')
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
ok(cuda.cuInit(0))
ok(cuda.cuDeviceGet(ctypes.byref(device), 0))
ok(cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device))
ok(cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(8 << 30)))
print('held', flush=True)
time.sleep(600)
";

const HELD_MIB: u64 = 8_192;

/// Who holds memory of the GPU: a process on a machine that has one, an entry of the double elsewhere.
enum Holder<'a> {
    Process(std::process::Child),
    Entry(&'a Double),
}

impl Holder<'_> {
    /// Has it once this returns.
    fn take(double: Option<&Double>) -> Holder<'_> {
        use std::io::BufRead;
        if let Some(double) = double {
            double.edit(|machine| machine.gpu(ON).stray = HELD_MIB);
            return Holder::Entry(double);
        }
        let mut child = std::process::Command::new("python3")
            .args(["-c", HOLDER])
            .env("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let output = child.stdout.take().expect("it is piped");
        let read = std::io::BufReader::new(output).read_line(&mut said);
        assert_eq!((read.unwrap(), said.trim()), (5, "held"));
        Holder::Process(child)
    }

    fn give_back(self) {
        match self {
            Holder::Process(mut child) => {
                child.kill().unwrap();
                child.wait().unwrap();
            }
            Holder::Entry(double) => double.edit(|machine| machine.gpu(ON).stray = 0),
        }
    }
}

/// On a machine with one GPU it is done to that, which nobody else may use meanwhile.
#[tokio::test]
async fn eight_gib_are_seen_within_a_second_and_a_half_refused_and_used_when_they_are_free() {
    let tool = std::process::Command::new("nvidia-smi").arg("-L").output();
    let is_real = tool.is_ok_and(|said| {
        said.status.success() && String::from_utf8_lossy(&said.stdout).lines().count() == 1
    });
    let double = (!is_real).then(one);
    let options = match &double {
        Some(double) => double.options().set("RUNGATE_GPU_SAMPLE_MS", "1000"),
        None => crate::support::Options::gpus(""),
    };
    let gateway = Gateway::start(options).await;
    until("it is measured", || async {
        gpu(&gateway).await["sampled_at"].is_string()
    })
    .await;
    let number = |gpu: &Value, member: &str| gpu[member].as_u64().expect("a number");
    let before = gpu(&gateway).await;
    let uuid = before["uuid"].as_str().expect("a uuid").to_owned();
    let free_gib = number(&before, "memory_free_mb") / 1_024;
    assert!(free_gib >= 12, "somebody else uses it: {before}");
    let wants = json!({"vram_gb": free_gib - 4});
    register(&gateway, "large", wants).await;
    let began = std::time::Instant::now();
    let holder = Holder::take(double.as_ref());
    let held = std::time::Instant::now();
    let foreign = number(&before, "memory_foreign_mb");
    until("it is seen", || async {
        number(&gpu(&gateway).await, "memory_foreign_mb") >= foreign + HELD_MIB
    })
    .await;
    let took = held.elapsed();
    eprintln!(
        "8 GiB on {uuid}: held after {:?}, seen {took:?} later",
        held - began
    );
    assert!(took < Duration::from_millis(1_500), "{took:?}");
    let refused = gateway.post("/services/large/start", json!({})).await;
    assert_eq!(refused.expect(409)["detail"]["error"], "insufficient_vram");
    holder.give_back();
    let what = "there is room for it again";
    until(what, || async {
        let vram = gateway.get("/vram").await.expect(200);
        number(&vram, "available_for_new_mb") >= (free_gib - 4) * 1_024
    })
    .await;
    start(&gateway, "large").await;
}
