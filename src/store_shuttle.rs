//! The store under the model checker: readers, loads, invalidations, clears and gaps in every order that a
//! scheduler can choose, on the real quick_cache.
//!
//! The world is a database of versions and a channel. A version is visible before its message can be received,
//! as Postgres has it. Checked in every schedule:
//!
//! * no read returns a version older than one whose message had been applied when the read began (I2);
//! * a read that begins after another of the same key ended never returns an older version, also if it may be
//!   answered by what a gap has put out of service;
//! * a read that asks for what is current while the gate is closed returns nothing older than the database was when it
//!   began (X4);
//! * when all is quiet and the channel is drained, whatever is held equals the database (I1);
//! * nobody waits for ever (the model checker reports a deadlock);
//! * at the end the store is at rest (`store/whole.rs`): no flight, no runner, the index of hashes is what is held, and the
//!   counters add up.
//!
//! Run: `RUSTFLAGS="--cfg shuttle" cargo test --lib --profile explore shuttle`. `SHUTTLE_ITERATIONS` sets the number of schedules; a
//! failure prints its schedule, and `SHUTTLE_SCHEDULE=` with that text, and the name of the test, plays it again.

use std::{collections::VecDeque as Deque, time::Duration};

use shuttle::{future::block_on, rand::Rng, thread};

use super::*;
use crate::{
    change::{Change, Rows},
    coherence::Boot,
    depends::By,
    error::{Error, Kind},
    hashed::Secret,
    source::{Received, Stamp},
    tables::{On, Tables, Trust},
    tags::Tag,
};

const KEYS: usize = 2;

const OURS: Origin = Origin {
    stamp: Stamp { incarnation: None, dirty: false, lsn: 7, saw: None },
    ours: true,
    at: Tenths::BOOT,
    ended: Boot::ZERO,
};

struct World {
    store: Arc<Store<i64, u64>>,
    tables: Tables,
    database: Mutex<[u64; KEYS]>,
    channel: Mutex<Channel>,
    applied: Mutex<[u64; KEYS]>,
    returned: Mutex<[u64; KEYS]>,
    /// Of the runners. They go on for a moment after they have answered.
    tasks: Mutex<Vec<thread::JoinHandle<()>>>,
}

#[derive(Default)]
struct Channel {
    listening: bool,
    messages: Deque<(Change, [u64; KEYS])>,
}

/// What happens beside the reads.
#[derive(Clone, Copy)]
struct Plan {
    capacity: usize,
    clears: bool,
    gaps: bool,
    /// Some readers take what a gap has put out of service, and some ask for what is current.
    moods: bool,
    /// Messages carry hashes, and the index of hashes is swept.
    hashed: bool,
    /// What is held is read again, and expires, and is looked for.
    ages: bool,
    /// Rows that were read without the store are put in.
    puts: bool,
    /// Messages say nothing of the keys of entries: those are tagged with the rows that they are made of.
    tagged: bool,
    /// Loads fail, runners die and callers are cancelled, now and then.
    accidents: bool,
}

/// What a reader asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mood {
    Coherent,
    Stale,
    Current,
}

impl World {
    fn new(plan: Plan) -> Arc<Self> {
        let hashed = plan.hashed.then(|| Hashed::new(Secret::new(b"secret")));
        let limits = Limits { runners_max: 2, batch_max: 2 };
        let store = Store::new(Bounds::rows::<i64, u64>(plan.capacity), limits, hashed);
        let ttl = plan.ages.then_some(Duration::from_secs(1));
        let store = Arc::new(store.expiring(Expiry { ttl, ..Expiry::default() }));
        let world = Self {
            store: Arc::clone(&store),
            tables: Tables::default(),
            database: Mutex::new([1; KEYS]),
            channel: Mutex::new(Channel { listening: true, ..Channel::default() }),
            applied: Mutex::new([1; KEYS]),
            returned: Mutex::new([0; KEYS]),
            tasks: Mutex::new(Vec::new()),
        };
        world.tables.set_coherent(true);
        let by = if plan.tagged { By::Tagged } else { By::Key };
        if plan.tagged {
            store.tag();
        }
        let on = On { table: "t".into(), trust: Trust::default(), by };
        world.tables.add_on("cache", vec![on], &(store as Arc<dyn Member>));
        Arc::new(world)
    }

    fn write(&self, key: usize, whole_table: bool) {
        let versions = {
            let mut database = lock(&self.database);
            database[key] += 1;
            *database
        };
        let mut known = [0; KEYS];
        let rows = if whole_table {
            known[key] = versions[key];
            Rows::All
        } else {
            known[key] = versions[key];
            let key = i64::try_from(key).unwrap();
            let keys = || Rows::Keys(vec![RowKey::new(&key.to_parts())]);
            self.store.hashed().map_or_else(keys, |hashed| hashed.rows(&key))
        };
        let mut channel = lock(&self.channel);
        if channel.listening {
            channel.messages.push_back((Change::requested("t", rows), known));
        }
    }

    /// Applies one message. Returns whether there was one.
    fn apply(&self) -> bool {
        let Some((change, versions)) = lock(&self.channel).messages.pop_front() else {
            return false;
        };
        self.tables.apply(&change);
        let mut applied = lock(&self.applied);
        for (applied, version) in applied.iter_mut().zip(versions) {
            *applied = version.max(*applied);
        }
        true
    }

    /// The line is lost, and found again: what was sent in between is lost.
    fn gap(&self) {
        self.tables.set_coherent(false);
        lock(&self.channel).listening = false;
        lock(&self.channel).messages.clear();
        thread::yield_now();
        lock(&self.channel).listening = true;
        self.tables.set_coherent(true);
    }

    fn run(self: &Arc<Self>, mut runner: Runner<i64, u64>, accidents: bool) {
        while let Some(keys) = runner.take() {
            let keys = keys.to_vec();
            let luck = if accidents { shuttle::rand::thread_rng().gen_range(0..8) } else { 7 };
            match luck {
                0 => runner.fail(&Error::new(Kind::Timeout, "accident")),
                1 => return,
                _ => {
                    let rows = *lock(&self.database);
                    thread::yield_now();
                    let made = |key: &i64| {
                        let tags = if self.store.tags().is_some() { vec![Tag::row("t", key)] } else { Vec::new() };
                        (Ok(Some(rows[usize::try_from(*key).unwrap()])), Received { tags, ..Received::default() })
                    };
                    runner.finish_received(keys.iter().map(made), OURS);
                }
            }
        }
    }

    /// Nothing is under way any more.
    fn assert_at_rest(&self) {
        let tasks = std::mem::take(&mut *lock(&self.tasks));
        for task in tasks {
            task.join().unwrap();
        }
        self.store.assert_at_rest();
    }

    /// Somebody reads a row by himself, and puts it in.
    fn put(&self, key: usize) {
        let name = i64::try_from(key).unwrap();
        let drawn = self.store.draw(&name);
        let row = lock(&self.database)[key];
        thread::yield_now();
        self.store.put(&name, drawn, Some(row), OURS);
    }

    fn get(self: &Arc<Self>, key: usize, mood: Mood, accidents: bool) {
        let mut at_least = lock(&self.applied)[key].max(lock(&self.returned)[key]);
        let current = lock(&self.database)[key];
        if mood == Mood::Current && !self.store.is_coherent() {
            at_least = at_least.max(current);
        }
        let name = i64::try_from(key).unwrap();
        let held = if mood == Mood::Stale { self.store.lookup_stale(&name) } else { self.store.lookup(&name) };
        let entry = held.map_or_else(
            || {
                let mut wanted = Vec::new();
                let join = if mood == Mood::Current { Join::Coherent } else { Join::Running };
                let asked = self.store.ask(&name, join, &mut wanted);
                for runner in self.store.enqueue(wanted) {
                    let world = Arc::clone(self);
                    let task = thread::spawn(move || world.run(runner, accidents));
                    lock(&self.tasks).push(task);
                }
                match asked {
                    Asked::Hit(entry) => Some(entry),
                    Asked::Wait(_) if accidents && shuttle::rand::thread_rng().gen_range(0..8) == 0 => None,
                    Asked::Wait(wait) => {
                        block_on(wait).expect("every caller is answered").ok().map(|answer| answer.entry)
                    }
                }
            },
            Some,
        );
        let Some(version) = entry.map(|entry| entry.value.expect("rows are never deleted here")) else {
            return;
        };
        assert!(version >= at_least, "key {key}: read {version} after {at_least} was applied or returned");
        let mut returned = lock(&self.returned);
        returned[key] = returned[key].max(version);
    }
}

fn scenario(plan: Plan) {
    let world = World::new(plan);
    let mut threads = Vec::new();
    for reader in 0..3 {
        let world = Arc::clone(&world);
        threads.push(thread::spawn(move || {
            for turn in 0..2 {
                let mood = match (plan.moods, reader) {
                    (true, 1) => Mood::Stale,
                    (true, 2) => Mood::Current,
                    _ => Mood::Coherent,
                };
                world.get((reader + turn) % KEYS, mood, plan.accidents);
            }
        }));
    }
    let writer = Arc::clone(&world);
    threads.push(thread::spawn(move || {
        writer.write(0, false);
        writer.write(1, plan.clears);
        writer.write(0, false);
    }));
    let applier = Arc::clone(&world);
    threads.push(thread::spawn(move || {
        for _ in 0..3 {
            applier.apply();
            thread::yield_now();
        }
    }));
    if plan.gaps {
        let world = Arc::clone(&world);
        threads.push(thread::spawn(move || world.gap()));
    }
    if plan.ages {
        let world = Arc::clone(&world);
        threads.push(thread::spawn(move || {
            let mut wanted = Vec::new();
            let _answers = [0, 1].map(|key| world.store.reload(&Due::Early(key), &mut wanted));
            for runner in world.store.enqueue(wanted) {
                world.run(runner, plan.accidents);
            }
            // All loads began at boot.
            Member::tick(&*world.store, Tenths::new(10));
            world.store.reclaim();
            Member::tick(&*world.store, Tenths::BOOT);
        }));
    }
    if plan.puts {
        let world = Arc::clone(&world);
        threads.push(thread::spawn(move || {
            for key in [0, 0, 1] {
                world.put(key);
            }
        }));
    }
    if plan.hashed || plan.tagged {
        let world = Arc::clone(&world);
        threads.push(thread::spawn(move || {
            for _ in 0..2 {
                if plan.hashed {
                    world.store.sweep()
                } else {
                    world.store.sweep_tags()
                };
                thread::yield_now();
            }
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
    while world.apply() {}
    let database = *lock(&world.database);
    for (key, version) in database.iter().enumerate() {
        if let Some(entry) = world.store.peek(&i64::try_from(key).unwrap()) {
            assert_eq!(entry.value, Some(*version), "key {key} is stale for ever");
            assert_eq!(world.store.tags_of(&i64::try_from(key).unwrap()).is_empty(), !plan.tagged);
        }
        world.get(key, Mood::Coherent, false);
    }
    world.assert_at_rest();
    // A tag does not say when it changed last but one, so that loads are repeated that need not be.
    if plan.capacity >= KEYS && !plan.clears && !plan.gaps && !plan.ages && !plan.accidents && !plan.tagged {
        // Each key: one load for the first reader, and one after each of its changes.
        let loads = world.store.counters.snapshot().loads;
        assert!(loads <= 2 + 3, "{loads} loads of two keys that changed three times");
    }
}

fn check(plan: Plan) {
    explore(move || scenario(plan));
}

/// Plays a scenario in many schedules, or in the one that is asked for.
fn explore(scenario: impl Fn() + Clone + Send + Sync + 'static) {
    if let Ok(schedule) = std::env::var("SHUTTLE_SCHEDULE") {
        return shuttle::replay(scenario, schedule.trim());
    }
    shuttle::check_random(scenario.clone(), iterations());
    shuttle::check_pct(scenario, iterations(), 3);
}

fn iterations() -> usize {
    std::env::var("SHUTTLE_ITERATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000)
}

const CALM: Plan = Plan {
    capacity: 8,
    clears: false,
    gaps: false,
    moods: false,
    hashed: false,
    ages: false,
    puts: false,
    tagged: false,
    accidents: false,
};

#[test]
fn shuttle_reads_against_changes() {
    check(CALM);
}

#[test]
fn shuttle_reads_against_age() {
    check(Plan { ages: true, ..CALM });
}

#[test]
fn shuttle_reads_against_age_and_gaps_and_accidents() {
    check(Plan { ages: true, hashed: true, gaps: true, accidents: true, ..CALM });
}

#[test]
fn shuttle_reads_against_rows_that_are_put_in() {
    check(Plan { puts: true, ..CALM });
}

#[test]
fn shuttle_reads_against_puts_and_hashes_and_gaps() {
    check(Plan { puts: true, hashed: true, gaps: true, clears: true, ..CALM });
}

#[test]
fn shuttle_reads_against_hashes() {
    check(Plan { hashed: true, ..CALM });
}

#[test]
fn shuttle_reads_against_hashes_and_evictions() {
    check(Plan { hashed: true, capacity: 1, ..CALM });
}

#[test]
fn shuttle_reads_against_hashes_and_accidents() {
    check(Plan { hashed: true, gaps: true, accidents: true, ..CALM });
}

#[test]
fn shuttle_reads_against_tags() {
    check(Plan { tagged: true, ..CALM });
}

#[test]
fn shuttle_reads_against_tags_and_gaps_and_evictions() {
    check(Plan { tagged: true, gaps: true, capacity: 1, ..CALM });
}

#[test]
fn shuttle_reads_against_tags_and_age_and_accidents() {
    check(Plan { tagged: true, ages: true, accidents: true, ..CALM });
}

/// The race that is told in `store/sweep.rs`: a key that was forgotten is about to leave the index, and is asked for.
#[test]
fn shuttle_a_sweep_against_a_read_and_a_change() {
    let scenario = || {
        let world = World::new(Plan { hashed: true, ..CALM });
        world.get(0, Mood::Coherent, false);
        world.write(0, false);
        assert!(world.apply());
        let steps: [fn(&Arc<World>); 3] = [
            |world| world.store.sweep(),
            |world| world.get(0, Mood::Coherent, false),
            |world| {
                world.write(0, false);
                world.apply();
            },
        ];
        let threads = steps.map(|step| {
            let world = Arc::clone(&world);
            thread::spawn(move || step(&world))
        });
        for thread in threads {
            thread.join().unwrap();
        }
        let held = world.store.peek(&0).map(|entry| entry.value);
        assert!(held.is_none() || held == Some(Some(3)), "{held:?} is stale for ever");
        world.get(0, Mood::Coherent, false);
    };
    explore(scenario);
}

/// A load has read the old row when a reader's own query finds the new one and puts it in (X2, told in `store/ticket.rs`).
#[test]
fn shuttle_a_row_that_is_put_in_against_a_load() {
    let scenario = || {
        let world = World::new(CALM);
        let steps: [fn(&Arc<World>); 3] = [
            |world| world.get(0, Mood::Coherent, false),
            |world| {
                world.write(0, false);
                world.put(0);
            },
            |world| {
                world.get(0, Mood::Coherent, false);
                world.get(0, Mood::Coherent, false);
            },
        ];
        let threads = steps.map(|step| {
            let world = Arc::clone(&world);
            thread::spawn(move || step(&world))
        });
        for thread in threads {
            thread.join().unwrap();
        }
        world.get(0, Mood::Coherent, false);
        assert!(world.apply());
        world.get(0, Mood::Coherent, false);
    };
    explore(scenario);
}

/// A failure is worth something only if it can be played again.
#[test]
fn shuttle_a_schedule_that_fails_fails_again() {
    let lost_update = || {
        let sum = Arc::new(AtomicU64::new(0));
        let threads = [1, 2].map(|n| {
            let sum = Arc::clone(&sum);
            thread::spawn(move || sum.store(sum.load(Ordering::SeqCst) + n, Ordering::SeqCst))
        });
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(sum.load(Ordering::SeqCst), 3, "an update is lost");
    };
    let directory = tempfile::tempdir().unwrap();
    let mut config = shuttle::Config::new();
    config.failure_persistence = shuttle::FailurePersistence::File(Some(directory.path().to_owned()));
    let search = || {
        let scheduler = shuttle::scheduler::RandomScheduler::new(1000);
        shuttle::Runner::new(scheduler, config.clone()).run(lost_update);
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(search)).expect_err("found");
    let file = std::fs::read_dir(directory.path()).unwrap().next().expect("a schedule").unwrap();
    let schedule = std::fs::read_to_string(file.path()).unwrap();
    std::panic::catch_unwind(|| shuttle::replay(lost_update, &schedule)).expect_err("found again");
}

#[test]
fn shuttle_reads_against_clears() {
    check(Plan { clears: true, ..CALM });
}

#[test]
fn shuttle_reads_against_gaps() {
    check(Plan { gaps: true, ..CALM });
}

#[test]
fn shuttle_old_and_current_reads_against_gaps() {
    check(Plan { gaps: true, moods: true, ..CALM });
}

#[test]
fn shuttle_reads_against_accidents() {
    check(Plan { accidents: true, ..CALM });
}

#[test]
fn shuttle_reads_against_evictions() {
    check(Plan { capacity: 1, clears: true, ..CALM });
}

#[path = "store_shuttle_lease.rs"]
mod lease;
