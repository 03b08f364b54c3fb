//! The format on disk: these bytes were written by formats 1 to 3, and every later program must read them.
//! A new format adds a golden file beside; it never changes one. `UPDATE_GOLDEN=1` writes a missing file.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use rungate::domain::audit::{Asked, Details};
use rungate::domain::event::Event;
use rungate::domain::ids::{PlaneId, RunId};
use rungate::domain::time::Timestamp;
use rungate::ledger::record_codec::{GENESIS, Meta, Raw, encode};
use rungate::ledger::view;
use uuid::Uuid;

use crate::ledger_world::{START, details, one_of_each, run_id, source};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it/golden")
        .join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        text,
        expected,
        "the format on disk changed: {}",
        path.display()
    );
}

#[test]
fn every_event_keeps_its_bytes() {
    let mut text = String::new();
    for event in one_of_each() {
        let bytes = encode(&event);
        let back: Event = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(back, event);
        let (name, _) = view::name_and_fields(&event);
        writeln!(text, "{name} {}", hex(&bytes)).unwrap();
    }
    golden("events_v1.txt", &text);
}

#[test]
fn one_of_each_event_is_in_the_golden_file() {
    // Postcard writes a variant's number first: the list above is complete when it has no hole and the
    // next number is no event.
    let numbers: Vec<u8> = one_of_each().iter().map(|event| encode(event)[0]).collect();
    let expected: Vec<u8> = (0..u8::try_from(numbers.len()).unwrap()).collect();
    assert_eq!(numbers, expected);
    let mut beyond = vec![u8::try_from(numbers.len()).unwrap()];
    beyond.extend([0; 64]);
    assert!(postcard::take_from_bytes::<Event>(&beyond).is_err());
}

fn sample(payload: &[u8], asked: Option<Asked>, details: Option<Details>) -> Vec<u8> {
    let event = encode(&Event::JobCompleted {
        run: run_id(1),
        attempt: 2,
    });
    let meta = Meta {
        actor: "executor".into(),
        request_id: Some("r".into()),
        asked,
        details,
    };
    let (format, meta) = meta.to_bytes();
    let mut raw = Raw {
        format,
        purged: false,
        plane: PlaneId(1),
        at: START,
        cursor: 5,
        run: Some(run_id(1)),
        prev_hash: [9; 32],
        payload_hash: *blake3::hash(payload).as_bytes(),
        hash: GENESIS,
        event: &event,
        meta: &meta,
        payload_len: u32::try_from(payload.len()).unwrap(),
        payload,
    };
    raw.hash = raw.computed_hash(42);
    raw.to_bytes()
}

fn asked() -> Asked {
    Asked {
        source: source(),
        duration_us: 300,
    }
}

#[test]
fn a_record_keeps_its_bytes() {
    let bytes = sample(b"{\"ok\":true}", None, None);
    golden("record_v1.txt", &format!("{}\n", hex(&bytes)));
    let bytes = sample(b"{\"ok\":true}", Some(asked()), None);
    golden("record_v2.txt", &format!("{}\n", hex(&bytes)));
    let bytes = sample(b"{\"ok\":true}", Some(asked()), Some(details()));
    golden("record_v3.txt", &format!("{}\n", hex(&bytes)));
}

#[test]
fn a_record_cut_short_is_an_error_and_no_panic() {
    let bytes = sample(b"{}", Some(asked()), Some(details()));
    for len in 0..bytes.len() {
        assert!(Raw::parse(1, &bytes[..len]).is_err(), "{len}");
    }
}

#[test]
fn a_record_of_a_newer_format_is_refused() {
    let mut bytes = sample(b"{}", None, None);
    bytes[0] = 4;
    assert!(Raw::parse(1, &bytes).is_err());
}

proptest! {
    #[test]
    fn any_record_round_trips(
        payload in proptest::collection::vec(any::<u8>(), 0..300),
        (at, cursor, plane, run) in any::<(i64, u64, u32, u128)>(),
        (actor, request_id) in any::<(String, Option<String>)>(),
        index in 0usize..100,
        (purged, is_asked, is_detailed) in any::<(bool, bool, bool)>(),
    ) {
        let events = one_of_each();
        let event = events[index % events.len()].clone();
        let event_bytes = encode(&event);
        let meta = Meta {
            actor: actor.into(),
            request_id: request_id.map(Into::into),
            asked: is_asked.then(asked),
            details: is_detailed.then(details),
        };
        let (format, meta_bytes) = meta.to_bytes();
        let mut raw = Raw {
            format,
            purged: false,
            plane: PlaneId(plane),
            at: Timestamp(at),
            cursor,
            run: (run != 0).then_some(RunId(Uuid::from_u128(run))),
            prev_hash: [3; 32],
            payload_hash: *blake3::hash(&payload).as_bytes(),
            hash: GENESIS,
            event: &event_bytes,
            meta: &meta_bytes,
            payload_len: u32::try_from(payload.len()).unwrap(),
            payload: &payload,
        };
        raw.hash = raw.computed_hash(7);
        let kept = Raw { purged, ..raw };
        let bytes = kept.to_bytes();
        let back = Raw::parse(7, &bytes).unwrap();
        // A purge leaves the hash as it was.
        prop_assert_eq!(back.computed_hash(7), raw.hash);
        let record = back.decode(7).unwrap();
        prop_assert_eq!(back.decode_meta(7).unwrap(), meta.clone());
        let (mut told, mut carried) = (event, meta.asked);
        if let Some(details) = meta.details {
            let source = match &mut told {
                Event::WriteAudited { write } => Some(&mut write.source),
                _ => carried.as_mut().map(|asked| &mut asked.source),
            };
            if let Some(source) = source {
                Arc::make_mut(source).details = details;
            }
        }
        prop_assert_eq!(record.event, told);
        prop_assert_eq!(record.actor, meta.actor);
        prop_assert_eq!(record.request_id, meta.request_id);
        prop_assert_eq!(record.asked, carried);
        prop_assert_eq!(record.at, Timestamp(at));
        prop_assert_eq!(record.purged, purged);
        prop_assert_eq!(record.payload.len(), if purged { 0 } else { payload.len() });
    }

    #[test]
    fn any_bytes_are_parsed_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(raw) = Raw::parse(1, &bytes) {
            let _ = raw.decode(1);
        }
    }
}
