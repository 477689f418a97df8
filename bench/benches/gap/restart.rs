//! A restart of the whole server.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rowcache::{Event, cli::temp_server::Stop};
use rowcache_bench::{
    ground::Ground,
    measure::{Spread, thousands},
    report::{self, Ratio},
    suite::Bench,
};
use tokio_postgres::NoTls;

use crate::{HOTTEST, PATIENCE, Way, events, millis, reader::Choice, start, until};

/// Milliseconds.
struct Back {
    down: f64,
    coherent: f64,
    refilled: f64,
    /// Rows that are held when the refill has ended.
    held: f64,
}

pub async fn run(bench: &mut Bench, ground: &mut Ground) -> Result<()> {
    let rows = bench.size(HOTTEST, 5000);
    ground.users(rows).await?;
    let choice = Choice::new(rows);
    let mut table = report::Table::new(
        format!("A restart of the server; `refill(100_000)`, {} rows held.", thousands(rows as i64)),
        &[
            "down for, s, besides",
            "down, ms",
            "ms from the first connection until coherent",
            "until refilled",
            "rows held then, at least",
        ],
    );
    for pause in [0, 2] {
        let mut all = Vec::new();
        for _ in 0..bench.rounds(4) {
            all.push(turn(ground, &choice, Duration::from_secs(pause)).await?);
        }
        let spread = |of: fn(&Back) -> f64| Spread::of(all.iter().map(of));
        table.row([
            pause.to_string(),
            spread(|it| it.down).to_string(),
            spread(|it| it.coherent).to_string(),
            spread(|it| it.refilled).to_string(),
            thousands(all.iter().map(|it| it.held as i64).min().unwrap_or_default()),
        ]);
        let (coherent, refilled) = (spread(|it| it.coherent / 100.0), spread(|it| it.refilled / 500.0));
        let named = |what: &str| format!("{what} after a restart, stopped for {pause} s");
        bench.ratio(Ratio::cost(named("time to coherent"), "100 ms", coherent).target(1.0));
        bench.ratio(Ratio::cost(named("time until 100,000 rows are held again"), "500 ms", refilled).target(1.0));
    }
    bench.table(table);
    Ok(())
}

async fn turn(ground: &mut Ground, choice: &Choice, pause: Duration) -> Result<Back> {
    let (node, users) = start(ground, Way::Refill, choice.ids()).await?;
    choice.warm_up(&users, choice.ids().len()).await?;
    let mut events = events(&node);
    let stopped = Instant::now();
    ground.server.stop(Stop::Fast).await?;
    tokio::time::sleep(pause).await;
    let answering = tokio::spawn(answers(ground.url()));
    ground.server.start().await?;
    let answers = answering.await??;
    let coherent = until(&mut events, |at, event| at >= answers && matches!(event, Event::Coherent)).await?;
    while users.stats().refilled == 0 {
        ensure!(answers.elapsed() < PATIENCE, "it refills");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let refilled = answers.elapsed();
    let held = choice.ids().iter().filter(|id| users.peek(id).is_known()).count();
    ensure!(held > 0, "rows are held again");
    node.shutdown().await;
    Ok(Back {
        down: millis(answers - stopped),
        coherent: millis(coherent - answers),
        refilled: millis(refilled),
        held: held as f64,
    })
}

/// When the server first accepts a connection.
async fn answers(url: String) -> Result<Instant> {
    let began = Instant::now();
    loop {
        if tokio_postgres::connect(&url, NoTls).await.is_ok() {
            return Ok(Instant::now());
        }
        ensure!(began.elapsed() < PATIENCE, "the server answers");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
