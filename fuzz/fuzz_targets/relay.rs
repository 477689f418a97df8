#![no_main]

libfuzzer_sys::fuzz_target!(|input: rowcache_fuzz::relay::Input| rowcache_fuzz::relay::run(&input));
