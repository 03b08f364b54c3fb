//! Tokens: what is well formed has one form, and another character anywhere breaks its checksum.
#![no_main]

use rungate::auth::token::is_well_formed;

libfuzzer_sys::fuzz_target!(|input: (&str, u8)| {
    let (text, place) = input;
    if !is_well_formed(text, "user") {
        return;
    }
    let mut changed = text.as_bytes().to_vec();
    let place = usize::from(place) % changed.len();
    changed[place] = if changed[place] == b'0' { b'1' } else { b'0' };
    let changed = String::from_utf8(changed).expect("it was ASCII");
    assert!(!is_well_formed(&changed, "user"), "{text} and {changed}");
});
