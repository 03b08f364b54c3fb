//! Query strings.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| rungate::api::fuzzing::query(text));
