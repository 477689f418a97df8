//! Each rule lets pass what is allowed, and finds what is not.

use super::*;

const BOUND: Promises = Promises { staleness_bound: 100 };

fn v(number: u64) -> Version {
    Version { era: 0, number }
}

/// A committed write of key 1 by transaction `number`, sent and ended at these times.
fn write(number: u64, sent: Time, ended: Time) -> Write {
    let (key, version) = (1, v(number));
    Write { key, version, deletes: false, xid: number, sent, ended, outcome: Outcome::Committed }
}

fn deletion(number: u64, sent: Time, ended: Time) -> Write {
    Write { deletes: true, ..write(number, sent, ended) }
}

/// A read of key 1 on node 0.
fn read(mode: Mode, start: Time, seen: impl Into<Option<u64>>) -> Read {
    let seen = seen.into().map(v);
    Read { node: 0, key: 1, mode, start, end: start + 5, seen, loaded: None, snapshot: None }
}

fn history(writes: &[Write], reads: &[Read]) -> History {
    History { writes: writes.to_vec(), reads: reads.to_vec(), notes: Vec::new() }
}

fn rules(history: &History) -> Vec<Rule> {
    let report = check(history, BOUND);
    for violation in &report.violations {
        let times: Vec<_> = violation.story.iter().map(|(at, _)| at).collect();
        assert!(times.is_sorted(), "a story is told in order: {violation}");
        assert!(!violation.story.is_empty(), "{violation}");
    }
    report.violations.iter().map(|violation| violation.rule).collect()
}

fn three() -> Vec<Write> {
    vec![write(1, 0, 0), write(2, 1000, 1010), write(3, 2000, 2010)]
}

#[test]
fn what_is_read_was_written_and_not_rolled_back_and_not_later() {
    let mut writes = three();
    writes.push(Write { outcome: Outcome::RolledBack, ..write(4, 2500, 2600) });
    let of = |seen| rules(&history(&writes, &[read(Mode::Any, 2700, seen)]));
    assert_eq!(of(3), []);
    assert_eq!(of(4), [Rule::Written]);
    assert_eq!(of(9), [Rule::Written]);
    assert_eq!(rules(&history(&three(), &[read(Mode::Any, 1990, 3)])), [Rule::NoFuture]);
    assert_eq!(rules(&history(&three(), &[read(Mode::Any, 1996, 3)])), [], "sent while the read ran");
}

#[test]
fn each_freshness_has_its_bound() {
    let of = |mode, start| rules(&history(&three(), &[read(mode, start, 2)]));
    assert_eq!(of(Mode::Coherent, 2110), [], "visible for 100");
    assert_eq!(of(Mode::Coherent, 2111), [Rule::Fresh]);
    let within = Mode::Within(std::time::Duration::from_nanos(10));
    assert_eq!(of(within, 2020), []);
    assert_eq!(of(within, 2021), [Rule::Fresh]);
    assert_eq!(of(Mode::Fenced, 2010), [], "the commit had not returned before the read began");
    assert_eq!(of(Mode::Fenced, 2011), [Rule::Fresh]);
    assert_eq!(of(Mode::Any, 9999), []);
}

#[test]
fn a_token_is_a_floor_and_knows_keys_that_its_transaction_did_not_touch() {
    let of = |xid, seen| rules(&history(&three(), &[read(Mode::AtLeast(xid), 2001, seen)]));
    assert_eq!(of(3, 3), []);
    assert_eq!(of(3, 2), [Rule::Token]);
    assert_eq!(of(77, 2), []);
}

#[test]
fn what_a_node_had_applied_is_a_floor_on_that_node() {
    let mut all = history(&three(), &[read(Mode::Coherent, 2030, 2)]);
    all.notes.push((1, 2020, Noted::Applied { xid: 3, keys: Some(vec![1]) }));
    assert_eq!(rules(&all), [], "another node");
    all.notes.push((0, 2025, Noted::Applied { xid: 3, keys: Some(vec![2]) }));
    assert_eq!(rules(&all), [], "another key");
    all.notes.push((0, 2030, Noted::Applied { xid: 3, keys: None }));
    assert_eq!(rules(&all), [], "not before the read began");
    all.notes.push((0, 2029, Noted::Applied { xid: 3, keys: None }));
    assert_eq!(rules(&all), [Rule::Applied]);
}

#[test]
fn reads_of_one_node_do_not_go_back_and_fenced_ones_of_no_node() {
    let back = [read(Mode::Coherent, 2005, 3), read(Mode::Coherent, 2015, 2)];
    assert_eq!(rules(&history(&three(), &back)), [Rule::Monotonic]);
    let overlapping = [read(Mode::Coherent, 2005, 3), read(Mode::Coherent, 2009, 2)];
    assert_eq!(rules(&history(&three(), &overlapping)), []);
    let elsewhere = |mode| [read(mode, 1996, 3), Read { node: 1, ..read(mode, 2002, 2) }];
    assert_eq!(rules(&history(&three(), &elsewhere(Mode::Coherent))), []);
    assert_eq!(rules(&history(&three(), &elsewhere(Mode::Fenced))), [Rule::Linearizable]);
    let old = [read(Mode::Coherent, 2005, 3), read(Mode::Any, 2015, 2), read(Mode::Coherent, 2025, 3)];
    assert_eq!(rules(&history(&three(), &old)), [], "whoever asks for old rows gets them");
}

#[test]
fn no_row_is_a_deletion_that_is_late_enough() {
    let writes = [deletion(1, 100, 110), write(2, 200, 210), deletion(3, 300, 310), write(4, 400, 410)];
    let of = |mode, start| rules(&history(&writes, &[read(mode, start, None)]));
    assert_eq!(of(Mode::Fenced, 50), [], "never written yet");
    assert_eq!(of(Mode::Fenced, 150), []);
    assert_eq!(of(Mode::Fenced, 250), [Rule::Fresh], "version 2 was there, and 3 is to come");
    assert_eq!(of(Mode::Fenced, 296), [], "3 is sent meanwhile");
    assert_eq!(of(Mode::Fenced, 411), [Rule::Fresh]);
    // The earliest that will do counts for those after it: 1, and not 3.
    let then = [read(Mode::Coherent, 301, None), read(Mode::Coherent, 307, 2)];
    assert_eq!(rules(&history(&writes, &then)), [], "the first may have read before version 2");
    let applied = vec![(0, 301, Noted::Applied { xid: 3, keys: None })];
    let then = [read(Mode::Coherent, 302, None), read(Mode::Any, 303, 2), read(Mode::Coherent, 308, 2)];
    let all = History { notes: applied, ..history(&writes, &then) };
    assert_eq!(rules(&all), [Rule::Applied, Rule::Monotonic]);
}

#[test]
fn a_row_that_was_there_from_the_start_is_not_absent() {
    assert_eq!(rules(&history(&three(), &[read(Mode::Any, 500, None)])), [], "an answer to nothing in particular");
    assert_eq!(rules(&history(&three(), &[read(Mode::Fenced, 500, None)])), [Rule::Fresh]);
}

#[test]
fn a_snapshot_is_of_one_moment_and_shows_whole_transactions() {
    let other = |number, xid, sent, ended| Write { key: 2, xid, ..write(number, sent, ended) };
    let writes = [
        write(1, 0, 0),
        other(1, 1, 0, 0),
        write(2, 100, 110),
        other(2, 22, 200, 210),
        write(3, 300, 310),
        other(3, 3, 300, 310),
    ];
    let of = |one: u64, two: u64| {
        let one = Read { end: 400, snapshot: Some(1), ..read(Mode::Any, 90, one) };
        let two = Read { key: 2, end: 400, snapshot: Some(1), ..read(Mode::Any, 90, two) };
        rules(&history(&writes, &[one, two]))
    };
    assert_eq!(of(1, 1), []);
    assert_eq!(of(2, 2), []);
    assert_eq!(of(3, 3), []);
    assert_eq!(of(1, 2), [Rule::Snapshot], "when key 2 got version 2, key 1 had version 2");
    assert_eq!(of(3, 2), [Rule::Snapshot], "transaction 3 wrote both");
}

#[test]
fn what_was_lost_in_a_crash_ends_when_the_node_has_recovered() {
    let mut writes = three();
    writes.push(Write { outcome: Outcome::Lost { with: 0 }, ..write(4, 2100, 2110) });
    writes.push(Write { version: Version { era: 1, number: 4 }, xid: 4, ..write(4, 5000, 5010) });
    let recovered = vec![(0, 4000, Noted::Coherent { era: 1 })];
    let of = |reads: &[Read]| rules(&History { notes: recovered.clone(), ..history(&writes, reads) });
    assert_eq!(
        of(&[read(Mode::Coherent, 2120, 4), read(Mode::Coherent, 3500, 3)]),
        [],
        "it went back, with the server"
    );
    assert_eq!(of(&[read(Mode::Coherent, 4001, 4)]), [Rule::Lost]);
    assert_eq!(of(&[Read { seen: Some(Version { era: 1, number: 4 }), ..read(Mode::Fenced, 5020, 1) }]), []);
    assert_eq!(of(&[read(Mode::Coherent, 5200, 3)]), [Rule::Fresh]);
}

#[test]
fn what_was_loaded_before_a_gap_is_not_served_after_it() {
    let of = |mode, loaded| {
        let read = Read { loaded: Some(loaded), ..read(mode, 3000, 3) };
        rules(&History { notes: vec![(0, 2900, Noted::Gap { since: 2800 })], ..history(&three(), &[read]) })
    };
    assert_eq!(of(Mode::Coherent, 2850), []);
    assert_eq!(of(Mode::Coherent, 2750), [Rule::Gap]);
    assert_eq!(of(Mode::Any, 2750), []);
}

#[test]
fn what_is_held_when_all_is_quiet_equals_the_table() {
    let of = |writes: &[Write], seen: Option<u64>| {
        let held = Noted::Holds { key: 1, seen: seen.map(v) };
        rules(&History { notes: vec![(0, 9000, held)], ..history(writes, &[]) })
    };
    assert_eq!(of(&three(), Some(3)), []);
    assert_eq!(of(&three(), Some(2)), [Rule::Quiet]);
    assert_eq!(of(&three(), None), [Rule::Quiet]);
    let mut gone = three();
    gone.push(deletion(4, 3000, 3010));
    assert_eq!(of(&gone, None), []);
    assert_eq!(of(&gone, Some(3)), [Rule::Quiet]);
}

#[test]
fn a_report_says_what_was_tried() {
    let report = check(&history(&three(), &[read(Mode::Coherent, 2200, 3), read(Mode::Coherent, 2300, 3)]), BOUND);
    assert_eq!((report.reads, report.violated), (2, 0));
    assert_eq!(report.tried, BTreeMap::from([(Rule::Fresh, 2), (Rule::Monotonic, 1)]));
}
