//! What reads cost that wait for a fence.

use std::{hint::black_box, process::ExitCode, sync::Arc};

use anyhow::{Result, ensure};
use rowcache::{Freshness, Table, TableOptions};
use rowcache_bench::{
    ground::{Ground, User, holding},
    measure::{Turns, number, quantile, time_of},
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};
use sqlx::PgPool;
use tokio::task::JoinSet;

const SELECT: &str = "select id, email, name, role from public.users where id = $1";
const ROWS: usize = 10_000;

fn main() -> ExitCode {
    suite::main("fence", "A fenced read", run)
}

#[derive(Clone)]
enum Way {
    Fenced(Table<i64, User>),
    Pool(PgPool),
}

impl Way {
    async fn read(&self, id: i64) -> Result<()> {
        match self {
            Self::Fenced(users) => {
                ensure!(black_box(users.get_with(&id, Freshness::Fenced).await?).is_some(), "{id} is there");
            }
            Self::Pool(pool) => {
                black_box(sqlx::query_as::<_, User>(SELECT).bind(id).fetch_one(pool).await?);
            }
        }
        Ok(())
    }
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "A read with `Freshness::Fenced` has all that was committed before it began, wherever. The row is held; the read waits until a
         message that the node sent to itself after the call has come back through Postgres. Fences are shared by who waits for one, and are
         at least 5 ms apart, so that a node takes no more than 200 transaction ids a second (`Config::fence_spacing`); a select by key
         through a pool of 5 is what it is compared with.",
    );
    let ground = Ground::start(&mut bench).await?;
    ground.users(ROWS).await?;
    let ids: Vec<i64> = (1..=ROWS as i64).collect();
    let pool = ground.pool(5).await?;
    let spaced = ground.node(5).await?;
    let mut config = ground.config(5)?;
    config.fence_spacing = std::time::Duration::ZERO;
    let unspaced = rowcache::Node::start(config).await?;
    let ways = [
        (
            "fenced read, 5 ms apart (default)",
            Way::Fenced(holding(&spaced, "public.users", TableOptions::default(), &ids).await?),
        ),
        (
            "fenced read, no spacing",
            Way::Fenced(holding(&unspaced, "public.users", TableOptions::default(), &ids).await?),
        ),
        ("select by key", Way::Pool(pool)),
    ];
    let mut table = report::Table::new(
        "Reads of rows that are held.",
        &["callers", "", "reads a second", "ms for a read: p50", "p99", "reads for each of the select's"],
    );
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = ways.iter().map(|way| (way.0.to_owned(), Vec::new())).collect();
    for callers in [1, 64, 1000] {
        let reads = bench.size([200, 4][usize::from(callers == 1000)], 3);
        let times: [Arc<std::sync::Mutex<Vec<f64>>>; 3] = Default::default();
        let turns = Turns::wait(bench.rounds(7), ways.len(), |n| {
            let (way, times) = (ways[n].1.clone(), times[n].clone());
            async move {
                let (of_each, took) = time_of(read_all(&way, callers, reads)).await;
                times.lock().expect("not poisoned").extend(of_each?);
                Ok(took.as_secs_f64() / (callers * reads) as f64)
            }
        })
        .await?;
        for (n, way) in ways.iter().enumerate() {
            let mut times = times[n].lock().expect("not poisoned").clone();
            times.sort_by(f64::total_cmp);
            let a_second = turns.of(n).map(|seconds| 1.0 / seconds).median;
            let millis = |part: f64| number(quantile(&times, part) * 1e3);
            table.row([
                callers.to_string(),
                way.0.to_owned(),
                number(a_second),
                millis(0.5),
                millis(0.99),
                if n == 2 { String::new() } else { turns.ratio(2, n).to_string() },
            ]);
            lines[n].1.push((callers as f64, a_second));
            if n < 2 {
                let what = format!("{}: reads a second, {callers} callers", way.0);
                bench.ratio(Ratio::gain(what, ways[2].0, turns.ratio(2, n)));
            }
        }
    }
    bench.table(table);
    bench.plot(Plot {
        name: "reads".to_owned(),
        title: "Reads of held rows that wait for a fence".to_owned(),
        unit: "reads a second".to_owned(),
        log: true,
        shape: Shape::Lines { x: "callers".to_owned(), log_x: true, lines },
    });
    spaced.shutdown().await;
    unspaced.shutdown().await;
    Ok(bench)
}

/// The seconds that each read took.
async fn read_all(way: &Way, callers: usize, reads: usize) -> Result<Vec<f64>> {
    let mut readers = JoinSet::new();
    for caller in 0..callers {
        let way = way.clone();
        readers.spawn(async move {
            let mut times = Vec::new();
            for n in 0..reads {
                let (read, took) = time_of(way.read((caller * 7919 + n * 104_729) as i64 % ROWS as i64 + 1)).await;
                read?;
                times.push(took.as_secs_f64());
            }
            anyhow::Ok(times)
        });
    }
    let mut all = Vec::new();
    while let Some(times) = readers.join_next().await {
        all.extend(times??);
    }
    Ok(all)
}
