//! Stops processes that bear our ledger's mark and that nobody answers for: what a crash between a spawn and
//! its record, or a lost instance, left behind. Another gateway's processes are never touched.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;

use super::procfs::{self, Marked};
use super::{Shared, blocking, process};
use crate::domain::ids::{Generation, ServiceName};

/// Between TERM and KILL; an orphan's own grace period is not known any more.
const GRACE: Duration = Duration::from_secs(10);
/// Pauses between looks at whether they are gone: first and longest.
const LOOK_FIRST: Duration = Duration::from_millis(50);
const LOOK_MAX: Duration = Duration::from_secs(2);

/// TERM, up to ten seconds of grace, KILL until none is left.
pub(super) async fn sweep(shared: Arc<Shared>, live: Vec<(ServiceName, Generation)>) {
    let live: Arc<HashSet<_>> = Arc::new(live.into_iter().collect());
    let orphans = look(&shared, &live).await;
    if orphans.is_empty() {
        return;
    }
    for orphan in &orphans {
        tracing::warn!(
            service.name = %orphan.mark.service,
            instance.generation = orphan.mark.generation.0,
            process.pid = orphan.pid,
            "stopping an orphaned process"
        );
    }
    send(orphans, Signal::TERM).await;
    let deadline = Instant::now() + GRACE;
    let mut pause = LOOK_FIRST;
    loop {
        let left = look(&shared, &live).await;
        if left.is_empty() {
            return;
        }
        if Instant::now() >= deadline {
            send(left, Signal::KILL).await;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_MAX);
    }
}

async fn look(shared: &Arc<Shared>, live: &Arc<HashSet<(ServiceName, Generation)>>) -> Vec<Marked> {
    let (shared, live) = (shared.clone(), live.clone());
    blocking(move || {
        let mut marked = procfs::marked_by(shared.ledger);
        marked.retain(|process| {
            let mark = &process.mark;
            !live.contains(&(mark.service.clone(), mark.generation))
                && !shared.table.holds(&mark.service, mark.generation)
        });
        marked
    })
    .await
}

/// To each marked process, and to the group of each marked leader, whose members may have wiped their
/// environment; to nobody twice, for some take a second TERM as an order to drop everything.
async fn send(orphans: Vec<Marked>, signal: Signal) {
    blocking(move || {
        let mut reached = HashSet::new();
        for orphan in &orphans {
            let leads = orphan.stat.process_group == orphan.pid;
            let group = if leads {
                procfs::group_members(orphan.pid)
            } else {
                Vec::new()
            };
            for pid in std::iter::once(orphan.pid).chain(group) {
                if reached.insert(pid) {
                    process::signal_marked(pid, &orphan.mark, orphan.stat.process_group, signal);
                }
            }
        }
    })
    .await;
}
