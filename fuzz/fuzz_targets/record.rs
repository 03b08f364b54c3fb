//! Records of the ledger: any bytes are taken apart or refused, and what was taken apart is put together again.
#![no_main]

use rungate::domain::ids::Seq;
use rungate::ledger::record_codec::Raw;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let seq: Seq = 1;
    let Ok(raw) = Raw::parse(seq, bytes) else {
        return;
    };
    assert_eq!(raw.to_bytes(), bytes);
    let _ = raw.computed_hash(seq);
    let _ = raw.decode(seq);
    let _ = Raw::event_of(bytes);
});
