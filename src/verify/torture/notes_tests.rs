use super::*;
use crate::verify::torture::wire::Written;

const PORT: u16 = 1;
const NEW: u16 = 2;

fn attempt(port: u16, xid: u64, number: u64, ended: Option<Time>) -> Attempt {
    let rows = vec![Written { key: 1, number, deletes: false, undone: false }];
    Attempt { port, xid, sent: number + 1, ended, rolled_back: false, rows, token: None }
}

fn read(asked: Asked, start: Time, seen: u64) -> (NodeId, RawRead) {
    (0, RawRead { key: 1, asked, start, end: start + 1, seen: Some(seen), loaded: Some(start), call: start })
}

fn survivors(history: &[(u64, u64)]) -> Survivors {
    let rows = history.last().map(|(number, _)| (1, *number)).into_iter().collect();
    Survivors { history: history.iter().map(|(number, xid)| (1, *number, false, *xid)).collect(), rows }
}

fn made(notes: Notes, timeline: &Timeline, survivors: &Survivors) -> (History, Vec<String>) {
    history(notes, &[], timeline, survivors, &mut Base::new(), false)
}

fn outcomes(history: &History) -> Vec<(Version, Outcome)> {
    history.writes.iter().map(|write| (write.version, write.outcome)).collect()
}

#[test]
fn what_has_survived_was_committed_though_nobody_said_so() {
    let notes = Notes { attempts: vec![attempt(PORT, 7, 10, None), attempt(PORT, 8, 20, None)], ..Notes::default() };
    let (history, wrong) = made(notes, &Timeline::new(PORT), &survivors(&[(10, 7)]));
    let version = |number| Version { era: 0, number };
    assert_eq!(outcomes(&history), [(version(10), Outcome::Committed), (version(20), Outcome::RolledBack)]);
    assert_eq!(history.writes[0].ended, Time::MAX);
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn a_commit_that_is_gone_was_lost_if_something_crashed_and_is_wrong_if_not() {
    let notes =
        || Notes { attempts: vec![attempt(PORT, 7, 10, Some(12)), attempt(PORT, 9, 50, Some(60))], ..Notes::default() };
    let mut timeline = Timeline::new(PORT);
    let (_, wrong) = made(notes(), &timeline, &survivors(&[(50, 9)]));
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    timeline.begin_era(PORT, 30);
    let (history, wrong) = made(notes(), &timeline, &survivors(&[(50, 9)]));
    assert_eq!(
        outcomes(&history),
        [
            (Version { era: 0, number: 10 }, Outcome::Lost { with: 0 }),
            (Version { era: 1, number: 50 }, Outcome::Committed)
        ]
    );
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn a_table_that_is_not_what_the_notes_say_is_wrong() {
    let notes = Notes { attempts: vec![attempt(PORT, 7, 10, Some(12))], ..Notes::default() };
    let survivors = Survivors { rows: HashMap::from([(1, 11)]), ..survivors(&[(10, 7)]) };
    assert_eq!(made(notes, &Timeline::new(PORT), &survivors).1.len(), 1);
}

#[test]
fn a_token_stands_for_its_transaction_unless_that_was_lost() {
    let mut timeline = Timeline::new(PORT);
    timeline.begin_era(PORT, 30);
    let notes = Notes {
        attempts: vec![attempt(PORT, 7, 10, Some(12)), attempt(PORT, 9, 50, Some(60))],
        reads: vec![read(Asked::AtLeast(10), 15, 10), read(Asked::Own(50), 70, 50)],
        ..Notes::default()
    };
    let (history, _) = made(notes, &timeline, &survivors(&[(50, 9)]));
    let modes: Vec<_> = history.reads.iter().map(|read| read.mode).collect();
    assert_eq!(modes, [Mode::Coherent, Mode::AtLeast(9)]);
}

#[test]
fn only_what_the_clock_thread_answers_for_is_excused_after_a_stop() {
    let mut timeline = Timeline::new(PORT);
    timeline.incidents.stopped.push((0, 100, 200));
    let after = 200 + CLOCK_THREAD_LATE;
    let reads = vec![
        read(Asked::Get, 99, 10),
        read(Asked::Get, 201, 10),
        read(Asked::Fenced, 201, 10),
        read(Asked::Get, after + 1, 10),
    ];
    let notes = |notes| Notes {
        attempts: vec![attempt(PORT, 7, 10, Some(12))],
        reads: reads.clone(),
        notes,
        ..Notes::default()
    };
    let modes = |history: History| history.reads.iter().map(|read| read.mode).collect::<Vec<_>>();
    let (history, _) = made(notes(Vec::new()), &timeline, &survivors(&[(10, 7)]));
    assert_eq!(modes(history), [Mode::Coherent, Mode::Any, Mode::Fenced, Mode::Coherent]);
    let gap = RawNote::Gap { since: 0, why: String::new() };
    let (history, _) = made(notes(vec![(0, 200, gap)]), &timeline, &survivors(&[(10, 7)]));
    assert_eq!(modes(history), [Mode::Coherent, Mode::Coherent, Mode::Fenced, Mode::Coherent]);
}

/// The new primary was promoted at 100, and all nodes had been told at 200.
fn split() -> Timeline {
    let mut timeline = Timeline::new(PORT);
    timeline.begin_era(NEW, 100);
    timeline.is_now(5);
    timeline.incidents.split = Some((100, 200, NEW));
    timeline
}

#[test]
fn while_there_are_two_primaries_nobody_is_right() {
    let notes = Notes {
        attempts: vec![attempt(NEW, 7, 110, Some(120)), attempt(PORT, 7, 130, Some(140))],
        reads: vec![read(Asked::Get, 150, 130), read(Asked::Get, 201, 110)],
        notes: vec![
            (0, 145, RawNote::Applied { xid: 7, keys: None }),
            (0, 210, RawNote::Coherent { incarnation: 5 }),
            (0, 220, RawNote::Applied { xid: 7, keys: None }),
        ],
        ..Notes::default()
    };
    let (history, wrong) = made(notes, &split(), &survivors(&[(110, 7)]));
    assert!(wrong.is_empty(), "{wrong:?}");
    assert_eq!(history.writes[0].ended, 200, "it was not for nodes that had not been told");
    assert_eq!(history.writes[1].outcome, Outcome::Lost { with: 0 });
    assert_eq!((history.reads[0].mode, history.reads[1].mode), (Mode::Any, Mode::Coherent));
    // The first of the two applied the transaction of the former primary.
    assert_eq!(history.notes.len(), 2);
}

#[test]
fn x6_what_another_server_has_must_not_be_kept() {
    let kept = |coherent: Time| {
        let mut late = read(Asked::Get, ANSWERED_LATE + 200, 110);
        late.1.loaded = Some(150);
        let notes = Notes {
            attempts: vec![attempt(NEW, 7, 110, Some(120))],
            reads: vec![late],
            notes: vec![(0, coherent, RawNote::Coherent { incarnation: 5 })],
            ..Notes::default()
        };
        made(notes, &split(), &survivors(&[(110, 7)])).1.len()
    };
    assert_eq!(kept(Time::MAX), 1);
    assert_eq!(kept(180), 0, "it listened to the new one by then");
}
