//! The price of a hit, in instructions, beside a bare `quick_cache` `get` in the same binary.
//!
//! Starts a throw-away Postgres, fills a real table cache and a bare `quick_cache` with the same keys, and runs the same reads of
//! each under callgrind, which counts the same instructions every time, whatever else the machine does. It fails when a budget is
//! exceeded. Needs valgrind.

use std::{
    future::Future,
    hint::black_box,
    pin::pin,
    process::{Command, ExitCode},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use quick_cache::sync::Cache;
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Zipf};
use rowcache::{Config, Lookup, Node, OnChange, Table, TableOptions, cli::temp_server::TempServer};

/// What may be spent, as a multiple of the bare `get`.
const BUDGETS: [(&str, f64); 2] = [("try_get", 1.25), ("get", 1.5)];

/// Options that a hit has to look at: what they cost is stated, and has no budget.
const OPTIONS: [&str; 4] = ["idle", "refresh_ahead", "on_change", "audit"];

const ROWS: i64 = 10_000;
const READS: usize = 200_000;

#[derive(Clone, Debug, sqlx::FromRow)]
struct User {
    #[expect(dead_code, reason = "only its weight counts")]
    id: i64,
    #[expect(dead_code, reason = "as above")]
    name: String,
}

pub(crate) const NAME: &str = "instructions";

/// `rowcache-verify instructions`.
pub(crate) fn command() -> clap::Command {
    clap::Command::new(NAME)
        .about(
            "Counts the instructions of a hit, beside those of a bare quick_cache, and fails when they exceed a budget",
        )
        .after_help("It starts a throw-away Postgres, and needs valgrind. The numbers are those of a release build.")
}

#[derive(clap::Args)]
pub(crate) struct Options {
    /// What is run under callgrind, and the database of it.
    #[arg(hide = true, num_args = 2)]
    one: Vec<String>,
}

pub(crate) async fn count(options: &Options) -> ExitCode {
    match &options.one[..] {
        [variant, url] => run(variant, url).await,
        _ => gate().await,
    }
}

/// Runs each variant under callgrind and compares.
async fn gate() -> ExitCode {
    let server = TempServer::options().setting("fsync", "off").start().await.expect("a throw-away Postgres");
    let url = server.url("postgres");
    fill(&url).await;
    let bare = instructions("bare", &url);
    println!("{:<28} {bare:>6.1} instructions per read", "bare quick_cache get");
    let mut exceeded = false;
    for (variant, budget) in BUDGETS {
        let ours = instructions(variant, &url);
        let ratio = ours / bare;
        exceeded |= ratio > budget;
        let verdict = if ratio > budget { "EXCEEDED" } else { "ok" };
        println!("Table::{variant:<21} {ours:>6.1} instructions per read: {ratio:.2}x, budget {budget}x, {verdict}");
    }
    for variant in OPTIONS {
        let ours = instructions(variant, &url);
        println!("Table::get, {variant:<16} {ours:>6.1} instructions per read: {:.2}x", ours / bare);
    }
    if exceeded { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Instructions per read of one variant: those that are executed inside of the function `measured_…`.
fn instructions(variant: &str, url: &str) -> f64 {
    let program = std::env::current_exe().expect("this program has a path");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*measured_*"])
        .arg(program)
        .args([NAME, variant, url])
        .output()
        .expect("valgrind is installed");
    let report = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{report}{}", String::from_utf8_lossy(&output.stdout));
    let collected = report.lines().find_map(|line| line.split("Collected :").nth(1)).expect("callgrind reports a sum");
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let reads = READS as f64;
    collected.trim().parse::<f64>().expect("callgrind reports a number") / reads
}

async fn run(variant: &str, url: &str) -> ExitCode {
    let (node, users) = open(url, variant).await;
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
        other => panic!("no variant {other}"),
    };
    assert_eq!(hits, keys.len(), "every read was a hit");
    node.shutdown().await;
    ExitCode::SUCCESS
}

async fn fill(url: &str) {
    let pool = sqlx::PgPool::connect(url).await.expect("connects");
    rowcache::migrate::up(&pool).await.expect("migrates");
    let setup = "create table users as select n as id, 'user ' || n as name from generate_series(1::bigint, 10000) n;
         alter table users add primary key (id); select rowcache.track('users')";
    sqlx::raw_sql(setup).execute(&pool).await.expect("made");
    pool.close().await;
}

/// A node that holds all rows.
async fn open(url: &str, variant: &str) -> (Node, Table<i64, User>) {
    let mut config = Config::from_url(url).expect("a good URL");
    // Under callgrind everything takes long.
    let long = Duration::from_mins(10);
    (config.load_timeout, config.beat, config.beat_timeout, config.lease) = (long, long, 2 * long, 2 * long);
    let node = Node::start(config).await.expect("starts");
    let options = TableOptions::default().capacity(usize::try_from(ROWS).expect("small") * 2);
    let options = match variant {
        "idle" => options.idle(long),
        "refresh_ahead" => options.refresh_ahead(0.9),
        "on_change" => options.on_change(OnChange::Refresh),
        "audit" => options.audit(10),
        _ => options,
    };
    let users: Table<i64, User> = node.table_with("users", options).await.expect("opens");
    let keys: Vec<i64> = (1..=ROWS).collect();
    assert_eq!(users.get_many(&keys).await.expect("loads").iter().flatten().count(), keys.len());
    (node, users)
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
    let mut context = Context::from_waker(Waker::noop());
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
