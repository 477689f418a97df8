//! What the change log holds while millions of transactions write to it.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::time::sleep;

use super::{
    load,
    setup::{Ground, Variant},
};

/// Between two lines.
const STEP: u32 = 250_000;

/// Writes so many messages, each in a transaction of its own, while one node polls and trims.
pub(super) async fn print(ground: &Ground, messages: u32) -> Result<()> {
    println!("What the change log holds, while one node polls it\n");
    println!(
        "| messages written | messages kept | MB with indexes | longest fence, ms |\n| ---: | ---: | ---: | ---: |"
    );
    ground.tell(Variant::Log).await?;
    let readers = load::readers(ground, Variant::Log, 1, &load::Noted::default()).await?;
    let [node] = &readers.nodes[..] else { unreachable!("one was asked for") };
    let (writer, observer) = (ground.client().await?, ground.client().await?);
    writer.batch_execute("set synchronous_commit = off").await?;
    let write = format!(
        "do $$ begin for n in 1..{STEP} loop update public.item set updated_at = now() where id = n % 1000 + 1; commit; end loop; end $$"
    );
    for written in (STEP..=messages).step_by(STEP as usize) {
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
        let (kept, megabytes) = (held.get::<_, i64>(0), held.get::<_, i64>(1) >> 20);
        println!("| {written} | {kept} | {megabytes} | {:.1} |", longest.as_secs_f64() * 1e3);
        observer.batch_execute("vacuum public.item").await?;
    }
    println!();
    node.shutdown().await;
    Ok(())
}
