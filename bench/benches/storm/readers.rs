//! What reads notice of a storm that changes other rows.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rand::{SeedableRng as _, rngs::StdRng};
use rand_distr::{Distribution as _, Zipf};
use rowcache::{Lookup, Table, TableOptions};
use rowcache_bench::{
    ground::{Ground, User, holding},
    measure::{Spread, cpu_of, number, quantile, thousands},
    report::{self, Ratio},
    suite::Bench,
};

use crate::{Told, applied, read_again, send};

/// Reads between two looks at the clock.
const BATCH: usize = 256;

/// Reads one after the other.
struct Batch {
    began: Instant,
    ended: Instant,
    cpu: Duration,
    /// How long one of them took.
    one: Duration,
}

/// What reads cost within some time.
struct Reads {
    /// All of them, in nanoseconds each.
    wall: f64,
    cpu: f64,
    /// Of single ones, in nanoseconds, sorted.
    single: Vec<f64>,
}

impl Reads {
    fn within(batches: &[Batch], from: Instant, until: Instant) -> Result<Self> {
        let these: Vec<&Batch> = batches.iter().filter(|batch| batch.began >= from && batch.ended <= until).collect();
        let (first, last) = these.first().zip(these.last()).context("nothing was read")?;
        let reads = (these.len() * BATCH) as f64;
        let cpu: Duration = these.iter().map(|batch| batch.cpu).sum();
        let mut single: Vec<f64> = these.iter().map(|batch| batch.one.as_nanos() as f64).collect();
        single.sort_by(f64::total_cmp);
        Ok(Self {
            wall: (last.ended - first.began).as_nanos() as f64 / reads,
            cpu: cpu.as_nanos() as f64 / reads,
            single,
        })
    }
}

fn read(users: &Table<i64, User>, keys: &[i64], stop: &AtomicBool) -> Vec<Batch> {
    let mut batches = Vec::with_capacity(1 << 16);
    for keys in keys.chunks_exact(BATCH).cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let began = Instant::now();
        let (hits, cpu) =
            cpu_of(|| keys.iter().filter(|id| matches!(black_box(users.try_get(id)), Lookup::Row(_))).count());
        let ended = Instant::now();
        assert_eq!(hits, keys.len(), "every read is a hit");
        black_box(users.try_get(&keys[0]));
        batches.push(Batch { began, ended, cpu, one: ended.elapsed() });
    }
    batches
}

pub async fn run(bench: &mut Bench, ground: &Ground, rows: usize, messages: &[String]) -> Result<()> {
    // What the storm changes; the others of those that are held are read.
    let held = rows as i64 * 4 / 10;
    let changed = held * 3 / 4;
    let mut storm: Vec<String> = Vec::new();
    let mut told: Vec<i64> = Vec::new();
    for message in messages {
        let keys = serde_json::from_str::<Told<i64>>(message)?.k;
        if keys.iter().all(|id| *id <= changed) {
            storm.push(message.clone());
            told.extend(keys);
        }
    }
    ensure!(told.len() as i64 > changed * 9 / 10, "{} of {changed} rows are told apart", told.len());
    let ids: Vec<i64> = (1..=held).collect();
    let node = ground.node(5).await?;
    let users = holding(&node, "public.users", TableOptions::default(), &ids).await?;
    let ranks = Zipf::new((held - changed) as f64, 0.99).context("sane")?;
    let mut random = StdRng::seed_from_u64(5);
    let read_ids: Arc<Vec<i64>> = Arc::new((0..1 << 20).map(|_| changed + ranks.sample(&mut random) as i64).collect());

    let quiet_time = Duration::from_millis(bench.size(500, 50) as u64);
    let (mut quiet, mut during) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds(7) {
        read_again(&users, &told).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let (table, keys, stopped) = (users.clone(), read_ids.clone(), stop.clone());
        let reader = tokio::task::spawn_blocking(move || read(&table, &keys, &stopped));
        let began = Instant::now();
        tokio::time::sleep(quiet_time).await;
        let quiet_until = Instant::now();
        let before = users.stats().invalidations;
        let from = send(&ground.url(), &storm).await?;
        applied(from, told.len(), || users.stats().invalidations - before).await?;
        let until = Instant::now();
        stop.store(true, Ordering::Relaxed);
        let batches = reader.await?;
        quiet.push(Reads::within(&batches, began, quiet_until)?);
        during.push(Reads::within(&batches, from, until)?);
    }
    node.shutdown().await;

    let mut table = report::Table::new(
        format!("Hits while {} other rows change, medians.", thousands(told.len() as i64)),
        &["", "hits a second", "CPU time of a hit, ns", "ns for a hit: p50", "p99", "p99.9"],
    );
    for (name, reads) in [("without a storm", &quiet), ("during it", &during)] {
        let median = |of: &dyn Fn(&Reads) -> f64| number(Spread::of(reads.iter().map(of)).median);
        table.row([
            name.to_owned(),
            median(&|reads| 1e9 / reads.wall),
            median(&|reads| reads.cpu),
            median(&|reads| quantile(&reads.single, 0.5)),
            median(&|reads| quantile(&reads.single, 0.99)),
            median(&|reads| quantile(&reads.single, 0.999)),
        ]);
    }
    bench.table(table);
    let ratio =
        |of: fn(&Reads) -> f64| Spread::of(during.iter().zip(&quiet).map(|(during, quiet)| of(during) / of(quiet)));
    bench.ratio(Ratio::gain("hits a second during a storm", "without it", ratio(|reads| 1e9 / reads.wall)));
    bench.ratio(Ratio::cost("CPU time of a hit during a storm", "without it", ratio(|reads| reads.cpu)));
    bench.ratio(Ratio::cost("a hit during a storm, p99", "without it", ratio(|reads| quantile(&reads.single, 0.99))));
    Ok(())
}
