//! The core's atomics under loom: which orderings the gate and the horizon need. shuttle takes every atomic for sequentially
//! consistent, and sees none of this.
//!
//! Run: `ROWCACHE_TEST_ATOMICS=loom cargo test --all-features --lib loom`. Each test runs every
//! execution that the memory model of C11 allows (`LOOM_MAX_PREEMPTIONS` bounds them, `LOOM_LOG=trace` tells them).
//! `LOOM_CHECKPOINT_FILE` keeps the execution that failed, and continues with it.

use std::time::Duration;

use loom::thread;

use crate::{
    fill::Join,
    gate::{Before, Gate, Words},
    horizon::Horizon,
    source::Stamp,
    store::{Asked, Bounds, Limits, Origin, Store},
    sync::{Arc, AtomicU64, Ordering},
    tables::Member,
};

const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_secs(2);

// loom leaves out executions in which a thread loads another's value and then stores its own (it stays green there with Relaxed).
// So the thread that moves a gate shows every word of it: what it loads is its own.

/// Who finds a gate open knows what was done before it was opened: LISTEN has returned, so that a load may start (I1).
#[test]
fn loom_an_open_gate_shows_what_came_before_it() {
    loom::model(|| {
        let world = Arc::new((Gate::closed(), AtomicU64::new(0)));
        let opener = Arc::clone(&world);
        let opener = thread::spawn(move || {
            let (gate, listening) = &*opener;
            let mut words = Words::default();
            gate.show(words.fresh(false), Before::Forgotten);
            listening.store(1, Ordering::Relaxed);
            gate.show(words.fresh(true), Before::Forgotten);
        });
        let (gate, listening) = &*world;
        if gate.word().is_coherent() {
            assert_eq!(listening.load(Ordering::Relaxed), 1, "a load starts before LISTEN has returned");
        }
        opener.join().unwrap();
    });
}

/// A gap, and its end. Who finds the gate moved finds its entry out of service, and not lost, until the gap is about to end; and not
/// out of service, but gone, after it. Just before its end it may be lost already: who asks then loads, and nobody is served
/// what is from before the gap once the gate is open.
#[test]
fn loom_what_a_gap_left_is_there_until_the_gap_ends_and_no_longer() {
    loom::model(|| {
        let mut words = Words::default();
        let [held, gap, open] = [true, false, true].map(|coherent| words.fresh(coherent));
        let world = Arc::new((Gate::closed(), AtomicU64::new(0)));
        let mover = Arc::clone(&world);
        let mover = thread::spawn(move || {
            let (gate, ending) = &*mover;
            gate.show(held, Before::Forgotten);
            gate.show(gap, Before::Stale);
            ending.store(1, Ordering::Relaxed);
            gate.show(open, Before::Forgotten);
        });
        let (gate, ending) = &*world;
        let shown = gate.word();
        let stale = gate.is_stale(held);
        if shown == open {
            assert!(!stale, "served after the gap");
        }
        if shown == gap && !stale {
            assert_eq!(ending.load(Ordering::Relaxed), 1, "lost in the gap");
        }
        mover.join().unwrap();
    });
}

/// Who knows how far the node is after a gap finds nothing from before it: neither in service nor out of it.
#[test]
fn loom_who_sees_the_horizon_move_sees_the_gate_moved() {
    loom::model(|| {
        let mut words = Words::default();
        let [held, gap, open] = [true, false, true].map(|coherent| words.fresh(coherent));
        let world = Arc::new((Gate::closed(), Horizon::default()));
        let applier = Arc::clone(&world);
        let applier = thread::spawn(move || {
            let (gate, horizon) = &*applier;
            gate.show(held, Before::Forgotten);
            horizon.advance(BEFORE, 10);
            horizon.gap();
            gate.show(gap, Before::Stale);
            gate.show(open, Before::Forgotten);
            horizon.advance(AFTER, 20);
        });
        let (gate, horizon) = &*world;
        if horizon.age(AFTER) == Duration::ZERO {
            assert!(gate.word() != held && !gate.is_stale(held), "an entry passes for fresher than it is");
        }
        applier.join().unwrap();
    });
}

/// As a snapshot of many rows does: the word, then the position; an entry under that word is not held against a position of
/// a later epoch.
#[test]
fn loom_a_position_is_not_of_a_later_epoch_than_the_word() {
    loom::model(|| {
        let mut words = Words::default();
        let [held, gap, open] = [true, false, true].map(|coherent| words.fresh(coherent));
        let world = Arc::new((Gate::closed(), Horizon::default()));
        let applier = Arc::clone(&world);
        let applier = thread::spawn(move || {
            let (gate, horizon) = &*applier;
            gate.show(held, Before::Forgotten);
            horizon.advance(BEFORE, 10);
            horizon.gap();
            gate.show(gap, Before::Stale);
            gate.show(open, Before::Forgotten);
            horizon.advance(AFTER, 20);
        });
        let (gate, horizon) = &*world;
        let word = gate.word();
        let covered = horizon.covered();
        if word == held && covered == 20 {
            assert!(gate.word() != word, "entries of two epochs in one snapshot");
        }
        applier.join().unwrap();
    });
}

/// Two clears, and one task that gives memory back: who is told that another one is at it may rely on it.
#[test]
fn loom_what_the_last_clear_left_is_given_back() {
    loom::model(|| {
        let mut words = Words::default();
        let store: Arc<Store<i64, u64>> =
            Arc::new(Store::new(Bounds::rows::<i64, u64>(100), Limits { runners_max: 1, batch_max: 1 }, None));
        store.show(words.fresh(true), Before::Forgotten);
        let mut wanted = Vec::new();
        assert!(matches!(store.ask(&1, Join::Running, &mut wanted), Asked::Wait(_)));
        let mut runner = store.enqueue(wanted).pop().expect("one");
        runner.take();
        let stamp = Stamp { incarnation: None, dirty: false, lsn: 7, saw: None };
        runner.finish([Ok(Some(1))], Origin { stamp, ours: true, ..Origin::default() });
        assert_eq!((runner.take(), store.stats().entries), (None, 1));

        assert!(store.wants_reclaim());
        let reclaimer = Arc::clone(&store);
        let reclaimer = thread::spawn(move || reclaimer.reclaim());
        store.show(words.fresh(true), Before::Forgotten);
        let again = store.wants_reclaim();
        reclaimer.join().unwrap();
        if again {
            store.reclaim();
        }
        assert_eq!(store.stats().entries, 0, "nobody gives it back before the next clear");
    });
}
