//! Events: whatever decodes is written again and means the same.
#![no_main]

use rungate::domain::event::Event;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(event) = postcard::from_bytes::<Event>(bytes) else {
        return;
    };
    let again = postcard::to_stdvec(&event).expect("an event is written");
    let decoded: Event = postcard::from_bytes(&again).expect("and read again");
    // Bytes and not values: a float may be none of a number.
    assert_eq!(postcard::to_stdvec(&decoded).expect("as before"), again);
});
