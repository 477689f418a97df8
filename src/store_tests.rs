//! The store step by step, one thread at a time. What threads do to each other is in `store_shuttle.rs`.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::AtomicBool,
    time::Duration,
};

use super::*;
use crate::{
    change::Rows,
    coherence::Boot,
    error::{Error, Kind},
    gate::Words,
    hashed::Secret,
    source::Stamp,
    stats::SAMPLED,
};

#[path = "store/limits_tests.rs"]
mod limits;

const OURS: Origin = Origin {
    stamp: Stamp { incarnation: None, dirty: false, lsn: 7, saw: None },
    ours: true,
    at: Tenths::BOOT,
    ended: Boot::ZERO,
};

type Wait = oneshot::Receiver<Outcome<&'static str>>;
type Users = Arc<Store<i64, &'static str>>;

struct Fixture {
    store: Users,
    words: Words,
}

fn fixture() -> Fixture {
    let store = Arc::new(Store::new(Bounds::rows::<i64, &str>(100), Limits { runners_max: 2, batch_max: 3 }, None));
    let mut fixture = Fixture { store, words: Words::default() };
    fixture.turn(true);
    fixture
}

impl Fixture {
    /// Moves the gate, as a new epoch or a clear does.
    fn turn(&mut self, coherent: bool) {
        self.store.show(self.words.fresh(coherent), Before::Forgotten);
    }

    /// One caller asks for keys that must all miss.
    fn ask(&self, keys: &[i64]) -> (Vec<Wait>, Vec<Runner<i64, &'static str>>) {
        let mut wanted = Vec::new();
        let waits = keys.iter().map(|key| match self.store.ask(key, Join::Running, &mut wanted) {
            Asked::Wait(wait) => wait,
            Asked::Hit(_) => panic!("{key} was held"),
        });
        let waits = waits.collect();
        (waits, self.store.enqueue(wanted))
    }

    /// Loads these rows, and keeps them.
    fn hold(&self, rows: &[(i64, Option<&'static str>)]) {
        let (_waits, mut runners) = self.ask(&rows.iter().map(|(key, _)| *key).collect::<Vec<_>>());
        let runner = &mut runners[0];
        runner.take();
        runner.finish(rows.iter().map(|(_, row)| Ok(*row)), OURS);
        assert_eq!(runner.take(), None);
    }

    fn held(&self, key: i64) -> Option<Option<&'static str>> {
        self.store.peek(&key).map(|entry| entry.value)
    }
}

/// As [`fixture`], and messages have hashes.
fn hashed_fixture(capacity: usize) -> Fixture {
    let limits = Limits { runners_max: 1, batch_max: 10_000 };
    let store =
        Arc::new(Store::new(Bounds::rows::<i64, &str>(capacity), limits, Some(Hashed::new(Secret::new(b"secret")))));
    let mut fixture = Fixture { store, words: Words::default() };
    fixture.turn(true);
    fixture
}

fn value(wait: &mut Wait) -> Option<&'static str> {
    wait.try_recv().expect("answered").expect("loaded").entry.value
}

#[test]
fn a_load_answers_all_who_joined_and_is_published() {
    let fixture = fixture();
    let (mut first, mut runners) = fixture.ask(&[1]);
    let (mut second, none) = fixture.ask(&[1]);
    assert!(none.is_empty(), "one load per key");
    let runner = &mut runners[0];
    assert_eq!(runner.take(), Some(&[1][..]));
    let (mut third, none) = fixture.ask(&[1]);
    assert!(none.is_empty());
    runner.finish([Ok(Some("ada"))], OURS);
    for wait in [&mut first[0], &mut second[0], &mut third[0]] {
        assert_eq!(value(wait), Some("ada"));
    }
    assert_eq!(runner.take(), None);
    assert_eq!(fixture.held(1), Some(Some("ada")));
    assert!(fixture.store.lookup(&1).is_some());
    let stats = fixture.store.counters.snapshot();
    assert_eq!((stats.gets, stats.hits, stats.led, stats.joined), (4, 1, 1, 2));
    assert_eq!((stats.loads, stats.published, stats.queries), (1, 1, 1));
}

#[test]
fn what_each_look_tells_and_counts() {
    let mut fixture = fixture();
    fixture.hold(&[(1, Some("ada"))]);
    let word = fixture.store.word();
    assert!(fixture.store.is_coherent() && word.is_coherent());
    let looks = |store: &Users| [store.lookup_unaudited(&1), store.peek_used(&1), store.peek(&1)];
    assert!(looks(&fixture.store).iter().all(|entry| entry.as_ref().is_some_and(|entry| entry.value == Some("ada"))));
    assert_eq!(fixture.store.counters.snapshot().hits, 1, "the first of them is a caller's");
    fixture.store.open_seats(1);
    for _ in 0..4 * SAMPLED {
        fixture.store.lookup_unaudited(&1);
    }
    assert!(fixture.store.take_sample().is_empty(), "unaudited");
    fixture.turn(false);
    assert!(!fixture.store.is_coherent() && fixture.store.word() != word);
    assert!(looks(&fixture.store).iter().all(Option::is_none));
}

#[test]
fn an_entry_is_as_old_as_its_load() {
    let fixture = fixture();
    let (_wait, mut runners) = fixture.ask(&[1]);
    runners[0].take();
    runners[0].finish([Ok(Some("ada"))], Origin { at: Tenths::at(Duration::from_secs(90)), ..OURS });
    let entry = fixture.store.peek(&1).expect("held");
    assert_eq!((entry.age(Duration::from_secs(100)), entry.lsn()), (Duration::from_secs(10), 7));
}

#[test]
fn after_a_gap_the_keys_that_were_used_most_come_first() {
    let mut fixture = fixture();
    fixture.hold(&[(1, Some("ada")), (2, Some("bob")), (3, None)]);
    for (key, hits) in [(3, 8), (2, 4)] {
        for _ in 0..hits * SAMPLED {
            fixture.store.lookup(&key);
        }
    }
    assert!(fixture.store.used_before(3).is_empty(), "they are in service");
    let gap = fixture.words.fresh(false);
    fixture.store.show(gap, Before::Stale);
    let used = |max| {
        let keys = fixture.store.used_before(max);
        assert!(keys.is_sorted_by(|one, other| one.0 >= other.0), "{keys:?}");
        let mut keys: Vec<i64> = keys.into_iter().map(|(_, key)| key).collect();
        keys.sort_unstable();
        keys
    };
    assert_eq!(
        (used(0), used(1), used(2), used(3), used(9)),
        (vec![], vec![3], vec![2, 3], vec![1, 2, 3], vec![1, 2, 3])
    );
}

#[test]
fn after_a_gap_the_keys_that_it_took_away_are_known_as_well() {
    let mut words = Words::default();
    let limits = Limits { runners_max: 2, batch_max: 3 };
    let store = Arc::new(Store::new(Bounds::rows::<i64, &str>(100), limits, None).refilling(2));
    store.show(words.fresh(true), Before::Forgotten);
    let fixture = Fixture { store, words };
    let mut words = fixture.words.clone();
    let used = |max| -> Vec<i64> { fixture.store.used_before(max).into_iter().map(|(_, key)| key).collect() };
    let hold_and_use = || {
        fixture.hold(&[(1, Some("ada")), (2, Some("bob")), (3, Some("cyd"))]);
        for key in [1, 1, 3] {
            for _ in 0..4 * SAMPLED {
                fixture.store.lookup(&key);
            }
        }
    };

    hold_and_use();
    // What is cleared while nothing is wrong is not what a gap has cost.
    fixture.store.show(words.fresh(true), Before::Forgotten);
    fixture.store.reclaim();
    hold_and_use();
    fixture.store.show(words.fresh(false), Before::Stale);
    // A load that is not published.
    fixture.hold(&[(1, Some("ada"))]);
    // A restart of the server.
    fixture.store.show(words.fresh(false), Before::Forgotten);
    fixture.store.reclaim();
    assert_eq!(fixture.store.stats().entries, 0);
    fixture.store.show(words.fresh(true), Before::Forgotten);
    assert_eq!(used(2), [1, 3]);
    assert!(used(2).is_empty(), "they have been asked for");

    // Another gap, before they were loaded, but for one.
    fixture.hold(&[(3, Some("cyd"))]);
    fixture.store.show(words.fresh(false), Before::Stale);
    fixture.store.lost_again(&[(9, 1), (5, 3)]);
    fixture.store.show(words.fresh(true), Before::Forgotten);
    // Its memory is being reclaimed just now.
    fixture.store.note_loss(&3);
    assert_eq!(used(2), [1, 3], "each once");
}

#[test]
fn absent_rows_are_held_and_an_invalidation_forgets_them() {
    let fixture = fixture();
    let (mut wait, mut runners) = fixture.ask(&[1]);
    runners[0].take();
    runners[0].finish([Ok(None)], OURS);
    assert_eq!(value(&mut wait[0]), None);
    assert_eq!(fixture.held(1), Some(None));
    fixture.store.invalidate(&1);
    assert_eq!(fixture.held(1), None);
}

#[test]
fn x1_an_invalidation_during_a_load_voids_it_for_those_who_come_later() {
    let fixture = fixture();
    let (mut before, mut runners) = fixture.ask(&[1]);
    let runner = &mut runners[0];
    runner.take();
    fixture.store.invalidate(&1);
    let (mut after, none) = fixture.ask(&[1]);
    assert!(none.is_empty(), "loads of one key do not overlap");
    runner.finish([Ok(Some("old"))], OURS);
    assert_eq!(value(&mut before[0]), Some("old"), "who asked before the change gets what was read");
    assert_eq!(fixture.held(1), None, "it is never cached");
    assert!(after[0].try_recv().is_err(), "who came after waits for a load of its own");
    assert_eq!(runner.take(), Some(&[1][..]));
    runner.finish([Ok(Some("new"))], OURS);
    assert_eq!(value(&mut after[0]), Some("new"));
    assert_eq!(fixture.held(1), Some(Some("new")));
    let stats = fixture.store.counters.snapshot();
    assert_eq!((stats.voided, stats.published, stats.loads), (1, 1, 2));
    assert_eq!((stats.led, stats.joined), (2, 0), "who came after leads the load of its own");
}

#[test]
fn an_invalidation_of_a_queued_key_voids_nothing() {
    let fixture = fixture();
    let (_wait, mut runners) = fixture.ask(&[1]);
    fixture.store.invalidate(&1);
    runners[0].take();
    runners[0].finish([Ok(Some("new"))], OURS);
    assert_eq!(fixture.held(1), Some(Some("new")));
}

#[test]
fn x8_a_load_that_began_before_a_clear_is_not_published_after_it() {
    let mut fixture = fixture();
    let (mut before, mut runners) = fixture.ask(&[1]);
    runners[0].take();
    fixture.turn(true);
    let (mut after, _) = fixture.ask(&[1]);
    runners[0].finish([Ok(Some("old"))], OURS);
    assert_eq!(value(&mut before[0]), Some("old"));
    assert_eq!(fixture.held(1), None);
    assert!(after[0].try_recv().is_err());
    assert_eq!(runners[0].take(), Some(&[1][..]));
}

#[test]
fn a_clear_forgets_what_is_held_at_once() {
    let mut fixture = fixture();
    fixture.hold(&[(1, Some("ada")), (2, None)]);
    fixture.turn(true);
    assert_eq!((fixture.held(1), fixture.held(2)), (None, None));
    assert!(fixture.store.lookup(&1).is_none());
}

#[test]
fn reclaiming_frees_what_a_clear_left_and_nothing_loaded_since() {
    let mut fixture = fixture();
    fixture.hold(&[(1, Some("old")), (2, Some("old"))]);
    fixture.turn(true);
    fixture.hold(&[(1, Some("new"))]);
    assert_eq!(fixture.store.stats().entries, 2);
    fixture.store.reclaim();
    assert_eq!(fixture.store.stats().entries, 1);
    assert_eq!(fixture.held(1), Some(Some("new")));
}

#[test]
fn nothing_is_cached_or_served_while_not_coherent() {
    let mut fixture = fixture();
    fixture.hold(&[(1, Some("ada"))]);
    fixture.turn(false);
    assert_eq!(fixture.held(1), None);
    let (mut first, mut runners) = fixture.ask(&[1]);
    runners[0].take();
    let (mut second, _) = fixture.ask(&[1]);
    runners[0].finish([Ok(Some("bea"))], OURS);
    assert_eq!(value(&mut first[0]), Some("bea"));
    assert_eq!(value(&mut second[0]), Some("bea"), "loads are shared all the same");
    fixture.turn(true);
    assert_eq!(fixture.held(1), None, "and forgotten");
    assert_eq!(fixture.store.counters.snapshot().uncached, 1);
}

#[test]
fn x6_rows_of_another_server_are_returned_but_not_cached() {
    let fixture = fixture();
    let (mut wait, mut runners) = fixture.ask(&[1]);
    runners[0].take();
    runners[0].finish([Ok(Some("ada"))], Origin::default());
    assert_eq!(value(&mut wait[0]), Some("ada"));
    assert_eq!(fixture.held(1), None);
    assert_eq!(fixture.store.counters.snapshot().uncached, 1);
}

#[test]
fn a_failure_goes_to_all_who_joined_and_is_not_cached() {
    let fixture = fixture();
    let (mut first, mut runners) = fixture.ask(&[1]);
    let (mut second, _) = fixture.ask(&[1]);
    runners[0].take();
    runners[0].fail(&Error::new(Kind::Timeout, "too slow"));
    for wait in [&mut first[0], &mut second[0]] {
        assert!(wait.try_recv().expect("answered").is_err_and(|error| error.is_timeout()));
    }
    assert_eq!(runners[0].take(), None);
    let (_wait, runners) = fixture.ask(&[1]);
    assert_eq!(runners.len(), 1, "the next caller starts a new load");
    assert_eq!(fixture.store.counters.snapshot().failed, 1);
}

#[test]
fn x17_a_cancelled_caller_harms_nobody() {
    let fixture = fixture();
    let (cancelled, mut runners) = fixture.ask(&[1]);
    drop(cancelled);
    let (mut other, _) = fixture.ask(&[1]);
    runners[0].take();
    runners[0].finish([Ok(Some("ada"))], OURS);
    assert_eq!(value(&mut other[0]), Some("ada"));
    assert_eq!(fixture.held(1), Some(Some("ada")), "the load was worth finishing");
}

#[test]
fn x17_a_runner_that_is_dropped_tells_everybody() {
    let fixture = fixture();
    let (mut loading, mut runners) = fixture.ask(&[1, 2, 3]);
    runners[0].take();
    let (mut queued, more) = fixture.ask(&[4]);
    drop(more);
    drop(runners);
    for wait in loading.iter_mut().chain(&mut queued) {
        assert!(wait.try_recv().expect("answered").is_err_and(|error| error.is_closed()));
    }
    let (_wait, runners) = fixture.ask(&[1]);
    assert_eq!(runners.len(), 1, "and the store still works");
}

#[test]
fn waiting_keys_go_out_together_within_the_limits() {
    let fixture = fixture();
    let (_wait, mut runners) = fixture.ask(&[1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(runners.len(), 2);
    assert_eq!(runners[0].take(), Some(&[1, 2, 3][..]));
    assert_eq!(runners[1].take(), Some(&[4, 5, 6][..]));
    let (_more, none) = fixture.ask(&[8]);
    assert!(none.is_empty(), "no more than two queries at a time");
    runners[0].finish([Ok(None), Ok(None), Ok(None)], OURS);
    assert_eq!(runners[0].take(), Some(&[7, 8][..]));
}

#[test]
fn runners_come_and_go() {
    let fixture = fixture();
    for key in 0..10 {
        let (_wait, mut runners) = fixture.ask(&[key]);
        assert_eq!(runners.len(), 1, "the one before has retired");
        runners[0].take();
        runners[0].finish([Ok(None)], OURS);
        assert_eq!(runners[0].take(), None);
    }
}

#[test]
fn a_message_forgets_the_keys_that_it_names_and_a_key_of_another_type_is_not_understood() {
    let fixture = fixture();
    fixture.hold(&[(1, Some("ada")), (2, Some("bob"))]);
    let tell = |part| Member::invalidate(&*fixture.store, &[RowKey::new(&[part])], &Change::requested("t", Rows::All));
    assert!(tell(KeyPart::Int(1)) && tell(KeyPart::Int(7)));
    assert_eq!((fixture.held(1), fixture.held(2)), (None, Some(Some("bob"))));
    assert!(!tell(KeyPart::Text("2".into())));
}

#[test]
fn a_value_that_panics_when_it_is_dropped_does_not_end_reclaiming() {
    /// Panics the first time.
    struct Bomb(AtomicBool);

    impl Drop for Bomb {
        fn drop(&mut self) {
            assert!(!self.0.swap(false, std::sync::atomic::Ordering::Relaxed), "the bomb went off");
        }
    }

    let store: Arc<Store<i64, Bomb>> =
        Arc::new(Store::new(Bounds::rows::<i64, Bomb>(100), Limits { runners_max: 1, batch_max: 1 }, None));
    let mut words = Words::default();
    store.show(words.fresh(true), Before::Forgotten);
    let mut wanted = Vec::new();
    store.ask(&1, Join::Running, &mut wanted);
    let mut runners = store.enqueue(wanted);
    runners[0].take();
    runners[0].finish([Ok(Some(Bomb(AtomicBool::new(true))))], OURS);
    store.show(words.fresh(true), Before::Forgotten);
    assert!(store.wants_reclaim());
    catch_unwind(AssertUnwindSafe(|| store.reclaim())).expect_err("the bomb");
    assert!(store.wants_reclaim(), "nobody is at it any more");
}

#[test]
fn a_gap_puts_entries_out_of_service_and_only_those_who_ask_for_old_ones_get_them() {
    let mut fixture = fixture();
    fixture.hold(&[(1, Some("ada")), (2, None)]);
    let gap = fixture.words.fresh(false);
    fixture.store.show(gap, Before::Stale);
    assert!(fixture.store.lookup(&1).is_none() && fixture.store.peek(&1).is_none());
    let stale = |fixture: &Fixture, key| fixture.store.lookup_stale(&key).map(|entry| entry.value);
    assert_eq!((stale(&fixture, 1), stale(&fixture, 2), stale(&fixture, 3)), (Some(Some("ada")), Some(None), None));
    // The gap goes on: another attempt to come back has failed.
    let gap = fixture.words.fresh(false);
    fixture.store.show(gap, Before::Stale);
    fixture.store.reclaim();
    assert_eq!(stale(&fixture, 1), Some(Some("ada")));
    // Whoever reads the database meanwhile has seen the present, after which nobody may get the past.
    let (mut wait, mut runners) = fixture.ask(&[1]);
    runners[0].take();
    runners[0].finish([Ok(Some("eve"))], OURS);
    assert_eq!(value(&mut wait[0]), Some("eve"));
    assert_eq!(stale(&fixture, 1), None);
    let stats = fixture.store.counters.snapshot();
    assert_eq!((stats.stale, stats.uncached), (3, 1));
    fixture.turn(true);
    assert_eq!(stale(&fixture, 2), None, "what was held before the gap is not known to be right");
}

#[test]
fn what_is_cleared_is_not_even_old() {
    let mut fixture = fixture();
    fixture.hold(&[(1, Some("ada"))]);
    let gap = fixture.words.fresh(false);
    fixture.store.show(gap, Before::Stale);
    fixture.turn(false);
    assert!(fixture.store.lookup_stale(&1).is_none());
}

#[test]
fn x4_who_needs_what_is_current_does_not_join_a_load_while_no_message_could_void_it() {
    let mut fixture = fixture();
    fixture.turn(false);
    let (mut before, mut runners) = fixture.ask(&[1]);
    runners[0].take();
    let mut wanted = Vec::new();
    let Asked::Wait(mut current) = fixture.store.ask(&1, Join::Coherent, &mut wanted) else { panic!() };
    let Asked::Wait(mut any) = fixture.store.ask(&1, Join::Running, &mut wanted) else { panic!() };
    assert!(wanted.is_empty(), "loads of one key do not overlap");
    runners[0].finish([Ok(Some("old"))], OURS);
    assert_eq!((value(&mut before[0]), value(&mut any)), (Some("old"), Some("old")));
    assert!(current.try_recv().is_err());
    runners[0].take();
    runners[0].finish([Ok(Some("new"))], OURS);
    assert_eq!(value(&mut current), Some("new"));
}

#[test]
fn a_storm_of_clears_is_reclaimed_by_one() {
    let fixture = fixture();
    assert!(fixture.store.wants_reclaim());
    assert!((0..1000).all(|_| !fixture.store.wants_reclaim()), "one is on its way");
    fixture.store.reclaim();
    assert!(fixture.store.wants_reclaim(), "it has ended");
}

#[test]
fn a_hash_reaches_the_load_and_the_entry_of_its_key_and_no_other() {
    let fixture = hashed_fixture(100);
    let hashed = fixture.store.hashed().expect("hashes");
    let any = Change::requested("t", Rows::All);
    let forget = |key: i64| match hashed.rows(&key) {
        Rows::Hashed { secret, hashes } => fixture.store.invalidate_hashed(&secret, &hashes, &any),
        other => panic!("{other:?}"),
    };
    let (mut before, mut runners) = fixture.ask(&[1, 2]);
    let runner = &mut runners[0];
    runner.take();
    assert!(forget(1) && forget(3), "understood, known or not");
    runner.finish([Ok(Some("old")), Ok(Some("bob"))], OURS);
    assert_eq!(value(&mut before[0]), Some("old"));
    assert_eq!((fixture.held(1), fixture.held(2)), (None, Some(Some("bob"))));
    assert!(forget(2));
    assert_eq!(fixture.held(2), None);
    assert!(!fixture.store.invalidate_hashed("another", &[hashed.hash(&1)], &any), "made by another secret");
}

#[test]
fn a_sweep_leaves_what_is_held_or_under_way() {
    let fixture = hashed_fixture(100);
    let hashed = fixture.store.hashed().expect("hashes");
    let load = |keys: &[i64]| {
        let (_waits, mut runners) = fixture.ask(keys);
        runners[0].take();
        runners[0].finish(keys.iter().map(|_| Ok(Some("row"))), OURS);
        runners.pop().expect("one")
    };
    let few = load(&(0..100).collect::<Vec<_>>());
    assert!(few.sweep().is_none(), "too few to bother");
    drop(few);
    let runner = load(&(100..5000).collect::<Vec<_>>());
    assert_eq!(hashed.len(), 5000);
    runner.sweep().expect("due")();
    assert!(runner.sweep().is_none(), "done");
    drop(runner);
    let held: Vec<i64> = (0..5000).filter(|key| fixture.held(*key).is_some()).collect();
    assert!(!held.is_empty() && held.len() <= 110, "{}", held.len());
    assert_eq!(hashed.len(), held.len());
    assert!(held.iter().all(|key| hashed.find(&hashed.hash(key)) == Some(*key)));

    let (_wait, mut runners) = fixture.ask(&[7000, 7001]);
    runners[0].take();
    for key in &held {
        fixture.store.invalidate(key);
    }
    fixture.store.sweep();
    assert_eq!(hashed.len(), 2, "loads under way");
}
