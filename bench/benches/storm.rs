//! How fast changes are applied when very many come at once, and what reads notice of them.

#[path = "storm/hot.rs"]
mod hot;
#[path = "storm/readers.rs"]
mod readers;

use std::{
    fmt::Debug,
    fs,
    future::poll_fn,
    hash::Hash,
    process::ExitCode,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rowcache::{Key, Table, TableOptions, install};
use rowcache_bench::{
    ground::{Ground, User, holding},
    measure::{Spread, Turns, number, thousands},
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio_postgres::{AsyncMessage, Client, NoTls};

const BARE: &str = "bare tokio-postgres, serde_json and quick_cache";
/// Keys a second that a node is to apply.
const WANTED: f64 = 2e6;
/// Within this, whatever was sent has long been applied.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    suite::main("storm", "A storm of changes", run)
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "A statement changes every row of a table whose rows a node holds, and its triggers tell the keys (`max_keys` is above the number of
         rows; by default such a statement would clear the table). The node hears that once, and forgets all rows. The same messages are
         then sent again and again, all of them in one transaction, so that its COMMIT delivers them at once; before each time, the rows are
         read again. The time is from sending COMMIT until the last key has been applied, the server's part included. Bare is a listener
         that reads the same messages with serde_json and removes each key from a quick_cache that holds the same rows; nothing else runs
         in its turn. While others read, the storm changes nine tenths of the rows, and one thread reads the others with `try_get`: every
         read is a hit.",
    );
    bench.about(
        "The hot row is changed by one writer who waits for each commit (`synchronous_commit = off`, or the disk would set the pace), and
         read by one thread with `get` every 0.1 ms. What it reads is behind by the time since the writer was told of the next commit. A change
         every 0.1 ms overtakes nearly every load, and what was overtaken is handed to whoever asked before the change, and not held: a row that
         changes faster than it can be loaded cannot be served from memory without serving what is known to be old.",
    );
    let ground = Ground::start(&mut bench).await?;
    ground.client().await?.batch_execute("create database bare").await?;
    let rows = bench.size(1_000_000, 20_000);
    let mut table = report::Table::new(
        format!("{} changed keys in one commit.", thousands(rows as i64)),
        &[
            "keys",
            "",
            "messages, MB",
            "ms from COMMIT until all are applied",
            "ms from the first key",
            "keys a second",
            "RSS before, MB",
            "at its peak",
        ],
    );
    let mut bars = Vec::new();

    ground.users(rows).await?;
    let ids: Vec<i64> = (1..=rows as i64).collect();
    let messages = drain(&mut bench, &ground, &mut table, &mut bars, "bigint", "public.users", ids).await?;
    readers::run(&mut bench, &ground, rows, &messages).await?;

    ground.people(rows).await?;
    let emails: Vec<String> = (1..=rows as i64).map(|id| User::nth(id).email).collect();
    drain(&mut bench, &ground, &mut table, &mut bars, "text", "public.people", emails).await?;
    bench.table(table);
    bench.plot(Plot {
        name: "drain".to_owned(),
        title: "A storm of changes: how fast they are applied".to_owned(),
        unit: "keys a second".to_owned(),
        log: false,
        shape: Shape::Bars(bars),
    });
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

/// The messages with which triggers tell a change of all rows.
async fn told<K: DeserializeOwned>(ground: &Ground, table: &str, rows: usize) -> Result<Vec<String>> {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let keep = heard.clone();
    let listener =
        listen(&ground.url(), move |message| keep.lock().expect("not poisoned").push(message.to_owned())).await?;
    ground.client().await?.batch_execute(&format!("update {table} set role = 'owner'")).await?;
    let keys = || -> Result<usize> {
        let heard = heard.lock().expect("not poisoned");
        heard.iter().map(|message| Ok(serde_json::from_str::<Told<K>>(message)?.k.len())).sum()
    };
    let began = Instant::now();
    while keys()? < rows {
        ensure!(began.elapsed() < PATIENCE, "triggers told {} of {rows} keys", keys()?);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ensure!(keys()? == rows, "triggers told {} of {rows} keys", keys()?);
    drop(listener);
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

type Cache<K> = quick_cache::sync::Cache<K, Arc<User>>;

/// What the turns share.
struct Storm<K: Key> {
    url: String,
    users: Table<K, User>,
    bare_url: String,
    bare: Arc<Cache<K>>,
    /// Keys that were removed from it.
    removed: Arc<AtomicU64>,
    keys: Vec<K>,
    messages: Vec<String>,
    all: Mutex<[Vec<Took>; 2]>,
    resident: Mutex<Vec<f64>>,
}

impl<K: Key + Clone + Eq + Hash> Storm<K> {
    async fn turn(&self, way: usize) -> Result<f64> {
        let took = if way == 0 { self.node().await? } else { self.bare().await? };
        let cost = took.from_commit / self.keys.len() as f64;
        self.all.lock().expect("not poisoned")[way].push(took);
        Ok(cost)
    }

    async fn node(&self) -> Result<Took> {
        read_again(&self.users, &self.keys).await?;
        let before = self.users.stats().invalidations;
        self.resident.lock().expect("not poisoned").push(resident()?);
        let began = send(&self.url, &self.messages).await?;
        let took = applied(began, self.keys.len(), || self.users.stats().invalidations - before).await?;
        let left = self.keys.iter().filter(|key| self.users.peek(key).is_known()).count();
        ensure!(left == 0, "{left} rows that have changed are held");
        Ok(took)
    }

    async fn bare(&self) -> Result<Took> {
        for (key, id) in self.keys.iter().zip(1..) {
            self.bare.insert(key.clone(), Arc::new(User::nth(id)));
        }
        let held = self.bare.len();
        ensure!(held == self.keys.len(), "{held} of {} rows are held", self.keys.len());
        self.removed.store(0, Ordering::Relaxed);
        let began = send(&self.bare_url, &self.messages).await?;
        let took = applied(began, self.keys.len(), || self.removed.load(Ordering::Relaxed)).await?;
        ensure!(self.bare.is_empty(), "{} rows that have changed are held", self.bare.len());
        Ok(took)
    }
}

/// Measures how fast a change of all rows is applied. Returns its messages.
async fn drain<K>(
    bench: &mut Bench,
    ground: &Ground,
    table: &mut report::Table,
    bars: &mut Vec<(String, f64)>,
    kind: &str,
    name: &str,
    keys: Vec<K>,
) -> Result<Vec<String>>
where
    K: Key + Clone + Eq + Hash + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let rows = keys.len();
    let pool = ground.pool(1).await?;
    install::track(&pool, name, &install::TrackOptions { max_keys: 2 * rows as u32, ..Default::default() }).await?;
    let node = ground.node(5).await?;
    let users = holding(&node, name, TableOptions::default(), &keys).await?;
    let messages = told::<K>(ground, name, rows).await?;
    node.barrier().await?;
    ensure!(users.stats().invalidations == rows as u64, "the triggers' own messages were applied, each key once");
    sqlx::raw_sql(format!("vacuum analyze {name}").as_str()).execute(&pool).await?;

    let bare = Arc::new(Cache::new(2 * rows));
    let removed = Arc::new(AtomicU64::new(0));
    let bare_url = ground.server.url("bare");
    let (from, count) = (bare.clone(), removed.clone());
    let hear = move |message: &str| {
        let told: Told<K> = serde_json::from_str(message).expect("triggers send JSON");
        let keys = told.k.iter().filter(|key| from.remove(*key).is_some()).count();
        count.fetch_add(keys as u64, Ordering::Relaxed);
    };
    let listener = listen(&bare_url, hear).await?;
    let storm = Arc::new(Storm {
        url: ground.url(),
        users,
        bare_url,
        bare,
        removed,
        keys,
        messages,
        all: Mutex::default(),
        resident: Mutex::default(),
    });
    let turns = Turns::wait(bench.rounds(5), 2, |way| {
        let storm = storm.clone();
        async move { storm.turn(way).await }
    })
    .await?;
    node.shutdown().await;
    drop(listener);

    let bytes: usize = storm.messages.iter().map(String::len).sum();
    let all = storm.all.lock().expect("not poisoned");
    let before = Spread::of(storm.resident.lock().expect("not poisoned").iter().copied()).median;
    for (n, way) in ["rowcache", BARE].into_iter().enumerate() {
        let millis = |of: fn(&Took) -> f64| Spread::of(all[n][1..].iter().map(|took| of(took) * 1e3)).to_string();
        let a_second = turns.of(n).map(|seconds| 1.0 / seconds);
        let peak = Spread::of(all[n].iter().map(|took| took.peak)).median;
        let megabytes = |bytes: f64| if n == 0 { number(bytes / 1e6) } else { String::new() };
        table.row([
            kind.to_owned(),
            way.to_owned(),
            number(bytes as f64 / 1e6),
            millis(|took| took.from_commit),
            millis(|took| took.from_first),
            number(a_second.median),
            megabytes(before),
            megabytes(peak),
        ]);
        bars.push((format!("{way}, {kind}"), a_second.median));
    }
    let a_second = turns.of(0).map(|seconds| 1.0 / seconds / WANTED);
    let per_first = Spread::of(all[0][1..].iter().map(|took| rows as f64 / took.from_first.max(1e-3) / WANTED));
    bench.ratio(Ratio::gain(format!("{kind} keys applied a second"), "2,000,000", a_second).target(1.0));
    bench.ratio(Ratio::gain(format!("{kind} keys applied a second, from the first key"), "2,000,000", per_first));
    bench.ratio(Ratio::cost(format!("time to apply {kind} keys"), BARE, turns.ratio(0, 1)));
    let peaks = Spread::of(all[0].iter().map(|took| took.peak / before));
    bench.ratio(Ratio::cost(format!("RSS at its peak in a storm of {kind} keys"), "RSS before", peaks));
    Ok(storm.messages.clone())
}
