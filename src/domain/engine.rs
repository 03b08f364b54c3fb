//! What follows by itself: deadlines that have passed, then the scheduler. The coordinator and the tests
//! drive State through this one function, so that what is tested is what runs.

use super::decide::due;
use super::event::Event;
use super::scheduler::step;
use super::settings::Settings;
use super::state::State;
use super::time::Timestamp;

/// The next events that follow from State and the time alone. Apply them and call it again until it gives
/// `None`; an empty list means that a deadline turned out to be nothing.
pub fn follow_up(state: &mut State, settings: &Settings, now: Timestamp) -> Option<Vec<Event>> {
    due(state, settings, now).or_else(|| step(state, settings, now))
}
