#![no_main]

libfuzzer_sys::fuzz_target!(|input: rowcache_fuzz::store::Input| rowcache_fuzz::store::run(&input));
