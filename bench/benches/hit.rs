//! What a hit costs, beside other caches in memory, a Redis and the database.

#[path = "../../src/bin/rowcache-budget/hit.rs"]
mod instructions;

use std::{
    fmt::Debug,
    hash::Hash,
    hint::black_box,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use hydracache::{CacheOptions, HydraCache};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rand_distr::{Distribution as _, Zipf};
use redis::AsyncCommands as _;
use rowcache::{Key, Node, OnChange, Table, TableOptions};
use rowcache_bench::{
    ground::{self, Ground, User, holding},
    measure::{Spread, Turns, cpu_of, number},
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};
use tokio::runtime::Handle;

const BARE: &str = "quick_cache `get`";
const TRY_GET: &str = "rowcache `try_get`";
const GET: &str = "rowcache `get`";
const MOKA: &str = "moka sync `get`";
const MOKA_FUTURE: &str = "moka future `get`";
const HYDRA: &str = "hydracache `get`";

/// Reads of a turn, of each thread.
const READS: usize = 50_000;

fn main() -> ExitCode {
    suite::main("hit", "A hit", run)
}

async fn run(mut bench: Bench) -> Result<Bench> {
    if let [variant, url] = &bench.options.child[..] {
        instructions::run(variant, url).await?;
        return Ok(bench);
    }
    bench.about(
        "Rows are held as `Arc<User>` (a number and three strings) and handed out as that, but for hydracache, which keeps them encoded and
         decodes them for each reader. Every read is a hit. Each way has a cache and rows of its own, with its own defaults, room for twice the rows, and no expiry, but for
         rowcache, whose rows expire. Zipf is Zipf 0.99. Each thread reads keys of its own choice. Times are the CPU time of the threads.",
    );
    bench.about(
        "Why targets are missed. An entry says more than its row: when, and in which state of the node, it was loaded. What a hit looks at lies in
         two lines of a processor's cache as often as not, where the count of an `Arc<User>` lies in one: of 100,000 rows, a hit has 5.1 misses of
         a first-level cache of 32 KiB, quick_cache's 4.5 (cachegrind). Where neither keys nor rows are in a processor's cache, a hit is a wait for
         memory, and a loop of reads lets the waits of several hits overlap. The reference count of a hit is a locked instruction, behind which an
         awaited `get` has to load the loop's state again; on some processors less overlaps then (1.97 of quick_cache's time has been measured with
         an older EPYC, uniform keys and a million rows), on others it makes no difference. A program that does something with a row before it
         reads the next one does not see it. Nothing is ten times as slow as a hit that is a wait for memory: hydracache decodes each row, which
         takes a microsecond, beside a wait of 0.1 to 0.4. How many times as slow Redis is, is as much a matter of how long the kernel takes to
         wake a process.",
    );
    let ground = Ground::start(&mut bench).await?;
    let (few, many) = (bench.size(100_000, 2000), bench.size(1_000_000, 4000));
    let mut table = report::Table::new(
        "Nanoseconds of CPU time for a hit (medians), and that as a multiple of quick_cache's.",
        &["keys", "rows", "read by", BARE, TRY_GET, GET, MOKA, MOKA_FUTURE, "foyer", "dashmap", HYDRA],
    );
    for rows in [few, many] {
        ground.users(rows).await?;
        ground.people(rows).await?;
        let nodes = [ground.node(4).await?, ground.node(4).await?];
        let ids: Vec<i64> = (1..=rows as i64).collect();
        compare(&mut bench, &mut table, "bigint", ids, &nodes, "public.users").await?;
        let emails: Vec<String> = (1..=rows as i64).map(|id| User::nth(id).email).collect();
        compare(&mut bench, &mut table, "text", emails, &nodes, "public.people").await?;
        for node in nodes {
            node.shutdown().await;
        }
    }
    bench.table(table);
    ground.users(few).await?;
    options(&mut bench, &ground, few).await?;
    network(&mut bench, &ground, few).await?;
    count(&mut bench, &ground).await?;
    Ok(bench)
}

/// Reads these keys, all of which are there.
type Read<K> = Box<dyn Fn(&[K]) -> usize + Send + Sync>;

/// In the order of the table's columns. Each way has a cache and rows of its own, or one would find in the processor's caches what the one before it has
/// read. Only the row itself is hidden from the compiler, not what it comes wrapped in.
async fn caches<K>(keys: &[K], [held, awaited]: [Table<K, User>; 2]) -> Result<Vec<(&'static str, Read<K>)>>
where
    K: Key + Clone + Eq + Hash + Debug + ToString + Send + Sync + 'static,
{
    let room = keys.len() * 2;
    let rows = || keys.iter().cloned().zip((1..).map(|id| Arc::new(User::nth(id))));
    let mut caches: Vec<(&'static str, Read<K>)> = Vec::new();

    let bare = quick_cache::sync::Cache::new(room);
    rows().for_each(|(key, row)| bare.insert(key, row));
    caches
        .push((BARE, Box::new(move |keys| keys.iter().filter(|key| bare.get(*key).map(black_box).is_some()).count())));

    let read = move |keys: &[K]| keys.iter().filter(|key| held.try_get(key).row().map(black_box).is_some()).count();
    caches.push((TRY_GET, Box::new(read)));

    let runtime = Handle::current();
    let read = move |keys: &[K]| {
        runtime.block_on(async {
            let mut hits = 0;
            for key in keys {
                hits += usize::from(awaited.get(key).await.is_ok_and(|row| row.map(black_box).is_some()));
            }
            hits
        })
    };
    caches.push((GET, Box::new(read)));

    let moka = moka::sync::Cache::new(room as u64);
    rows().for_each(|(key, row)| moka.insert(key, row));
    moka.run_pending_tasks();
    caches
        .push((MOKA, Box::new(move |keys| keys.iter().filter(|key| moka.get(*key).map(black_box).is_some()).count())));

    let (moka, runtime) = (moka::future::Cache::new(room as u64), Handle::current());
    for (key, row) in rows() {
        moka.insert(key, row).await;
    }
    moka.run_pending_tasks().await;
    let read = move |keys: &[K]| {
        runtime.block_on(async {
            let mut hits = 0;
            for key in keys {
                hits += usize::from(moka.get(key).await.map(black_box).is_some());
            }
            hits
        })
    };
    caches.push((MOKA_FUTURE, Box::new(read)));

    let foyer: foyer_memory::Cache<K, Arc<User>> = foyer_memory::CacheBuilder::new(room).build();
    for (key, row) in rows() {
        foyer.insert(key, row);
    }
    let read = move |keys: &[K]| {
        keys.iter().filter(|key| foyer.get(*key).map(|entry| black_box(entry.value().clone())).is_some()).count()
    };
    caches.push(("foyer", Box::new(read)));

    let map = dashmap::DashMap::new();
    rows().for_each(|(key, row)| drop(map.insert(key, row)));
    let read = move |keys: &[K]| {
        keys.iter().filter(|key| map.get(*key).map(|row| black_box(Arc::clone(&row))).is_some()).count()
    };
    caches.push(("dashmap", Box::new(read)));

    let (hydra, runtime) = (HydraCache::local().max_capacity(room as u64 * 1024).build(), Handle::current());
    for (key, row) in rows() {
        hydra.put(&key.to_string(), User::clone(&row), CacheOptions::new()).await?;
    }
    let read = move |keys: &[K]| {
        runtime.block_on(async {
            let mut hits = 0;
            for key in keys {
                let read = hydra.get::<User>(&key.to_string()).await;
                hits += usize::from(read.is_ok_and(|row| row.map(black_box).is_some()));
            }
            hits
        })
    };
    caches.push((HYDRA, Box::new(read)));
    Ok(caches)
}

async fn compare<K>(
    bench: &mut Bench,
    table: &mut report::Table,
    kind: &str,
    keys: Vec<K>,
    nodes: &[Node; 2],
    of: &str,
) -> Result<()>
where
    K: Key + Clone + Eq + Hash + Debug + ToString + Send + Sync + 'static,
{
    let rows = keys.len();
    let main = kind == "bigint" && rows == bench.size(100_000, 2000);
    let options = TableOptions::default;
    let held = [holding(&nodes[0], of, options(), &keys).await?, holding(&nodes[1], of, options(), &keys).await?];
    let caches = Arc::new(caches(&keys, held).await?);
    for (choice, zipf) in [("Zipf", true), ("uniform", false)] {
        for threads in [1, 2] {
            let read: Vec<Arc<Vec<K>>> = (0..threads).map(|seed| Arc::new(choose(&keys, zipf, seed))).collect();
            let rounds = bench.rounds(15);
            let all = caches.clone();
            let turns = tokio::task::spawn_blocking(move || {
                Turns::take(rounds, all.len(), |n| nanoseconds(all[n].0, &all[n].1, &read))
            })
            .await?;
            let at = |name| caches.iter().position(|cache| cache.0 == name).expect("it is there");
            let mut cells = vec![
                kind.to_owned(),
                report_rows(rows),
                format!("{choice}, {threads} thread{}", ["", "s"][threads as usize - 1]),
            ];
            for n in 0..caches.len() {
                let (nanos, ratio) = (turns.of(n).median, turns.ratio(n, 0).median);
                cells.push(if n == 0 { number(nanos) } else { format!("{} ({ratio:.2})", number(nanos)) });
            }
            table.row(cells);
            let named = |what: &str| format!("{what}, {} {kind} keys, {choice}, {threads} thr.", report_rows(rows));
            bench.ratio(Ratio::cost(named(TRY_GET), BARE, turns.ratio(at(TRY_GET), 0)).target(1.10));
            bench.ratio(Ratio::cost(named(GET), BARE, turns.ratio(at(GET), 0)).target(1.3));
            bench.ratio(Ratio::gain(named(MOKA), TRY_GET, turns.ratio(at(MOKA), at(TRY_GET))).target(2.5));
            bench.ratio(Ratio::gain(named(MOKA_FUTURE), GET, turns.ratio(at(MOKA_FUTURE), at(GET))).target(2.5));
            bench.ratio(Ratio::gain(named(HYDRA), GET, turns.ratio(at(HYDRA), at(GET))).target(10.0));
            if main && zipf && threads == 1 {
                let bars = caches.iter().enumerate().map(|(n, cache)| (cache.0.replace('`', ""), turns.of(n).median));
                bench.plot(Plot {
                    name: "caches".to_owned(),
                    title: "A hit: 100,000 rows, bigint keys, Zipf, one thread".to_owned(),
                    unit: "nanoseconds of CPU time".to_owned(),
                    log: false,
                    shape: Shape::Bars(bars.collect()),
                });
            }
        }
    }
    Ok(())
}

fn report_rows(rows: usize) -> String {
    rowcache_bench::measure::thousands(rows as i64)
}

fn choose<K: Clone>(keys: &[K], zipf: bool, seed: u64) -> Vec<K> {
    let mut random = StdRng::seed_from_u64(seed);
    let ranks = Zipf::new(keys.len() as f64, 0.99).expect("sane");
    (0..READS)
        .map(|_| {
            let rank = if zipf { ranks.sample(&mut random) as usize - 1 } else { random.random_range(0..keys.len()) };
            // What is read most does not lie together.
            keys[rank.wrapping_mul(2_654_435_761) % keys.len()].clone()
        })
        .collect()
}

/// For a read, over all threads.
fn nanoseconds<K: Sync + Send>(name: &str, read: &Read<K>, choices: &[Arc<Vec<K>>]) -> f64 {
    let cpu: Duration = thread::scope(|scope| {
        let readers: Vec<_> = choices
            .iter()
            .map(|keys| {
                scope.spawn(|| {
                    let (hits, cpu) = cpu_of(|| read(keys));
                    assert_eq!(hits, keys.len(), "every read of {name} is a hit");
                    cpu
                })
            })
            .collect();
        readers.into_iter().map(|reader| reader.join().expect("it does not panic")).sum()
    });
    cpu.as_nanos() as f64 / (choices.len() * READS) as f64
}

/// What options cost that a hit has to look at.
async fn options(bench: &mut Bench, ground: &Ground, rows: usize) -> Result<()> {
    let minute = Duration::from_mins(1);
    let all: [(&str, TableOptions); 8] = [
        ("defaults", TableOptions::default()),
        ("without `ttl`", TableOptions::default().ttl(None)),
        ("`idle`", TableOptions::default().idle(minute)),
        ("`refresh_ahead`", TableOptions::default().refresh_ahead(0.9)),
        ("`on_change(Refresh)`", TableOptions::default().on_change(OnChange::Refresh)),
        ("`stale_if_error`", TableOptions::default().stale_if_error(minute)),
        ("`audit(10)`", TableOptions::default().audit(10)),
        (
            "`weigher`",
            TableOptions::default().weigher(|user: &User| user.email.len() + user.name.len() + user.role.len()),
        ),
    ];
    let ids: Vec<i64> = (1..=rows as i64).collect();
    let (mut nodes, mut reads): (Vec<_>, Vec<(&str, Read<i64>)>) = Default::default();
    for (name, options) in all {
        let node = ground.node(2).await?;
        let options = if name == "`weigher`" { options.bytes(1 << 30) } else { options };
        let users = holding(&node, "public.users", options, &ids).await?;
        let runtime = Handle::current();
        let read = move |keys: &[i64]| {
            runtime.block_on(async {
                let mut hits = 0;
                for key in keys {
                    hits += usize::from(users.get(key).await.is_ok_and(|row| row.map(black_box).is_some()));
                }
                hits
            })
        };
        reads.push((name, Box::new(read)));
        nodes.push(node);
    }
    let choices = vec![Arc::new(choose(&ids, true, 0))];
    let rounds = bench.rounds(15);
    let (turns, reads) = tokio::task::spawn_blocking(move || {
        (Turns::take(rounds, reads.len(), |n| nanoseconds(reads[n].0, &reads[n].1, &choices)), reads)
    })
    .await?;
    let mut table = report::Table::new(
        "What options cost that a hit has to look at: `get`, 100,000 rows, bigint keys, Zipf, one thread.",
        &["option", "nanoseconds", "of the defaults'"],
    );
    for (n, (name, _)) in reads.iter().enumerate() {
        table.row([(*name).to_owned(), turns.of(n).to_string(), turns.ratio(n, 0).to_string()]);
    }
    bench.table(table);
    for node in nodes {
        node.shutdown().await;
    }
    Ok(())
}

/// The instructions of a hit, which are the same each time.
async fn count(bench: &mut Bench, ground: &Ground) -> Result<()> {
    ground.client().await?.batch_execute(instructions::TABLE).await?;
    let mut table = report::Table::new(
        "Instructions of a hit, counted by callgrind: 10,000 rows, bigint keys, Zipf, one thread.",
        &["", "instructions", "of the bare `get`'s"],
    );
    let mut bare = None;
    for (variant, budget) in instructions::VARIANTS {
        let url = ground.url();
        let counted = tokio::task::spawn_blocking(move || instructions::instructions(&["--child", variant, &url]));
        let counted = counted.await??;
        let ratio = counted / *bare.get_or_insert(counted);
        let named = match variant {
            "bare" => BARE.to_owned(),
            "try_get" => TRY_GET.to_owned(),
            "get" => GET.to_owned(),
            option => format!("{GET} with `{option}`"),
        };
        if let Some(budget) = budget {
            let what = format!("instructions of {named}");
            bench.ratio(Ratio::cost(what, BARE, Spread::exact(ratio)).target(budget));
        }
        table.row([named, number(counted), number(ratio)]);
    }
    bench.table(table);
    Ok(())
}

/// What a hit spares: one reader, one read after the other.
async fn network(bench: &mut Bench, ground: &Ground, rows: usize) -> Result<()> {
    let ids: Vec<i64> = (1..=rows as i64).collect();
    let node = ground.node(2).await?;
    let users = holding(&node, "public.users", TableOptions::default(), &ids).await?;
    let server = ground::redis(bench).await?;
    let mut redis = server.connect().await?;
    for ids in ids.chunks(1000) {
        let mut batch = redis::pipe();
        for id in ids {
            batch.set(format!("user:{id}"), serde_json::to_vec(&User::nth(*id))?).ignore();
        }
        let () = batch.query_async(&mut redis).await?;
    }
    let pool = ground.pool(1).await?;
    let client = ground.client().await?;
    let select = "select * from public.users where id = $1";
    let statement = client.prepare(select).await?;
    let keys = choose(&ids, true, 0);
    let reads = bench.size(2000, 200);
    let mut costs: [Vec<f64>; 4] = Default::default();
    for round in 0..bench.rounds(9) {
        let some = &keys[round * reads..(round + 1) * reads];
        let held = users.clone();
        let all = keys.clone();
        let hit = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let hits = all.iter().filter(|key| held.try_get(key).row().map(black_box).is_some()).count();
            (hits == all.len()).then(|| began.elapsed().as_secs_f64() / all.len() as f64)
        })
        .await?;
        ensure!(hit.is_some(), "every read is a hit");
        costs[0].extend(hit);
        let began = Instant::now();
        for id in some {
            let row: Vec<u8> = redis.get(format!("user:{id}")).await?;
            black_box(serde_json::from_slice::<User>(&row)?);
        }
        costs[1].push(began.elapsed().as_secs_f64() / reads as f64);
        let began = Instant::now();
        for id in some {
            black_box(client.query_one(&statement, &[id]).await?);
        }
        costs[2].push(began.elapsed().as_secs_f64() / reads as f64);
        let began = Instant::now();
        for id in some {
            black_box(sqlx::query_as::<_, User>(select).bind(id).fetch_one(&pool).await?);
        }
        costs[3].push(began.elapsed().as_secs_f64() / reads as f64);
    }
    let names = [TRY_GET, "Redis `GET`", "Postgres, tokio-postgres", "Postgres, sqlx and its pool"];
    let mut table = report::Table::new(
        "One reader, one read after the other, over loopback; Redis' rows are JSON, and parsed. Elapsed time.",
        &["", "microseconds", "as a multiple of a hit"],
    );
    let ratio = |n: usize| Spread::of(costs[n].iter().zip(&costs[0]).map(|(cost, hit)| cost / hit));
    for (n, name) in names.iter().enumerate() {
        let micros = Spread::of(costs[n].iter().map(|seconds| seconds * 1e6));
        table.row([(*name).to_owned(), micros.to_string(), ratio(n).to_string()]);
    }
    bench.ratio(Ratio::gain(names[1], TRY_GET, ratio(1)).target(1000.0));
    bench.ratio(Ratio::gain(names[2], TRY_GET, ratio(2)));
    bench.ratio(Ratio::gain(names[3], TRY_GET, ratio(3)));
    bench.table(table);
    let bars = names
        .iter()
        .zip(&costs)
        .map(|(name, costs)| (name.replace('`', ""), Spread::of(costs.iter().copied()).median * 1e9));
    bench.plot(Plot {
        name: "network".to_owned(),
        title: "A hit, and what it spares".to_owned(),
        unit: "nanoseconds".to_owned(),
        log: true,
        shape: Shape::Bars(bars.collect()),
    });
    node.shutdown().await;
    Ok(())
}
