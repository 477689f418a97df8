//! The migrations are part of the crate: a new file among them must be noticed. And `ROWCACHE_TEST_ATOMICS=loom` swaps the atomics
//! of the core, in tests, for those whose orderings are checked: as a variable, so that no dependency is built anew for it.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
    println!("cargo:rerun-if-env-changed=ROWCACHE_TEST_ATOMICS");
    if std::env::var_os("ROWCACHE_TEST_ATOMICS").is_some_and(|it| it == "loom") {
        println!("cargo:rustc-cfg=loom_core");
    }
}
