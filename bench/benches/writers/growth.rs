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

/// Of so many transactions, one writes a message. The log is trimmed by numbers of transactions.
const EVERY: usize = 4;

/// Makes so many steps of so many transactions each, while one node polls and trims. A row for each step.
pub async fn measure(ground: &Ground, steps: usize, step: usize) -> Result<Table> {
    let mut table = Table::new(
        format!(
            "What the change log holds, while one node polls it. Of {EVERY} transactions one changes a row; none waits for its flush."
        ),
        &["transactions", "messages written", "messages kept", "MB with indexes", "longest fence meanwhile, ms"],
    );
    setup::tell(ground, Variant::Log).await?;
    let readers = Readers::new(ground, Variant::Log, 1, &Noted::default()).await?;
    let (node, items) = &readers.nodes[0];
    let (writer, observer) = (ground.client().await?, ground.client().await?);
    writer.batch_execute("set synchronous_commit = off").await?;
    let messages = step / EVERY;
    let write = format!(
        "do $$ begin for n in 1..{messages} loop update public.item set updated_at = now() where id = n % 1000 + 1; commit; \
         for other in 2..{EVERY} loop perform pg_current_xact_id(); commit; end loop; end loop; end $$"
    );
    for n in 1..=steps {
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
            thousands((n * step) as i64),
            thousands((n * messages) as i64),
            thousands(kept),
            number(bytes as f64 / 1e6),
            number(longest.as_secs_f64() * 1e3),
        ]);
        observer.batch_execute("vacuum public.item").await?;
    }
    node.barrier().await?;
    let stats = items.stats();
    ensure!(
        stats.invalidations >= (steps * messages) as u64 || stats.clears > 0,
        "the node was told of all: {stats:?}"
    );
    readers.end().await;
    Ok(table)
}
