//! How much a store holds, and for how long.

use super::*;
use crate::{
    snapshot::Sight,
    source::{Earlier, Received},
};

/// As [`fixture`], with these bounds, and rows that weigh as many bytes as their text.
fn bounded(bounds: Bounds) -> Fixture {
    let store = Store::new(bounds, Limits { runners_max: 1, batch_max: 10_000 }, None);
    let weigh: Weigh<&'static str> =
        if bounds.bytes.is_some() { Weigh::With(std::sync::Arc::new(|text| text.len())) } else { Weigh::One };
    let mut fixture = Fixture { store: Arc::new(store.weighed(weigh)), words: Words::default() };
    fixture.turn(true);
    fixture
}

const FEW: Bounds = Bounds { rows: 100, bytes: None, absent_bytes: 40_000 };

#[test]
fn a_row_and_its_absence_are_not_held_at_the_same_time() {
    let mut fixture = fixture();
    for [first, second] in [[Some("ada"), None], [None, Some("ada")]] {
        fixture.hold(&[(1, first)]);
        fixture.turn(true);
        fixture.hold(&[(1, second)]);
        assert_eq!(fixture.held(1), Some(second));
        assert_eq!(fixture.store.stats().entries, 1);
        fixture.turn(true);
    }
}

#[test]
fn made_up_keys_evict_no_row_and_fill_no_memory() {
    let fixture = bounded(FEW);
    let rows: Vec<_> = (0..80).map(|key| (key, Some("row"))).collect();
    fixture.hold(&rows);
    let known = fixture.store.stats().entries;
    for made_up in 1000..20_000 {
        fixture.hold(&[(made_up, None)]);
    }
    let stats = fixture.store.stats();
    assert_eq!(stats.entries - stats.absent, known, "rows");
    assert!(stats.absent > 50, "absent rows are held: {stats:?}");
    assert!(stats.bytes <= 40_000, "{stats:?}");
    assert_eq!((stats.not_found, stats.evicted), (19_000, 19_000 - stats.absent));
}

#[test]
fn absent_rows_are_not_held_without_memory_for_them() {
    let fixture = bounded(Bounds { absent_bytes: 0, ..FEW });
    fixture.hold(&[(1, None), (2, Some("ada"))]);
    assert_eq!((fixture.held(1), fixture.held(2)), (None, Some(Some("ada"))));
}

#[test]
fn rows_are_held_by_weight_and_the_too_large_one_harms_nobody() {
    const LONG: &str =
        "a text of which there can be but one: it takes more than half of the space that there is, as can be counted";
    let overhead = held::overhead::<i64, &str>();
    let bytes = 2 * overhead + 3 * LONG.len() / 2;
    let fixture = bounded(Bounds { bytes: Some(bytes), ..FEW });
    fixture.hold(&[(1, Some(LONG))]);
    assert_eq!(fixture.store.stats().bytes, (overhead + LONG.len()) as u64);
    fixture.hold(&[(2, Some(LONG))]);
    let stats = fixture.store.stats();
    assert_eq!((stats.entries, stats.evicted, stats.oversized), (1, 1, 0));
    assert!(stats.bytes <= bytes as u64);
    let huge: &'static str = Box::leak("x".repeat(bytes).into_boxed_str());
    let held_before = (fixture.held(1), fixture.held(2));
    fixture.hold(&[(3, Some(huge))]);
    assert_eq!((fixture.held(1), fixture.held(2), fixture.held(3)), (held_before.0, held_before.1, None));
    let stats = fixture.store.stats();
    assert_eq!((stats.evicted, stats.oversized, stats.published), (2, 1, 3));
}

#[test]
fn an_entry_that_is_replaced_is_not_evicted() {
    let mut fixture = fixture();
    fixture.hold(&[(1, Some("old"))]);
    fixture.turn(true);
    fixture.hold(&[(1, Some("new"))]);
    assert_eq!(fixture.store.stats().evicted, 0);
}

/// As [`fixture`], with entries that live so long. It is a minute after boot, and [`hold`](Fixture::hold) has just begun then.
fn expiring(expiry: Expiry<&'static str>) -> Fixture {
    aging(expiry, None)
}

fn aging(expiry: Expiry<&'static str>, reload: Option<Reload<i64>>) -> Fixture {
    let store = Store::new(Bounds::rows::<i64, &str>(5000), Limits { runners_max: 1, batch_max: 10_000 }, None);
    let mut fixture = Fixture { store: Arc::new(store.expiring(expiry).reloading(reload)), words: Words::default() };
    fixture.turn(true);
    fixture.after(0);
    fixture
}

const START: Duration = Duration::from_mins(1);

/// Of the lots that decide which entries are read again early.
const SEED: u64 = 1;

impl Fixture {
    /// So many tenths of a second after the start. Returns whether somebody should look for what has expired.
    fn after(&self, tenths: u32) -> bool {
        Member::tick(&*self.store, Tenths::at(START).plus(Duration::from_millis(100) * tenths))
    }

    /// As [`hold`](Self::hold), with a load that began at the start.
    fn hold_from_start(&self, rows: &[(i64, Option<&'static str>)]) {
        let (_waits, mut runners) = self.ask(&rows.iter().map(|(key, _)| *key).collect::<Vec<_>>());
        runners[0].take();
        runners[0].finish(rows.iter().map(|(_, row)| Ok(*row)), Origin { at: Tenths::at(START), ..OURS });
        assert_eq!(runners[0].take(), None);
    }
}

#[test]
fn entries_expire_and_are_loaded_again() {
    let fixture = expiring(Expiry { ttl: Some(Duration::from_secs(10)), ..Expiry::default() });
    fixture.hold_from_start(&[(1, Some("ada")), (2, None), (3, Some("eve"))]);
    fixture.after(99);
    assert!((1..=3).all(|key| fixture.store.lookup(&key).is_some()));
    fixture.after(100);
    for key in 1..=3 {
        assert!(fixture.store.lookup(&key).is_none() && fixture.store.lookup_stale(&key).is_none());
        assert_eq!(fixture.held(key), None);
    }
    let (mut waits, mut runners) = fixture.ask(&[1, 2]);
    runners[0].take();
    runners[0].finish([Ok(Some("bob")), Ok(None)], Origin { at: Tenths::at(START + Duration::from_secs(10)), ..OURS });
    assert_eq!((value(&mut waits[0]), fixture.held(1), fixture.held(2)), (Some("bob"), Some(Some("bob")), Some(None)));
    let stats = fixture.store.stats();
    assert_eq!((stats.expired, stats.entries, stats.hits), (2, 3, 3), "nobody has asked for the third one");
}

#[test]
fn what_was_loaded_together_does_not_expire_together() {
    let fixture = expiring(Expiry { ttl: Some(Duration::from_secs(100)), jitter: 0.5, ..Expiry::default() });
    fixture.hold_from_start(&(0..1000).map(|key| (key, Some("row"))).collect::<Vec<_>>());
    let left = |tenths| {
        fixture.after(tenths);
        (0..1000).filter(|key| fixture.held(*key).is_some()).count()
    };
    assert_eq!((left(499), left(1000)), (1000, 0));
    assert!((650..850).contains(&left(625)) && (150..350).contains(&left(875)), "{} {}", left(625), left(875));
}

#[test]
fn what_nobody_uses_expires() {
    let fixture = expiring(Expiry {
        ttl: Some(Duration::from_secs(30)),
        idle: Some(Duration::from_secs(5)),
        ..Expiry::default()
    });
    fixture.hold_from_start(&[(1, Some("used")), (2, Some("looked at")), (3, Some("left alone"))]);
    for tenths in [40, 80, 120] {
        fixture.after(tenths);
        assert!(fixture.store.lookup(&1).is_some(), "after {tenths}");
        assert_eq!(fixture.held(2).is_some(), tenths < 50, "a peek is no use");
    }
    assert_eq!((fixture.held(1).is_some(), fixture.held(3).is_some()), (true, false));
    for tenths in [160, 200, 240, 280] {
        fixture.after(tenths);
        fixture.store.lookup(&1);
    }
    fixture.after(299);
    assert!(fixture.store.lookup(&1).is_some());
    fixture.after(300);
    assert!(fixture.store.lookup(&1).is_none(), "use does not prolong its life");
}

#[test]
fn what_is_used_before_the_clock_has_been_told_does_not_expire_at_once() {
    let fixture = expiring(Expiry { idle: Some(Duration::from_secs(5)), ..Expiry::default() });
    Member::tick(&*fixture.store, Tenths::BOOT);
    fixture.hold_from_start(&[(1, Some("ada"))]);
    assert!(fixture.store.lookup(&1).is_some());
    fixture.after(1);
    assert!(fixture.store.lookup(&1).is_some());
}

#[test]
fn a_row_may_know_how_long_it_lives() {
    let of = |row: &&'static str| match *row {
        "default" => None,
        row => Some(Duration::from_secs(row.parse().expect("a number"))),
    };
    let expiry = Expiry { ttl: Some(Duration::from_secs(10)), of: Some(std::sync::Arc::new(of)), ..Expiry::default() };
    let fixture = expiring(expiry);
    let rows = [(1, Some("default")), (2, Some("3")), (3, Some("60")), (4, Some("0")), (5, None)];
    fixture.hold_from_start(&rows);
    let held = |tenths| {
        fixture.after(tenths);
        (1..=5).filter(|key| fixture.held(*key).is_some()).collect::<Vec<_>>()
    };
    assert_eq!(held(0), [1, 2, 3, 5]);
    assert_eq!((held(29), held(30), held(100), held(600)), (vec![1, 2, 3, 5], vec![1, 3, 5], vec![3], vec![]));
}

#[test]
fn what_has_expired_is_looked_for() {
    let fixture = expiring(Expiry { ttl: Some(Duration::from_secs(50)), ..Expiry::default() });
    fixture.hold_from_start(&[(1, Some("ada")), (2, None)]);
    assert!(!fixture.after(49) && fixture.after(50) && !fixture.after(51), "every tenth of its life");
    fixture.store.reclaim();
    assert_eq!(fixture.store.stats().entries, 2);
    assert!(fixture.after(500));
    fixture.store.reclaim();
    let stats = fixture.store.stats();
    assert_eq!((stats.entries, stats.expired), (0, 2));
    assert!(!expiring(Expiry::default()).after(10_000), "there is nothing to look for");
}

#[test]
fn what_is_used_is_read_again_before_it_expires() {
    let (reload, mut due) = Reload::new(Some(Early::Share(0.8)), false, SEED).expect("wanted");
    let mut fixture = aging(Expiry { ttl: Some(Duration::from_secs(10)), ..Expiry::default() }, Some(reload));
    fixture.hold_from_start(&[(1, Some("old")), (2, Some("unused"))]);
    fixture.after(79);
    fixture.store.lookup(&1);
    assert!(due.try_recv().is_err());
    fixture.after(80);
    for _ in 0..3 {
        assert_eq!(fixture.store.lookup(&1).expect("served").value, Some("old"));
    }
    assert_eq!((due.try_recv(), due.try_recv().is_err()), (Ok(Due::Early(1)), true), "once");
    // That load fails, and the next one is due after half of the time.
    let reload = |key| {
        let mut wanted = Vec::new();
        let answer = fixture.store.reload(&Due::Early(key), &mut wanted).expect("nobody loads it");
        assert!(fixture.store.reload(&Due::Early(key), &mut wanted).is_none(), "one at a time");
        let mut runners = fixture.store.enqueue(wanted);
        runners[0].take();
        (answer, runners)
    };
    let (_answer, mut runners) = reload(1);
    runners[0].fail(&Error::new(Kind::Unavailable, "down"));
    assert!(runners[0].take().is_none());
    fixture.after(89);
    assert!(fixture.store.lookup(&1).is_some() && due.try_recv().is_err());
    fixture.after(90);
    assert!(fixture.store.lookup(&1).is_some());
    assert_eq!(due.try_recv(), Ok(Due::Early(1)));
    // A change during the load voids it, as any.
    let (_answer, mut runners) = reload(1);
    fixture.store.invalidate(&1);
    runners[0].finish([Ok(Some("old"))], OURS);
    assert_eq!((runners[0].take(), fixture.held(1)), (None, None));
    // What a gap has put out of service is not read again: nobody would keep it, and it would be gone.
    fixture.store.show(fixture.words.fresh(false), Before::Stale);
    assert_eq!(fixture.store.lookup_stale(&2).expect("held").value, Some("unused"));
    assert!(due.try_recv().is_err());
    // Nor if the gap came in between.
    let mut wanted = Vec::new();
    assert!(fixture.store.reload(&Due::Early(2), &mut wanted).is_none() && wanted.is_empty());
}

/// `XFetch`: with each of many entries, a hit every tenth of a second until it is read again.
#[test]
fn what_took_long_to_load_is_read_again_early_and_not_all_at_once() {
    // How long before its end each entry was read again, in tenths of a second, if its load took so long.
    let early = |beta, took: u64| {
        let (reload, mut due) = Reload::new(Some(Early::Chance(beta)), false, SEED).expect("wanted");
        let fixture = aging(Expiry { ttl: Some(Duration::from_secs(100)), ..Expiry::default() }, Some(reload));
        let keys: Vec<i64> = (0..1000).collect();
        let (_waits, mut runners) = fixture.ask(&keys);
        runners[0].take();
        let ended = START + Duration::from_millis(took);
        runners[0].finish(keys.iter().map(|_| Ok(Some("slow"))), Origin { at: Tenths::at(START), ended, ..OURS });
        let mut early = HashMap::new();
        for tenth in 0..1000 {
            fixture.after(tenth);
            for key in &keys {
                assert!(fixture.store.lookup(key).is_some(), "served until its end");
            }
            while let Ok(Due::Early(key)) = due.try_recv() {
                // It is due again because that load has not come.
                early.entry(key).or_insert(1000 - tenth);
            }
        }
        let mut early: Vec<u32> = early.into_values().collect();
        early.sort_unstable();
        early
    };
    let mean = |early: &[u32]| early.iter().map(|tenths| f64::from(*tenths)).sum::<f64>() / 1000.0;
    // A load of two seconds, and ten hits a second: that none of them is drawn becomes unlikely seven seconds before the end.
    let slow = early(1.0, 2000);
    assert_eq!(slow.len(), 1000, "nobody waits");
    assert!((60.0..82.0).contains(&mean(&slow)), "{}", mean(&slow));
    let (last, first) = (slow[0], slow[999]);
    assert!((5..50).contains(&last) && (130..300).contains(&first), "{first} {last}");
    let slower = early(2.0, 2000);
    assert!(mean(&slower) > 1.8 * mean(&slow), "{} {}", mean(&slower), mean(&slow));
    assert!(early(1.0, 0).is_empty(), "what is loaded at once needs no time");
}

/// It is as old as it was read by somebody else, and took no longer than to be taken.
#[test]
fn what_came_from_a_tier_ends_with_its_age_and_was_not_slow() {
    let (reload, mut due) = Reload::new(Some(Early::Chance(1.0)), false, SEED).expect("wanted");
    let fixture = aging(Expiry { ttl: Some(Duration::from_secs(100)), ..Expiry::default() }, Some(reload));
    let (_waits, mut runners) = fixture.ask(&[1]);
    runners[0].take();
    let at = Tenths::at(START);
    let saw = Sight { xmin: 1, ended: 1 };
    let earlier = Some(Earlier { saw, lsn: 1, at: at.minus(Duration::from_mins(1)) });
    let received = Received { earlier, ..Received::default() };
    runners[0].finish_received([(Ok(Some("ada")), received)], Origin { at, ended: START, ..OURS });
    for tenth in 0..400 {
        fixture.after(tenth);
        assert!(fixture.store.lookup(&1).is_some() && due.try_recv().is_err(), "{tenth}");
    }
    fixture.after(400);
    assert!(fixture.store.lookup(&1).is_none());
}

/// Asked of what is held and has not been reclaimed yet.
#[test]
fn what_is_served_when_postgres_does_not_answer_is_not_known_to_be_wrong() {
    let rescue = Some(Rescue { max: Duration::from_secs(5), after: None });
    let mut fixture = expiring(Expiry { ttl: Some(Duration::from_secs(10)), rescue, ..Expiry::default() });
    fixture.hold_from_start(&[(1, Some("ada")), (2, Some("bob")), (3, None)]);
    let rescued = |fixture: &Fixture, in_gap| [1, 2, 3].map(|key| fixture.store.rescued(&key, in_gap).is_some());
    fixture.after(149);
    assert!(fixture.store.lookup(&1).is_none(), "it has expired");
    fixture.store.invalidate(&2);
    assert_eq!(rescued(&fixture, false), [true, false, true]);
    assert_eq!(fixture.store.stats().rescued, 2);
    fixture.after(150);
    assert_eq!(rescued(&fixture, true), [false; 3], "too long ago");
    // What a gap has put out of service, for whom it is not too old; what was cleared, for nobody.
    fixture.after(149);
    fixture.store.show(fixture.words.fresh(false), Before::Stale);
    assert_eq!((rescued(&fixture, false), rescued(&fixture, true)), ([false; 3], [true, false, true]));
    for coherent in [false, true] {
        fixture.turn(coherent);
        assert_eq!(rescued(&fixture, true), [false; 3]);
    }
}

#[test]
fn what_was_used_and_has_changed_is_read_again() {
    let (reload, mut due) = Reload::new(None, true, SEED).expect("wanted");
    let fixture = aging(Expiry::default(), Some(reload));
    fixture.hold_from_start(&[(1, Some("used")), (2, Some("unused")), (3, None)]);
    fixture.store.lookup(&1);
    fixture.store.lookup(&3);
    for key in 1..=4 {
        fixture.store.invalidate(&key);
        fixture.store.invalidate(&key);
    }
    assert_eq!((due.try_recv(), due.try_recv()), (Ok(Due::Changed(1)), Ok(Due::Changed(3))));
    assert!(due.try_recv().is_err());
    // By then somebody has asked for one of them.
    fixture.hold_from_start(&[(3, Some("new"))]);
    let mut wanted = Vec::new();
    let answers = [1, 3].map(|key| fixture.store.reload(&Due::Changed(key), &mut wanted));
    assert_eq!((wanted, answers.map(|answer| answer.is_some())), (vec![1], [true, false]));
}

#[test]
fn a_value_that_is_evicted_may_call_into_its_table() {
    struct Caller(std::sync::Weak<Store<i64, Caller>>);

    impl Drop for Caller {
        fn drop(&mut self) {
            if let Some(store) = self.0.upgrade() {
                (0..100).for_each(|key| drop(store.lookup(&key)));
                store.invalidate(&-1);
            }
        }
    }

    let overhead = held::overhead::<i64, Caller>();
    let bounds = Bounds { rows: 100, bytes: Some(40 * overhead), absent_bytes: 0 };
    let weigh = Weigh::With(std::sync::Arc::new(move |_: &Caller| 4 * overhead));
    let store = Store::new(bounds, Limits { runners_max: 1, batch_max: 1 }, None).weighed(weigh);
    let store: Arc<Store<i64, Caller>> = Arc::new(store);
    let mut words = Words::default();
    store.show(words.fresh(true), Before::Forgotten);
    for key in 0..100 {
        let mut wanted = Vec::new();
        store.ask(&key, Join::Running, &mut wanted);
        let mut runners = store.enqueue(wanted);
        runners[0].take();
        runners[0].finish([Ok(Some(Caller(std::sync::Arc::downgrade(&store))))], OURS);
        assert!(runners[0].take().is_none());
    }
    assert!(store.stats().evicted > 80);
}

#[test]
fn what_is_pinned_stays_until_it_is_changed_or_unpinned() {
    let fixture = bounded(FEW);
    let flood = |fixture: &Fixture, from: i64| {
        for key in from..from + 2000 {
            fixture.hold(&[(key, Some("other"))]);
        }
    };
    assert!(fixture.store.pin(&1, true) && !fixture.store.pin(&1, true));
    // What comes first, while there is space, would stay by itself.
    flood(&fixture, 100);
    fixture.hold(&[(1, Some("ada")), (2, Some("bob"))]);
    flood(&fixture, 1000);
    assert_eq!((fixture.held(1), fixture.held(2)), (Some(Some("ada")), None));
    fixture.store.invalidate(&1);
    assert_eq!(fixture.held(1), None);
    fixture.hold(&[(1, Some("eve"))]);
    flood(&fixture, 4000);
    assert_eq!(fixture.held(1), Some(Some("eve")));
    assert!(fixture.store.pin(&1, false) && !fixture.store.pin(&1, false));
    fixture.store.invalidate(&1);
    fixture.hold(&[(1, Some("eve"))]);
    flood(&fixture, 8000);
    assert_eq!(fixture.held(1), None);
}
