//! What the server takes: doing nothing, and with very many waiting jobs; and how soon it is up with them.

use crate::report::{Bar, Figure};
use crate::scale::Scale;
use crate::servers::Process;
use crate::{Context, Failure, child};

const GROUP: &str = "memory of the server";
const MIB: f64 = 1_048_576.0;

/// All figures of this file.
pub fn measure(context: &mut Context, scale: &Scale) -> Result<(), Failure> {
    let idle = Process::gateway(&context.dir("idle")?)?;
    settle();
    let (resident, _) = idle.memory()?;
    drop(idle);
    let figure = Figure::of(GROUP, "idle", "MiB", &[resident as f64 / MIB]);
    context.add(figure.bar(Bar::AtMost(40.0)));

    let waiting = scale.queue_sizes.1;
    let dir = context.dir("queue")?;
    child::run_part("queue", &dir, &[waiting as u64], false)?;
    let busy = Process::gateway(&dir)?;
    settle();
    let (resident, most) = busy.memory()?;
    let name = format!("{waiting} waiting jobs");
    let figure = Figure::of(GROUP, name, "MiB", &[resident as f64 / MIB]);
    context.add(figure.bar(Bar::AtMost(1_536.0)));
    let peak = "the same, most since its start";
    context.add(Figure::of(GROUP, peak, "MiB", &[most as f64 / MIB]).bar(Bar::AtMost(1_536.0)));
    let up = "until it answers with them";
    context.add(Figure::of(GROUP, up, "s", &[busy.started_in.as_secs_f64()]));
    drop(busy);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

/// Long enough for what a start leaves behind to be handed back.
fn settle() {
    std::thread::sleep(std::time::Duration::from_secs(2));
}
