#![no_main]

libfuzzer_sys::fuzz_target!(|input: rowcache_fuzz::change::Input| rowcache_fuzz::change::run(&input));
