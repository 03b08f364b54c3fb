//! The audit: the records that carry the request they came of, and those of writes that left no other record.
//! Newest first, read off the ledger itself, so that there is no second copy to disagree with it.

use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use smol_str::SmolStr;

use crate::domain::audit::{AuditedWrite, Outcome, Source};
use crate::domain::event::Event;
use crate::domain::ids::{RunId, Seq};
use crate::domain::record::Record;
use crate::domain::time::Timestamp;

use super::error::ReadError;
use super::record_codec::{self, Raw};
use super::store::{Direction, Snapshot, Table};
use super::{Ledger, keys, read, view};

/// Most records that one read looks at: about a tenth of a second. A short page then has a `next`.
const MAX_EXAMINED: usize = 100_000;

/// Which writes are shown; the default shows all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditFilter {
    /// As records name it.
    pub actor: Option<SmolStr>,
    /// Whose administrators see it (`Source::tenant`).
    pub tenant: Option<SmolStr>,
    /// The route's pattern, with or without `/api/gateway`.
    pub route: Option<SmolStr>,
    pub outcome: Option<Outcome>,
    /// At or after.
    pub since: Option<Timestamp>,
    /// Before.
    pub until: Option<Timestamp>,
}

/// A write.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditEntry {
    pub seq: Seq,
    pub at: Timestamp,
    pub actor: SmolStr,
    pub request_id: Option<SmolStr>,
    pub source: Arc<Source>,
    pub status: u16,
    pub code: Option<SmolStr>,
    pub duration_us: u64,
    /// How many writes it stands for, the first of them at `since`.
    pub count: u64,
    pub since: Timestamp,
    /// What it brought about: the event's name; `None` when nothing.
    pub event: Option<String>,
    pub run: Option<RunId>,
}

/// Some writes, newest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AuditPage {
    pub items: Vec<AuditEntry>,
    /// `before` of the next page; `None` at the end. A page may be short, even empty, and have one.
    pub next: Option<Seq>,
}

impl AuditEntry {
    fn of(record: Record) -> Option<AuditEntry> {
        let Record {
            seq,
            at,
            actor,
            request_id,
            ..
        } = record;
        if let Event::WriteAudited { write } = record.event {
            let AuditedWrite {
                source,
                status,
                code,
                duration_us,
                count,
                since,
            } = write;
            return Some(AuditEntry {
                seq,
                at,
                actor,
                request_id,
                source,
                status,
                code,
                duration_us,
                count,
                since,
                event: None,
                run: None,
            });
        }
        let asked = record.asked?;
        Some(AuditEntry {
            seq,
            at,
            actor,
            request_id,
            source: asked.source,
            status: 200,
            code: None,
            duration_us: asked.duration_us,
            count: 1,
            since: at,
            run: record.event.run(),
            event: Some(view::name_and_fields(&record.event).0),
        })
    }
}

impl AuditFilter {
    fn accepts(&self, entry: &AuditEntry) -> bool {
        let tenant = self.tenant.as_ref();
        self.actor
            .as_ref()
            .is_none_or(|actor| *actor == entry.actor)
            && tenant.is_none_or(|tenant| entry.source.tenant() == Some(tenant))
            && self
                .route
                .as_ref()
                .is_none_or(|route| short(route) == short(&entry.source.route))
            && self
                .outcome
                .is_none_or(|outcome| outcome == Outcome::of(entry.status))
    }
}

fn short(route: &str) -> &str {
    route.strip_prefix("/api/gateway").unwrap_or(route)
}

impl Ledger {
    /// Writes before `before` that pass the filter, newest first.
    pub fn audit(
        &self,
        filter: &AuditFilter,
        before: Option<Seq>,
        limit: usize,
    ) -> Result<AuditPage, ReadError> {
        let snapshot = self.inner.store.snapshot()?;
        let before = match (before, filter.until) {
            (Some(before), _) => before,
            (None, Some(until)) => read::first_at(&*snapshot, self.tail(), until)?,
            (None, None) => Seq::MAX,
        };
        page(&*snapshot, filter, before, limit)
    }
}

fn page(
    snapshot: &dyn Snapshot,
    filter: &AuditFilter,
    before: Seq,
    limit: usize,
) -> Result<AuditPage, ReadError> {
    let audited = first_byte_of_audited();
    let mut found = AuditPage::default();
    let mut examined = 0usize;
    let high = keys::seq(before);
    let bounds = (Bound::Unbounded, Bound::Excluded(&high[..]));
    read::walk_range(
        snapshot,
        Table::Events,
        bounds,
        Direction::Down,
        |key, bytes| {
            let seq = keys::parse_seq(key).unwrap_or_default();
            let raw = Raw::parse(seq, bytes)?;
            // Time never runs backwards in the ledger.
            if filter.since.is_some_and(|since| raw.at < since) {
                found.next = None;
                return Ok(ControlFlow::Break(()));
            }
            if raw.has_request() || raw.event.first() == Some(&audited) {
                let entry = AuditEntry::of(raw.decode(seq)?);
                found
                    .items
                    .extend(entry.filter(|entry| filter.accepts(entry)));
            }
            examined += 1;
            found.next = (seq > 1).then_some(seq);
            let done = found.items.len() >= limit || examined >= MAX_EXAMINED;
            Ok::<_, ReadError>(match done {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })
        },
    )?;
    Ok(found)
}

/// What the bytes of an audited write begin with: postcard writes a variant's number first.
fn first_byte_of_audited() -> u8 {
    let write = AuditedWrite {
        source: Arc::default(),
        status: 0,
        code: None,
        duration_us: 0,
        count: 0,
        since: Timestamp(0),
    };
    record_codec::encode(&Event::WriteAudited { write })[0]
}
