//! Starts and restarts that a stop calls off, while nobody looks: the executor's part is played here.

use super::people::nobody;
use super::*;
use crate::domain::event::Exit;
use crate::domain::ids::{Generation, ServiceName};

impl Gateway {
    /// Commands, one commit each, while nothing else of this thread's runtime gets a turn.
    fn at_one_go(&self, commands: Vec<Command>) {
        let handle = self.handle.clone();
        let submit = async move {
            for command in commands {
                handle.submit(nobody(), command).await.unwrap();
            }
        };
        let elsewhere = std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            runtime.unwrap().block_on(submit);
        });
        elsewhere.join().unwrap();
    }

    async fn phase_becomes(&self, wanted: Option<&str>) {
        let reached = async {
            loop {
                let view = self.ledger.service("w").unwrap().unwrap();
                let phase = view.instance.map(|instance| json!(instance.phase));
                if phase == wanted.map(Value::from) {
                    break;
                }
                tokio::task::yield_now().await;
            }
        };
        let reached = tokio::time::timeout(Duration::from_secs(30), reached).await;
        reached.unwrap_or_else(|_| panic!("it is not {wanted:?}"));
    }
}

fn service() -> ServiceName {
    ServiceName::from("w")
}

/// What ends the first instance for good: somebody stops it, and it is gone.
fn stopped() -> Vec<Command> {
    let generation = Generation(1);
    vec![
        Command::StopService {
            service: service(),
            drain: false,
        },
        Command::InstanceExited {
            service: service(),
            generation,
            exit: Exit::Code(0),
        },
        Command::InstanceReleased {
            service: service(),
            generation,
        },
    ]
}

/// A gateway with a service, and the answer to a start of it that is under way.
async fn starting() -> (std::sync::Arc<Gateway>, tokio::task::JoinHandle<Answer>) {
    let gateway = std::sync::Arc::new(gateway());
    gateway.has_begun().await;
    let spec = json!({"name": "w", "type": "w", "port": 0, "command": ["/bin/true"]});
    let registered = gateway.post("/services/register", spec).await;
    assert_eq!(registered.status, 200, "{}", registered.json);
    let starter = gateway.clone();
    let start = async move { starter.post("/services/w/start", json!({})).await };
    let start = tokio::spawn(start);
    gateway.phase_becomes(Some("starting")).await;
    (gateway, start)
}

async fn failed(asked: tokio::task::JoinHandle<Answer>) {
    let answer = tokio::time::timeout(Duration::from_secs(30), asked).await;
    let answer = answer.expect("it is told that it was stopped").unwrap();
    let told = (answer.status.as_u16(), &answer.json["code"]);
    assert_eq!(told, (502, &json!("start_failed")), "{}", answer.json);
}

/// It waited for two minutes for an instance that had come and gone.
#[tokio::test]
async fn a_start_is_told_of_a_stop_that_it_did_not_see() {
    let (gateway, start) = starting().await;
    gateway.at_one_go(stopped());
    failed(start).await;
}

/// The same, for an instance that never came.
#[tokio::test]
async fn a_restart_is_told_of_a_stop_that_calls_it_off() {
    let (gateway, start) = starting().await;
    let restarter = gateway.clone();
    let restart = async move { restarter.post("/services/w/restart", json!({})).await };
    let restart = tokio::spawn(restart);
    gateway.phase_becomes(Some("stopping")).await;
    gateway.at_one_go(stopped());
    failed(restart).await;
    failed(start).await;
}

/// Without a stop the next instance comes, at once or when there is room, and is what the restart answers for.
#[tokio::test]
async fn a_restart_waits_for_the_instance_that_comes() {
    let (gateway, start) = starting().await;
    let restarter = gateway.clone();
    let restart = async move { restarter.post("/services/w/restart", json!({})).await };
    let restart = tokio::spawn(restart);
    gateway.phase_becomes(Some("stopping")).await;
    let mut gone = stopped();
    gone.remove(0);
    gateway.at_one_go(gone);
    gateway.phase_becomes(Some("starting")).await;
    gateway.at_one_go(vec![Command::InstanceHealthy {
        service: service(),
        generation: Generation(2),
    }]);
    let answer = restart.await.unwrap();
    let told = (answer.status.as_u16(), &answer.json["status"]);
    assert_eq!(told, (200, &json!("started")), "{}", answer.json);
    assert_eq!(answer.json["previous_status"], "running");
    start.abort();
}
