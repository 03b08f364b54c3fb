//! Bodies of requests: checked, made canonical, read as each route reads them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| rungate::api::fuzzing::body(bytes));
