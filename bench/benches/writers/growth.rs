//! What the change log holds while many transactions write to it.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rowcache_bench::{
    ground::Ground,
    measure::{number, thousands},
    report::Table,
};
use tokio::time::sleep;

use crate::{
    load::{Noted, Readers},
    setup::{self, Variant},
};

/// Writes so many messages, each in a transaction of its own, while one node polls and trims. A row for each step.
pub async fn measure(ground: &Ground, messages: usize, step: usize) -> Result<Table> {
    let mut table = Table::new(
        "What the change log holds, while one node polls it and one writer writes as fast as it can, without waiting for flushes.",
        &["messages written", "messages kept", "MB with indexes", "longest fence meanwhile, ms"],
    );
    setup::tell(ground, Variant::Log).await?;
    let readers = Readers::new(ground, Variant::Log, 1, &Noted::default()).await?;
    let (node, items) = &readers.nodes[0];
    let (writer, observer) = (ground.client().await?, ground.client().await?);
    writer.batch_execute("set synchronous_commit = off").await?;
    let write = format!(
        "do $$ begin for n in 1..{step} loop update public.item set updated_at = now() where id = n % 1000 + 1; commit; end loop; end $$"
    );
    for written in (step..=messages).step_by(step) {
        let mut longest = Duration::ZERO;
        let mut writing = pin!(writer.batch_execute(&write));
        loop {
            let began = Instant::now();
            let fence = async {
                node.barrier().await?;
                longest = longest.max(began.elapsed());
                sleep(Duration::from_millis(20)).await;
                anyhow::Ok(())
            };
            tokio::select! {
                done = &mut writing => break done?,
                fenced = fence => fenced?,
            }
        }
        let held = "select (select count(*) from rowcache.change_log), sum(pg_total_relation_size(c.oid))::bigint
            from pg_class c where c.relnamespace = 'rowcache'::regnamespace and c.relkind = 'r' and c.relname like 'change_log_%'";
        let held = observer.query_one(held, &[]).await?;
        let (kept, bytes) = (held.get::<_, i64>(0), held.get::<_, i64>(1));
        table.row([
            thousands(written as i64),
            thousands(kept),
            number(bytes as f64 / 1e6),
            number(longest.as_secs_f64() * 1e3),
        ]);
        observer.batch_execute("vacuum public.item").await?;
    }
    node.barrier().await?;
    let stats = items.stats();
    ensure!(stats.invalidations >= messages as u64 || stats.clears > 0, "the node was told of all: {stats:?}");
    readers.end().await;
    Ok(table)
}
