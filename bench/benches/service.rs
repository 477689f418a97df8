//! A service that authenticates every request: with its callers in the cache, and with a query for each.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use rowcache_bench::{
    ground::Ground,
    measure::{Spread, cpu_of_server, number},
    report::{Plot, Ratio, Shape, Table},
    suite::{self, Bench},
};
use sqlx::PgPool;

use self::load::{Load, Service, wrk};

#[path = "service/app.rs"]
mod app;
#[path = "http/load.rs"]
mod load;

/// Each way: how it is called, which of the two services goes it, and its path there.
const WAYS: [(&str, bool, &str); 7] = [
    ("no authentication", true, "/nobody"),
    ("cache, two tables", true, "/tables"),
    ("cache, a view", true, "/view"),
    ("joined select", false, "/joined"),
    ("two selects", false, "/selects"),
    ("cache, two tables; and a query", true, "/tables/orders"),
    ("joined select; and a query", false, "/joined/orders"),
];
const TABLES: usize = 1;
const VIEW: usize = 2;
const JOINED: usize = 3;
const SELECTS: usize = 4;
const TABLES_ORDERS: usize = 5;
const JOINED_ORDERS: usize = 6;

/// Changes of callers a second, meanwhile.
const CHANGES: u32 = 10;

fn main() -> ExitCode {
    suite::main("service", "What it is for: a service that authenticates every request", run)
}

/// What came of a turn.
struct Turn {
    load: Load,
    /// The CPU time of Postgres, and of the service.
    postgres: Duration,
    service: Duration,
}

async fn run(mut bench: Bench) -> Result<Bench> {
    if let [kind, url, accounts] = &bench.options.child[..] {
        app::serve(kind == "cached", url, accounts.parse()?).await?;
        return Ok(bench);
    }
    bench.about(
        "An axum service is sent an API key with each request, looks up the account that has it and the organisation that the account belongs to,
         refuses callers whose organisation may not read, and answers with a small JSON object. 100,000 accounts of 1,000 organisations; who asks
         is chosen in the manner of Zipf. With the cache, the service reads two tables (`table_by` the API key, and a table), or a view
         that holds both together; without, it sends one joined select or two selects through a sqlx pool of 10. `wrk` asks with one thread and 32
         connections. It, the service and Postgres are processes of their own and share two processors. Meanwhile 10 accounts are changed a second.
         An article on this design reports 6 to 8 % more requests per second.",
    );
    let ground = Ground::start(&mut bench).await?;
    let accounts = bench.size(100_000, 2000);
    let pool = ground.pool(2).await?;
    app::prepare(&pool, accounts).await?;
    let (url, number_of) = (ground.url(), accounts.to_string());
    let cached = Service::start(&["cached", &url, &number_of], "serving").await?;
    let plain = Service::start(&["plain", &url, &number_of], "serving").await?;
    let services = [&plain, &cached];
    for (name, is_cached, path) in &WAYS[1..] {
        let service = services[usize::from(*is_cached)];
        let answer = service.get(path, &app::authorization(7)).await?;
        ensure!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"caller\":\"Account 7\""), "{name}: {answer}");
        let refused = service.get(path, &app::authorization(0)).await?;
        ensure!(refused.starts_with("HTTP/1.1 401"), "{name} lets strangers in: {refused}");
    }
    let writer = tokio::spawn(change(ground.pool(1).await?, accounts));
    let before = app::Reads::of(&cached).await?;

    let postmaster = ground.postmaster()?;
    let seconds = bench.size(4, 1) as f64;
    let mut turns: [Vec<Turn>; WAYS.len()] = Default::default();
    let mut commits = [0.0; WAYS.len()];
    for round in 0..=bench.rounds(5) {
        for n in 0..WAYS.len() {
            let variant = (n + round) % WAYS.len();
            let (_, is_cached, path) = WAYS[variant];
            let service = services[usize::from(is_cached)];
            let committed = if round == 0 { app::commits(&pool).await? } else { 0 };
            let (postgres, own) = (cpu_of_server(postmaster)?, service.cpu()?);
            let load = wrk(&format!("http://{}{path}", service.address), &app::script(accounts), seconds).await?;
            let (postgres, own) =
                (cpu_of_server(postmaster)?.saturating_sub(postgres), service.cpu()?.saturating_sub(own));
            if round == 0 {
                commits[variant] = (app::commits(&pool).await? - committed) as f64 / load.requests as f64;
            } else {
                turns[variant].push(Turn { load, postgres, service: own });
            }
        }
    }
    ensure!(!writer.is_finished(), "the writer has ended: {:?}", writer.await);
    writer.abort();
    let reads = app::Reads::of(&cached).await?.since(&before);
    let share = reads.misses as f64 / reads.gets as f64;
    ensure!(share < 0.01, "{} of {} reads missed", reads.misses, reads.gets);
    bench.about(&format!("Of the cache's reads, {} % were misses: after changes.", number(share * 100.0)));
    report(&mut bench, &turns, commits);
    Ok(bench)
}

fn report(bench: &mut Bench, turns: &[Vec<Turn>; WAYS.len()], commits: [f64; WAYS.len()]) {
    let of = |n: usize, what: fn(&Turn) -> f64| Spread::of(turns[n].iter().map(what));
    let mut table = Table::new(
        "32 connections. CPU time of Postgres and of the service; commits are those of the whole database, the writer's included.",
        &[
            "callers are looked up by",
            "requests a second",
            "ms: p50",
            "p99",
            "Postgres: processors busy",
            "µs a request",
            "commits a request",
            "service: µs a request",
        ],
    );
    for (n, (name, ..)) in WAYS.iter().enumerate() {
        table.row([
            (*name).to_owned(),
            of(n, |turn| turn.load.a_second()).to_string(),
            number(of(n, |turn| turn.load.p50.as_secs_f64() * 1e3).median),
            number(of(n, |turn| turn.load.p99.as_secs_f64() * 1e3).median),
            of(n, |turn| turn.postgres.as_secs_f64() / turn.load.took.as_secs_f64()).to_string(),
            number(of(n, |turn| turn.postgres.as_secs_f64() * 1e6 / turn.load.requests as f64).median),
            number(commits[n]),
            number(of(n, |turn| turn.service.as_secs_f64() * 1e6 / turn.load.requests as f64).median),
        ]);
    }
    let faster = |of: usize, than: usize| {
        Spread::of(turns[of].iter().zip(&turns[than]).map(|(of, than)| of.load.a_second() / than.load.a_second()))
    };
    let gain = |of: usize, than: usize| {
        Ratio::gain(format!("requests a second, {}", WAYS[of].0), WAYS[than].0, faster(of, than))
    };
    bench.ratio(gain(TABLES, JOINED).target(10.0));
    bench.ratio(gain(VIEW, JOINED).target(10.0));
    bench.ratio(gain(TABLES, SELECTS));
    bench.ratio(gain(TABLES, 0));
    bench.ratio(gain(TABLES_ORDERS, JOINED_ORDERS));
    explain(bench, turns);
    let spared = turns[JOINED].iter().zip(&turns[TABLES]).map(|(joined, tables)| {
        let [joined, tables] = [joined, tables].map(|turn| turn.postgres.as_secs_f64() / turn.load.requests as f64);
        // A turn may need less than the kernel counts.
        joined / tables.max(1e-9)
    });
    bench.ratio(Ratio::gain(
        format!("Postgres' CPU time of a request, {}", WAYS[JOINED].0),
        WAYS[TABLES].0,
        Spread::of(spared),
    ));
    bench.table(table);
    let bars = WAYS.iter().enumerate().map(|(n, way)| (way.0.to_owned(), of(n, |turn| turn.load.a_second()).median));
    bench.plot(Plot {
        name: "requests".to_owned(),
        title: "A service that authenticates every request".to_owned(),
        unit: "requests a second".to_owned(),
        log: false,
        shape: Shape::Bars(bars.collect()),
    });
}

/// Where the time goes that the cache does not spare.
fn explain(bench: &mut Bench, turns: &[Vec<Turn>; WAYS.len()]) {
    let together = |turn: &Turn| (turn.service + turn.postgres).as_secs_f64() / turn.load.requests as f64;
    let pairs = || turns[JOINED].iter().zip(&turns[TABLES]);
    let less = Spread::of(pairs().map(|(joined, tables)| together(joined) / together(tables)));
    let [nobody, joined, tables] = [0, JOINED, TABLES].map(|n| {
        let rate = Spread::of(turns[n].iter().map(|turn| turn.load.a_second())).median;
        let micros = Spread::of(turns[n].iter().map(|turn| together(turn) * 1e6)).median;
        (rate, micros)
    });
    bench.about(&format!(
        "What bounds the gain: without any authentication the service answers {} requests a second on these two processors, one of which `wrk` can fill
         alone, and that is {} times what it answers with a joined select; no cache could gain more here. With the cache it reaches {} of it. In CPU time of the service
         and Postgres together, a request takes {} µs with a joined select, {} µs with the cache, and {} µs without authentication. Queries of the
         handler's own leave as much of the gain as they leave of the time: see the ways with a query.",
        number(nobody.0),
        number(nobody.0 / joined.0),
        number(tables.0 / nobody.0),
        number(joined.1),
        number(tables.1),
        number(nobody.1),
    ));
    bench.ratio(Ratio::gain(
        format!("CPU time of a request, service and Postgres, {}", WAYS[JOINED].0),
        WAYS[TABLES].0,
        less,
    ));
}

/// Changes accounts for as long as it runs.
async fn change(pool: PgPool, accounts: usize) -> Result<()> {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / CHANGES);
    for n in 1_usize.. {
        ticks.tick().await;
        let id = (n * 7919 % accounts + 1) as i64;
        let changed = sqlx::query("update public.accounts set changes = changes + 1 where id = $1").bind(id);
        let rows = changed.execute(&pool).await.context("changing an account")?.rows_affected();
        ensure!(rows == 1, "account {id} is there");
    }
    bail!("it counts no further")
}
