//! What a miss costs, beside the queries that a service would send itself.

use std::{
    hint::black_box,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Result, ensure};
use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use rowcache::{Table, TableOptions};
use rowcache_bench::{
    ground::{Ground, User},
    measure::{Turns, quantile, time_of},
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio_postgres::{Client, Statement};

const SELECT: &str = "select id, email, name, role from public.users where id = $1";
/// What a load of one row sends.
const SELECT_WITH_STAMP: &str =
    "select t.*, t.id as k, s.* from rowcache.stamp s left join public.users t on t.id = $1";
const WAYS: [&str; 5] = [
    "rowcache `get`",
    "sqlx, a pool like the node's",
    "tokio-postgres, pipelined",
    "sqlx, a pool with its defaults",
    "sqlx, a pool like the node's, with a load's stamp",
];

fn main() -> ExitCode {
    suite::main("miss", "A miss", run)
}

/// A way to read.
#[derive(Clone)]
enum Way {
    Ours(Table<i64, User>),
    Pool(PgPool, &'static str),
    Pipeline(Arc<Client>, Statement),
}

impl Way {
    async fn read(&self, id: i64) -> Result<()> {
        match self {
            Self::Ours(users) => ensure!(black_box(users.get(&id).await?).is_some(), "{id} is there"),
            Self::Pool(pool, select) => {
                black_box(sqlx::query_as::<_, User>(*select).bind(id).fetch_one(pool).await?);
            }
            Self::Pipeline(client, statement) => {
                let row = client.query_one(statement, &[&id]).await?;
                black_box(User { id: row.get(0), email: row.get(1), name: row.get(2), role: row.get(3) });
            }
        }
        Ok(())
    }
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "So many tasks read rows by key, each task one after the other, and none that were read before: every read of rowcache is a miss. The
         node has its defaults (four statements at a time, of at most 512 keys). sqlx's pools have as many connections as the node's. By default they
         test each connection before it is used, which is one more round trip; the node's does so only if a connection was idle for a second. The
         pipeline is one connection of tokio-postgres, on which all tasks send their queries without waiting for one another. Loads of
         rowcache also read the snapshot that they were made in, and check it.",
    );
    bench.about(
        "Why targets are missed. A load also reads in which incarnation of the server and at which position of the log it was made: that is
         most of what it takes longer, as the last way shows, which sends the same statement without a cache. One connection answers a pipeline
         without a pause between two queries; loads of up to 512 rows come in four statements at a time, so that they gain with the number of
         tasks.",
    );
    let ground = Ground::start(&mut bench).await?;
    let rows = bench.size(1_000_000, 20_000);
    ground.users(rows).await?;
    let node = ground.node(5).await?;
    let users: Table<i64, User> =
        node.table_with("public.users", TableOptions::default().capacity(rows * 2).history(0)).await?;
    let like_ours = ground.config(5)?.pool.connect(&ground.url()).await?;
    let pool = ground.pool(5).await?;
    let client = Arc::new(ground.client().await?);
    let statement = client.prepare(SELECT).await?;
    let ways = [
        Way::Ours(users.clone()),
        Way::Pool(like_ours.clone(), SELECT),
        Way::Pipeline(client, statement),
        Way::Pool(pool, SELECT),
        Way::Pool(like_ours, SELECT_WITH_STAMP),
    ];

    let mut ids: Vec<i64> = (1..=rows as i64).collect();
    ids.shuffle(&mut StdRng::seed_from_u64(7));
    let ids = Arc::new(ids);
    let next = Arc::new(AtomicUsize::new(0));
    let mut table = report::Table::new(
        "Rows a second (medians), and what one read takes.",
        &["tasks", "way", "rows a second", "of sqlx's", "of the pipeline's", "µs for a read: p50", "p99"],
    );
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = WAYS.iter().map(|way| (way.replace('`', ""), Vec::new())).collect();
    for tasks in [1, 16, 64, 512] {
        let reads = bench.size(if tasks == 1 { 2000 } else { 12_000 }, 600);
        let times: [Arc<std::sync::Mutex<Vec<f64>>>; 5] = Default::default();
        let turns = Turns::wait(bench.rounds(9), ways.len(), |n| {
            let (way, ids, next, users, times) =
                (ways[n].clone(), ids.clone(), next.clone(), users.clone(), times[n].clone());
            async move {
                let mut from = next.fetch_add(reads, Ordering::Relaxed);
                if from + reads > ids.len() {
                    users.forget_all();
                    from = 0;
                    next.store(reads, Ordering::Relaxed);
                }
                let before = users.stats().misses;
                let (of_each, took) = time_of(read_all(&way, &ids, from, reads, tasks)).await;
                let missed = users.stats().misses - before;
                let ours = matches!(way, Way::Ours(_));
                ensure!(!ours || missed >= reads as u64, "{missed} of {reads} reads were misses");
                times.lock().expect("not poisoned").extend(of_each?);
                Ok(took.as_secs_f64() / reads as f64)
            }
        })
        .await?;
        for (n, way) in WAYS.iter().enumerate() {
            let mut times = times[n].lock().expect("not poisoned").clone();
            times.sort_by(f64::total_cmp);
            let a_second = turns.of(n).map(|seconds| 1.0 / seconds);
            let of = |to: usize| turns.ratio(to, n).to_string();
            let micros = |part: f64| rowcache_bench::measure::number(quantile(&times, part) * 1e6);
            table.row([
                tasks.to_string(),
                (*way).to_owned(),
                rowcache_bench::measure::number(a_second.median),
                if n == 1 { String::new() } else { of(1) },
                if n == 2 { String::new() } else { of(2) },
                micros(0.5),
                micros(0.99),
            ]);
            lines[n].1.push((f64::from(tasks), a_second.median));
        }
        ratios(&mut bench, tasks, &turns);
    }
    bench.table(table);
    bench.plot(Plot {
        name: "rows".to_owned(),
        title: "Rows read a second, none held".to_owned(),
        unit: "rows a second".to_owned(),
        log: true,
        shape: Shape::Lines { x: "tasks that read".to_owned(), log_x: true, lines },
    });
    node.shutdown().await;
    Ok(bench)
}

/// Our way beside each of the others.
fn ratios(bench: &mut Bench, tasks: u32, turns: &Turns) {
    for (n, way) in WAYS.iter().enumerate().skip(1) {
        let ratio = if tasks == 1 {
            Ratio::cost("latency of a miss, 1 task", *way, turns.ratio(0, n))
        } else {
            Ratio::gain(format!("rows a second, {tasks} tasks"), *way, turns.ratio(n, 0))
        };
        bench.ratio(match (tasks, n) {
            (1, 1) => ratio.target(1.15),
            (64, 1) => ratio.target(5.0),
            (64, 2) => ratio.target(2.0),
            _ => ratio,
        });
    }
}

/// The seconds that each read took.
async fn read_all(way: &Way, ids: &Arc<Vec<i64>>, from: usize, reads: usize, tasks: u32) -> Result<Vec<f64>> {
    let taken = Arc::new(AtomicUsize::new(from));
    let mut readers = JoinSet::new();
    for _ in 0..tasks {
        let (way, ids, taken) = (way.clone(), ids.clone(), taken.clone());
        readers.spawn(async move {
            let mut times = Vec::new();
            loop {
                let n = taken.fetch_add(1, Ordering::Relaxed);
                if n >= from + reads {
                    return anyhow::Ok(times);
                }
                let (read, took) = time_of(way.read(ids[n])).await;
                read?;
                times.push(took.as_secs_f64());
            }
        });
    }
    let mut all = Vec::new();
    while let Some(times) = readers.join_next().await {
        all.extend(times??);
    }
    Ok(all)
}
