#![no_main]

libfuzzer_sys::fuzz_target!(|input: rowcache_fuzz::token::Input<'_>| rowcache_fuzz::token::run(&input));
