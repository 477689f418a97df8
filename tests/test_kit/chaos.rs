//! Whatever goes wrong, no read after a barrier is stale, and none at any time is older than the bound.

use std::collections::BTreeMap;

use super::*;

/// When each version of a row was replaced.
#[derive(Default)]
struct History {
    /// The version that is there now.
    now: BTreeMap<i64, u64>,
    replaced: BTreeMap<(i64, u64), Instant>,
}

/// How much of what is worth a test has happened.
#[derive(Debug, Default)]
struct Counts {
    barriers: usize,
    failed_barriers: usize,
    stale: usize,
    failed_loads: usize,
    gaps: u64,
}

struct Run {
    rows: TestTable<i64, (i64,)>,
    nodes: Vec<(Node, Table<i64, (i64,)>)>,
    history: History,
    counts: Counts,
    bound: Duration,
    dice: u64,
}

const KEYS: i64 = 8;

impl Run {
    async fn new(db: &Database, seed: u64, config: impl Fn() -> Config) -> Self {
        let rows = db.table::<i64, (i64,)>("public.rows");
        let bound = config().staleness_bound();
        let mut all = Vec::new();
        for _ in 0..3 {
            let node = db.node_with(config()).await.expect("starts");
            let table = node.table("public.rows").await.expect("opens");
            all.push((node, table));
        }
        let (history, counts) = Default::default();
        let mut run = Self { rows, nodes: all, history, counts, bound, dice: seed };
        (0..KEYS).for_each(|key| run.write(key));
        run
    }

    fn below(&mut self, end: u64) -> u64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.dice >> 33) % end
    }

    fn write(&mut self, key: i64) {
        let version = self.history.now.entry(key).or_default();
        self.history.replaced.insert((key, *version), Instant::now());
        *version += 1;
        self.rows.put(key, (version.cast_signed(),));
    }

    /// Reads a key on a node, and holds it against what was there.
    async fn read(&mut self, node: usize, key: i64, at_least: Option<u64>) {
        let began = Instant::now();
        let Ok(found) = self.nodes[node].1.get(&key).await else {
            self.counts.failed_loads += 1;
            return;
        };
        let version = found.map_or(0, |row| row.0.cast_unsigned());
        let at_least = at_least.unwrap_or_default();
        assert!(version >= at_least, "after a barrier: version {version} of {key}, and {at_least} was there before");
        if let Some(replaced) = self.history.replaced.get(&(key, version)) {
            self.counts.stale += 1;
            let age = began.saturating_duration_since(*replaced);
            assert!(age <= self.bound, "{key} was read {age:?} after it was replaced");
        }
    }

    async fn step(&mut self, db: &Database) {
        let node = usize::try_from(self.below(3)).expect("there are three");
        let key = self.below(KEYS.cast_unsigned()).cast_signed();
        match self.below(40) {
            0..10 => self.write(key),
            10..28 => self.read(node, key, None).await,
            28..36 => {
                let now = self.history.now.clone();
                if self.nodes[node].0.barrier().await.is_ok() {
                    self.counts.barriers += 1;
                    for (key, version) in now {
                        self.read(node, key, Some(version)).await;
                    }
                } else {
                    self.counts.failed_barriers += 1;
                }
            }
            36..38 => sleep(ms(self.below(1500))).await,
            38 if self.below(10) == 0 => db.disconnect(),
            _ => sleep(ms(self.below(20))).await,
        }
    }
}

async fn run(seed: u64, counts: &mut Counts) {
    let db = Database::new();
    let config = || {
        let mut config = testing::config();
        config.redundant_listener = seed.is_multiple_of(3);
        (config.beat, config.beat_timeout, config.lease) = (ms(200), ms(600), ms(900));
        config
    };
    let mut run = Run::new(&db, seed, config).await;
    db.chaos(
        Chaos::seeded(seed)
            .delay_messages(Duration::ZERO..=ms(30))
            .duplicate_messages(0.2)
            .lose_messages(0.01)
            .lose_fences(0.01)
            .break_lines(0.01)
            .delay_loads(Duration::ZERO..=ms(40))
            .fail_loads(0.05),
    );
    for _ in 0..400 {
        run.step(&db).await;
    }
    db.calm();
    db.disconnect(); // Some lines may be silent.
    for (node, _) in &run.nodes {
        node.until_coherent().await.expect("comes back");
    }
    for node in 0..run.nodes.len() {
        run.nodes[node].0.barrier().await.expect("nothing is in the way");
        for (key, version) in run.history.now.clone() {
            run.read(node, key, Some(version)).await;
        }
        counts.gaps += run.nodes[node].0.stats().gaps;
    }
    let Counts { barriers, failed_barriers, stale, failed_loads, .. } = run.counts;
    counts.barriers += barriers;
    counts.failed_barriers += failed_barriers;
    counts.stale += stale;
    counts.failed_loads += failed_loads;
}

#[tokio::test(start_paused = true)]
async fn no_read_after_a_barrier_is_stale() {
    let mut counts = Counts::default();
    for seed in 1..=20 {
        run(seed, &mut counts).await;
    }
    println!("{counts:?}");
    let Counts { barriers, failed_barriers, stale, failed_loads, gaps } = counts;
    assert!(barriers > 100 && failed_barriers > 5, "{counts:?}");
    assert!(stale > 5, "changes were missed before their messages came: {counts:?}");
    assert!(failed_loads > 50 && gaps > 20, "{counts:?}");
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
