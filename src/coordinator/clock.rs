//! The ledger's clock: the wall clock, except that it never runs backwards and never stands still. When the
//! machine's clock is set back, deadlines must still come about.

use std::time::Instant;

use crate::clock::now;
use crate::domain::effect::Effect;
use crate::domain::time::Timestamp;

/// While it is ahead of the wall clock it goes this much slower than time, so that the two meet again.
const SLOWER: u32 = 2;

pub(super) struct Clock {
    last: Timestamp,
    read: Instant,
}

impl Clock {
    /// Goes on from the last event's time.
    pub fn new(last: Timestamp) -> Clock {
        Clock {
            last,
            read: Instant::now(),
        }
    }

    /// The time for the next events.
    pub fn now(&mut self) -> Timestamp {
        self.advance(now(), Instant::now())
    }

    fn advance(&mut self, wall: Timestamp, read: Instant) -> Timestamp {
        let passed = read.saturating_duration_since(self.read) / SLOWER;
        let passed_us = i64::try_from(passed.as_micros()).unwrap_or(i64::MAX);
        let at_least = Timestamp(self.last.0.saturating_add(passed_us));
        // A reading that adds nothing must not eat the time that has passed.
        if wall.max(at_least) > self.last {
            self.last = wall.max(at_least);
            self.read = read;
        }
        self.last
    }

    /// Whoever performs effects goes by the wall clock.
    pub fn to_wall(&self, effects: &mut [Effect]) {
        let ahead_us = (self.last - now()).max(0);
        for effect in effects {
            let at = match effect {
                Effect::StopInstance { kill_at, .. } => kill_at,
                Effect::FindInstance {
                    stop_at: Some(stop_at),
                    ..
                } => stop_at,
                Effect::StopCall { deadline, .. } => deadline,
                Effect::SendCallback { not_before, .. } => not_before,
                Effect::AskCheckpoint(asking) => &mut asking.deadline,
                Effect::TakeMemory(taking) => &mut taking.deadline,
                Effect::WakeInstance(waking) => &mut waking.deadline,
                Effect::SendNotice(sending) => &mut sending.not_before,
                _ => continue,
            };
            *at = Timestamp(at.0.saturating_sub(ahead_us));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::effect::{AskCheckpoint, TakeMemory, WakeInstance};
    use crate::domain::ids::{Generation, RunId, ServiceName};
    use crate::domain::ladder::{Ask, Step};

    #[test]
    fn a_clock_set_back_slows_the_ledgers_and_never_stops_it() {
        let start = Instant::now();
        let mut clock = Clock {
            last: Timestamp(1_000_000),
            read: start,
        };
        let after = |ms| start + Duration::from_millis(ms);
        assert_eq!(clock.advance(Timestamp(500_000), after(0)).0, 1_000_000);
        assert_eq!(clock.advance(Timestamp(600_000), after(100)).0, 1_050_000);
        assert_eq!(clock.advance(Timestamp(1_500_000), after(200)).0, 1_500_000);
    }

    /// The wall clock has been set back by an hour.
    #[test]
    fn every_deadline_of_an_effect_is_told_by_the_wall_clock() {
        let at = now() + 3_600_000;
        let clock = Clock {
            last: at,
            read: Instant::now(),
        };
        let (service, generation) = (ServiceName::from("s"), Generation(1));
        let run = RunId(uuid::Uuid::nil());
        let mut effects = [
            Effect::StopInstance {
                service: service.clone(),
                generation,
                kill_at: at,
            },
            Effect::StopCall {
                run,
                attempt: 1,
                service: service.clone(),
                generation,
                reason: "pause",
                deadline: at,
            },
            Effect::AskCheckpoint(Box::new(AskCheckpoint {
                run,
                attempt: 1,
                service: service.clone(),
                generation,
                number: 0,
                ask: Ask::Path("/c".into()),
                deadline: at,
            })),
            Effect::TakeMemory(Box::new(TakeMemory {
                service: service.clone(),
                generation,
                number: 0,
                step: Step::Kill,
                grants: Vec::new(),
                is_anew: false,
                deadline: at,
            })),
            Effect::WakeInstance(Box::new(WakeInstance {
                service,
                generation,
                step: Step::Kill,
                deadline: at,
            })),
        ];
        clock.to_wall(&mut effects);
        for effect in &effects {
            let told = match effect {
                Effect::StopInstance { kill_at, .. } => *kill_at,
                Effect::StopCall { deadline, .. } => *deadline,
                Effect::AskCheckpoint(asking) => asking.deadline,
                Effect::TakeMemory(taking) => taking.deadline,
                Effect::WakeInstance(waking) => waking.deadline,
                other => panic!("{other:?}"),
            };
            let off_ms = (told - now()).abs() / 1_000;
            assert!(off_ms < 60_000, "{effect:?} is off by {off_ms} ms");
        }
    }

    #[test]
    fn readings_in_quick_succession_add_up() {
        let start = Instant::now();
        let mut clock = Clock {
            last: Timestamp(1_000_000),
            read: start,
        };
        for us in 1..=1_000 {
            clock.advance(Timestamp(0), start + Duration::from_nanos(us * 1_000));
        }
        assert_eq!(clock.last.0, 1_000_500);
    }
}
