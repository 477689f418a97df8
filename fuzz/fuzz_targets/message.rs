#![no_main]

libfuzzer_sys::fuzz_target!(|payload: &str| rowcache_fuzz::message::run(payload));
