//! Whatever goes wrong, no read after a barrier is stale, and none at any time is older than the bound.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use super::*;

const KEYS: u64 = 8;
const NODES: usize = 3;

/// What was there, and what has been read. Rows are the numbers of their versions.
#[derive(Default)]
struct History {
    now: BTreeMap<i64, u64>,
    /// When each version was replaced.
    replaced: BTreeMap<(i64, u64), Instant>,
    /// The last version that was read, by node and key.
    read: BTreeMap<(usize, i64), u64>,
}

/// How much of what is worth a test has happened.
#[derive(Debug, Default)]
struct Counts {
    barriers: usize,
    failed_barriers: usize,
    stale: usize,
    failed_loads: usize,
    gaps: u64,
    voided: u64,
}

type Versions = Table<i64, (i64,)>;

struct Run {
    rows: TestTable<i64, (i64,)>,
    nodes: Vec<(Node, Versions)>,
    history: Mutex<History>,
    counts: Mutex<Counts>,
    bound: Duration,
}

/// Chance.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    fn key(&mut self) -> i64 {
        self.below(KEYS).cast_signed()
    }

    async fn pause(&mut self, most: u64) {
        sleep(ms(self.below(most))).await;
    }
}

impl Run {
    fn history<T>(&self, with: impl FnOnce(&mut History) -> T) -> T {
        with(&mut self.history.lock().expect("nobody panicked"))
    }

    fn count(&self, with: impl FnOnce(&mut Counts)) {
        with(&mut self.counts.lock().expect("nobody panicked"));
    }

    fn write(&self, key: i64) {
        self.history(|history| {
            let version = history.now.entry(key).or_default();
            history.replaced.insert((key, *version), Instant::now());
            *version += 1;
            self.rows.put(key, (version.cast_signed(),));
        });
    }

    /// Reads a key on a node, and holds it against what was there.
    async fn read(&self, node: usize, key: i64, at_least: u64) {
        let began = Instant::now();
        let before = self.history(|history| history.read.get(&(node, key)).copied().unwrap_or_default());
        let Ok(found) = self.nodes[node].1.get(&key).await else {
            return self.count(|counts| counts.failed_loads += 1);
        };
        let version = found.map_or(0, |row| row.0.cast_unsigned());
        assert!(version >= at_least, "after a barrier: version {version} of {key}, and {at_least} was there before");
        assert!(version >= before, "back in time: version {version} of {key} after {before}");
        let replaced = self.history(|history| {
            history.read.entry((node, key)).and_modify(|last| *last = version.max(*last)).or_insert(version);
            history.replaced.get(&(key, version)).copied()
        });
        if let Some(age) = replaced.map(|replaced| began.saturating_duration_since(replaced)) {
            assert!(age <= self.bound, "{key} was read {age:?} after it was replaced");
            self.count(|counts| counts.stale += usize::from(!age.is_zero()));
        }
    }

    /// Reads everything that was there before a barrier.
    async fn barrier(&self, node: usize) {
        let before = self.history(|history| history.now.clone());
        if self.nodes[node].0.barrier().await.is_err() {
            return self.count(|counts| counts.failed_barriers += 1);
        }
        self.count(|counts| counts.barriers += 1);
        for (key, version) in before {
            self.read(node, key, version).await;
        }
    }
}

async fn run(seed: u64, counts: &mut Counts) {
    let db = Database::new();
    let mut config = testing::config();
    config.redundant_listener = seed.is_multiple_of(3);
    (config.beat, config.beat_timeout, config.lease) = (ms(200), ms(600), ms(900));
    let (rows, bound) = (db.table("public.rows"), config.staleness_bound());
    let mut nodes = Vec::new();
    for _ in 0..NODES {
        let node = db.node_with(config.clone()).await.expect("starts");
        let table = node.table("public.rows").await.expect("opens");
        nodes.push((node, table));
    }
    let run = Arc::new(Run { rows, nodes, history: Mutex::default(), counts: Mutex::default(), bound });
    (0..KEYS.cast_signed()).for_each(|key| run.write(key));
    db.chaos(
        Chaos::seeded(seed)
            .delay_messages(Duration::ZERO..=ms(30))
            .duplicate_messages(0.2)
            .lose_messages(0.005)
            .lose_fences(0.01)
            .break_lines(0.005)
            .delay_loads(Duration::ZERO..=ms(40))
            .fail_loads(0.05),
    );
    let mut tasks = tokio::task::JoinSet::new();
    let (writer, mut dice) = (Arc::clone(&run), Dice(seed));
    tasks.spawn(async move {
        for _ in 0..300 {
            writer.write(dice.key());
            dice.pause(30).await;
        }
    });
    for node in 0..NODES {
        for reader in 0..3 {
            let (run, mut dice) = (Arc::clone(&run), Dice(seed ^ (1000 * (10 * node + reader + 1)) as u64));
            tasks.spawn(async move {
                for _ in 0..150 {
                    run.read(node, dice.key(), 0).await;
                    dice.pause(30).await;
                }
            });
        }
        let (run, mut dice) = (Arc::clone(&run), Dice(seed ^ (7 + node) as u64));
        tasks.spawn(async move {
            for _ in 0..15 {
                run.barrier(node).await;
                dice.pause(200).await;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("what it read was right");
    }
    db.calm();
    db.disconnect(); // Some lines may be silent.
    for (at, (node, table)) in run.nodes.iter().enumerate() {
        node.until_coherent().await.expect("comes back");
        let barriers = run.counts.lock().expect("nobody panicked").barriers;
        run.barrier(at).await;
        assert_eq!(run.counts.lock().expect("nobody panicked").barriers, barriers + 1, "nothing is in the way");
        counts.gaps += node.stats().gaps;
        counts.voided += table.stats().voided;
    }
    let Counts { barriers, failed_barriers, stale, failed_loads, .. } =
        std::mem::take(&mut *run.counts.lock().expect("nobody panicked"));
    counts.barriers += barriers;
    counts.failed_barriers += failed_barriers;
    counts.stale += stale;
    counts.failed_loads += failed_loads;
}

#[tokio::test(start_paused = true)]
async fn no_read_after_a_barrier_is_stale() {
    let mut counts = Counts::default();
    for seed in 1..=10 {
        run(seed, &mut counts).await;
    }
    println!("{counts:?}");
    let Counts { barriers, failed_barriers, stale, failed_loads, gaps, voided } = counts;
    assert!(barriers > 100 && failed_barriers > 5 && failed_loads > 50 && gaps > 20, "{counts:?}");
    // Changes were missed before their messages had come, and loads were overtaken by changes.
    assert!(stale > 50 && voided > 50, "{counts:?}");
}

/// A run in one thread is the same each time.
#[test]
fn the_same_seed_makes_the_same_run() {
    let once = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let mut counts = Counts::default();
        runtime.expect("starts").block_on(run(7, &mut counts));
        format!("{counts:?}")
    };
    assert_eq!(once(), once());
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_lost_takes_the_line_with_it() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    read(&table).await;
    db.chaos(Chaos::seeded(1).lose_messages(1.0));
    users.put(42, user("Grace"));
    db.calm();
    assert!(node.barrier().await.is_err_and(|error| error.is_unavailable()), "its fence does not come back");
    assert_eq!(why(&node), Some(Reason::BeatLate));
    assert_eq!(read(&table).await, "Grace");
    node.until_coherent().await.expect("connects again");
    node.barrier().await.expect("the new line carries messages");
}

#[tokio::test(start_paused = true)]
async fn a_fence_that_is_lost_is_a_gap() {
    let (db, _) = ada();
    let node = db.node().await;
    db.chaos(Chaos::seeded(1).lose_fences(1.0));
    assert!(node.barrier().await.is_err_and(|error| error.is_unavailable()));
    assert_eq!(why(&node), Some(Reason::BeatLate));
    db.calm();
    node.until_coherent().await.expect("connects again");
}

#[tokio::test(start_paused = true)]
async fn a_line_that_breaks_with_a_message_is_a_gap_at_once() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    read(&table).await;
    db.chaos(Chaos::seeded(1).break_lines(1.0));
    users.put(42, user("Grace"));
    db.calm();
    assert!(matches!(why(&node), Some(Reason::ConnectionLost(_))));
    assert_eq!(read(&table).await, "Grace");
}

#[tokio::test(start_paused = true)]
async fn a_spare_line_takes_over() {
    let (db, users) = ada();
    let mut config = testing::config();
    config.redundant_listener = true;
    let node = db.node_with(config).await.expect("starts");
    let table = cached(&node).await;
    let mut events = node.subscribe();
    while !node.is_covered() {
        events.recv().await.expect("the node runs");
    }
    read(&table).await;
    // One of the two lines breaks with the message, the other one does not.
    let seed = (0..1000).find(|seed| broken(*seed) == [true, false]).expect("there is one");
    db.chaos(Chaos::seeded(seed).break_lines(0.5));
    users.put(42, user("Grace"));
    db.calm();
    node.barrier().await.expect("a fence comes back");
    assert_eq!(read(&table).await, "Grace");
    assert_eq!(node.stats().gaps, 0);
    let seen = so_far(&mut events).await;
    assert!(seen.iter().any(|event| matches!(event, Event::Handoff(_))), "{seen:?}");
}

/// What a seed does to two messages, found out with two nodes.
fn broken(seed: u64) -> [bool; 2] {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    // In a thread of its own: the caller is in a runtime.
    let find = move || {
        runtime.expect("starts").block_on(async move {
            let (db, users) = ada();
            let nodes = [db.node().await, db.node().await];
            db.chaos(Chaos::seeded(seed).break_lines(0.5));
            users.put(42, user("Grace"));
            nodes.map(|node| why(&node).is_some())
        })
    };
    std::thread::spawn(find).join().expect("ends")
}
