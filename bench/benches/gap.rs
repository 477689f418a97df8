//! How soon a node serves from memory again after it has lost its connection, and what that asks of the database.

#[path = "gap/quiet.rs"]
mod quiet;
#[path = "gap/reader.rs"]
mod reader;
#[path = "gap/restart.rs"]
mod restart;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rowcache::{Event, Node, Table, TableOptions, install};
use rowcache_bench::{
    ground::{Ground, User, holding},
    measure::{Spread, cpu_of_server, number, thousands},
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};
use tokio::sync::mpsc;

use reader::{Choice, Reader};

/// Rows that are read again by a node that refills.
const HOTTEST: usize = 100_000;
/// Rows that change just when the connection is lost.
const CHANGED: i64 = 100;
/// How long is looked on after the loss.
const LOOK: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    suite::main("gap", "After a gap", run)
}

/// How a node gets over a gap.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Lazy,
    Refill,
    Redundant,
    Log,
}

impl Way {
    const ALL: [Self; 4] = [Self::Lazy, Self::Refill, Self::Redundant, Self::Log];

    fn name(self) -> &'static str {
        match self {
            Self::Lazy => "lazily (default)",
            Self::Refill => "`refill(100_000)`",
            Self::Redundant => "`redundant_listener`",
            Self::Log => "change log",
        }
    }

    fn options(self) -> TableOptions {
        if self == Self::Refill { TableOptions::default().refill(HOTTEST) } else { TableOptions::default() }
    }

    fn via(self) -> install::Transport {
        if self == Self::Log { install::Transport::Log } else { install::Transport::Notify }
    }
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "A node holds all rows, and is read 20,000 times a second by Zipf 0.99: first `try_get`, and a `get` in a task of its own for what is
         not held. Then the server ends the backend that the node listens on, and in the same transaction 100 rows change. The first time is
         until the node is coherent again, from sending that statement. The second one is until the hit ratio is 99 % again, for good, over
         100 ms; what has been lost is looked at for 1.5 s. Loads and the CPU time of the server are those of these 1.5 s. Afterwards
         the 100 rows are read: each is the new one.",
    );
    bench.about(
        "With a redundant listener there is no gap, and nothing is forgotten. With the change log there is a gap, in which reads go to Postgres;
         then what the log has told meanwhile is applied to what was held, and that is served again. The restart is that of the whole server
         (fast shutdown, start): the time begins when it first accepts a connection, which is tried every 2 ms.",
    );
    bench.about(
        "Why targets are missed. A refill sends two statements of 512 keys at a time, the hottest first, so that a fleet asks for no more than that per
         node and table. How long it takes to read 100,000 rows while nothing else runs is in the last table; here the processors are shared with a
         reader who is as fast as before, and sends his misses himself. Among a million rows it takes a tenth of a second to find the hottest,
         and they lie farther apart in the server's memory, which takes up to twice as long to read. With the change log, what was read during
         the gap is loaded once more when it is asked for, as it was not published. After a restart the pause between two attempts to connect
         is a thirtieth to a fifteenth of the time that the server was down.",
    );
    let mut ground = Ground::start(&mut bench).await?;
    let mut table = report::Table::new(
        "One lost connection, medians.",
        &[
            "rows held",
            "after a gap, rows are read",
            "ms until coherent",
            "ms until 99 % are hits",
            "hits 1 s after, %",
            "slowest read, ms",
            "ms until refilled",
            "rows loaded",
            "statements",
            "CPU time of the server, ms",
        ],
    );
    for (rows, rounds) in [(bench.size(100_000, 5000), 5), (bench.size(1_000_000, 20_000), 2)] {
        ground.users(rows).await?;
        let choice = Choice::new(rows);
        let mut lost: [Vec<Lost>; 4] = Default::default();
        for round in 0..bench.rounds(rounds) {
            for n in 0..Way::ALL.len() {
                let way = (n + round) % Way::ALL.len();
                lost[way].push(turn(&ground, Way::ALL[way], &choice, round, bench.size(8_000_000, 20_000)).await?);
            }
        }
        show(&mut bench, &mut table, rows, &lost);
    }
    bench.table(table);
    quiet::run(&mut bench, &ground).await?;
    restart::run(&mut bench, &mut ground).await?;
    quiet::batches(&mut bench, &ground).await?;
    Ok(bench)
}

/// What a lost connection came to.
struct Lost {
    coherent: Duration,
    /// `None`: not within [`LOOK`].
    back: Option<Duration>,
    refilled: Option<Duration>,
    /// Hits in a window, by the time since the loss.
    windows: Vec<(f64, f64)>,
    slowest: Duration,
    loads: u64,
    statements: u64,
    cpu: Duration,
}

async fn start(ground: &Ground, way: Way, ids: &[i64]) -> Result<(Node, Table<i64, User>)> {
    let pool = ground.pool(1).await?;
    let options = install::TrackOptions { via: way.via(), ..Default::default() };
    install::track(&pool, "public.users", &options).await?;
    pool.close().await;
    let mut config = ground.config(5)?;
    config.redundant_listener = way == Way::Redundant;
    let node = Node::start(config).await?;
    let users = holding(&node, "public.users", way.options(), ids).await?;
    let began = Instant::now();
    while way == Way::Redundant && !node.is_covered() {
        ensure!(began.elapsed() < PATIENCE, "the spare line covers");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok((node, users))
}

/// What happens to a node, and when.
fn events(node: &Node) -> mpsc::UnboundedReceiver<(Instant, Event)> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut events = node.subscribe();
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            if !matches!(event, Event::Change(_)) && sender.send((Instant::now(), event)).is_err() {
                return;
            }
        }
    });
    receiver
}

/// When an event came of which this is true.
async fn until(
    events: &mut mpsc::UnboundedReceiver<(Instant, Event)>,
    mut is_it: impl FnMut(Instant, &Event) -> bool,
) -> Result<Instant> {
    let come = async {
        while let Some((at, event)) = events.recv().await {
            if is_it(at, &event) {
                return Ok(at);
            }
        }
        anyhow::bail!("the node has stopped")
    };
    tokio::time::timeout(PATIENCE, come).await.context("the node is not what it should be")?
}

/// The first one that listened, for a node that does so twice.
const KILL: &str = "select pg_terminate_backend(pid) from (select pid from pg_stat_activity \
    where datname = current_database() and application_name like '%(listener)' order by backend_start limit 1) as first";

async fn turn(ground: &Ground, way: Way, choice: &Choice, round: usize, warm_up: usize) -> Result<Lost> {
    let (node, users) = start(ground, way, choice.ids()).await?;
    choice.warm_up(&users, warm_up).await?;
    let client = ground.client().await?;
    let role = format!("role {} {round}", way.name());
    let reader = Reader::start(users.clone(), choice.clone());
    tokio::time::sleep(Duration::from_millis(300)).await;

    let mut events = events(&node);
    let (before, postmaster) = (users.stats(), ground.postmaster()?);
    let cpu = cpu_of_server(postmaster)?;
    let began = Instant::now();
    client.batch_execute(&format!("{KILL}; update public.users set role = '{role}' where id <= {CHANGED}")).await?;
    let coherent = until(&mut events, |_, event| match way {
        Way::Redundant => matches!(event, Event::Handoff(_)),
        _ => matches!(event, Event::Coherent),
    });
    let coherent = coherent.await?;
    let mut refilled = None;
    while began.elapsed() < LOOK {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if refilled.is_none() && users.stats().refilled > before.refilled {
            refilled = Some(began.elapsed());
        }
    }
    let cpu = cpu_of_server(postmaster)?.saturating_sub(cpu);
    let stats = users.stats().since(&before);
    while way == Way::Refill && refilled.is_none() {
        ensure!(began.elapsed() < PATIENCE, "it refills");
        tokio::time::sleep(Duration::from_millis(5)).await;
        refilled = (users.stats().refilled > before.refilled).then(|| began.elapsed());
    }
    let seen = reader.stop().await?;
    ensure!(seen.failed == 0, "{} reads failed, of {}", seen.failed, seen.first_failure);

    node.barrier().await?;
    let changed: Vec<i64> = (1..=CHANGED).collect();
    let new = users.get_many(&changed).await?.iter().flatten().filter(|user| user.role == role).count();
    ensure!(new as i64 == CHANGED, "{new} of {CHANGED} rows are the new ones");
    let gaps = node.stats().gaps;
    ensure!((gaps == 0) == (way == Way::Redundant), "{gaps} gaps, {}", way.name());
    node.shutdown().await;

    let windows = seen.windows(began);
    Ok(Lost {
        coherent: coherent - began,
        back: back(&windows),
        refilled,
        windows,
        slowest: seen.slowest(began),
        loads: stats.loads,
        statements: stats.queries,
        cpu,
    })
}

/// When the last five windows in a row ended in which less than 99 % were hits.
fn back(windows: &[(f64, f64)]) -> Option<Duration> {
    let after: Vec<_> = windows.iter().filter(|(at, _)| *at >= 0.0).collect();
    let is_low = |five: &[&(f64, f64)]| five.iter().map(|(_, hits)| hits).sum::<f64>() < 99.0 * five.len() as f64;
    match after.windows(5).rposition(is_low) {
        None => Some(Duration::ZERO),
        Some(last) => after.get(last + 5).map(|(at, _)| Duration::from_secs_f64(at / 1e3)),
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn show(bench: &mut Bench, table: &mut report::Table, rows: usize, lost: &[Vec<Lost>; 4]) {
    let named = thousands(rows as i64);
    let spread = |way: usize, of: &dyn Fn(&Lost) -> f64| Spread::of(lost[way].iter().map(of));
    // Those that do not come back count as the whole time that was looked at.
    let late = |time: Option<Duration>| millis(time.unwrap_or(LOOK));
    let refilled = |it: &Lost| millis(it.refilled.unwrap_or_default());
    let shown = |way: usize, of: &dyn Fn(&Lost) -> Option<Duration>| {
        let in_time = lost[way].iter().filter_map(of).count();
        if in_time * 2 > lost[way].len() {
            number(spread(way, &|it| late(of(it))).median)
        } else {
            format!("not within {}", number(millis(LOOK)))
        }
    };
    for (n, way) in Way::ALL.into_iter().enumerate() {
        let hits_after = |it: &Lost| {
            let around: Vec<f64> =
                it.windows.iter().filter(|(at, _)| (900.0..1100.0).contains(at)).map(|(_, hits)| *hits).collect();
            around.iter().sum::<f64>() / around.len().max(1) as f64
        };
        table.row([
            named.clone(),
            way.name().to_owned(),
            if way == Way::Redundant {
                "no gap".to_owned()
            } else {
                number(spread(n, &|it| millis(it.coherent)).median)
            },
            shown(n, &|it| it.back),
            number(spread(n, &hits_after).median),
            number(spread(n, &|it| millis(it.slowest)).median),
            if way == Way::Refill { number(spread(n, &|it| refilled(it)).median) } else { String::new() },
            number(spread(n, &|it| it.loads as f64).median),
            number(spread(n, &|it| it.statements as f64).median),
            number(spread(n, &|it| millis(it.cpu)).median),
        ]);
    }
    for (n, way) in [(0, "lazily"), (3, "change log")] {
        let coherent = spread(n, &|it| millis(it.coherent) / 100.0);
        let what = format!("time to coherent after a killed listener, {named} rows, {way}");
        bench.ratio(Ratio::cost(what, "100 ms", coherent).target(1.0));
    }
    let full = rows <= HOTTEST;
    let what = if full { "time until 99 % are hits" } else { "time until the hottest 100,000 are held" };
    let back = spread(1, &|it| if full { late(it.back) } else { refilled(it) });
    bench.ratio(
        Ratio::cost(format!("{what}, {named} rows, refill"), "500 ms", back.map(|time| time / 500.0)).target(1.0),
    );
    for (n, way) in [(2, "redundant listener"), (3, "change log")] {
        let back = spread(n, &|it| late(it.back) / 500.0);
        bench.ratio(Ratio::cost(format!("time until 99 % are hits, {named} rows, {way}"), "500 ms", back).target(1.0));
        let loads =
            Spread::of(lost[n].iter().zip(&lost[0]).map(|(it, lazy)| it.loads as f64 / lazy.loads.max(1) as f64));
        bench.ratio(Ratio::cost(format!("rows loaded after a killed listener, {named} rows, {way}"), "lazily", loads));
    }
    let last = |n: usize| lost[n].last().map(|it| it.windows.clone()).unwrap_or_default();
    let lines = Way::ALL.into_iter().enumerate().map(|(n, way)| (way.name().replace('`', ""), last(n)));
    bench.plot(Plot {
        name: format!("hits-{rows}"),
        title: format!("Hits around the loss of a connection, {named} rows, 20,000 reads a second"),
        unit: "%".to_owned(),
        log: false,
        shape: Shape::Lines { x: "ms since the loss".to_owned(), log_x: false, lines: lines.collect() },
    });
}
