//! What a tier costs, and what it spares Postgres.

use std::{
    hint::black_box,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use redis::AsyncCommands as _;
use rowcache::{Node, Table, TableOptions, Tier, verify::redis::RedisServer};
use rowcache_bench::{
    ground::{self, Ground, User},
    measure::{Spread, thousands},
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};
use tokio::{task::JoinSet, time::sleep};

const PLAIN: &str = "plain `GET` of the same bytes";
const TAKEN: &str = "rowcache `get`, from the tier";
const LOADED: &str = "rowcache `get`, from Postgres, no tier";
const HELD: &str = "rowcache `get`, held";

type Users = Table<i64, User>;

fn main() -> ExitCode {
    suite::main("tier", "A shared tier", run)
}

struct Servers {
    ground: Ground,
    redis: RedisServer,
}

impl Servers {
    async fn node(&self, tiered: bool) -> Result<(Node, Users)> {
        let node = self.ground.node(5).await?;
        let tier = Tier::redis(&self.redis.url())?.timeout(Duration::from_secs(10));
        let options = TableOptions::default();
        let options = if tiered { options.tier::<User>(&tier) } else { options };
        let users = node.table_with("public.users", options).await?;
        for _ in 0..2 {
            node.barrier().await?;
        }
        Ok((node, users))
    }
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "A Redis with its defaults, and a Postgres, on this machine. One reader reads one key after the other, each new to the node that it
         reads from: as a plain `GET` of the bytes that the tier has for the row, from a node with a tier that another node has filled, from
         a node without a tier, and once more from the first node, which holds the row by then. Then nodes that hold nothing read the same
         keys at the same time, in batches of 100, each in an order of its own, and the rows are counted that they read from Postgres:
         without a tier, with an empty one, and with one that another node has filled.",
    );
    let ground = Ground::start(&mut bench).await?;
    let redis = ground::redis(&mut bench).await?;
    let servers = Servers { ground, redis };
    let (keys, rounds) = (bench.size(2000, 200), bench.rounds(11));
    servers.ground.users(keys * (rounds + 1)).await?;
    reads(&mut bench, &servers, keys, rounds).await?;
    cold(&mut bench, &servers, keys).await?;
    Ok(bench)
}

/// One key after the other, each new to the node that reads it.
async fn reads(bench: &mut Bench, servers: &Servers, count: usize, rounds: usize) -> Result<()> {
    let (fills, takes, loads) = (servers.node(true).await?, servers.node(true).await?, servers.node(false).await?);
    let mut redis = servers.redis.connect().await?;
    let mut turns: Vec<[f64; 4]> = Vec::new();
    for round in 0..=rounds {
        servers.redis.ask::<String>(&["FLUSHALL"]).await?;
        let keys: Vec<i64> = ((round * count) as i64 + 1..=((round + 1) * count) as i64).collect();
        fill(&fills.1, &keys, ((round + 1) * count) as u64).await?;
        let names: Vec<String> = redis.keys("rowcache:*").await?;
        ensure!(names.len() >= count, "{} of {count} rows are in the tier", names.len());
        let mut costs = [0.0; 4];
        // Which of them is the first one, changes; the rows are held when they have been taken.
        for n in 0..3 {
            match (n + round) % 3 {
                0 => {
                    let began = Instant::now();
                    for name in &names[..count] {
                        black_box(redis.get::<_, Vec<u8>>(name).await?);
                    }
                    costs[0] = micros(began, count);
                }
                1 => {
                    costs[1] = read(&takes.1, &keys).await?;
                    costs[3] = read(&takes.1, &keys).await?;
                }
                _ => costs[2] = read(&loads.1, &keys).await?,
            }
        }
        if round > 0 {
            turns.push(costs);
        }
    }
    let (of_taken, of_loaded) = (takes.1.stats(), loads.1.stats());
    let all = ((rounds + 1) * count) as u64;
    ensure!(of_taken.tier.hits == all && of_taken.hits >= all, "all were taken from the tier, once: {of_taken:?}");
    ensure!(of_loaded.loads == all, "all were read from Postgres: {of_loaded:?}");
    let names = [PLAIN, TAKEN, LOADED, HELD];
    let mut table = report::Table::new(
        "One reader, one key after the other.",
        &["", "microseconds", "as a multiple of a plain `GET`"],
    );
    let ratio = |n: usize, to: usize| Spread::of(turns.iter().map(|turn| turn[n] / turn[to]));
    for (n, name) in names.iter().enumerate() {
        let micros = Spread::of(turns.iter().map(|turn| turn[n]));
        table.row([(*name).to_owned(), micros.to_string(), ratio(n, 0).to_string()]);
    }
    bench.table(table);
    bench.ratio(Ratio::cost(TAKEN, PLAIN, ratio(1, 0)));
    bench.ratio(Ratio::cost(LOADED, PLAIN, ratio(2, 0)));
    bench.ratio(Ratio::cost(TAKEN, LOADED, ratio(1, 2)));
    let bars = names.iter().enumerate();
    let bars = bars.map(|(n, name)| (name.replace('`', ""), Spread::of(turns.iter().map(|turn| turn[n])).median));
    bench.plot(Plot {
        name: "reads".to_owned(),
        title: "A row that is held, in the tier, or in Postgres".to_owned(),
        unit: "microseconds".to_owned(),
        log: true,
        shape: Shape::Bars(bars.collect()),
    });
    for (node, _) in [fills, takes, loads] {
        node.shutdown().await;
    }
    Ok(())
}

/// Has a node read these rows, and waits until it has put so many into the tier in its life.
async fn fill(users: &Users, keys: &[i64], written: u64) -> Result<()> {
    users.get_many(keys).await?;
    let began = Instant::now();
    while users.stats().tier.written < written {
        ensure!(began.elapsed() < Duration::from_secs(10), "{:?}", users.stats().tier);
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

async fn read(users: &Users, keys: &[i64]) -> Result<f64> {
    let began = Instant::now();
    for key in keys {
        ensure!(black_box(users.get(key).await?).is_some(), "{key} is there");
    }
    Ok(micros(began, keys.len()))
}

/// For one of so many.
fn micros(began: Instant, count: usize) -> f64 {
    began.elapsed().as_secs_f64() * 1e6 / count as f64
}

/// Nodes that hold nothing read the same keys, all at the same time.
async fn cold(bench: &mut Bench, servers: &Servers, keys: usize) -> Result<()> {
    let mut table = report::Table::new(
        format!(
            "{} keys, read by all nodes at the same time: rows read from Postgres (medians).",
            thousands(keys as i64)
        ),
        &["nodes", "no tier", "an empty tier", "a filled tier"],
    );
    let ways = [(false, false), (true, false), (true, true)];
    let mut lines: Vec<(String, Vec<(f64, f64)>)> =
        ["no tier", "an empty tier", "a filled tier"].map(|name| (name.to_owned(), Vec::new())).to_vec();
    for count in [1, 4, 8] {
        let mut read: [Vec<f64>; 3] = Default::default();
        for round in 0..bench.rounds(3) {
            for n in 0..ways.len() {
                let way = (n + round) % ways.len();
                servers.redis.ask::<String>(&["FLUSHALL"]).await?;
                let (tiered, filled) = ways[way];
                read[way].push(crowd(servers, keys, count, tiered, filled).await? as f64);
            }
        }
        let of = |way: usize| Spread::of(read[way].iter().copied());
        table.row([count.to_string(), of(0).to_string(), of(1).to_string(), of(2).to_string()]);
        for (way, line) in lines.iter_mut().enumerate() {
            line.1.push((count as f64, of(way).median));
        }
        if count > 1 {
            let what = format!("rows read from Postgres by {count} nodes, an empty tier");
            let ratio = Spread::of(read[1].iter().zip(&read[0]).map(|(tier, none)| tier / none));
            bench.ratio(Ratio::cost(what, "no tier", ratio));
        }
    }
    bench.table(table);
    bench.plot(Plot {
        name: "cold".to_owned(),
        title: format!("Rows that nodes read from Postgres when all read the same {}", thousands(keys as i64)),
        unit: "rows".to_owned(),
        log: false,
        shape: Shape::Lines { x: "nodes".to_owned(), log_x: false, lines },
    });
    Ok(())
}

/// The rows that these nodes read from Postgres. `filled`: once another one, which began before they read, has put all into the tier.
async fn crowd(servers: &Servers, keys: usize, count: usize, tiered: bool, filled: bool) -> Result<u64> {
    let mut nodes = Vec::new();
    for _ in 0..count {
        nodes.push(servers.node(tiered).await?);
    }
    let all: Vec<i64> = (1..=keys as i64).collect();
    if filled {
        let (node, users) = servers.node(true).await?;
        fill(&users, &all, keys as u64).await?;
        node.shutdown().await;
    }
    let mut readers = JoinSet::new();
    for (seed, (_, users)) in nodes.iter().enumerate() {
        let (mut keys, users) = (all.clone(), users.clone());
        keys.shuffle(&mut StdRng::seed_from_u64(seed as u64));
        readers.spawn(async move {
            for batch in keys.chunks(100) {
                let found = users.get_many(batch).await?.iter().flatten().count();
                ensure!(found == batch.len(), "{found} of {} rows are there", batch.len());
            }
            Ok(())
        });
    }
    while let Some(read) = readers.join_next().await {
        read??;
    }
    let stats = nodes.iter().map(|(_, users)| users.stats());
    let read = stats.map(|stats| stats.loads - stats.tier.hits).sum();
    for (node, _) in nodes {
        node.shutdown().await;
    }
    Ok(read)
}
