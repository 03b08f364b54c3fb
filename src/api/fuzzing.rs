//! What the fuzzers of `fuzz/` reach of the reading of requests; built for them only (`--cfg fuzzing`).

use super::fields::Fields;
use super::{commands, json, query, queue, runs, service_spec};

/// Reads a body as each route that takes one does. Space around a body does not change its canonical form.
pub fn body(bytes: &[u8]) {
    let Ok(text) = json::check(bytes) else {
        return;
    };
    let spaced = [b" \t", bytes, b"\n"].concat();
    assert_eq!(
        json::canonical(&spaced),
        json::canonical(bytes),
        "there is one form"
    );
    let read = |reader: &dyn Fn(&Fields)| {
        if let Ok(fields) = Fields::of_body(text) {
            reader(&fields);
        }
    };
    read(&|fields| drop(runs::read_start(fields)));
    read(&|fields| drop(queue::read_submission(fields)));
    read(&|fields| drop(commands::read_command(fields)));
    read(&|fields| drop(service_spec::read_new(fields)));
}

/// Reads a query string as listings and streams do.
pub fn query(text: &str) {
    let query = query::Query::parse(text);
    let _ = query.int("limit", 1..=500, 50);
    let _ = query.seconds("heartbeat_s", 0.1, 60.0, 5.0);
    let _ = query.boolean("follow");
    let _ = query.instant("since");
    let _ = query.finish();
    drop(runs::read_listing(&query));
}
