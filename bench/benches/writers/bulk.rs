//! One statement that changes every row: how long it takes, how much memory the server needs for it, and what is told.

use std::{
    fs,
    future::poll_fn,
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rowcache_bench::ground::Ground;
use tokio::time::interval;
use tokio_postgres::{AsyncMessage, NoTls};

use crate::setup::{self, Variant};

pub struct Outcome {
    pub seconds: f64,
    /// Bytes of its own that the server's process had at most, less those before.
    pub memory: f64,
    /// Notifications, or rows of the change log.
    pub messages: u64,
}

/// Sent when all else has been.
const END: &str = "the end";

pub async fn measure(ground: &Ground, variant: Variant) -> Result<Outcome> {
    setup::tell(ground, variant).await?;
    let (listener, mut connection) = tokio_postgres::connect(&ground.url(), NoTls).await?;
    let counting = tokio::spawn(async move {
        let mut count = 0;
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            match message {
                AsyncMessage::Notification(message) if message.payload() == END => break,
                AsyncMessage::Notification(_) => count += 1,
                _ => {}
            }
        }
        count
    });
    listener.batch_execute("listen cache; listen rowcache").await?;
    let client = ground.client().await?;
    client.batch_execute("checkpoint").await?;
    let logged = "select count(*) from rowcache.change_log";
    let before: i64 = client.query_one(logged, &[]).await?.get(0);
    let process: i32 = client.query_one("select pg_backend_pid()", &[]).await?.get(0);
    let own = own_memory(process)?;
    let (mut most, mut tick) = (own, interval(Duration::from_millis(2)));
    let began = Instant::now();
    let mut update = pin!(client.batch_execute("update public.item set updated_at = now()"));
    loop {
        tokio::select! {
            done = &mut update => break done?,
            _ = tick.tick() => most = most.max(own_memory(process)?),
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let after: i64 = client.query_one(logged, &[]).await?.get(0);
    client.execute("select pg_notify('cache', $1)", &[&END]).await?;
    let messages = counting.await? + (after - before).cast_unsigned();
    Ok(Outcome { seconds, memory: (most - own) as f64, messages })
}

/// Bytes that a process shares with nobody.
fn own_memory(process: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("a line RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}
