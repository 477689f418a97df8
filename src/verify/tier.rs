//! What a tier costs, and what it spares Postgres: on one real server of each kind.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use futures_util::future::try_join_all;
use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use redis::AsyncCommands as _;

use super::redis::RedisServer;
use crate::{Node, Table, TableOptions, Tier, cli::temp_server::TempServer, install, migrate};

pub(super) const HELP: &str = "\
Examples:
  rowcache-verify tier
  rowcache-verify tier --keys 5000 --rounds 9

Needs `redis-server`. Everything runs on this machine: throw-away servers, and the nodes in one process. Compare within one run.";

#[derive(clap::Args)]
pub(super) struct Options {
    /// How often each way of reading has its turn.
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: u32,
    /// Keys of a turn.
    #[arg(long, default_value_t = 2000, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=100_000))]
    keys: i64,
    /// The directory of Postgres' programs. Default: what is found on this machine.
    #[arg(long, value_name = "DIR")]
    bin: Option<PathBuf>,
}

#[derive(PartialEq, sqlx::FromRow, serde::Serialize, serde::Deserialize)]
struct User {
    id: i64,
    name: String,
    email: String,
    roles: Vec<String>,
}

type Users = Table<i64, User>;

struct Ground {
    // In this order they end.
    redis: RedisServer,
    server: TempServer,
}

impl Ground {
    async fn new(bin: Option<PathBuf>, rows: i64) -> Result<Self> {
        let options = TempServer::options().setting("max_connections", "300");
        let server = bin.into_iter().fold(options, crate::cli::temp_server::Options::bin_dir).start().await?;
        let redis = RedisServer::start().await?;
        let pool = sqlx::PgPool::connect(&server.admin_url()).await?;
        migrate::up(&pool).await?;
        sqlx::raw_sql(
            "create table public.users (id bigint primary key, name text not null, email text not null, roles text[] not null)",
        )
        .execute(&pool)
        .await?;
        sqlx::query(
            "insert into public.users select n, 'user ' || n, 'user' || n || '@example.org', array['reader', 'writer'] from generate_series(1, $1) n",
        )
        .bind(rows)
        .execute(&pool)
        .await?;
        install::track(&pool, "public.users", &install::TrackOptions::default()).await?;
        pool.close().await;
        Ok(Self { redis, server })
    }

    fn tier(&self) -> Result<Tier> {
        Ok(Tier::redis(&self.redis.url())?.timeout(Duration::from_secs(10)))
    }

    async fn node(&self, tiered: bool) -> Result<(Node, Users)> {
        let node = Node::connect(&self.server.admin_url()).await?;
        let options = TableOptions::default();
        let options = if tiered { options.tier::<User>(&self.tier()?) } else { options };
        let users = node.table_with("public.users", options).await?;
        for _ in 0..2 {
            node.barrier().await?;
        }
        Ok((node, users))
    }
}

pub(super) async fn measure(options: &Options) -> Result<ExitCode> {
    let ground = Ground::new(options.bin.clone(), options.keys * i64::from(options.rounds)).await?;
    println!("Postgres {}, {}\n", ground.server.version(), redis_version(&ground.redis).await?);
    reads(options, &ground).await?;
    cold(options, &ground).await?;
    Ok(ExitCode::SUCCESS)
}

async fn redis_version(redis: &RedisServer) -> Result<String> {
    let info: String = redis.ask(&["INFO", "server"]).await?;
    let version = info.lines().find_map(|line| line.strip_prefix("redis_version:")).context("a version")?;
    Ok(format!("Redis {version}"))
}

/// One key after the other, each new to the node that reads it.
async fn reads(options: &Options, ground: &Ground) -> Result<()> {
    let ((_one, writes), (_two, takes), (_three, loads)) =
        (ground.node(true).await?, ground.node(true).await?, ground.node(false).await?);
    let mut redis = ground.redis.connect().await?;
    let mut turns: Vec<[f64; 4]> = Vec::new();
    for round in 0..i64::from(options.rounds) {
        let keys: Vec<i64> = (round * options.keys + 1..=(round + 1) * options.keys).collect();
        writes.get_many(&keys).await?;
        let wanted = u64::try_from((round + 1) * options.keys)?;
        while writes.stats().tier.written < wanted {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let names: Vec<String> = redis.keys("rowcache:*").await?;
        let began = Instant::now();
        for name in &names[..keys.len()] {
            let _: Vec<u8> = redis.get(name).await?;
        }
        let plain = micros(began, &keys);
        turns.push([plain, read(&takes, &keys).await?, read(&loads, &keys).await?, read(&takes, &keys).await?]);
    }
    let stats = takes.stats().tier;
    println!("One key after the other; {} of {} keys were taken from the tier.\n", stats.hits, stats.asked);
    println!("| | µs | of a plain GET |\n| --- | ---: | ---: |");
    let ways =
        ["plain `GET` of the same bytes", "`get`, from the tier", "`get`, from Postgres, no tier", "`get`, held"];
    for (n, way) in ways.iter().enumerate() {
        let (micros, of_plain) = (turns.iter().map(|turn| turn[n]), turns.iter().map(|turn| turn[n] / turn[0]));
        println!("| {way} | {:.1} | {:.2} |", median(micros), median(of_plain));
    }
    println!();
    Ok(())
}

async fn read(users: &Users, keys: &[i64]) -> Result<f64> {
    let began = Instant::now();
    for key in keys {
        users.get(key).await?;
    }
    Ok(micros(began, keys))
}

/// For one of the keys.
#[expect(clippy::cast_precision_loss, reason = "a few thousand")]
fn micros(began: Instant, keys: &[i64]) -> f64 {
    began.elapsed().as_secs_f64() * 1e6 / keys.len() as f64
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nodes that hold nothing read the same keys, each in an order of its own, all at the same time.
async fn cold(options: &Options, ground: &Ground) -> Result<()> {
    println!(
        "{} keys, read by all nodes at the same time, in batches of 100, each in an order of its own.\n",
        options.keys
    );
    println!(
        "| nodes | rows read from Postgres, no tier | with a cold tier | with a warm one |\n| ---: | ---: | ---: | ---: |"
    );
    for count in [1, 4, 8] {
        let mut counts = Vec::new();
        for tiered in [false, true] {
            ground.redis.ask::<String>(&["FLUSHALL"]).await?;
            counts.push(crowd(options, ground, count, tiered, false).await?);
        }
        ground.redis.ask::<String>(&["FLUSHALL"]).await?;
        counts.push(crowd(options, ground, count, true, true).await?);
        println!("| {count} | {} | {} | {} |", counts[0], counts[1], counts[2]);
    }
    Ok(())
}

/// The rows that these nodes read from Postgres. `warm`: once another one, which began before they read, has put all into the tier.
async fn crowd(options: &Options, ground: &Ground, count: u64, tiered: bool, warm: bool) -> Result<u64> {
    let mut nodes = Vec::new();
    for _ in 0..count {
        nodes.push(ground.node(tiered).await?);
    }
    let keys: Vec<i64> = (1..=options.keys).collect();
    if warm {
        let (_node, users) = ground.node(true).await?;
        users.get_many(&keys).await?;
        while users.stats().tier.written < u64::try_from(options.keys)? {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let readers = nodes.iter().zip(0..).map(|((_, users), seed)| {
        let mut keys = keys.clone();
        keys.shuffle(&mut StdRng::seed_from_u64(seed));
        async move {
            for batch in keys.chunks(100) {
                users.get_many(batch).await?;
            }
            anyhow::Ok(())
        }
    });
    try_join_all(readers).await?;
    Ok(nodes.iter().map(|(_, users)| users.stats()).map(|stats| stats.loads - stats.tier.hits).sum())
}
