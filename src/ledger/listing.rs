//! Lists of runs, newest first: by time alone, by status or by session, a page at a time.

use std::ops::{Bound, ControlFlow};

use smol_str::SmolStr;
use uuid::Uuid;

use crate::domain::ids::{PlaneId, RunId};
use crate::domain::time::Timestamp;

use super::error::ReadError;
use super::projection::run::{RunStatus, RunSummary};
use super::store::{Direction, Snapshot, Table};
use super::{keys, read};

/// Most runs that one page looks at. A filter that few runs pass then gives a short page with a `next`,
/// rather than a read without end.
const MAX_EXAMINED: usize = 10_000;

/// Which runs a list shows; the default shows all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunFilter {
    /// Any of these; empty for all.
    pub statuses: Vec<RunStatus>,
    /// The session as given at the start; a run without one belongs to the session of its own id.
    pub session: Option<SmolStr>,
    /// Created at or after, to the millisecond (run ids hold no more).
    pub created_from: Option<Timestamp>,
    /// Created before, to the millisecond.
    pub created_until: Option<Timestamp>,
    /// The type or the service that it was started for.
    pub service: Option<SmolStr>,
}

impl RunFilter {
    fn accepts(&self, run: &RunSummary) -> bool {
        let session = self
            .session
            .as_ref()
            .is_none_or(|wanted| match &run.session {
                Some(session) => session == wanted,
                None => run.run.to_string() == wanted.as_str(),
            });
        let service = self.service.as_ref().is_none_or(|wanted| {
            run.spec.service_type.as_ref() == Some(wanted) || run.service.as_ref() == Some(wanted)
        });
        let status = self.statuses.is_empty() || self.statuses.contains(&run.status);
        session && service && status
    }
}

/// A page of runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunPage {
    pub items: Vec<RunSummary>,
    /// `before` of the next page; `None` at the end. A page may be short, even empty, and have one.
    pub next: Option<RunId>,
}

/// One index's run ids, newest first, fetched a stretch at a time.
struct Source {
    plane: PlaneId,
    table: Table,
    prefix: Vec<u8>,
    /// Ids found and not yet taken, newest last.
    ready: Vec<RunId>,
    /// Everything from here on was fetched.
    before: RunId,
    from: RunId,
    exhausted: bool,
}

/// How many ids one stretch fetches.
const STRETCH: usize = 128;

impl Source {
    fn peek(&mut self, snapshot: &dyn Snapshot) -> Result<Option<RunId>, ReadError> {
        if self.ready.is_empty() && !self.exhausted {
            self.fetch(snapshot)?;
        }
        Ok(self.ready.last().copied())
    }

    fn fetch(&mut self, snapshot: &dyn Snapshot) -> Result<(), ReadError> {
        let low = [&self.prefix[..], self.from.0.as_bytes()].concat();
        let high = [&self.prefix[..], self.before.0.as_bytes()].concat();
        if low >= high {
            self.exhausted = true;
            return Ok(());
        }
        let bounds = (Bound::Included(&low[..]), Bound::Excluded(&high[..]));
        let ready = &mut self.ready;
        snapshot.scan(self.table, bounds, Direction::Down, &mut |key, _| {
            ready.extend(keys::last_run(key));
            if ready.len() < STRETCH {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        self.exhausted = ready.len() < STRETCH;
        ready.reverse();
        if let Some(oldest) = ready.first() {
            self.before = *oldest;
        }
        Ok(())
    }
}

/// Runs of some planes that pass the filter and are older than `before`.
pub fn runs(
    snapshot: &dyn Snapshot,
    planes: &[PlaneId],
    filter: &RunFilter,
    before: Option<RunId>,
    limit: usize,
) -> Result<RunPage, ReadError> {
    let of_plane = |plane: &PlaneId| sources(*plane, filter, before);
    let mut sources: Vec<Source> = planes.iter().flat_map(of_plane).collect();
    let mut page = RunPage::default();
    for _ in 0..MAX_EXAMINED {
        let mut newest: Option<(RunId, PlaneId)> = None;
        for source in &mut sources {
            let run = source.peek(snapshot)?;
            newest = newest.max(run.map(|run| (run, source.plane)));
        }
        let Some((run, plane)) = newest else {
            page.next = None;
            return Ok(page);
        };
        if page.items.len() >= limit {
            return Ok(page);
        }
        for source in &mut sources {
            if source.plane == plane && source.ready.last() == Some(&run) {
                source.ready.pop();
            }
        }
        page.next = Some(run);
        if let Some(summary) = read::run(snapshot, plane, run)?.filter(|run| filter.accepts(run)) {
            page.items.push(summary);
        }
    }
    Ok(page)
}

fn sources(plane: PlaneId, filter: &RunFilter, before: Option<RunId>) -> Vec<Source> {
    let until = filter.created_until.map(first_id_at);
    let highest = RunId(Uuid::max());
    let before = before.into_iter().chain(until).min().unwrap_or(highest);
    let from = filter.created_from.map_or(RunId(Uuid::nil()), first_id_at);
    let source = |table, prefix: &[u8]| Source {
        plane,
        table,
        prefix: prefix.to_vec(),
        ready: Vec::new(),
        before,
        from,
        exhausted: false,
    };
    if let Some(session) = &filter.session {
        let mut sources = vec![source(
            Table::RunsBySession,
            &keys::session(plane, session, highest)[..20],
        )];
        // A run without a session is found under its own id.
        if let Ok(run) = session.parse::<RunId>() {
            let mut own = source(Table::Runs, &keys::run(plane, run)[..4]);
            own.exhausted = true;
            if run < before && run >= from {
                own.ready.push(run);
            }
            sources.push(own);
        }
        return sources;
    }
    if filter.statuses.is_empty() {
        return vec![source(Table::Runs, &keys::run(plane, highest)[..4])];
    }
    let mut statuses = filter.statuses.clone();
    statuses.sort_unstable();
    statuses.dedup();
    let prefixed = |status| {
        source(
            Table::RunsByStatus,
            &keys::status(plane, status, highest)[..5],
        )
    };
    statuses.into_iter().map(prefixed).collect()
}

/// The lowest run id made at `at`: a version 7 UUID begins with 48 bits of milliseconds.
fn first_id_at(at: Timestamp) -> RunId {
    let ms = u64::try_from(at.0.div_euclid(1_000))
        .unwrap_or(0)
        .min((1 << 48) - 1);
    RunId(Uuid::from_u128(u128::from(ms) << 80))
}

/// How many runs of a plane stand in each status.
pub fn count_by_status(
    snapshot: &dyn Snapshot,
    plane: PlaneId,
) -> Result<Vec<(RunStatus, u64)>, ReadError> {
    let mut counts = [0u64; RunStatus::ALL.len()];
    let low = plane.0.to_be_bytes();
    let high = keys::status(plane, RunStatus::Cancelled, RunId(Uuid::max()));
    let bounds = (Bound::Included(&low[..]), Bound::Included(&high[..]));
    snapshot.scan(Table::RunsByStatus, bounds, Direction::Up, &mut |key, _| {
        if let Some(count) = key.get(4).and_then(|n| counts.get_mut(usize::from(*n))) {
            *count += 1;
        }
        ControlFlow::Continue(())
    })?;
    Ok(RunStatus::ALL.into_iter().zip(counts).collect())
}
