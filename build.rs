//! The migrations are part of the crate: a new file among them must be noticed.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
