//! State at start-up: the newest snapshot, then every event after it.

use crate::domain::state::State;
use crate::ledger::{Ledger, ReadError};

/// Why State could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    #[error("the ledger could not be read")]
    Read(#[from] ReadError),
}

/// Makes State anew from what is on disk.
pub fn recover(ledger: &Ledger, ageing_ms_per_level: u64) -> Result<State, RecoverError> {
    let mut state = match ledger.load_snapshot()? {
        Some((seq, bytes)) => match State::from_snapshot(&bytes, ageing_ms_per_level) {
            Ok(state) => state,
            Err(error) => {
                // Written by another version: the events say the same.
                tracing::warn!(snapshot.seq = seq, %error, "passing over a snapshot of another form");
                State::new(ageing_ms_per_level)
            }
        },
        None => State::new(ageing_ms_per_level),
    };
    ledger.replay(state.seq, |seq, at, plane, (event, payload_bytes)| {
        state.fold(seq, at, plane, (&event, payload_bytes));
    })?;
    Ok(state)
}
