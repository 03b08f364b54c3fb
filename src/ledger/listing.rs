//! Lists of runs, newest first: by time alone, by status or by session, a page at a time.

use std::collections::BinaryHeap;
use std::ops::{Bound, ControlFlow};

use smol_str::SmolStr;
use uuid::Uuid;

use crate::domain::ids::{PlaneId, RunId};

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
    /// How many the next stretch fetches.
    stretch: usize,
    exhausted: bool,
}

/// How many ids one stretch fetches at most. Of many sources most have nothing for the page: their first stretch is one
/// id, and each is eight times the one before.
const STRETCH: usize = 128;

impl Source {
    fn next(&mut self, snapshot: &dyn Snapshot) -> Result<Option<RunId>, ReadError> {
        if self.ready.is_empty() && !self.exhausted {
            self.fetch(snapshot)?;
        }
        Ok(self.ready.pop())
    }

    fn fetch(&mut self, snapshot: &dyn Snapshot) -> Result<(), ReadError> {
        let high = [&self.prefix[..], self.before.0.as_bytes()].concat();
        let bounds = (
            Bound::Included(&self.prefix[..]),
            Bound::Excluded(&high[..]),
        );
        let (ready, stretch) = (&mut self.ready, self.stretch);
        snapshot.scan(self.table, bounds, Direction::Down, &mut |key, _| {
            ready.extend(keys::last_run(key));
            if ready.len() < stretch {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        self.exhausted = ready.len() < stretch;
        self.stretch = STRETCH.min(stretch * 8);
        ready.reverse();
        if let Some(oldest) = ready.first() {
            self.before = *oldest;
        }
        Ok(())
    }
}

/// Runs of some planes that pass the filter and are older than `before`: one look at each plane, then at those alone
/// that have runs for the page.
pub fn runs(
    snapshot: &dyn Snapshot,
    planes: &[PlaneId],
    filter: &RunFilter,
    before: Option<RunId>,
    limit: usize,
) -> Result<RunPage, ReadError> {
    let stretch = if planes.len() > 1 { 1 } else { STRETCH };
    let of_plane = |plane: &PlaneId| sources(*plane, filter, before, stretch);
    let mut sources: Vec<Source> = planes.iter().flat_map(of_plane).collect();
    let mut newest = BinaryHeap::with_capacity(sources.len());
    for (index, source) in sources.iter_mut().enumerate() {
        let run = source.next(snapshot)?;
        newest.extend(run.map(|run| (run, source.plane, index)));
    }
    let mut page = RunPage::default();
    let mut last = None;
    for _ in 0..MAX_EXAMINED {
        let Some((run, plane, index)) = newest.pop() else {
            page.next = None;
            return Ok(page);
        };
        if page.items.len() >= limit {
            return Ok(page);
        }
        let next = sources[index].next(snapshot)?;
        newest.extend(next.map(|run| (run, plane, index)));
        // Two sources of a plane may have the same run.
        if last.replace((run, plane)) == Some((run, plane)) {
            continue;
        }
        page.next = Some(run);
        if let Some(summary) = read::run(snapshot, plane, run)?.filter(|run| filter.accepts(run)) {
            page.items.push(summary);
        }
    }
    Ok(page)
}

fn sources(
    plane: PlaneId,
    filter: &RunFilter,
    before: Option<RunId>,
    stretch: usize,
) -> Vec<Source> {
    let highest = RunId(Uuid::max());
    let before = before.unwrap_or(highest);
    let source = |table, prefix: &[u8]| Source {
        plane,
        table,
        prefix: prefix.to_vec(),
        ready: Vec::new(),
        before,
        stretch,
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
            if run < before {
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

/// How many runs stand in each status, over all planes. Goes through all of them.
pub fn count_by_status(snapshot: &dyn Snapshot) -> Result<Vec<(RunStatus, u64)>, ReadError> {
    let mut counts = [0u64; RunStatus::ALL.len()];
    read::walk(snapshot, Table::RunsByStatus, &[], |key, _| {
        if let Some(count) = key.get(4).and_then(|n| counts.get_mut(usize::from(*n))) {
            *count += 1;
        }
        Ok::<_, ReadError>(ControlFlow::Continue(()))
    })?;
    Ok(RunStatus::ALL.into_iter().zip(counts).collect())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;

    use super::*;
    use crate::domain::event::Event;
    use crate::domain::spec::JobSpec;
    use crate::domain::time::Timestamp;
    use crate::ledger::error::StoreError;
    use crate::ledger::projection::run::{self as projection, Place};
    use crate::ledger::record_codec::encode;
    use crate::ledger::store::{KeyBounds, Visit};

    /// The table of runs alone, which counts the rows that it shows.
    #[derive(Default)]
    struct Runs {
        rows: BTreeMap<Vec<u8>, Vec<u8>>,
        shown: Cell<usize>,
    }

    impl Snapshot for Runs {
        fn get(&self, _: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
            Ok(self.rows.get(key).cloned())
        }

        fn scan(
            &self,
            _: Table,
            bounds: KeyBounds<'_>,
            direction: Direction,
            visit: &mut Visit<'_>,
        ) -> Result<(), StoreError> {
            assert_eq!(direction, Direction::Down);
            for (key, value) in self.rows.range::<[u8], _>(bounds).rev() {
                self.shown.set(self.shown.get() + 1);
                if visit(key, value).is_break() {
                    break;
                }
            }
            Ok(())
        }

        fn len(&self, _: Table) -> Result<u64, StoreError> {
            Ok(self.rows.len() as u64)
        }

        fn disk_bytes(&self, _: Table) -> Result<u64, StoreError> {
            Ok(0)
        }
    }

    #[test]
    fn a_page_of_many_planes_reads_little_of_each() {
        let (planes, of_each, limit) = (300, 200, 50);
        let mut all = Runs::default();
        let mut newest = Vec::new();
        for n in 0..planes * of_each {
            let (plane, run) = (
                PlaneId(n % planes),
                RunId(Uuid::from_u128(u128::from(n) << 64)),
            );
            let spec = JobSpec::plain();
            let queued = Event::JobQueued {
                run,
                spec,
                session: None,
                labels: Vec::new(),
                container: None,
            };
            let place = Place {
                seq: u64::from(n) + 1,
                cursor: 1,
                plane,
                at: Timestamp(0),
                payload_len: 1,
            };
            let summary = projection::apply(None, &queued, place).unwrap();
            all.rows
                .insert(keys::run(plane, run).to_vec(), encode(&summary));
            newest.push(run);
        }
        newest.reverse();
        let planes: Vec<PlaneId> = (0..planes).map(PlaneId).collect();
        let mut before = None;
        for wanted in newest.chunks(limit).take(9) {
            all.shown.set(0);
            let page = runs(&all, &planes, &RunFilter::default(), before, limit).unwrap();
            assert!(
                page.items
                    .iter()
                    .map(|run| run.run)
                    .eq(wanted.iter().copied())
            );
            assert!(
                all.shown.get() < 2 * planes.len() + 10 * limit,
                "{}",
                all.shown.get()
            );
            before = page.next;
        }
    }
}
