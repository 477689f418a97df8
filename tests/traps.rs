//! The traps that other caches fell into: one test each, end to end, on real Postgres.
//!
//! | trap | what went wrong elsewhere | file in `traps/` |
//! | --- | --- | --- |
//! | `trap_01_the_load_that_stores_the_old_row` | a load read the old row, the change was handled, the load was kept | `loads.rs` |
//! | `trap_02_the_load_that_outlives_a_clear` | the same, when everything was cleared | `loads.rs` |
//! | `trap_03_the_refresh_that_stores_the_old_row` | the same, in a refresh that nobody had asked for | `loads.rs` |
//! | `trap_04_the_absence_that_outlives_the_insert` | "no such row" was kept after the row had been inserted | `loads.rs` |
//! | `trap_05_the_reader_who_joins_an_overtaken_load` | who came after the change was given the load from before it | `loads.rs` |
//! | `trap_06_the_fill_from_a_replica` | a row was read from a replica that lagged behind | `fills.rs` |
//! | `trap_07_the_fill_from_an_old_snapshot` | a row was read in a transaction with an old snapshot | `fills.rs` |
//! | `trap_08_messages_lost_while_reconnecting` | what was sent while nobody listened was never missed | `line.rs` |
//! | `trap_09_the_first_reconnect_that_fails` | the second attempt to connect came back as if nothing had happened | `line.rs` |
//! | `trap_10_the_link_that_is_alive_but_deaf` | a connection that had stopped to deliver was taken for a quiet one | `line.rs` |
//! | `trap_11_the_payload_that_aborts_the_writer` | a message too large for NOTIFY rolled back the write | `writes.rs` |
//! | `trap_12_the_primary_key_that_changes` | an UPDATE of the key told one of the two keys | `writes.rs` |
//! | `trap_13_the_truncate_that_nobody_tells` | row triggers do not fire on TRUNCATE | `writes.rs` |
//! | `trap_14_the_trigger_that_is_gone_or_drifted` | a table without its triggers was served as ever | `writes.rs` |
//! | `trap_15_the_sequence_taken_for_a_gap_test` | numbers that are dealt before the commit were taken for its order | `order.rs` |
//! | `trap_16_the_slow_consumer` | the queue of a consumer that was too slow grew without bound | `limits.rs` |
//! | `trap_17_the_clock_that_is_wrong` | wall clocks of different machines decided what is newer | `order.rs` |
//! | `trap_18_the_own_echo` | the message of an own write undid it, or it undid a newer one | `order.rs` |
//! | `trap_19_the_tolerance_for_a_few_misses` | a few lost messages were thought to do no harm | `line.rs` |
//! | `trap_20_the_statistics_that_lie` | more hits than gets, counters that started again after a reconnect | `limits.rs` |
//! | `trap_21_the_refresh_storm` | each message of a hot key made a load | `limits.rs` |
//! | `trap_22_the_old_row_served_for_ever` | old rows were served for as long as the database was away | `limits.rs` |
//! | `trap_23_the_load_that_is_stuck` | a load that hung, panicked or was cancelled blocked its key | `limits.rs` |

#![allow(clippy::doc_markdown)] // names of other projects are not code

mod fills;
mod limits;
mod line;
mod loads;
mod order;
mod slow;
mod writes;

use std::{fs, path::Path};

use rowcache::{Config, Node};

use crate::{
    fixture,
    support::{TestDb, proxy::Proxy},
};

const LOST: &str = "LISTEN connection was lost";
const AGAIN: &str = "cannot open the LISTEN connection";

/// A node that notices trouble soon, whose line goes through a proxy. The pool does not.
async fn behind_proxy(db: &TestDb) -> (Node, Proxy) {
    let proxy = Proxy::start(db.port).await;
    let mut config: Config = fixture::hasty(&db.url);
    config.listener = fixture::hasty(&proxy.url(&db.url)).listener;
    (Node::start(config).await.expect("starts"), proxy)
}

/// All files below a directory of this repository whose names end like this, with what they contain.
fn sources(dir: &str, ending: &str) -> Vec<(String, String)> {
    fn collect(dir: &Path, ending: &str, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                collect(&path, ending, found);
            } else if path.to_string_lossy().ends_with(ending) {
                let text = fs::read_to_string(&path).expect("a text");
                found.push((path.to_string_lossy().into_owned(), text));
            }
        }
    }
    let mut found = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir), ending, &mut found);
    assert!(!found.is_empty(), "{dir} has no {ending}");
    found
}

#[test]
fn each_trap_has_one_test_which_the_table_names() {
    let rows: Vec<(String, String)> = include_str!("traps.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//! | `trap_"))
        .map(|row| {
            let code: Vec<_> = row.split('`').collect();
            (format!("trap_{}", code[0]), code[code.len() - 2].to_owned())
        })
        .collect();
    let tests: Vec<(String, String)> = ["tests", "src"]
        .iter()
        .flat_map(|dir| sources(dir, ".rs"))
        .flat_map(|(path, text)| {
            let names = text.lines().filter_map(|line| line.trim_start().strip_prefix("async fn trap_"));
            let file = Path::new(&path).file_name().expect("a file").to_string_lossy().into_owned();
            names
                .map(|rest| (format!("trap_{}", rest.split('(').next().expect("a name")), file.clone()))
                .collect::<Vec<_>>()
        })
        .collect();
    for n in 1..=23 {
        let is_it = |row: &&(String, String)| row.0.starts_with(&format!("trap_{n:02}_"));
        let (rows, tests): (Vec<_>, Vec<_>) =
            (rows.iter().filter(is_it).collect(), tests.iter().filter(is_it).collect());
        assert_eq!((rows.len(), tests.len()), (1, 1), "trap {n}: {rows:?} {tests:?}");
        assert_eq!(rows, tests, "the table, and what there is");
    }
    assert_eq!((rows.len(), tests.len()), (23, 23));
}
