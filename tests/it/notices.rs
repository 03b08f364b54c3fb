//! What tenants are told, decided without a network: how an outage, a notice that alone is refused, age and changes of
//! mind come out, with hours passed in no time.

use std::collections::BTreeSet;

use rungate::domain::command::{Command, NoticeTried, Origin};
use rungate::domain::decide::decide;
use rungate::domain::effect::{Effect, SendNotice};
use rungate::domain::event::Event;
use rungate::domain::ids::{PlaneId, RunId};
use rungate::domain::notify::{Channel, Notice, Notify, Ntfy, Webhook};
use rungate::domain::settings::Settings;
use rungate::domain::state::State;
use rungate::domain::state::notices::Line;
use rungate::domain::tenant::{Tenancy, TenantProfile};
use rungate::domain::time::Timestamp;
use smol_str::SmolStr;
use uuid::Uuid;

const MINUTE_US: i64 = 60_000_000;

/// A State, and the tries that its events imply.
struct World {
    state: State,
    settings: Settings,
    now: Timestamp,
    open: Vec<SendNotice>,
    attempts: usize,
    told: Vec<u64>,
}

impl World {
    fn new(channel: Channel) -> World {
        let settings = Settings::default();
        let mut world = World {
            state: State::new(settings.ageing_ms_per_level),
            settings,
            now: Timestamp(1_763_690_400_000_000),
            open: Vec::new(),
            attempts: 0,
            told: Vec::new(),
        };
        let tenant = SmolStr::new_static("default");
        world.happens(Event::PlaneOpened {
            plane: PlaneId::ROOT,
            tenant: tenant.clone(),
            runtime: tenant.clone(),
        });
        world.happens(Event::TenantCreated {
            profile: TenantProfile::plain(&tenant),
            tenant,
        });
        world.leads_to(channel, "http://example.org");
        world
    }

    fn leads_to(&mut self, channel: Channel, url: &str) {
        let events = Notice::OF_RUNS.to_vec();
        let url = SmolStr::new(url);
        let mut notify = Notify::default();
        match channel {
            Channel::Ntfy => {
                notify.ntfy = Some(Ntfy {
                    url,
                    topic: "t".into(),
                    events,
                    by_settings: false,
                });
            }
            Channel::Webhook => notify.webhook = Some(Webhook { url, events }),
        }
        let tenant = "default".into();
        self.happens(Event::TenantNotifyChanged { tenant, notify });
    }

    fn happens(&mut self, event: Event) -> u64 {
        let seq = self.state.seq + 1;
        self.state.apply(seq, self.now, PlaneId::ROOT, &event);
        self.open.extend(notices(self.state.begun_notices()));
        seq
    }

    /// A run ends; the record that tells so.
    fn run_ends(&mut self) -> u64 {
        let run = RunId(Uuid::now_v7());
        self.happens(Event::JobCompleted { run, attempt: 1 })
    }

    /// Makes what is due by `until`, in order, answered by `status`.
    fn pass(&mut self, until: Timestamp, status: impl Fn(&SendNotice) -> u16) {
        loop {
            let due = self.open.iter().enumerate();
            let due = due.min_by_key(|(_, notice)| notice.not_before);
            let Some((index, _)) = due.filter(|(_, n)| n.not_before.max(self.now) <= until) else {
                break;
            };
            let notice = self.open.remove(index);
            self.now = self.now.max(notice.not_before);
            let status = status(&notice);
            self.answered(&notice, status);
        }
        self.now = self.now.max(until);
    }

    fn answered(&mut self, notice: &SendNotice, status: u16) {
        let tried = NoticeTried {
            tenant: notice.tenant.clone(),
            channel: notice.destination.channel(),
            of: notice.of,
            number: notice.number,
            status: Some(status),
            error: None,
        };
        let origin = Origin {
            plane: PlaneId::ROOT,
            actor: "executor".into(),
            request_id: None,
            tenancy: Tenancy::All,
            at: self.now,
        };
        let command = Command::NoticeTried(Box::new(tried));
        let decision = decide(&self.state, &self.settings, &origin, command, self.now).unwrap();
        for (event, _) in decision.events {
            if let Event::NotificationAttempted { of, delivered, .. } = &event {
                self.attempts += 1;
                self.told.extend(delivered.then_some(*of));
            }
            self.happens(event);
        }
    }

    fn line(&self, channel: Channel) -> Line {
        let key = ("default".into(), channel);
        self.state
            .notices
            .lines
            .get(&key)
            .cloned()
            .unwrap_or_default()
    }

    /// A process that begins with a snapshot has the same State, and makes the same tries.
    fn survives_a_restart(&self) {
        let bytes = self.state.to_snapshot().unwrap();
        let again = State::from_snapshot(&bytes, self.settings.ageing_ms_per_level).unwrap();
        assert!(again == self.state);
        let of = |notices: &[SendNotice]| -> BTreeSet<(u64, u32)> {
            notices
                .iter()
                .map(|notice| (notice.of, notice.number))
                .collect()
        };
        assert_eq!(of(&notices(again.open_notices())), of(&self.open));
    }
}

fn notices(effects: Vec<Effect>) -> Vec<SendNotice> {
    let notice = |effect| match effect {
        Effect::SendNotice(notice) => *notice,
        other => panic!("{other:?}"),
    };
    effects.into_iter().map(notice).collect()
}

#[test]
fn an_outage_costs_few_records_and_what_waits_is_told_after_it() {
    let mut world = World::new(Channel::Webhook);
    let mut ended = Vec::new();
    for _ in 0..10_500 {
        ended.push(world.run_ends());
        let soon = Timestamp(world.now.0 + 100_000);
        world.pass(soon, |_| 503);
    }
    // 17 minutes: eight that had begun, then a try at each doubling of five seconds.
    assert!(world.attempts <= 20, "{}", world.attempts);
    world.survives_a_restart();
    let line = world.line(Channel::Webhook);
    assert_eq!((line.waiting.len(), line.skipped), (10_000, 500));
    let later = Timestamp(world.now.0 + 60 * MINUTE_US);
    world.pass(later, |_| 200);
    let line = world.line(Channel::Webhook);
    assert_eq!((line.waiting.len(), line.failures), (0, 0));
    world.told.sort_unstable();
    assert_eq!(world.told, ended[..10_000]);
}

#[test]
fn what_alone_is_refused_holds_up_nothing_else_and_is_given_up_in_the_end() {
    let mut world = World::new(Channel::Webhook);
    let poison = world.run_ends();
    let answer = |notice: &SendNotice| if notice.of == poison { 400 } else { 200 };
    let mut others = Vec::new();
    for _ in 0..1_000 {
        others.push(world.run_ends());
        let soon = Timestamp(world.now.0 + 1_000_000);
        world.pass(soon, answer);
    }
    world.pass(Timestamp(world.now.0 + MINUTE_US), answer);
    world.told.sort_unstable();
    assert_eq!(world.told, others);
    assert_eq!(world.line(Channel::Webhook).waiting.len(), 1);
    let before = world.attempts;
    world.pass(Timestamp(world.now.0 + 26 * 60 * MINUTE_US), answer);
    let line = world.line(Channel::Webhook);
    assert_eq!((line.waiting.len(), line.skipped), (0, 1));
    assert!(world.attempts - before <= 40, "{}", world.attempts - before);
    assert!(world.open.is_empty());
}

#[test]
fn ntfy_is_not_told_of_what_is_an_hour_old() {
    let mut world = World::new(Channel::Ntfy);
    for _ in 0..50 {
        world.run_ends();
    }
    world.pass(Timestamp(world.now.0 + 90 * MINUTE_US), |_| 429);
    world.run_ends();
    world.pass(Timestamp(world.now.0 + 90 * MINUTE_US), |_| 200);
    let line = world.line(Channel::Ntfy);
    assert_eq!(
        (line.waiting.len(), line.skipped, line.failures),
        (0, 50, 0)
    );
    assert_eq!(world.told.len(), 1);
}

#[test]
fn another_address_is_tried_at_once_and_an_outcome_from_the_old_one_changes_nothing() {
    let mut world = World::new(Channel::Webhook);
    let first = world.run_ends();
    let old = world.open.remove(0);
    world.answered(&old, 500);
    // Its next try is some seconds away.
    assert!(world.open.remove(0).not_before > world.now);
    world.leads_to(Channel::Webhook, "http://example.com");
    let again = world.open.remove(0);
    assert_eq!(
        (again.of, again.number, again.not_before),
        (first, 2, Timestamp(0))
    );
    world.answered(&again, 200);
    let attempts = world.attempts;
    world.answered(&old, 200);
    world.answered(&again, 500);
    assert_eq!(world.attempts, attempts);
    assert!(world.line(Channel::Webhook).waiting.is_empty());
    // Turned off, it forgets what waits.
    world.run_ends();
    world.open.clear();
    let tenant = "default".into();
    let notify = Notify::default();
    world.happens(Event::TenantNotifyChanged { tenant, notify });
    assert!(world.state.notices.lines.is_empty());
    world.run_ends();
    assert!(world.open.is_empty());
}

#[test]
fn a_test_goes_at_once_in_the_midst_of_an_outage() {
    let mut world = World::new(Channel::Ntfy);
    world.run_ends();
    world.pass(Timestamp(world.now.0 + MINUTE_US), |_| 500);
    let waiting = world.open.len();
    let tenant = "default".into();
    let asked = world.happens(Event::NotificationTestAsked { tenant });
    assert_eq!(world.open.len(), waiting + 1);
    let test = world.open.pop().unwrap();
    assert_eq!(
        (test.of, test.run, test.notice),
        (asked, None, Notice::Test)
    );
    assert!(test.not_before <= world.now);
    world.survives_a_restart_with(&test);
    world.answered(&test, 200);
    // It was taken: the rest follows.
    let soon = Timestamp(world.now.0 + 11 * MINUTE_US);
    world.pass(soon, |_| 200);
    assert!(world.line(Channel::Ntfy).waiting.is_empty());
}

impl World {
    fn survives_a_restart_with(&mut self, test: &SendNotice) {
        self.open.push(test.clone());
        self.survives_a_restart();
        self.open.pop();
    }
}
