//! What the parts of a recovery take by themselves: opening the line again, and reading rows.

use std::{sync::Arc, time::Instant};

use anyhow::{Result, ensure};
use rowcache::{Event, Table, TableOptions};
use rowcache_bench::{
    ground::{Ground, User},
    measure::{Spread, Turns, number, thousands},
    report::{self, Ratio},
    suite::Bench,
};
use tokio::task::JoinSet;

use crate::{HOTTEST, KILL, Way, events, millis, start, until};

pub async fn run(bench: &mut Bench, ground: &Ground) -> Result<()> {
    ground.users(1000).await?;
    let ids: Vec<i64> = (1..=1000).collect();
    let (mut noticed, mut coherent) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds(15) {
        let (node, _users) = start(ground, Way::Lazy, &ids).await?;
        let client = ground.client().await?;
        let mut events = events(&node);
        let began = Instant::now();
        client.batch_execute(KILL).await?;
        let gap = until(&mut events, |_, event| matches!(event, Event::Gap(_))).await?;
        let back = until(&mut events, |_, event| matches!(event, Event::Coherent)).await?;
        noticed.push(millis(gap - began));
        coherent.push(millis(back - began));
        node.shutdown().await;
    }
    let (noticed, coherent) = (Spread::of(noticed), Spread::of(coherent));
    let mut table = report::Table::new(
        "One lost connection while nobody reads, in milliseconds since it was ended.",
        &["until the node knows", "until it is coherent again"],
    );
    table.row([noticed.to_string(), coherent.to_string()]);
    bench.table(table);
    let coherent = coherent.map(|time| time / 100.0);
    bench.ratio(Ratio::cost("time to coherent after a killed listener, nobody reads", "100 ms", coherent).target(1.0));
    Ok(())
}

/// Reads what a refill reads, with more than one statement at a time.
pub async fn batches(bench: &mut Bench, ground: &Ground) -> Result<()> {
    const AT_A_TIME: [(usize, usize); 5] = [(1, 512), (2, 512), (4, 512), (1, 4096), (2, 4096)];
    let rows = bench.size(HOTTEST, 5000);
    let ids: Arc<Vec<i64>> = Arc::new((1..=rows as i64).collect());
    let mut tables: Vec<Table<i64, User>> = Vec::new();
    let mut nodes = Vec::new();
    for (_, keys) in AT_A_TIME {
        let mut config = ground.config(5)?;
        config.load_keys_max = keys;
        let node = rowcache::Node::start(config).await?;
        tables.push(node.table_with("public.users", TableOptions::default().capacity(2 * rows)).await?);
        nodes.push(node);
    }
    let turns = Turns::wait(bench.rounds(5), AT_A_TIME.len(), |n| {
        let (users, ids, (tasks, keys)) = (tables[n].clone(), ids.clone(), AT_A_TIME[n]);
        async move {
            users.forget_all();
            let (began, before) = (Instant::now(), users.stats());
            let mut readers = JoinSet::new();
            for task in 0..tasks {
                let (users, ids) = (users.clone(), ids.clone());
                readers.spawn(async move {
                    for keys in ids.chunks(keys).skip(task).step_by(tasks) {
                        let found = users.get_many(keys).await?.iter().flatten().count();
                        ensure!(found == keys.len(), "{found} of {} rows are there", keys.len());
                    }
                    anyhow::Ok(())
                });
            }
            while let Some(read) = readers.join_next().await {
                read??;
            }
            let took = millis(began.elapsed());
            let loads = users.stats().since(&before).loads;
            ensure!(loads == ids.len() as u64, "{loads} of {} rows were read from Postgres", ids.len());
            Ok(took)
        }
    })
    .await?;
    let mut table = report::Table::new(
        format!("How long it takes to read {} rows in the order of their keys, by `get_many`.", thousands(rows as i64)),
        &["statements at a time", "keys in each", "ms", "of the first row's"],
    );
    for (n, (tasks, keys)) in AT_A_TIME.into_iter().enumerate() {
        let ratio = number(turns.ratio(n, 0).median);
        table.row([tasks.to_string(), keys.to_string(), turns.of(n).to_string(), ratio]);
    }
    bench.table(table);
    for node in nodes {
        node.shutdown().await;
    }
    Ok(())
}
