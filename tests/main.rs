//! Most tests are one program: it is compiled and linked once, they share two servers, where each has a database of its own,
//! and processors have something to do until the last one has ended.
//!
//! A new file is one line here. A program of its own, which `Cargo.toml` names, is what would meet the others' tests:
//!
//! | program | why it is apart |
//! | --- | --- |
//! | `cli` | the doctor looks at the whole server: sessions, locks and transactions of all databases |
//! | `faults` | stops server processes, which may hold what all others of the server wait for |
//! | `log` | the change log keeps what any transaction of the server may still need |
//! | `torture` | is a crowd of processes itself, and needs nothing of what is compiled here |

#[macro_use]
mod support;
mod fixture;
#[allow(dead_code)] // the program is the subject of `cli.rs`; here it is asked now and then
#[path = "cli/program.rs"]
mod program;

mod audit;
mod bad_input;
mod bounds;
mod events;
mod examples;
mod expiry;
mod fleet;
mod freshness;
mod gap;
mod hashed;
mod memo;
mod outage;
mod pooler;
mod preloaded;
mod proxy;
mod read_through;
mod redundant;
mod shared_values;
mod start;
mod tags;
mod temp_server;
mod test_kit;
mod tier;
mod traps;
mod triggers;
mod types;
mod upstream;
mod views;
mod write;

#[test]
fn each_file_is_part_of_a_program() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let (here, manifest) = (include_str!("main.rs"), include_str!("../Cargo.toml"));
    for entry in root.join("tests").read_dir().expect("there is a directory") {
        let file = entry.expect("an entry").file_name().into_string().expect("a name");
        let Some(name) = file.strip_suffix(".rs").filter(|name| *name != "main") else { continue };
        let (part, program) = (format!("\nmod {name};\n"), format!("[[test]]\nname = \"{name}\"\n"));
        assert!(
            here.contains(&part) != manifest.contains(&program),
            "tests/{file} is either a `mod` of tests/main.rs or a [[test]] of Cargo.toml"
        );
    }
}
