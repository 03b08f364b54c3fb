//! Jobs with containers of their own, on a real engine: what they come to, what they say, and what their attempts hand on.

use serde_json::{Value, json};

use super::engine::{BUSYBOX, Docked, PYTHON, docker, options, until_engine};
use crate::support::assert_in_order;
use crate::support::sse::EventSource;
use crate::support::wait::until;

/// A job of a shell script.
fn script(script: &str, more: Value) -> Value {
    let mut container = json!({"image": BUSYBOX, "args": ["sh", "-c", script], "grace_seconds": 5});
    for (member, value) in more.as_object().unwrap() {
        container[member] = value.clone();
    }
    json!({"container": container, "max_attempts": 1})
}

/// Works until it is asked to save its work; the next attempt goes on from there.
const SAVES: &str = "
    if [ -f $RUNGATE_CHECKPOINT_DIR/step ]; then echo went on from $(cat $RUNGATE_CHECKPOINT_DIR/step); exit 0; fi
    trap 'echo 41 >$RUNGATE_CHECKPOINT_DIR/step; echo saved; exit 0' USR1
    echo at work
    while :; do sleep 0.1; done";

impl Docked {
    async fn output(&self, run: &str) -> Vec<String> {
        let path = format!("/api/gateway/runs/{run}/output");
        let told = self.get(&path).await.expect(200);
        serde_json::from_value(told["lines"].clone()).unwrap()
    }

    async fn says(&self, run: &str, line: &str) {
        until("it says so", || async {
            self.output(run).await.iter().any(|said| said == line)
        })
        .await;
    }

    /// A user's token.
    async fn user(&self, name: &str) -> String {
        let user = json!({"user_id": name});
        let made = self
            .post("/api/gateway/admin/users", user)
            .await
            .expect(200);
        made["token"].as_str().expect("shown once").to_owned()
    }

    async fn nothing_is_left(&self) {
        self.no_containers_are_left().await;
        until("no memory is reserved", || async {
            self.get("/vram").await.expect(200)["reserved_mb"] == 0
        })
        .await;
    }
}

/// The next line of a followed output.
async fn said(lines: &mut EventSource) -> String {
    let event = lines.next().await.expect("a line");
    let data: Value = serde_json::from_str(&event.data).unwrap();
    let line = data["line"].as_str();
    line.unwrap_or_else(|| panic!("no line: {event:?}"))
        .to_owned()
}

#[tokio::test]
async fn a_job_runs_to_its_end_and_its_output_is_followed_and_kept() {
    let gateway = Docked::start(options()).await;
    let run = gateway
        .start_job(script(
            "echo one; echo $RUNGATE_RUN_ID $RUNGATE_ATTEMPT $A; sleep 1; echo three",
            json!({"env": {"A": "b", "RUNGATE_ATTEMPT": "9"}, "vram_gb": 1, "memory": "32m"}),
        ))
        .await;
    let path = format!("/api/gateway/runs/{run}/output");
    let follow = gateway.request(reqwest::Method::GET, &format!("{path}?follow=true"));
    let mut lines = EventSource::open(follow, "").await;
    assert_eq!(said(&mut lines).await, "one");
    let state = gateway.run(&run).await;
    assert_eq!(state["status"], "running", "it is followed while it runs");
    assert_eq!(said(&mut lines).await, format!("{run} 1 b"));
    assert_eq!(said(&mut lines).await, "three");
    assert_eq!(lines.next().await.unwrap().name, "done");

    let told = gateway.run_becomes(&run, "completed").await;
    let other = gateway.user("other").await;
    for path in [
        path.clone(),
        format!("{path}/content"),
        format!("{path}?follow=true"),
    ] {
        let asked = gateway
            .bare(reqwest::Method::GET, &path)
            .bearer_auth(&other);
        assert_eq!(asked.send().await.unwrap().status(), 404, "{path}");
    }
    assert_eq!(told["output"], json!({"exit_code": 0}));
    assert_eq!(told["workflow_id"], "job:container");
    assert_eq!(
        (&told["job"]["service"], &told["job"]["service_name"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(gateway.output(&run).await.len(), 3);
    let content = gateway
        .request(reqwest::Method::GET, &format!("{path}/content"))
        .send()
        .await
        .unwrap();
    assert_eq!(
        content.headers()["content-type"],
        "text/plain; charset=utf-8"
    );
    assert_eq!(
        content.text().await.unwrap(),
        format!("one\n{run} 1 b\nthree\n")
    );
    assert_in_order(
        &gateway.events(&run).await,
        &["job_queued", "job_dispatched", "job_completed"],
    );
    gateway.nothing_is_left().await;
    let services = gateway.get("/services").await.expect(200);
    assert_eq!(services["services"], json!({}), "its service is nobody's");

    gateway
        .post(&format!("/api/gateway/runs/{run}/purge"), json!({}))
        .await
        .expect(200);
    gateway.get(&path).await.expect(410);
}

#[tokio::test]
async fn exit_code_signal_memory_and_time_are_told_apart() {
    let gateway = Docked::start(options()).await;
    let eats = "x = []\nwhile True: x.append(bytearray(1 << 20))";
    let cases = [
        (
            script("echo no; exit 7", json!({})),
            "exit_code",
            "exit code 7",
        ),
        (
            script("kill -9 $$", json!({})),
            "signal",
            "killed by signal 9",
        ),
        (
            json!({"container": {"image": PYTHON, "args": ["python3", "-c", eats], "memory": "32m"}, "max_attempts": 1}),
            "memory_limit",
            "killed, as it had used up its memory limit",
        ),
        (
            script(
                "trap 'exit 0' TERM; while :; do sleep 0.1; done",
                json!({"timeout_seconds": 1}),
            ),
            "timeout",
            "not over within 1000 ms",
        ),
        (
            script("true", json!({"user": "nobody-there"})),
            "not_started",
            "user",
        ),
        (
            json!({"container": {"image": "absent:1"}, "max_attempts": 1}),
            "not_started",
            "there is no image 'absent:1'",
        ),
    ];
    for (job, code, error) in cases {
        let run = gateway.start_job(job).await;
        let told = gateway.run_becomes(&run, "failed").await;
        assert_eq!(told["job"]["error_code"], code, "{told}");
        assert!(told["error"].as_str().unwrap().contains(error), "{told}");
    }
    gateway.nothing_is_left().await;
}

#[tokio::test]
async fn a_preempted_job_saves_its_work_and_goes_on_from_it() {
    let gateway = Docked::start(options().set("RUNGATE_MIN_RUNTIME_MS", "0")).await;
    let mut slow = script(
        SAVES,
        json!({"gpus": 2, "checkpoint_signal": "SIGUSR1", "checkpoint_seconds": 10, "user": "65534:65534"}),
    );
    slow["priority"] = json!(5);
    let slow = gateway.start_job(slow).await;
    gateway.says(&slow, "at work").await;
    let mut urgent = script("echo urgent", json!({"vram_gb": 4}));
    urgent["priority"] = json!(1);
    let urgent = gateway.start_job(urgent).await;
    gateway.run_becomes(&urgent, "completed").await;
    let told = gateway.run_becomes(&slow, "completed").await;
    assert_eq!(
        (&told["job"]["attempt"], &told["job"]["preempt_count"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(
        gateway.output(&slow).await,
        ["at work", "saved", "went on from 41"]
    );
    let records = gateway.records(&slow).await;
    let step = records
        .iter()
        .find(|record| record["effect"]["type"] == "ladder_step_ended");
    let step = &step.expect("a step")["effect"]["payload"];
    assert_eq!(
        (&step["step"], &step["outcome"]),
        (&json!("checkpoint"), &json!("done"))
    );
    gateway.nothing_is_left().await;
}

#[tokio::test]
async fn jobs_outlive_the_gateway_and_are_done_once() {
    let mut gateway = Docked::start(options()).await;
    let long = script("echo begun; sleep 4; echo over", json!({"vram_gb": 1}));
    let brief = script("echo begun; sleep 1; echo over", json!({"vram_gb": 1}));
    let long = gateway.start_job(long).await;
    let brief = gateway.start_job(brief).await;
    let stopped = gateway
        .start_job(script(
            "trap '' TERM; echo begun; while :; do sleep 0.1; done",
            json!({}),
        ))
        .await;
    for run in [&long, &brief, &stopped] {
        gateway.says(run, "begun").await;
    }
    gateway.command("c", &stopped, "cancel", json!({})).await;
    gateway.job_becomes(&stopped, "stopping").await;
    gateway.gateway.kill();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    gateway.gateway.launch().await;
    let state = gateway.run(&long).await;
    assert_eq!(state["status"], "running", "it goes on");
    for run in [&long, &brief] {
        let told = gateway.run_becomes(run, "completed").await;
        assert_eq!(told["job"]["attempt"], 1);
        assert_eq!(gateway.output(run).await, ["begun", "over"]);
    }
    gateway.run_becomes(&stopped, "cancelled").await;
    gateway.nothing_is_left().await;
}

#[tokio::test]
async fn what_a_job_leaves_behind_is_kept_for_as_long_as_it_may_be_needed() {
    let mut gateway = Docked::start(options()).await;
    let done = gateway.start_job(script("echo done", json!({}))).await;
    let fails = "
        if [ -f $RUNGATE_CHECKPOINT_DIR/step ]; then echo went on; exit 0; fi
        echo 1 >$RUNGATE_CHECKPOINT_DIR/step; exit 1";
    let failed = gateway.start_job(script(fails, json!({}))).await;
    gateway.run_becomes(&done, "completed").await;
    gateway.run_becomes(&failed, "failed").await;
    assert_eq!(gateway.volumes().len(), 2);

    gateway.gateway.stop().await;
    gateway.gateway.launch().await;
    until_engine("of the one that completed nothing is needed", || {
        gateway.volumes().len() == 1
    })
    .await;
    gateway.command("again", &failed, "retry", json!({})).await;
    gateway.run_becomes(&failed, "completed").await;
    assert_eq!(gateway.output(&failed).await, ["went on"]);
    assert_eq!(gateway.output(&done).await, ["done"]);

    gateway.gateway.stop().await;
    gateway.gateway.options = options().set("RUNGATE_DOCKER_JOBS_KEEP_HOURS", "0");
    gateway.gateway.launch().await;
    until("what they wrote is gone", || async {
        gateway.output(&done).await.is_empty() && gateway.output(&failed).await.is_empty()
    })
    .await;
    until_engine("no folder is left", || gateway.volumes().is_empty()).await;
}

#[tokio::test]
async fn a_container_that_is_removed_by_others_costs_an_attempt() {
    let gateway = Docked::start(options()).await;
    let mut job = script(
        "echo attempt $RUNGATE_ATTEMPT; [ $RUNGATE_ATTEMPT = 2 ] || sleep 60",
        json!({}),
    );
    job["max_attempts"] = json!(2);
    let run = gateway.start_job(job).await;
    gateway.says(&run, "attempt 1").await;
    let id = gateway.containers().pop().unwrap();
    docker(&["rm", "-f", &id]);
    let told = gateway.run_becomes(&run, "completed").await;
    assert_eq!(told["job"]["attempt"], 2);
    assert_eq!(gateway.output(&run).await, ["attempt 1", "attempt 2"]);
    gateway.nothing_is_left().await;
}

#[tokio::test]
async fn what_is_said_last_is_kept_however_much_it_is() {
    let gateway = Docked::start(options()).await;
    // More than the engine keeps of it, faster than it is read; and a line without an end.
    let much =
        "yes aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa | head -c 40000000";
    let much = gateway
        .start_job(script(&format!("{much}; echo; echo the end"), json!({})))
        .await;
    let cut = gateway
        .start_job(script(
            "echo a line; sleep 0.3; printf 'the end'",
            json!({}),
        ))
        .await;
    let path = format!("/api/gateway/runs/{cut}/output?follow=true");
    let follow = gateway.request(reqwest::Method::GET, &path);
    let mut lines = EventSource::open(follow, "").await;
    assert_eq!(said(&mut lines).await, "a line");
    assert_eq!(said(&mut lines).await, "the end");
    assert_eq!(lines.next().await.unwrap().name, "done");
    for run in [&much, &cut] {
        gateway.run_becomes(run, "completed").await;
        let lines = gateway.output(run).await;
        assert_eq!(lines.last().map(String::as_str), Some("the end"), "{run}");
    }
}

#[tokio::test]
async fn nothing_that_never_began_is_done() {
    let mut gateway = Docked::start(options()).await;
    let mut runs = Vec::new();
    for round in 0u64..4 {
        for _ in 0..4 {
            let job = script("echo began; sleep 0.3; echo over", json!({}));
            runs.push(gateway.start_job(job).await);
        }
        // While containers are made, and while some end.
        tokio::time::sleep(std::time::Duration::from_millis(60 + round * 140)).await;
        gateway.gateway.kill();
        gateway.gateway.launch().await;
    }
    for run in &runs {
        let told = gateway.run_becomes(run, "completed").await;
        assert_eq!(told["job"]["failures"], 0, "{told}");
        let events = gateway.events(run).await;
        let ends = events.iter().filter(|event| *event == "job_completed");
        assert_eq!(ends.count(), 1);
        // Whoever was killed in the instant between its start and its record begins again.
        let lines = gateway.output(run).await;
        let overs = lines.iter().filter(|line| *line == "over").count();
        assert_eq!(
            (overs, lines.last().map(String::as_str)),
            (1, Some("over")),
            "{lines:?}"
        );
    }
    gateway.nothing_is_left().await;
}

#[tokio::test]
async fn what_may_not_be_is_refused_before_it_is_queued() {
    let gateway = Docked::start(options()).await;
    let refused = [
        (json!({"image": "evil:1"}), 403, "job.container.image"),
        (
            json!({"image": BUSYBOX, "volumes": ["/:/host"]}),
            403,
            "job.container.volumes",
        ),
        (
            json!({"image": BUSYBOX, "ipc": "host"}),
            403,
            "job.container.ipc",
        ),
        (
            json!({"image": BUSYBOX, "gpu": 1}),
            422,
            "job.container.gpu",
        ),
        (json!({"image": "a b"}), 422, "job.container.image"),
        (json!({}), 422, "job.container.image"),
    ];
    for (container, status, field) in refused {
        let body = json!({"job": {"container": container}});
        let told = gateway
            .post("/api/gateway/runs/start", body.clone())
            .await
            .expect(status);
        assert_eq!(told["errors"][0]["field"], field, "{body}: {told}");
    }
    let both = json!({"job": {"container": {"image": BUSYBOX}, "payload": {}}});
    gateway
        .post("/api/gateway/runs/start", both)
        .await
        .expect(422);
    let runs = gateway.get("/api/gateway/runs").await.expect(200);
    assert_eq!(runs["items"], json!([]));
    until_engine("none was made", || gateway.containers().is_empty()).await;
}

#[tokio::test]
async fn without_an_engine_nothing_is_queued() {
    let gateway = crate::support::Gateway::start(crate::support::Options::gpus("none")).await;
    let body = json!({"job": {"container": {"image": "a"}}});
    let told = gateway.post("/api/gateway/runs/start", body).await;
    assert!(told.status == 403 || told.status == 503, "{}", told.json);
}
