//! How many reads are hits, of caches that hold a part of the keys.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
    fs,
    num::NonZeroUsize,
    path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use rand_distr::{Distribution as _, Zipf};
use rowcache::{TableOptions, testing::Database};
use rowcache_bench::{
    measure::Spread,
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};

const CACHES: [&str; 5] = ["rowcache", "quick_cache", "moka", "foyer (S3-FIFO)", "LRU"];

fn main() -> ExitCode {
    suite::main("ratio", "Hit ratio", run)
}

struct Trace {
    name: String,
    keys: Vec<u64>,
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "One reader; what is missed is read and kept. Capacities are parts of the number of different keys. The optimum knows the
         future (Belady). rowcache runs on a database in memory (`rowcache::testing`), as what it keeps does not depend on where rows come
         from; the others are read and filled by hand. 200,000 keys; scans are of keys that are read by nothing else.",
    );
    let mut traces = synthetic(bench.size(1_000_000, 50_000), bench.size(200_000, 10_000) as u64);
    match &bench.options.traces {
        Some(directory) => traces.extend(public(directory)?),
        None => bench.about(
            "Public traces (ARC's, LIRS's) are not part of this repository: `--traces DIR` adds those that are there to the table.",
        ),
    }
    let head = ["trace", "capacity", "optimum", CACHES[0], CACHES[1], CACHES[2], CACHES[3], CACHES[4]];
    let mut table = report::Table::new("Hits, in percent of all reads.", &head);
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = [CACHES[0], CACHES[2], CACHES[3], CACHES[4], "optimum"]
        .iter()
        .map(|name| ((*name).to_owned(), Vec::new()))
        .collect();
    for (n, trace) in traces.iter().enumerate() {
        let different = trace.keys.iter().collect::<std::collections::HashSet<_>>().len();
        for percent in [1, 2, 5, 10, 20] {
            let drawn = n == 0;
            if !drawn && ![1, 5, 20].contains(&percent) {
                continue;
            }
            let capacity = (different * percent / 100).max(1);
            let best = optimum(&trace.keys, capacity);
            let hits = [
                ours(&trace.keys, capacity).await?,
                quick(&trace.keys, capacity),
                moka(&trace.keys, capacity),
                foyer(&trace.keys, capacity),
                lru(&trace.keys, capacity),
            ];
            for (line, hits) in lines.iter_mut().zip([hits[0], hits[2], hits[3], hits[4], best]).filter(|_| drawn) {
                line.1.push((percent as f64, hits * 100.0));
            }
            if ![1, 5, 20].contains(&percent) {
                continue;
            }
            let cells = [best].into_iter().chain(hits).map(|hits| format!("{:.1}", hits * 100.0));
            table.row([trace.name.clone(), format!("{percent} %")].into_iter().chain(cells));
            for (name, other) in [("LRU", hits[4]), ("moka", hits[2]), ("optimum", best)] {
                let what = format!("hits, {}, {percent} %", trace.name);
                bench.ratio(Ratio::gain(what, name, Spread::exact(hits[0] / other)));
            }
        }
    }
    bench.table(table);
    bench.plot(Plot {
        name: "zipf".to_owned(),
        title: "Hits, Zipf 0.99".to_owned(),
        unit: "percent of all reads".to_owned(),
        log: false,
        shape: Shape::Lines { x: "capacity, in percent of the keys".to_owned(), log_x: false, lines },
    });
    Ok(bench)
}

fn synthetic(reads: usize, keys: u64) -> Vec<Trace> {
    let mut random = StdRng::seed_from_u64(7);
    let mut zipf = |exponent: f64, reads: usize| -> Vec<u64> {
        let ranks = Zipf::new(keys as f64, exponent).expect("sane");
        (0..reads).map(|_| ranks.sample(&mut random) as u64).collect()
    };
    let (steep, flat) = (zipf(0.99, reads), zipf(0.8, reads));
    let half = zipf(0.99, reads / 2);
    let mixed = |scanned: &dyn Fn(u64) -> u64| {
        // A scan of a thousand keys after each thousand reads.
        let mut scan = 0..;
        half.chunks(1000)
            .flat_map(|reads| {
                let scanned = scan.by_ref().take(reads.len()).map(|n| keys + scanned(n));
                reads.iter().copied().chain(scanned).collect::<Vec<_>>()
            })
            .collect()
    };
    let once = mixed(&|n| n);
    let again = mixed(&|n| n % (keys / 4));
    let mut moving = zipf(0.99, reads);
    let mut names: Vec<u64> = (0..=keys).collect();
    for part in moving.chunks_mut(reads / 10) {
        names.shuffle(&mut StdRng::seed_from_u64(part[0]));
        part.iter_mut().for_each(|key| *key = names[*key as usize]);
    }
    [
        ("Zipf 0.99", steep),
        ("Zipf 0.8", flat),
        ("Zipf 0.99, half of the reads scan keys once", once),
        ("Zipf 0.99, half of the reads scan the same quarter as many keys", again),
        ("Zipf 0.99, other keys become popular ten times", moving),
    ]
    .map(|(name, keys)| Trace { name: name.to_owned(), keys })
    .into()
}

/// ARC's format has the first block and how many on a line, LIRS's a block.
fn public(directory: &Path) -> Result<Vec<Trace>> {
    let mut paths: Vec<_> = fs::read_dir(directory)
        .with_context(|| format!("{} cannot be read", directory.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|it| it == "arc" || it == "lis" || it == "trc"))
        .collect();
    paths.sort();
    let mut traces = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        let arc = path.extension().is_some_and(|it| it != "trc");
        let mut keys = Vec::new();
        for line in text.lines() {
            let mut numbers = line.split_whitespace().map_while(|number| number.parse::<u64>().ok());
            let Some(first) = numbers.next() else { continue };
            let blocks = if arc { numbers.next().unwrap_or(1) } else { 1 };
            keys.extend(first..first + blocks);
        }
        let name = path.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        traces.push(Trace { name, keys });
    }
    Ok(traces)
}

/// The part of the reads that are hits.
fn hits(keys: &[u64], mut is_hit: impl FnMut(u64) -> bool) -> f64 {
    keys.iter().filter(|&&key| is_hit(key)).count() as f64 / keys.len() as f64
}

async fn ours(keys: &[u64], capacity: usize) -> Result<f64> {
    let database = Database::new();
    let rows = database.table::<i64, (i64,)>("public.rows");
    let mut put = std::collections::HashSet::new();
    for &key in keys.iter().filter(|&&key| put.insert(key)) {
        rows.put(key as i64, (key as i64,));
    }
    let node = database.node().await;
    let table = node
        .table_with::<i64, (i64,)>("public.rows", TableOptions::default().capacity(capacity).ttl(None).history(0))
        .await?;
    for &key in keys {
        anyhow::ensure!(table.get(&(key as i64)).await?.is_some(), "{key} is there");
    }
    let stats = table.stats();
    let part = stats.hits as f64 / keys.len() as f64;
    node.shutdown().await;
    Ok(part)
}

fn quick(keys: &[u64], capacity: usize) -> f64 {
    let cache = quick_cache::sync::Cache::new(capacity);
    hits(keys, |key| {
        let hit = cache.get(&key).is_some();
        if !hit {
            cache.insert(key, ());
        }
        hit
    })
}

fn moka(keys: &[u64], capacity: usize) -> f64 {
    let cache = moka::sync::Cache::new(capacity as u64);
    hits(keys, |key| {
        let hit = cache.get(&key).is_some();
        if !hit {
            cache.insert(key, ());
        }
        hit
    })
}

fn foyer(keys: &[u64], capacity: usize) -> f64 {
    let cache: foyer_memory::Cache<u64, ()> =
        foyer_memory::CacheBuilder::new(capacity).with_eviction_config(foyer_memory::S3FifoConfig::default()).build();
    hits(keys, |key| {
        let hit = cache.get(&key).is_some();
        if !hit {
            cache.insert(key, ());
        }
        hit
    })
}

fn lru(keys: &[u64], capacity: usize) -> f64 {
    let cache = RefCell::new(lru::LruCache::new(NonZeroUsize::new(capacity).expect("at least 1")));
    hits(keys, |key| {
        let mut cache = cache.borrow_mut();
        let hit = cache.get(&key).is_some();
        if !hit {
            cache.put(key, ());
        }
        hit
    })
}

/// What could be hits if it were known which key is needed last.
fn optimum(keys: &[u64], capacity: usize) -> f64 {
    let mut next = vec![usize::MAX; keys.len()];
    let mut seen = HashMap::new();
    for (n, key) in keys.iter().enumerate().rev() {
        if let Some(later) = seen.insert(key, n) {
            next[n] = later;
        }
    }
    let mut held: BTreeSet<(usize, u64)> = BTreeSet::new();
    let mut hits = 0;
    for (n, &key) in keys.iter().enumerate() {
        // Held keys stand under when they are read next, which is now.
        let hit = held.remove(&(n, key));
        hits += usize::from(hit);
        if next[n] == usize::MAX {
            continue;
        }
        held.insert((next[n], key));
        if held.len() > capacity {
            held.pop_last();
        }
    }
    hits as f64 / keys.len() as f64
}
