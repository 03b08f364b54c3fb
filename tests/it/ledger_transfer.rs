//! Verify, export, import and stats: an import is an equal ledger, and a single flipped bit is found.

use std::io::Cursor;

use rungate::ledger::transfer::import;
use rungate::ledger::{Ledger, OpenOptions, Scope, TransferError, VerifyError};

use crate::ledger_world::{Rng, write_trace};

fn options() -> OpenOptions {
    OpenOptions::default()
}

#[test]
fn an_import_of_an_export_is_an_equal_ledger() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (ledger, mut writer) = Ledger::open(from.path(), &options()).unwrap();
    write_trace(&mut writer, 11, 80, |_, _| {}).unwrap();
    let mut export = Vec::new();
    let exported = ledger.export(0, &mut export).unwrap();
    let imported = import(&mut Cursor::new(&export), to.path(), &options()).unwrap();
    assert_eq!(imported, exported);
    let copy = Ledger::open_read_only(to.path(), &options()).unwrap();
    assert_eq!(
        copy.verify(&mut |_| {}).unwrap(),
        ledger.verify(&mut |_| {}).unwrap()
    );
    let all = |ledger: &Ledger| ledger.records(Scope::All, 0, usize::MAX).unwrap();
    assert_eq!(all(&copy), all(&ledger));
    assert_eq!(copy.services().unwrap(), ledger.services().unwrap());
    let mut again = Vec::new();
    copy.export(0, &mut again).unwrap();
    assert_eq!(again, export, "an export of the import is the same text");
    let (mut ours, mut theirs) = (ledger.stats().unwrap(), copy.stats().unwrap());
    assert_eq!(ours.events.values().sum::<u64>(), ours.records);
    for stats in [&mut ours, &mut theirs] {
        stats.file_bytes = 0;
        stats.table_bytes.clear();
    }
    assert_eq!(ours, theirs);
}

#[test]
fn an_export_that_was_tampered_with_is_refused_and_leaves_nothing() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (ledger, mut writer) = Ledger::open(from.path(), &options()).unwrap();
    write_trace(&mut writer, 12, 10, |_, _| {}).unwrap();
    let mut export = Vec::new();
    ledger.export(0, &mut export).unwrap();
    let text = String::from_utf8(export).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let tampered = [
        lines[1..].join("\n"),
        [&lines[..4], &lines[5..]].concat().join("\n"),
        text.replacen("\"plane\":0", "\"plane\":1", 1),
        text.replacen("\"at_us\":176", "\"at_us\":177", 1),
        text[..text.len() - 40].to_owned(),
        "{}".to_owned(),
    ];
    for text in tampered {
        let error = import(&mut Cursor::new(text.as_bytes()), to.path(), &options()).unwrap_err();
        assert!(matches!(error, TransferError::BadLine { .. }), "{error}");
        assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0);
    }
    let error = import(&mut Cursor::new(text.as_bytes()), from.path(), &options()).unwrap_err();
    assert!(error.to_string().contains("exists already"), "{error}");
}

#[test]
fn verify_names_the_first_record_with_a_flipped_bit() {
    let directory = tempfile::tempdir().unwrap();
    let (ledger, mut writer) = Ledger::open(directory.path(), &options()).unwrap();
    write_trace(&mut writer, 13, 40, |_, _| {}).unwrap();
    let records = ledger.records(Scope::All, 0, usize::MAX).unwrap();
    drop((ledger, writer));
    let path = directory.path().join("ledger.redb");
    let whole = std::fs::read(&path).unwrap();
    let mut rng = Rng(13);
    for round in 0..40 {
        let index = usize::try_from(rng.below(records.len() as u64)).unwrap();
        let record = &records[index];
        // A record's own hash stands at byte 104 of it, preceded by all that the hash covers.
        let mut bytes = whole.clone();
        let mut found = 0;
        for at in 0..bytes.len() - 32 {
            if bytes[at..at + 32] == record.prev_hash && at >= 40 {
                // Flip within the header of every copy: stale pages hold old ones.
                let offset = match round % 4 {
                    0 => at - 32 + usize::try_from(rng.below(8)).unwrap(),
                    1 => at + usize::try_from(rng.below(32)).unwrap(),
                    2 => at + 64 + usize::try_from(rng.below(32)).unwrap(),
                    _ => at - 36,
                };
                if bytes[at + 64..at + 96] == record.hash {
                    bytes[offset] ^= 1 << rng.below(8);
                    found += 1;
                }
            }
        }
        assert!(found > 0);
        std::fs::write(&path, &bytes).unwrap();
        let ledger = Ledger::open_read_only(directory.path(), &options()).unwrap();
        match ledger.verify(&mut |_| {}) {
            Err(VerifyError::Record { seq, .. }) => assert_eq!(seq, record.seq, "round {round}"),
            other => panic!("round {round}: {other:?}"),
        }
    }
}

#[test]
fn verify_finds_a_flipped_bit_in_a_payload() {
    let directory = tempfile::tempdir().unwrap();
    let (ledger, mut writer) = Ledger::open(directory.path(), &options()).unwrap();
    crate::ledger_world::append(
        &mut writer,
        [(
            crate::ledger_world::queued(crate::ledger_world::run_id(1)),
            "{\"needle\":\"haystack\"}",
        )],
    );
    drop((ledger, writer));
    let path = directory.path().join("ledger.redb");
    let mut bytes = std::fs::read(&path).unwrap();
    let needle = b"haystack";
    let places: Vec<usize> = (0..bytes.len() - 8)
        .filter(|at| &bytes[*at..at + 8] == needle)
        .collect();
    for at in places {
        bytes[at] ^= 4;
    }
    std::fs::write(&path, &bytes).unwrap();
    let ledger = Ledger::open_read_only(directory.path(), &options()).unwrap();
    let error = ledger.verify(&mut |_| {}).unwrap_err();
    assert_eq!(
        error.to_string(),
        "record 1 is bad: its payload does not match its hash"
    );
}
