//! Reads at a fixed pace, whatever becomes of them.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use rand_distr::{Distribution as _, Zipf};
use rowcache::{Lookup, Table};
use rowcache_bench::ground::User;
use tokio::task::{JoinHandle, JoinSet};

/// Reads in a millisecond.
const PACE: usize = 20;
/// Milliseconds over which hits are counted.
const WINDOW: u128 = 20;

/// Which rows are read, some of them far more often than others.
#[derive(Clone)]
pub struct Choice {
    ids: Arc<Vec<i64>>,
    /// Ids in the order in which they are to be read.
    reads: Arc<Vec<i64>>,
}

impl Choice {
    pub fn new(rows: usize) -> Self {
        let mut random = StdRng::seed_from_u64(11);
        let ids: Vec<i64> = (1..=rows as i64).collect();
        // What is read most does not lie together.
        let mut ranked = ids.clone();
        ranked.shuffle(&mut random);
        let ranks = Zipf::new(rows as f64, 0.99).expect("sane");
        let reads = (0..1 << 21).map(|_| ranked[ranks.sample(&mut random) as usize - 1]).collect();
        Self { ids: Arc::new(ids), reads: Arc::new(reads) }
    }

    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// So that it is known what is read most.
    pub async fn warm_up(&self, users: &Table<i64, User>, reads: usize) -> Result<()> {
        let (users, choice) = (users.clone(), self.clone());
        let read = move || choice.reads.iter().cycle().take(reads).filter(|id| is_held(&users, **id)).count();
        let hits = tokio::task::spawn_blocking(read).await?;
        ensure!(hits == reads, "{hits} of {reads} reads are hits");
        Ok(())
    }
}

fn is_held(users: &Table<i64, User>, id: i64) -> bool {
    matches!(black_box(users.try_get(&id)), Lookup::Row(_))
}

/// What the reads of a millisecond came to.
struct Tick {
    at: Instant,
    hits: usize,
}

/// A read of a row that was not held.
struct Miss {
    began: Instant,
    took: Duration,
    failure: Option<String>,
}

pub struct Reader {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Result<Seen>>,
}

/// What a reader has seen.
pub struct Seen {
    ticks: Vec<Tick>,
    misses: Vec<Miss>,
    pub failed: usize,
    pub first_failure: String,
}

impl Reader {
    pub fn start(users: Table<i64, User>, choice: Choice) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(read(users, choice, stop.clone()));
        Self { stop, task }
    }

    pub async fn stop(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?
    }
}

async fn read(users: Table<i64, User>, choice: Choice, stop: Arc<AtomicBool>) -> Result<Seen> {
    let mut pace = tokio::time::interval(Duration::from_millis(1));
    let (mut ticks, mut loads) = (Vec::new(), JoinSet::new());
    for ids in choice.reads.chunks_exact(PACE).cycle() {
        let due = pace.tick().await.into_std();
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let mut hits = 0;
        for id in ids.iter().copied() {
            if is_held(&users, id) {
                hits += 1;
                continue;
            }
            let users = users.clone();
            loads.spawn(async move {
                let read = users.get(&id).await;
                let failure = match read {
                    Ok(Some(_)) => None,
                    Ok(None) => Some(format!("{id} is not there")),
                    Err(error) => Some(error.to_string()),
                };
                Miss { began: due, took: due.elapsed(), failure }
            });
        }
        ticks.push(Tick { at: due, hits });
    }
    let misses = loads.join_all().await;
    let mut failures = misses.iter().filter_map(|miss| miss.failure.as_deref());
    let first_failure = failures.next().unwrap_or_default().to_owned();
    let failed = misses.iter().filter(|miss| miss.failure.is_some()).count();
    Ok(Seen { ticks, misses, failed, first_failure })
}

impl Seen {
    /// Hits in percent, by the milliseconds since then at which windows begin.
    pub fn windows(&self, since: Instant) -> Vec<(f64, f64)> {
        let Some(first) = self.ticks.first().map(|tick| tick.at) else { return Vec::new() };
        // Windows begin at the moment itself.
        let shift = WINDOW - since.saturating_duration_since(first).as_millis() % WINDOW;
        let number = |tick: &Tick| ((tick.at - first).as_millis() + shift) / WINDOW;
        let offset = (since.saturating_duration_since(first).as_millis() + shift) as f64;
        let whole = |ticks: &&[Tick]| ticks.len() as u128 == WINDOW;
        let windows = self.ticks.chunk_by(|one, next| number(one) == number(next)).filter(whole);
        let hits =
            |ticks: &[Tick]| ticks.iter().map(|tick| tick.hits).sum::<usize>() as f64 / (ticks.len() * PACE) as f64;
        windows.map(|ticks| ((number(&ticks[0]) * WINDOW) as f64 - offset, hits(ticks) * 100.0)).collect()
    }

    /// The read that began since then and took longest, from the moment at which it was due.
    pub fn slowest(&self, since: Instant) -> Duration {
        self.misses.iter().filter(|miss| miss.began >= since).map(|miss| miss.took).max().unwrap_or_default()
    }
}
