//! One row that changes all the time.

use std::{
    future::{Future, poll_fn},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rowcache::{OnChange, Stats, Table, TableOptions};
use rowcache_bench::{
    ground::{Ground, User},
    measure::{Spread, number, quantile},
    report::{self, Plot, Ratio, Shape},
    suite::Bench,
};
use tokio::runtime::Handle;
use tokio_postgres::{Client, Statement};

const WAYS: [(&str, OnChange); 2] = [("`Evict` (default)", OnChange::Evict), ("`Refresh`", OnChange::Refresh)];
/// Changes a second that the writer tries to make.
const RATES: [u32; 4] = [10, 100, 1000, 10_000];

/// Changes that the writer sends before the first of them has been answered.
const PIPELINE: usize = 16;

/// What came of one turn.
struct Outcome {
    seconds: f64,
    changes: usize,
    stats: Stats,
    /// How far each read was behind, in milliseconds, sorted.
    behind: Vec<f64>,
}

pub async fn run(bench: &mut Bench, ground: &Ground) -> Result<()> {
    ground.users(1000).await?;
    let mut table = report::Table::new(
        "One row that changes all the time, medians. Behind: since when the row that was read had not been the current one.",
        &[
            "changes a second: wanted",
            "reached",
            "`on_change`",
            "reads a second",
            "hits, %",
            "loads a second",
            "of these overtaken, %",
            "ms behind: p50",
            "p99",
            "max",
        ],
    );
    let mut lines: Vec<(String, Vec<(f64, f64)>)> =
        WAYS.iter().map(|way| (way.0.replace('`', ""), Vec::new())).collect();
    let length = Duration::from_millis(bench.size(1500, 200) as u64);
    for rate in RATES {
        let mut outcomes: [Vec<Outcome>; 2] = Default::default();
        for round in 0..bench.rounds(3) {
            for n in 0..WAYS.len() {
                let way = (n + round) % WAYS.len();
                outcomes[way].push(turn(ground, WAYS[way].1, rate, length).await?);
            }
        }
        for (n, outcomes) in outcomes.iter().enumerate() {
            let spread = |of: &dyn Fn(&Outcome) -> f64| Spread::of(outcomes.iter().map(of));
            let hits = spread(&|it| it.stats.hits as f64 / it.stats.gets as f64);
            let reached = spread(&|it| it.changes as f64 / it.seconds);
            let loads = spread(&|it| it.stats.loads as f64 / it.seconds);
            table.row([
                rate.to_string(),
                number(reached.median),
                WAYS[n].0.to_owned(),
                number(spread(&|it| it.stats.gets as f64 / it.seconds).median),
                number(hits.median * 100.0),
                number(loads.median),
                number(spread(&|it| it.stats.voided as f64 * 100.0 / it.stats.loads.max(1) as f64).median),
                number(spread(&|it| quantile(&it.behind, 0.5)).median),
                number(spread(&|it| quantile(&it.behind, 0.99)).median),
                number(spread(&|it| quantile(&it.behind, 1.0)).median),
            ]);
            lines[n].1.push((reached.median, hits.median * 100.0));
            if n == 1 && rate == RATES[3] {
                let per_change = spread(&|it| it.stats.loads as f64 / it.changes as f64);
                bench.ratio(Ratio::cost(
                    "loads of a row that changes as fast as it can, `Refresh`",
                    "changes",
                    per_change,
                ));
            }
        }
    }
    bench.table(table);
    bench.plot(Plot {
        name: "hot".to_owned(),
        title: "One row that changes all the time: reads that are hits".to_owned(),
        unit: "%".to_owned(),
        log: false,
        shape: Shape::Lines { x: "changes a second".to_owned(), log_x: true, lines },
    });
    Ok(())
}

/// Changes the row. Returns when that was known to be committed.
async fn change(client: &Client, update: &Statement, version: usize) -> Result<Instant> {
    let changed = client.execute(update, &[&version.to_string()]).await?;
    ensure!(changed == 1, "the row is there");
    Ok(Instant::now())
}

/// Has all of them run at the same time, and begun in this order.
async fn in_order<F: Future<Output = Result<Instant>>>(all: impl Iterator<Item = F>) -> Result<Vec<Instant>> {
    let mut all: Vec<_> = all.map(Box::pin).collect();
    let mut ended: Vec<Option<Instant>> = vec![None; all.len()];
    poll_fn(|context| {
        let (mut failed, mut waits) = (None, false);
        for (run, end) in all.iter_mut().zip(&mut ended).filter(|(_, end)| end.is_none()) {
            match run.as_mut().poll(context) {
                Poll::Ready(Ok(at)) => *end = Some(at),
                Poll::Ready(Err(error)) => failed = Some(error),
                Poll::Pending => waits = true,
            }
        }
        match failed {
            Some(error) => Poll::Ready(Err(error)),
            None if waits => Poll::Pending,
            None => Poll::Ready(Ok(())),
        }
    })
    .await?;
    Ok(ended.into_iter().flatten().collect())
}

/// Has one writer and one reader at work.
async fn turn(ground: &Ground, on_change: OnChange, rate: u32, length: Duration) -> Result<Outcome> {
    let node = ground.node(5).await?;
    let users: Table<i64, User> = node.table_with("public.users", TableOptions::default().on_change(on_change)).await?;
    let client = ground.client().await?;
    client.batch_execute("set synchronous_commit = off; update public.users set name = '0' where id = 1").await?;
    let update = client.prepare("update public.users set name = $1 where id = 1").await?;
    node.barrier().await?;
    ensure!(users.get(&1).await?.is_some_and(|user| user.name == "0"), "the first version is there");

    let stop = Arc::new(AtomicBool::new(false));
    let (table, stopped, runtime) = (users.clone(), stop.clone(), Handle::current());
    let reader = tokio::task::spawn_blocking(move || -> Result<Vec<(Instant, usize)>> {
        let mut reads = Vec::new();
        while !stopped.load(Ordering::Relaxed) {
            let began = Instant::now();
            let user = runtime.block_on(table.get(&1))?;
            let version = user.map(|user| user.name.parse()).transpose()?;
            reads.extend(version.map(|version| (began, version)));
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(reads)
    });
    let (before, began) = (users.stats(), Instant::now());
    // When each version was known to be committed.
    let mut committed = vec![began];
    while began.elapsed() < length {
        let due = began + Duration::from_secs(committed.len() as u64) / rate;
        if let Some(early) = due.checked_duration_since(Instant::now()).filter(|it| *it > Duration::from_millis(1)) {
            tokio::time::sleep(early).await;
        }
        let late = (began.elapsed().as_secs_f64() * f64::from(rate)) as usize;
        let versions = committed.len()..=late.clamp(committed.len(), committed.len() + PIPELINE - 1);
        committed.extend(in_order(versions.map(|version| change(&client, &update, version))).await?);
    }
    let (seconds, stats) = (began.elapsed().as_secs_f64(), users.stats().since(&before));
    stop.store(true, Ordering::Relaxed);
    let mut behind = Vec::new();
    for (at, version) in reader.await?? {
        let since = committed.get(version + 1).and_then(|next| at.checked_duration_since(*next));
        behind.push(since.unwrap_or_default().as_secs_f64() * 1e3);
    }
    behind.sort_by(f64::total_cmp);
    node.barrier().await?;
    let last = (committed.len() - 1).to_string();
    ensure!(users.get(&1).await?.is_some_and(|user| user.name == last), "the last version is there");
    ensure!(stats.invalidations > 0 && !behind.is_empty(), "changes were applied, and the row was read");
    node.shutdown().await;
    Ok(Outcome { seconds, changes: committed.len() - 1, stats, behind })
}
