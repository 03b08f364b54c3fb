//! Tokens: what is well formed has one form, and another character anywhere breaks its checksum; of signed ones any
//! header is read or refused, of imported ones any hash.
#![no_main]

use rungate::auth::token::is_well_formed;
use rungate::auth::{jwt, secret};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((place, token)) = bytes.split_last() else {
        return;
    };
    if jwt::has_form(token) {
        let _ = jwt::header(token);
    }
    let Ok(text) = std::str::from_utf8(token) else {
        return;
    };
    if let Some((hash, fingerprint)) = text.split_once(' ') {
        drop(secret::parse_imported(hash, fingerprint));
    }
    if !is_well_formed(text, "user") {
        return;
    }
    let mut changed = token.to_vec();
    let place = usize::from(*place) % changed.len();
    changed[place] = if changed[place] == b'0' { b'1' } else { b'0' };
    let changed = String::from_utf8(changed).expect("it was ASCII");
    assert!(!is_well_formed(&changed, "user"), "{text} and {changed}");
});
