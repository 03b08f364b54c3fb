//! The wall clock, read in one place: everything below it is told the time.

use crate::domain::time::Timestamp;

/// Now, as the ledger counts.
pub fn now() -> Timestamp {
    Timestamp(jiff::Timestamp::now().as_microsecond())
}
