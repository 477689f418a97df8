//! How fast changes are applied when very many come at once, and what reads notice of them.

#[path = "storm/drain.rs"]
mod drain;
#[path = "storm/hot.rs"]
mod hot;
#[path = "storm/readers.rs"]
mod readers;

use std::{
    fs,
    future::poll_fn,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rowcache::{Key, Table, install};
use rowcache_bench::{
    ground::{Ground, User},
    suite::{self, Bench},
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio_postgres::{AsyncMessage, Client, NoTls};

use drain::Drains;

/// Within this, whatever was sent has long been applied.
const PATIENCE: Duration = Duration::from_mins(1);

fn main() -> ExitCode {
    suite::main("storm", "A storm of changes", run)
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "A statement changes every row of a table, and its triggers tell the keys (`max_keys` is the number of rows; by default such a statement
         would clear the table). A node applies that once. The same messages are then sent again and again, all of them in one transaction, so
         that its COMMIT delivers them at once, to a node that holds all of the rows, or every tenth; before each time, the rows are read again. What is
         counted are the keys in messages, whether they are held or not. Bare is a listener that reads the same messages with serde_json and
         removes each key from a quick_cache that holds the same rows; nothing else runs in its turn. While others read, the storm changes
         three quarters of the rows that are held, and one thread reads the others with `try_get`: every read is a hit.",
    );
    bench.about(
        "The hot row is changed by one writer, each time in a transaction of its own, with at most 16 under way on its one connection
         (`synchronous_commit = off`, or the disk would set the pace), and read by one thread with `get` every 0.1 ms. What it reads is behind
         by the time since the writer was told of the next commit. Most loads are overtaken by a change then. Whoever asked before that gets
         them, and they are not held: a row that changes faster than it can be loaded cannot be served from memory without serving what is
         known to be old.",
    );
    bench.about(
        "Why fewer than 2,000,000 keys a second are applied while all rows are held: one task applies all messages, and half of its time goes into
         memory that is in no cache of the processor, in `quick_cache`'s `remove`, one key after the other; the bare listener has that too. Nearly
         a third is the allocator: the values are dropped there, and for each key that was held an event is written down
         (`TableOptions::history`). To read the JSON takes 4 % for numbers; each text is allocated twice more, once as part of the message, and once
         as a key. Keys that are not held cost a fraction.",
    );
    let ground = Ground::start(&mut bench).await?;
    ground.client().await?.batch_execute("create database bare").await?;
    let rows = bench.size(1_000_000, 20_000);
    let mut drains = Drains::new(rows);

    ground.users(rows).await?;
    let ids: Vec<i64> = (1..=rows as i64).collect();
    let messages = told(&ground, "public.users", &ids).await?;
    drains.run(&mut bench, &ground, ("bigint", "public.users"), &ids, &messages).await?;
    readers::run(&mut bench, &ground, rows, &messages).await?;

    ground.people(rows).await?;
    let emails: Vec<String> = ids.iter().map(|id| User::nth(*id).email).collect();
    let messages = told(&ground, "public.people", &emails).await?;
    drains.run(&mut bench, &ground, ("text", "public.people"), &emails, &messages).await?;
    drains.show(&mut bench);

    hot::run(&mut bench, &ground).await?;
    Ok(bench)
}

/// What a message tells.
#[derive(Deserialize)]
struct Told<K> {
    k: Vec<K>,
}

/// A client that listens on the channel of rowcache, and hands over what comes.
async fn listen(url: &str, mut hear: impl FnMut(&str) + Send + 'static) -> Result<Client> {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notification(message) = message {
                hear(message.payload());
            }
        }
    });
    client.batch_execute("listen rowcache").await?;
    Ok(client)
}

/// The messages with which triggers tell a change of all rows. A node has applied them.
async fn told<K: Key + DeserializeOwned>(ground: &Ground, table: &str, rows: &[K]) -> Result<Vec<String>> {
    let pool = ground.pool(1).await?;
    let options = install::TrackOptions { max_keys: rows.len() as u32, ..Default::default() };
    install::track(&pool, table, &options).await?;
    pool.close().await;
    let node = ground.node(1).await?;
    let users: Table<K, User> = node.table(table).await?;
    let heard = Arc::new(Mutex::new(Vec::new()));
    let keep = heard.clone();
    let hear = move |message: &str| keep.lock().expect("not poisoned").push(message.to_owned());
    let listener = listen(&ground.url(), hear).await?;
    let client = ground.client().await?;
    client.batch_execute(&format!("update {table} set role = 'owner'")).await?;
    let keys = || -> Result<usize> {
        let heard = heard.lock().expect("not poisoned");
        heard.iter().map(|message| Ok(serde_json::from_str::<Told<K>>(message)?.k.len())).sum()
    };
    let began = Instant::now();
    while keys()? < rows.len() {
        ensure!(began.elapsed() < PATIENCE, "triggers told {} of {} keys", keys()?, rows.len());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    node.barrier().await?;
    let applied = users.stats().invalidations;
    ensure!(keys()? == rows.len() && applied == rows.len() as u64, "{applied} keys were applied, of {}", keys()?);
    node.shutdown().await;
    drop(listener);
    client.batch_execute(&format!("vacuum analyze {table}")).await?;
    let messages = std::mem::take(&mut *heard.lock().expect("not poisoned"));
    Ok(messages)
}

/// Sends messages in one transaction. Returns when its COMMIT was sent.
async fn send(url: &str, messages: &[String]) -> Result<Instant> {
    let (mut client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    let transaction = client.transaction().await?;
    transaction.execute("select pg_notify('rowcache', m) from unnest($1::text[]) m", &[&messages]).await?;
    let began = Instant::now();
    transaction.commit().await?;
    Ok(began)
}

/// How long a storm took, in seconds.
struct Took {
    from_commit: f64,
    from_first: f64,
    /// The most memory that this process had meanwhile, in bytes.
    peak: f64,
}

/// Waits until so many keys have been applied since COMMIT was sent.
async fn applied(began: Instant, keys: usize, count: impl Fn() -> u64) -> Result<Took> {
    let (mut first, mut peak) = (None, 0.0_f64);
    loop {
        let (counted, now) = (count(), Instant::now());
        if counted > 0 {
            first.get_or_insert(now);
        }
        peak = peak.max(resident()?);
        if counted >= keys as u64 {
            ensure!(counted == keys as u64, "{counted} of {keys} keys were applied");
            let first = first.unwrap_or(now);
            return Ok(Took {
                from_commit: (now - began).as_secs_f64(),
                from_first: (now - first).as_secs_f64(),
                peak,
            });
        }
        ensure!(began.elapsed() < PATIENCE, "{counted} of {keys} keys were applied");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The memory that this process has, in bytes.
fn resident() -> Result<f64> {
    let text = fs::read_to_string("/proc/self/statm").context("this machine has no /proc")?;
    let pages: u64 = text.split(' ').nth(1).context("statm has a second number")?.parse()?;
    Ok(pages as f64 * 4096.0)
}

/// Reads rows that are not held.
async fn read_again<K: Key>(users: &Table<K, User>, keys: &[K]) -> Result<()> {
    for keys in keys.chunks(5000) {
        let found = users.get_many(keys).await?.iter().flatten().count();
        ensure!(found == keys.len(), "{found} of {} rows are there", keys.len());
    }
    Ok(())
}
