//! The price of a hit, in instructions, beside a bare `quick_cache` `get` in the same binary.
//!
//! A real table cache and a bare `quick_cache` hold the same keys, and the same reads of each are run under callgrind, which counts
//! the same instructions every time, whatever else the machine does. `bench/` compiles this file as well, for its suite `hit`.

use std::{
    env,
    future::Future,
    hint::black_box,
    pin::pin,
    process::Command,
    sync::Arc,
    task::{Poll, Waker},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use quick_cache::sync::Cache;
use rand::{SeedableRng as _, rngs::StdRng};
use rand_distr::{Distribution as _, Zipf};
use rowcache::{Config, Lookup, Node, OnChange, Table, TableOptions};

/// What is counted, and what may be spent, as a multiple of the first one. Options that a hit has to look at have no budget.
pub const VARIANTS: [(&str, Option<f64>); 7] = [
    ("bare", None),
    ("try_get", Some(1.25)),
    ("get", Some(1.5)),
    ("idle", None),
    ("refresh_ahead", None),
    ("on_change", None),
    ("audit", None),
];

pub const ROWS: i64 = 10_000;
const READS: usize = 200_000;

#[derive(Clone, Debug, sqlx::FromRow)]
struct User {
    #[expect(dead_code, reason = "only its weight counts")]
    id: i64,
    #[expect(dead_code, reason = "as above")]
    name: String,
}

/// The table that is read. `id` is its key.
pub const TABLE: &str =
    "create table counted as select n as id, 'user ' || n as name from generate_series(1::bigint, 10000) n;
    alter table counted add primary key (id); select rowcache.track('counted')";

/// Instructions per read of one variant: those that are executed inside of the function `measured_…`. This program is started under
/// callgrind, with arguments that have it call [`run`].
pub fn instructions(arguments: &[&str]) -> Result<f64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*measured_*"])
        .arg(env::current_exe().context("this program has no path")?)
        .args(arguments)
        .output()
        .context("`valgrind` could not be started; Debian's package is valgrind")?;
    let report = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{report}{}", String::from_utf8_lossy(&output.stdout));
    let collected =
        report.lines().find_map(|line| line.split("Collected :").nth(1)).context("callgrind reports a sum")?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let reads = READS as f64;
    Ok(collected.trim().parse::<f64>()? / reads)
}

/// What is run under callgrind.
pub async fn run(variant: &str, url: &str) -> Result<()> {
    let (node, users) = open(url, variant).await?;
    let bare = Cache::new(usize::try_from(ROWS).expect("small") * 2);
    for id in 1..=ROWS {
        bare.insert(id, Arc::new(User { id, name: format!("user {id}") }));
    }
    let zipf = Zipf::new(10_000.0, 0.99).expect("sane");
    let mut random = StdRng::seed_from_u64(7);
    #[expect(clippy::cast_possible_truncation, reason = "a rank")]
    let keys: Vec<i64> = (0..READS).map(|_| zipf.sample(&mut random) as i64).collect();
    let hits = match variant {
        "bare" => measured_bare(&bare, &keys),
        "try_get" => measured_try_get(&users, &keys),
        "get" | "idle" | "refresh_ahead" | "on_change" | "audit" => measured_get(&users, &keys),
        other => bail!("no variant {other}"),
    };
    ensure!(hits == keys.len(), "every read is a hit");
    node.shutdown().await;
    Ok(())
}

/// A node that holds all rows.
async fn open(url: &str, variant: &str) -> Result<(Node, Table<i64, User>)> {
    let mut config = Config::from_url(url)?;
    // Under callgrind everything takes long.
    let long = Duration::from_mins(10);
    (config.load_timeout, config.beat, config.beat_timeout, config.lease) = (long, long, 2 * long, 2 * long);
    let node = Node::start(config).await?;
    let options = TableOptions::default().capacity(usize::try_from(ROWS).expect("small") * 2);
    let options = match variant {
        "idle" => options.idle(long),
        "refresh_ahead" => options.refresh_ahead(0.9),
        "on_change" => options.on_change(OnChange::Refresh),
        "audit" => options.audit(10),
        _ => options,
    };
    let users: Table<i64, User> = node.table_with("counted", options).await?;
    let keys: Vec<i64> = (1..=ROWS).collect();
    ensure!(users.get_many(&keys).await?.iter().flatten().count() == keys.len(), "every row is there");
    Ok((node, users))
}

/// Out of line, as in any program that calls it in more than one place, this cache's own included.
#[inline(never)]
fn bare_get(cache: &Cache<i64, Arc<User>>, key: i64) -> Option<Arc<User>> {
    cache.get(&key)
}

#[inline(never)]
fn measured_bare(cache: &Cache<i64, Arc<User>>, keys: &[i64]) -> usize {
    keys.iter().filter(|key| black_box(bare_get(cache, **key)).is_some()).count()
}

#[inline(never)]
fn measured_try_get(users: &Table<i64, User>, keys: &[i64]) -> usize {
    keys.iter().filter(|key| matches!(black_box(users.try_get(key)), Lookup::Row(_))).count()
}

/// Awaits each read. A hit is ready at once, so the future is polled by hand: what a runtime costs is not ours.
#[inline(never)]
fn measured_get(users: &Table<i64, User>, keys: &[i64]) -> usize {
    let mut context = std::task::Context::from_waker(Waker::noop());
    let read_all = async {
        let mut hits = 0;
        for key in keys {
            hits += usize::from(black_box(users.get(key).await).is_ok_and(|row| row.is_some()));
        }
        hits
    };
    match pin!(read_all).poll(&mut context) {
        Poll::Ready(hits) => hits,
        Poll::Pending => panic!("a hit waits for nothing"),
    }
}
