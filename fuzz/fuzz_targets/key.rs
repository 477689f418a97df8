#![no_main]

libfuzzer_sys::fuzz_target!(|input: rowcache_fuzz::key::Input| rowcache_fuzz::key::run(&input));
