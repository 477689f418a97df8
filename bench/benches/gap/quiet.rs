//! A lost connection while nobody reads: what opening the line again takes by itself.

use std::time::Instant;

use anyhow::Result;
use rowcache::Event;
use rowcache_bench::{
    ground::Ground,
    measure::Spread,
    report::{self, Ratio},
    suite::Bench,
};

use crate::{KILL, Way, events, millis, start, until};

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
