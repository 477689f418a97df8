//! How soon the nodes have dropped a row that somebody has changed.

use std::{
    future::poll_fn,
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use redis::{AsyncConnectionConfig, PushInfo, PushKind, Value, aio::MultiplexedConnection};
use rowcache::{Node, Table, TableOptions, verify::redis::RedisServer};
use rowcache_bench::{
    ground::{self, Ground, User},
    measure::{Spread, Turns, number, quantile},
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};
use tokio::{task::JoinSet, time::sleep};
use tokio_postgres::{AsyncMessage, Client, NoTls, Statement};

const OURS: &str = "rowcache";
const BARE: &str = "bare listener";
const REDIS: &str = "Redis, client tracking";

/// For the last changes of a turn to arrive.
const PATIENCE: Duration = Duration::from_secs(10);

/// From when all listen to the first change.
const SETTLE: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    suite::main("change", "From a change to its eviction", run)
}

/// When rows were dropped, or a message said that they had changed: by all nodes, listeners or clients of a turn.
static GONE: Mutex<Vec<(i64, Instant)>> = Mutex::new(Vec::new());

fn note(id: i64, at: Instant) {
    GONE.lock().unwrap_or_else(PoisonError::into_inner).push((id, at));
}

fn noted() -> usize {
    GONE.lock().unwrap_or_else(PoisonError::into_inner).len()
}

fn take_noted() -> Vec<(i64, Instant)> {
    std::mem::take(&mut *GONE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A row that says when it is dropped, which a node does when it applies a change of it.
#[derive(sqlx::FromRow)]
struct Watched {
    #[sqlx(flatten)]
    user: User,
}

impl Drop for Watched {
    fn drop(&mut self) {
        note(self.user.id, Instant::now());
    }
}

/// What one change took, to one node.
#[derive(Clone, Copy)]
struct Seen {
    /// Since the change was sent to the server.
    issued: f64,
    /// Since the writer knew that it was made. Less than nothing if the node knew before.
    acknowledged: f64,
}

/// One turn.
#[derive(Default)]
struct Outcome {
    seen: Vec<Seen>,
    /// For each change, since it was sent, until all had dropped the row.
    by_all: Vec<f64>,
    changes_a_second: f64,
    /// CPU time of this process, the writer included, for each change and node: seconds.
    cpu: f64,
}

impl Outcome {
    /// Makes all changes, and waits until they are gone everywhere.
    async fn of(to: To, load: Load) -> Result<Self> {
        let cpu = || Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).expect("Linux has this clock"));
        let before = cpu();
        let written = change(to, load).await?;
        until_noted(load).await?;
        let took = cpu().saturating_sub(before);
        let (mut gone, count) = (take_noted(), load.count);
        gone.sort_unstable();
        ensure!(gone.len() == written.len() * count, "{} of {} were told", gone.len(), written.len() * count);
        let cpu = took.as_secs_f64() / gone.len() as f64;
        let took = written[written.len() - 1].acknowledged - written[0].issued;
        let mut outcome = Self { changes_a_second: written.len() as f64 / took.as_secs_f64(), cpu, ..Self::default() };
        for (change, gone) in written.iter().zip(gone.chunks(count)) {
            ensure!(gone.iter().all(|(id, _)| *id == change.id), "each was told of each change, once");
            outcome.seen.extend(gone.iter().map(|&(_, at)| Seen {
                issued: seconds(change.issued, at),
                acknowledged: seconds(change.acknowledged, at),
            }));
            outcome.by_all.push(seconds(change.issued, gone[count - 1].1));
        }
        Ok(outcome)
    }

    fn quantile(&self, part: f64) -> f64 {
        quantile(&sorted(self.seen.iter().map(|seen| seen.issued)), part)
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    if to >= from { (to - from).as_secs_f64() } else { -(from - to).as_secs_f64() }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The servers. Row `n` is key `n`.
struct Servers {
    ground: Ground,
    redis: RedisServer,
}

/// A load.
#[derive(Clone, Copy)]
struct Load {
    /// Nodes, listeners or clients.
    count: usize,
    changes: usize,
    /// From one change to the next.
    pace: Duration,
    /// Whether the writer waits for the flush of each commit.
    flush: bool,
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "One writer, in a thread of its own, changes rows one after the other at a given pace: an UPDATE by key in a transaction of its own,
         which is answered when it is durable. All nodes hold all of these rows. A row is gone when the node has dropped its value: it has
         removed the entry by then, and no read finds it any more. The bare listener is a connection of tokio-postgres that listens to the
         same channel, and is done when it has the message; it drops nothing. For Redis it is a SET of as many bytes, durable nowhere, and the
         clients have read all keys and track them (RESP3). All nodes, listeners or clients run in the process and on the two threads of the
         runtime; those whose turn it is are the only ones that are connected.",
    );
    bench.about(
        "Times since the change was sent include the UPDATE and its flush, and are never negative; ratios are between them, within a round.
         Times since the writer had its answer can be negative: Postgres wakes listeners before it answers. A node takes 15 to 35 µs more
         CPU time for a change than the bare listener, its fences included. One node in a process hardly shows it; 32 nodes on the two cores
         also delay the writer's own answer. With a flush, the p99 is mostly the disk's, which is another one in each turn: for one node it was
         1.33 times the bare listener's in one run of this suite and 2.51 times in the next, while since the answer both were at 0.1 to 0.2 ms.",
    );
    let ground = Ground::start(&mut bench).await?;
    let redis = ground::redis(&mut bench).await?;
    let servers = Servers { ground, redis };
    let rows = bench.size(2000, 200);
    servers.ground.users(rows).await?;
    let mut connection = servers.redis.connect().await?;
    for id in 1..=rows as i64 {
        let () = redis::cmd("SET").arg(format!("user:{id}")).arg(text(id)?).query_async(&mut connection).await?;
    }

    let mut table = report::Table::new(
        "From a change until it is gone, µs; over all changes and all nodes, listeners or clients. Changes a second: as many as were made.",
        &[
            "commits wait for",
            "changes/s",
            "how many",
            "",
            "since it was sent: p50",
            "p99",
            "p99.9",
            "all of them: p50",
            "since the answer: p50",
            "p99",
            "p99.9",
            "CPU of this process for each",
        ],
    );
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    let few = Load { count: 1, changes: bench.size(400, 60), pace: Duration::from_millis(5), flush: true };
    let many = Load { changes: rows, pace: Duration::from_micros(500), flush: false, ..few };
    let counts = [1, 8, 32];
    let flushed = counts.map(|count| (Load { count, ..few }, "200 changes/s", &[OURS, BARE, REDIS][..]));
    let unflushed = counts.map(|count| (Load { count, flush: false, ..few }, "200 changes/s", &[OURS, BARE][..]));
    let loads = flushed.into_iter().chain(unflushed).chain([(many, "2,000 changes/s", &[OURS, BARE][..])]);
    for (load, pace, ways) in loads {
        let outcomes = measure(&bench, &servers, load, ways).await?;
        let (nodes, flush) = (if load.count == 1 { "" } else { "s" }, if load.flush { "" } else { ", no flush" });
        ratios(&mut bench, &format!("{pace}, {} node{nodes}{flush}", load.count), &outcomes);
        for (way, outcomes) in ways.iter().zip(&outcomes) {
            table.row(row(load, way, outcomes));
            let mut point = |line: String, part: f64| {
                let at = (load.count as f64, quantile(&sorted(all(outcomes).map(|seen| seen.issued)), part) * 1e6);
                match lines.iter_mut().find(|it| it.0 == line) {
                    Some(line) => line.1.push(at),
                    None => lines.push((line, vec![at])),
                }
            };
            if load.flush {
                point(format!("{way}, p50"), 0.5);
                point(format!("{way}, p99"), 0.99);
            }
        }
    }
    bench.table(table);
    bench.plot(Plot {
        name: "latency".to_owned(),
        title: "From sending a change until it is gone, 200 changes a second".to_owned(),
        unit: "microseconds".to_owned(),
        log: true,
        shape: Shape::Lines { x: "nodes, listeners or clients".to_owned(), log_x: true, lines },
    });
    Ok(bench)
}

/// The rounds of each of these ways.
async fn measure(bench: &Bench, servers: &Servers, load: Load, ways: &[&str]) -> Result<Vec<Vec<Outcome>>> {
    let outcomes: Mutex<Vec<Vec<Outcome>>> = Mutex::new(ways.iter().map(|_| Vec::new()).collect());
    Turns::wait(bench.rounds(5), ways.len(), |n| {
        let outcomes = &outcomes;
        async move {
            let outcome = match ways[n] {
                OURS => ours(servers, load).await,
                BARE => bare(servers, load).await,
                _ => tracking(servers, load).await,
            }
            .with_context(|| format!("{}, {} of them", ways[n], load.count))?;
            let median = outcome.quantile(0.5);
            outcomes.lock().unwrap_or_else(PoisonError::into_inner)[n].push(outcome);
            Ok(median)
        }
    })
    .await?;
    let mut outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    // The first turn does not count.
    outcomes.iter_mut().for_each(|outcomes| drop(outcomes.remove(0)));
    Ok(outcomes)
}

fn all(outcomes: &[Outcome]) -> impl Iterator<Item = Seen> {
    outcomes.iter().flat_map(|outcome| outcome.seen.iter().copied())
}

fn ratios(bench: &mut Bench, load: &str, outcomes: &[Vec<Outcome>]) {
    for (part, label, target) in [(0.5, "p50", 1.3), (0.99, "p99", 1.5)] {
        let what = || format!("{label} from sending a change until it is gone, {load}");
        let of = |to: usize| {
            let pairs = outcomes[0].iter().zip(&outcomes[to]);
            Spread::of(pairs.map(|(ours, other)| ours.quantile(part) / other.quantile(part)))
        };
        bench.ratio(Ratio::cost(what(), BARE, of(1)).target(target));
        if outcomes.len() > 2 {
            bench.ratio(Ratio::cost(what(), REDIS, of(2)));
        }
    }
}

fn row(load: Load, way: &str, outcomes: &[Outcome]) -> Vec<String> {
    let micros = |values: &[f64], part: f64| number(quantile(values, part) * 1e6);
    let issued = sorted(all(outcomes).map(|seen| seen.issued));
    let acknowledged = sorted(all(outcomes).map(|seen| seen.acknowledged));
    let by_all = sorted(outcomes.iter().flat_map(|outcome| outcome.by_all.iter().copied()));
    let waits = if load.flush && way != REDIS { "a flush" } else { "nothing" };
    vec![
        waits.to_owned(),
        number(Spread::of(outcomes.iter().map(|outcome| outcome.changes_a_second)).median),
        load.count.to_string(),
        way.to_owned(),
        micros(&issued, 0.5),
        micros(&issued, 0.99),
        micros(&issued, 0.999),
        micros(&by_all, 0.5),
        micros(&acknowledged, 0.5),
        micros(&acknowledged, 0.99),
        micros(&acknowledged, 0.999),
        number(Spread::of(outcomes.iter().map(|outcome| outcome.cpu * 1e6)).median),
    ]
}

async fn ours(servers: &Servers, load: Load) -> Result<Outcome> {
    let ids: Vec<i64> = (1..=load.changes as i64).collect();
    let mut nodes: Vec<(Node, Table<i64, Watched>)> = Vec::new();
    for _ in 0..load.count {
        let node = servers.ground.node(1).await?;
        let options = TableOptions::default().capacity(load.changes * 2);
        let users: Table<i64, Watched> = node.table_with("public.users", options).await?;
        let found = users.get_many(&ids).await?.iter().flatten().count();
        ensure!(found == ids.len(), "{found} of {} rows are there", ids.len());
        nodes.push((node, users));
    }
    ensure!(noted() == 0, "all are held");
    let outcome = Outcome::of(To::Postgres(servers.ground.url()), load).await?;
    for (node, users) in &nodes {
        node.barrier().await?;
        ensure!(ids.iter().all(|id| !users.peek(id).is_known()), "all are gone");
        ensure!(users.stats().invalidations == load.changes as u64, "each by its own message");
    }
    let mut ending = JoinSet::new();
    for (node, users) in nodes {
        drop(users);
        ending.spawn(async move { node.shutdown().await });
    }
    ending.join_all().await;
    Ok(outcome)
}

async fn bare(servers: &Servers, load: Load) -> Result<Outcome> {
    let (mut clients, mut listeners) = (Vec::new(), JoinSet::new());
    for _ in 0..load.count {
        let (client, mut connection) = tokio_postgres::connect(&servers.ground.url(), NoTls).await?;
        listeners.spawn(async move {
            while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                let AsyncMessage::Notification(message) = message else { continue };
                let at = Instant::now();
                note(key(message.payload()), at);
            }
        });
        client.batch_execute("listen rowcache").await?;
        clients.push(client);
    }
    let outcome = Outcome::of(To::Postgres(servers.ground.url()), load).await?;
    listeners.shutdown().await;
    drop(clients);
    Ok(outcome)
}

/// The one that a message of a trigger is about.
fn key(payload: &str) -> i64 {
    let message: serde_json::Value = serde_json::from_str(payload).unwrap_or_default();
    message["k"][0].as_i64().unwrap_or_default()
}

async fn tracking(servers: &Servers, load: Load) -> Result<Outcome> {
    let client = redis::Client::open(format!("{}?protocol=resp3", servers.redis.url()))?;
    let names: Vec<String> = (1..=load.changes).map(|id| format!("user:{id}")).collect();
    let mut clients = Vec::new();
    for _ in 0..load.count {
        let config = AsyncConnectionConfig::new().set_push_sender(|push: PushInfo| {
            invalidated(&push, Instant::now());
            Ok::<(), redis::aio::SendError>(())
        });
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let () = redis::cmd("CLIENT").arg("TRACKING").arg("ON").query_async(&mut connection).await?;
        for names in names.chunks(1000) {
            let _: Vec<Option<Vec<u8>>> = redis::cmd("MGET").arg(names).query_async(&mut connection).await?;
        }
        clients.push(connection);
    }
    let outcome = Outcome::of(To::Redis(servers.redis.url()), load).await?;
    drop(clients);
    Ok(outcome)
}

fn invalidated(push: &PushInfo, at: Instant) {
    let (PushKind::Invalidate, Some(Value::Array(keys))) = (&push.kind, push.data.first()) else { return };
    for key in keys {
        if let Value::BulkString(name) = key {
            let id = std::str::from_utf8(name).ok().and_then(|name| name.strip_prefix("user:")?.parse().ok());
            note(id.unwrap_or_default(), at);
        }
    }
}

/// Waits until all that was changed is gone everywhere.
async fn until_noted(load: Load) -> Result<()> {
    let began = Instant::now();
    while noted() < load.changes * load.count {
        if began.elapsed() > PATIENCE {
            bail!("only {} of {} are gone", noted(), load.changes * load.count);
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A change that was made.
struct Written {
    id: i64,
    issued: Instant,
    acknowledged: Instant,
}

/// Where changes are made.
enum To {
    Postgres(String),
    Redis(String),
}

enum Writer {
    Postgres(Client, Statement),
    Redis(MultiplexedConnection),
}

impl Writer {
    async fn new(to: &To, flush: bool) -> Result<Self> {
        Ok(match to {
            To::Postgres(url) => {
                let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
                tokio::spawn(connection);
                if !flush {
                    client.batch_execute("set synchronous_commit = off").await?;
                }
                let update = client.prepare("update public.users set role = upper(role) where id = $1").await?;
                Self::Postgres(client, update)
            }
            To::Redis(url) => Self::Redis(redis::Client::open(url.as_str())?.get_multiplexed_async_connection().await?),
        })
    }

    async fn change(&mut self, id: i64) -> Result<()> {
        match self {
            Self::Postgres(client, update) => {
                ensure!(client.execute(&*update, &[&id]).await? == 1, "{id} is there");
            }
            Self::Redis(connection) => {
                let () = redis::cmd("SET").arg(format!("user:{id}")).arg(text(id)?).query_async(connection).await?;
            }
        }
        Ok(())
    }
}

/// A row, as Redis has it.
fn text(id: i64) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&User::nth(id))?)
}

/// Changes rows 1 to `changes`, each at its time, in a thread with nothing else to do.
async fn change(to: To, load: Load) -> Result<Vec<Written>> {
    let write = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut writer = runtime.block_on(Writer::new(&to, load.flush))?;
        let mut written = Vec::with_capacity(load.changes);
        let began = Instant::now() + SETTLE;
        for n in 0..load.changes {
            thread::sleep((began + load.pace * n as u32).saturating_duration_since(Instant::now()));
            let (id, issued) = (n as i64 + 1, Instant::now());
            runtime.block_on(writer.change(id))?;
            written.push(Written { id, issued, acknowledged: Instant::now() });
        }
        Ok(written)
    };
    tokio::task::spawn_blocking(write).await?
}
