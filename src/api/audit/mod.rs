//! Who did what: each request that asks for a write leaves a record with its principal, address, route and outcome.
//!
//! A write that changes something is told by the record of that change, which carries the request (`Trail`), in the
//! same commit: neither is there without the other, and a start costs no second record. All others, refusals above
//! all, get a record of their own (`Recorder`). Refusals that are alike are counted (`window`), so that a flood of
//! them cannot fill the disk.
//!
//! | file | holds |
//! |---|---|
//! | `trail` | what is kept of a request |
//! | `recorder` | records of writes that left no other |
//! | `window` | counting what is alike |
//! | `routes` | `/audit`, `/audit/tail` |

mod recorder;
mod routes;
mod trail;
mod window;

pub use recorder::Recorder;
pub use routes::router;
pub use trail::{MaybeTrail, Seen, Trail};
