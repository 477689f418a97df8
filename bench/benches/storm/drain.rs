//! How fast a node applies what one COMMIT tells.

use std::{
    hash::Hash,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Result, ensure};
use rowcache::{Key, Table, TableOptions};
use rowcache_bench::{
    ground::{Ground, User, holding},
    measure::{Spread, Turns, number, thousands},
    report::{self, Plot, Ratio, Shape},
    suite::Bench,
};
use serde::de::DeserializeOwned;

use crate::{Told, Took, applied, listen, read_again, resident, send};

const BARE: &str = "bare tokio-postgres, serde_json and quick_cache";
/// Keys a second that a node is to apply.
const WANTED: f64 = 2e6;

type Cache<K> = quick_cache::sync::Cache<K, Arc<User>>;

/// What the turns share.
struct Storm<K: Key> {
    url: String,
    users: Table<K, User>,
    bare_url: String,
    bare: Arc<Cache<K>>,
    /// Keys that were removed from it, held or not.
    removed: Arc<AtomicU64>,
    /// The keys of the rows that are held.
    held: Vec<K>,
    messages: Vec<String>,
    /// Keys in them.
    keys: usize,
    all: Mutex<[Vec<Took>; 2]>,
    resident: Mutex<Vec<f64>>,
}

impl<K: Key + Clone + Eq + Hash> Storm<K> {
    async fn turn(&self, way: usize) -> Result<f64> {
        let took = if way == 0 { self.node().await? } else { self.bare().await? };
        let cost = took.from_commit;
        self.all.lock().expect("not poisoned")[way].push(took);
        Ok(cost)
    }

    async fn node(&self) -> Result<Took> {
        read_again(&self.users, &self.held).await?;
        let before = self.users.stats().invalidations;
        self.resident.lock().expect("not poisoned").push(resident()?);
        let began = send(&self.url, &self.messages).await?;
        let took = applied(began, self.keys, || self.users.stats().invalidations - before).await?;
        let left = self.held.iter().filter(|key| self.users.peek(key).is_known()).count();
        ensure!(left == 0, "{left} rows that have changed are held");
        Ok(took)
    }

    async fn bare(&self) -> Result<Took> {
        for (key, id) in self.held.iter().zip(1..) {
            self.bare.insert(key.clone(), Arc::new(User::nth(id)));
        }
        let held = self.bare.len();
        ensure!(held == self.held.len(), "{held} of {} rows are held", self.held.len());
        self.removed.store(0, Ordering::Relaxed);
        let began = send(&self.bare_url, &self.messages).await?;
        let took = applied(began, self.keys, || self.removed.load(Ordering::Relaxed)).await?;
        ensure!(self.bare.is_empty(), "{} rows that have changed are held", self.bare.len());
        Ok(took)
    }
}

/// What was found so far.
pub struct Drains {
    table: report::Table,
    bars: Vec<(String, f64)>,
}

impl Drains {
    pub fn new(rows: usize) -> Self {
        let table = report::Table::new(
            format!("{} changed keys in one commit.", thousands(rows as i64)),
            &[
                "keys",
                "of these held",
                "",
                "messages, MB",
                "ms from COMMIT until all are applied",
                "ms from the first key",
                "keys a second, from the first",
                "RSS before, MB",
                "at its peak",
            ],
        );
        Self { table, bars: Vec::new() }
    }

    pub fn show(self, bench: &mut Bench) {
        bench.table(self.table);
        bench.plot(Plot {
            name: "drain".to_owned(),
            title: "A storm of changes: how fast they are applied".to_owned(),
            unit: "keys a second".to_owned(),
            log: false,
            shape: Shape::Bars(self.bars),
        });
    }

    /// Measures with all rows held, and with every tenth.
    pub async fn run<K>(
        &mut self,
        bench: &mut Bench,
        ground: &Ground,
        (kind, name): (&str, &str),
        keys: &[K],
        messages: &[String],
    ) -> Result<()>
    where
        K: Key + Clone + Eq + Hash + DeserializeOwned + Send + Sync + 'static,
    {
        for (share, every) in [("all", 1), ("a tenth", 10)] {
            let held: Vec<K> = keys.iter().step_by(every).cloned().collect();
            let node = ground.node(5).await?;
            let users = holding(&node, name, TableOptions::default(), &held).await?;
            let bare = Arc::new(Cache::new(2 * held.len()));
            let removed = Arc::new(AtomicU64::new(0));
            let bare_url = ground.server.url("bare");
            let (from, count) = (bare.clone(), removed.clone());
            let hear = move |message: &str| {
                let told: Told<K> = serde_json::from_str(message).expect("triggers send JSON");
                told.k.iter().for_each(|key| drop(from.remove(key)));
                count.fetch_add(told.k.len() as u64, Ordering::Relaxed);
            };
            let listener = listen(&bare_url, hear).await?;
            let storm = Arc::new(Storm {
                url: ground.url(),
                users,
                bare_url,
                bare,
                removed,
                held,
                messages: messages.to_vec(),
                keys: keys.len(),
                all: Mutex::default(),
                resident: Mutex::default(),
            });
            let turns = Turns::wait(bench.rounds(3), 2, |way| {
                let storm = storm.clone();
                async move { storm.turn(way).await }
            })
            .await?;
            node.shutdown().await;
            drop(listener);
            self.found(bench, &storm, kind, share, &turns);
        }
        Ok(())
    }

    fn found<K: Key>(&mut self, bench: &mut Bench, storm: &Storm<K>, kind: &str, share: &str, turns: &Turns) {
        let bytes: usize = storm.messages.iter().map(String::len).sum();
        let all = storm.all.lock().expect("not poisoned");
        let before = Spread::of(storm.resident.lock().expect("not poisoned").iter().copied()).median;
        // The first round does not count.
        let spread = |way: usize, of: &dyn Fn(&Took) -> f64| Spread::of(all[way][1..].iter().map(of));
        let a_second = |took: &Took| storm.keys as f64 / took.from_first.max(1e-3);
        for (n, way) in ["rowcache", BARE].into_iter().enumerate() {
            let megabytes = |bytes: f64| if n == 0 { number(bytes / 1e6) } else { String::new() };
            self.table.row([
                kind.to_owned(),
                share.to_owned(),
                way.to_owned(),
                number(bytes as f64 / 1e6),
                spread(n, &|took| took.from_commit * 1e3).to_string(),
                spread(n, &|took| took.from_first * 1e3).to_string(),
                number(spread(n, &a_second).median),
                megabytes(before),
                megabytes(spread(n, &|took| took.peak).median),
            ]);
            let way = if n == 0 { way } else { "bare" };
            self.bars.push((format!("{way}, {kind}, {share} held"), spread(n, &a_second).median));
        }
        let named = |what: &str| format!("{what}, {kind} keys, {share} held");
        let reached = spread(0, &|took| a_second(took) / WANTED);
        bench.ratio(Ratio::gain(named("changed keys applied a second"), "2,000,000", reached).target(1.0));
        bench.ratio(Ratio::cost(named("time from COMMIT until all is applied"), BARE, turns.ratio(0, 1)));
        let peak = spread(0, &|took| took.peak / before);
        bench.ratio(Ratio::cost(named("RSS at its peak in a storm"), "RSS before", peak));
    }
}
