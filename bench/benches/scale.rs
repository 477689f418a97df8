//! What nodes and changes cost Postgres: constants that are measured, what follows from them, and whether it is so.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rowcache::{
    Node, Table,
    install::{self, TrackOptions, Transport},
};
use rowcache_bench::{
    ground::{Ground, User},
    measure::{Spread, cpu_of_server, number, thousands},
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_postgres::{Client, NoTls};

use self::model::Model;

#[path = "scale/model.rs"]
mod model;

const ROWS: i64 = 10_000;
const MORE_TABLES: usize = 32;

fn main() -> ExitCode {
    suite::main("scale", "Scale, on paper and by simulation", run)
}

/// What carries changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Via {
    Nothing,
    Notify,
    Log,
}

/// Sessions that listen to something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strangers {
    None,
    OnAnotherChannel,
    OnAnotherDatabase,
}

/// A load whose price is measured.
#[derive(Clone, Copy, Debug)]
struct Case {
    via: Via,
    nodes: usize,
    /// Changes a second, one row each.
    rate: u32,
    /// Tables that each node has open besides.
    more_tables: usize,
    strangers: Strangers,
}

impl Case {
    const fn of(via: Via, nodes: usize, rate: u32) -> Self {
        Self { via, nodes, rate, more_tables: 0, strangers: Strangers::None }
    }
}

/// Changes a second while constants are measured; and few, while nodes poll no more often than for many.
const RATE: u32 = 250;
const FEW: u32 = 50;
const SOME_NODES: usize = 8;
const LOG_NODES: usize = 16;
const MANY_NODES: usize = 32;

/// What constants follow from, in this order.
const FITTED: [Case; 12] = [
    Case::of(Via::Nothing, 0, RATE),
    Case::of(Via::Notify, 0, RATE),
    Case::of(Via::Notify, SOME_NODES, RATE),
    Case::of(Via::Notify, MANY_NODES, RATE),
    Case::of(Via::Notify, MANY_NODES, 0),
    Case { more_tables: MORE_TABLES, ..Case::of(Via::Notify, MANY_NODES, 0) },
    Case::of(Via::Log, 0, RATE),
    Case::of(Via::Log, LOG_NODES, 0),
    Case::of(Via::Log, LOG_NODES, FEW),
    Case::of(Via::Log, LOG_NODES, RATE),
    Case { strangers: Strangers::OnAnotherChannel, ..Case::of(Via::Notify, 0, RATE) },
    Case { strangers: Strangers::OnAnotherDatabase, ..Case::of(Via::Notify, 0, RATE) },
];

/// What is foretold.
const CHECKED: [Case; 4] = [
    Case::of(Via::Notify, 16, 300),
    Case::of(Via::Notify, 48, 50),
    Case::of(Via::Log, 8, 300),
    Case::of(Via::Log, 24, 100),
];

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "Real nodes, with their defaults, on one Postgres, and one writer that changes so many rows a second, one in each transaction; nodes on
         the change log do not listen (`Config::listen`). No rows are read: this is the price of staying coherent alone, in CPU time of Postgres' processes,
         without what the writer's statements would take anyway. Twelve loads give the constants; the rest is arithmetic: a change by NOTIFY costs its trigger
         and one waking for each session that listens in the database; each node sends a fence a second, which wakes all of them, too; a change by the
         log costs its trigger, and each node polls every 10 ms while changes arrive, and every 50 ms while none do. Loads that were not used for the constants are measured against it.",
    );
    bench.about(
        "A session that listens on another channel of the same database is woken all the same: to divide nodes over channels spares nothing, to
         divide them over databases does. What grows with the square of the nodes are their fences. A relay, one process that listens (or polls) for
         several nodes and forwards, divides the number of nodes; it pays where the lines of the plot end, and costs its own delay. There is a second
         limit, which is not one of CPU time: commits that notify come one after the other (suite `writers`).",
    );
    let further = [("max_connections", "400")];
    let ground = Ground::start_with(&mut bench, &further).await?;
    prepare(&ground).await?;
    let seconds = Duration::from_secs(bench.size(3, 1) as u64);
    let cases: Vec<Case> = FITTED.iter().chain(&CHECKED).copied().collect();
    let rounds = bench.rounds(3);
    let mut loads: Vec<Vec<Load>> = vec![Vec::new(); cases.len()];
    for round in 0..rounds {
        for n in 0..cases.len() {
            let case = (n + round * 5) % cases.len();
            let measured = measure(&ground, cases[case], seconds).await;
            loads[case].push(measured.with_context(|| format!("{:?}", cases[case]))?);
        }
    }
    let models: Vec<Model> = (0..rounds).map(|round| Model::fit(|case| loads[case][round])).collect();
    constants(&mut bench, &models);
    check(&mut bench, &models, &loads[FITTED.len()..]);
    predict(&mut bench, &Model::median(&models));
    Ok(bench)
}

/// Three tables that differ in what carries their changes, and many small ones.
async fn prepare(ground: &Ground) -> Result<()> {
    ground.users(ROWS as usize).await?;
    let client = ground.client().await?;
    let mut sql = "create database elsewhere;".to_owned();
    client.batch_execute(&sql).await?;
    sql.clear();
    for table in ["plain", "carts"] {
        sql += &format!(
            "create table public.{table} (like public.users including all) with (fillfactor = 80);
             insert into public.{table} select * from public.users; "
        );
    }
    for n in 0..MORE_TABLES {
        sql += &format!("create table public.t{n} (id bigint primary key); ");
    }
    client.batch_execute(&sql).await?;
    client.batch_execute("vacuum analyze").await?;
    let pool = ground.pool(1).await?;
    install::track(&pool, "public.carts", &TrackOptions { via: Transport::Log, ..TrackOptions::default() }).await?;
    for n in 0..MORE_TABLES {
        install::track(&pool, &format!("public.t{n}"), &TrackOptions::default()).await?;
    }
    pool.close().await;
    Ok(())
}

fn table(via: Via) -> &'static str {
    match via {
        Via::Nothing => "public.plain",
        Via::Notify => "public.users",
        Via::Log => "public.carts",
    }
}

/// What was measured of a case.
#[derive(Clone, Copy, Debug)]
struct Load {
    /// Processors that Postgres keeps busy.
    cores: f64,
    /// Changes a second that the writer has made.
    rate: f64,
}

async fn measure(ground: &Ground, case: Case, seconds: Duration) -> Result<Load> {
    let mut starting = JoinSet::new();
    for _ in 0..case.nodes {
        let mut config = ground.config(2)?;
        config.listen = case.via == Via::Notify;
        starting.spawn(start(config, case));
    }
    let nodes: Vec<(Node, Table<i64, User>)> = starting.join_all().await.into_iter().collect::<Result<_>>()?;
    let strangers = strangers(ground, case.strangers).await?;
    let writer = ground.client().await?;
    // What starting has left behind.
    sleep(seconds / 4).await;
    let before: Vec<u64> = nodes.iter().map(|(_, table)| table.stats().invalidations).collect();
    let postmaster = ground.postmaster()?;
    let (cpu, began) = (cpu_of_server(postmaster)?, Instant::now());
    let changes = change(&writer, table(case.via), case.rate, seconds).await?;
    let (cpu, took) = (cpu_of_server(postmaster)?.saturating_sub(cpu), began.elapsed().as_secs_f64());
    let wanted = f64::from(case.rate) * seconds.as_secs_f64();
    ensure!((changes as f64 - wanted).abs() <= wanted * 0.1 + 1.0, "{changes} changes, and not {wanted}");
    for ((node, table), before) in nodes.iter().zip(before) {
        let all = async {
            while table.stats().invalidations - before < changes {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(10), all).await.context("a change did not arrive")?;
        ensure!(table.stats().invalidations - before == changes, "each change arrives once");
        ensure!(node.stats().gaps == 0, "a node has lost its connection");
    }
    let mut stopping = JoinSet::new();
    for (node, _) in nodes {
        stopping.spawn(async move { node.shutdown().await });
    }
    stopping.join_all().await;
    drop(strangers);
    Ok(Load { cores: cpu.as_secs_f64() / took, rate: changes as f64 / took })
}

/// Fences before anything is measured.
const WARMING: usize = 10;

async fn start(config: rowcache::Config, case: Case) -> Result<(Node, Table<i64, User>)> {
    let node = Node::start(config).await?;
    let opened = node.table(table(case.via)).await?;
    for n in 0..case.more_tables {
        let _: Table<i64, (i64,)> = node.table(&format!("public.t{n}")).await?;
    }
    // The server plans statements anew the first times that a session sends them.
    for _ in 0..WARMING {
        node.barrier().await?;
    }
    Ok((node, opened))
}

/// As many sessions as the most nodes.
async fn strangers(ground: &Ground, kind: Strangers) -> Result<Vec<Client>> {
    let mut config: tokio_postgres::Config = ground.url().parse()?;
    match kind {
        Strangers::None => return Ok(Vec::new()),
        Strangers::OnAnotherChannel => {}
        Strangers::OnAnotherDatabase => {
            config.dbname("elsewhere");
        }
    }
    let mut clients = Vec::new();
    for _ in 0..MANY_NODES {
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        client.batch_execute("listen something_else").await?;
        clients.push(client);
    }
    Ok(clients)
}

/// Changes so many rows a second, for so long. How many it was.
async fn change(writer: &Client, table: &str, rate: u32, seconds: Duration) -> Result<u64> {
    if rate == 0 {
        sleep(seconds).await;
        return Ok(0);
    }
    let update = writer.prepare(&format!("update {table} set name = name || '' where id = $1")).await?;
    let mut ticks = interval(Duration::from_secs(1) / rate);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (end, mut changes) = (Instant::now() + seconds, 0);
    while Instant::now() < end {
        ticks.tick().await;
        let id = changes as i64 * 7919 % ROWS + 1;
        ensure!(writer.execute(&update, &[&id]).await? == 1, "{id} is there");
        changes += 1;
    }
    Ok(changes)
}

/// What was measured.
fn constants(bench: &mut Bench, models: &[Model]) {
    let of = |what: fn(&Model) -> f64| Spread::of(models.iter().map(what)).map(|seconds| seconds * 1e6).to_string();
    let mut table = report::Table::new("What Postgres pays, in microseconds of CPU time.", &["for", "µs"]);
    let mut row = |what: &str, value: String| table.row([what.to_owned(), value]);
    row("a change of one row, not tracked", of(|it| it.write));
    row("NOTIFY: more, for a change", of(|it| it.notify));
    row("NOTIFY: for a change and each node", of(|it| it.wake));
    row(
        "NOTIFY: for a change and each session that listens on another channel of the database",
        of(|it| it.wake_channel),
    );
    row("NOTIFY: for a change and each session that listens in another database", of(|it| it.wake_database));
    row("a node that listens, each second", of(|it| it.beat));
    row("… and for each further table that it has open", of(|it| it.beat_table));
    row("change log: more, for a change", of(|it| it.log));
    row("change log: a node that polls, each second, no changes", of(|it| it.polls[0]));
    row(&format!("change log: a node that polls, each second, {FEW} changes a second"), of(|it| it.polls[1]));
    row(&format!("change log: a node that polls, each second, {RATE} changes a second"), of(|it| it.polls[2]));
    bench.table(table);
}

/// What was foretold, and what came.
fn check(bench: &mut Bench, models: &[Model], loads: &[Vec<Load>]) {
    let mut table = report::Table::new(
        "Loads that were not used for the constants: processors that Postgres keeps busy, without the writer's own statements.",
        &["nodes", "changes a second", "transport", "predicted", "measured", "measured over predicted"],
    );
    for (case, loads) in CHECKED.iter().zip(loads) {
        let is_log = case.via == Via::Log;
        let predicted = |(model, load): (&Model, &Load)| model.cores(is_log, case.nodes as f64, load.rate);
        let measured = |(model, load): (&Model, &Load)| load.cores - load.rate * model.write;
        let both = || models.iter().zip(loads);
        let ratio = Spread::of(both().map(|it| measured(it) / predicted(it)));
        let transport = if is_log { "change log" } else { "NOTIFY" };
        table.row([
            case.nodes.to_string(),
            case.rate.to_string(),
            transport.to_owned(),
            Spread::of(both().map(predicted)).to_string(),
            Spread::of(both().map(measured)).to_string(),
            ratio.to_string(),
        ]);
        let what = format!("measured load, {transport}, {} nodes, {} changes a second", case.nodes, case.rate);
        bench.ratio(Ratio::cost(what, "predicted", ratio));
    }
    bench.table(table);
}

/// How many nodes one listener serves, behind a relay.
const RELAYED: f64 = 8.0;

fn predict(bench: &mut Bench, model: &Model) {
    let ways: [(&str, bool, f64); 4] = [
        ("NOTIFY", false, 1.0),
        ("change log", true, 1.0),
        ("NOTIFY, a relay for each 8 nodes", false, RELAYED),
        ("change log, a relay for each 8 nodes", true, RELAYED),
    ];
    let mut loads = report::Table::new(
        "Predicted: processors that Postgres keeps busy for coherence. A relay is one process that listens for several nodes and forwards.",
        &["nodes", "changes a second", ways[0].0, ways[1].0, ways[2].0, ways[3].0],
    );
    for nodes in [4.0, 32.0, 128.0, 512.0] {
        for rate in [1.0, 10.0, 100.0, 1000.0] {
            let cores = ways.map(|(_, is_log, share)| number(model.cores(is_log, f64::max(nodes / share, 1.0), rate)));
            loads.row([number(nodes), number(rate)].into_iter().chain(cores));
        }
    }
    bench.table(loads);
    let counts = || (0..=40).map(|n| f64::powf(10.0, f64::from(n) / 40.0 * 3.0));
    let mut ends = report::Table::new(
        "Predicted: changes a second for which Postgres needs one whole processor; 0: the nodes alone need more. And the changes a second
         above which the change log takes less CPU time than NOTIFY.",
        &["nodes", ways[0].0, ways[1].0, ways[2].0, ways[3].0, "the log is cheaper above"],
    );
    for nodes in [1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1000.0] {
        let most = ways.map(|(_, is_log, share)| {
            model.most(is_log, f64::max(nodes / share, 1.0)).map_or("0".to_owned(), |rate| thousands(rate as i64))
        });
        let above = model.log_is_cheaper_above(nodes).map_or("never".to_owned(), |rate| thousands(rate.ceil() as i64));
        ends.row([number(nodes)].into_iter().chain(most).chain([above]));
    }
    bench.table(ends);
    let line = |(name, is_log, share): (&str, bool, f64)| {
        let points = counts().filter_map(|nodes| {
            let rate = model.most(is_log, f64::max(nodes / share, 1.0)).filter(|rate| *rate >= 1.0)?;
            Some((nodes, rate))
        });
        (name.to_owned(), points.collect())
    };
    bench.plot(Plot {
        name: "limits".to_owned(),
        title: "Where Postgres needs one processor for coherence (predicted)".to_owned(),
        unit: "changes a second".to_owned(),
        log: true,
        shape: Shape::Lines { x: "nodes".to_owned(), log_x: true, lines: ways.into_iter().map(line).collect() },
    });
}
