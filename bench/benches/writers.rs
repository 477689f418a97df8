//! What writers pay for being listened to.

#[path = "writers/bulk.rs"]
mod bulk;
#[path = "writers/growth.rs"]
mod growth;
#[path = "writers/load.rs"]
mod load;
#[path = "writers/setup.rs"]
mod setup;

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use rowcache_bench::{
    ground::Ground,
    measure::{Spread, number, quantile, thousands},
    report::{Plot, Ratio, Shape, Table},
    suite::{self, Bench},
};

use load::{Outcome, Run};
use setup::Variant;

/// Who hears of changes, by default.
const NODES: usize = 8;

fn main() -> ExitCode {
    suite::main("writers", "What writers pay", run)
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "A table of rows of some 350 bytes, on a durable server. Writers change a row by its key in each transaction, as fast as they can,
         with a connection each. Changes are told by nobody; by the trigger that most articles show, which sends each row as JSON; by
         rowcache's, which sends keys, through NOTIFY; and by rowcache's into the change log, which nodes poll every 10 to 50 ms. No or eight
         nodes (for the trigger of the articles: eight connections that parse what they hear) run in the process of the writers, on the two
         cores of the server. Every turn waits until all nodes have been told of every commit. The longer flush is Postgres' own
         `commit_delay` of 1 ms, for each commit.",
    );
    bench.about(
        "Postgres lets transactions that notify commit one after the other, in the whole server: each waits for the flush of the one before,
         and what is in the message makes no difference to that. So NOTIFY costs little with one writer, and the more, the more writers could
         have shared a flush. Each node costs the server CPU time for each commit that notifies; by way of the change log, for each poll. On
         two cores that both sides share, that is throughput, too.",
    );
    let ground = Ground::start(&mut bench).await?;
    let rows = bench.size(200_000, 5000);
    setup::fill(&ground, rows).await?;
    commits(&mut bench, &ground, rows).await?;
    setup::fill(&ground, 1000).await?;
    polls(&mut bench, &ground).await?;
    for rows in [bench.size(100_000, 2000), bench.size(1_000_000, 20_000)] {
        setup::fill(&ground, rows).await?;
        update_all(&mut bench, &ground, rows).await?;
    }
    drop(ground);
    let ground = Ground::start(&mut bench).await?;
    setup::fill(&ground, 1000).await?;
    let step = bench.size(220_000, 1000);
    bench.table(growth::measure(&ground, 5, step).await?);
    Ok(bench)
}

/// How changes are told, and to how many nodes.
const TOLD: [(Variant, usize); 6] = [
    (Variant::None, 0),
    (Variant::Naive, NODES),
    (Variant::Notify, NODES),
    (Variant::Log, NODES),
    // With a short flush alone.
    (Variant::Notify, 0),
    (Variant::Log, 0),
];

async fn commits(bench: &mut Bench, ground: &Ground, rows: usize) -> Result<()> {
    let mut table = Table::new(
        "One row a commit. Known: from when a writer knew that it had committed until a node had applied it; 0: the node knew before.",
        &[
            "flush",
            "writers",
            "",
            "nodes",
            "commits/s",
            "of no trigger's",
            "server CPU µs a commit",
            "known after ms: p50",
            "p99",
        ],
    );
    let length = Duration::from_millis(bench.size(700, 200) as u64);
    for (slow, flush) in [(false, "this disk's"), (true, "1 ms longer")] {
        let all = if slow { &TOLD[..4] } else { &TOLD[..] };
        let mut lines: Vec<(String, Vec<(f64, f64)>)> = all.iter().map(|&told| (name(told), Vec::new())).collect();
        for writers in [1, 4, 16] {
            let mut outcomes: Vec<Vec<Outcome>> = all.iter().map(|_| Vec::new()).collect();
            for round in 0..bench.rounds(3) {
                for n in 0..all.len() {
                    let told = (n + round) % all.len();
                    let (variant, nodes) = all[told];
                    let run = Run { variant, nodes, writers, slow, rows, length };
                    outcomes[told].push(run.measure(ground).await?);
                }
            }
            for (n, outcomes_of) in outcomes.iter().enumerate() {
                let (variant, nodes) = all[n];
                let pairs = outcomes_of.iter().zip(&outcomes[0]);
                let of_none = Spread::of(pairs.map(|(it, none)| it.commits_a_second / none.commits_a_second));
                let a_second = Spread::of(outcomes_of.iter().map(|it| it.commits_a_second));
                let mut known: Vec<f64> = outcomes_of.iter().flat_map(|it| it.known_after.iter().copied()).collect();
                known.sort_by(f64::total_cmp);
                let after = |part| if known.is_empty() { String::new() } else { number(quantile(&known, part) * 1e3) };
                table.row([
                    flush.to_owned(),
                    writers.to_string(),
                    variant.text().to_owned(),
                    nodes.to_string(),
                    number(a_second.median),
                    if n == 0 { String::new() } else { of_none.to_string() },
                    number(Spread::of(outcomes_of.iter().map(|it| it.cpu_a_commit)).median),
                    after(0.5),
                    after(0.99),
                ]);
                lines[n].1.push((writers as f64, a_second.median));
                if n > 0 {
                    let many = if writers == 1 { "" } else { "s" };
                    let what = format!("commits a second, {writers} writer{many}, flush {flush}: {}", name(all[n]));
                    bench.ratio(Ratio::gain(what, Variant::None.text(), of_none));
                }
            }
        }
        bench.plot(Plot {
            name: if slow { "slow" } else { "fast" }.to_owned(),
            title: format!("Commits of one row a second, flush {flush}"),
            unit: "commits a second".to_owned(),
            log: true,
            shape: Shape::Lines { x: "writers".to_owned(), log_x: true, lines },
        });
    }
    bench.table(table);
    Ok(())
}

fn name((variant, nodes): (Variant, usize)) -> String {
    match (variant, nodes) {
        (Variant::None, _) => variant.text().to_owned(),
        (_, 0) => format!("{}, no node", variant.text()),
        _ => format!("{}, {nodes} nodes", variant.text()),
    }
}

/// What nodes cost the server that hear of a hundred changes a second.
async fn polls(bench: &mut Bench, ground: &Ground) -> Result<()> {
    let mut table = Table::new(
        "CPU time of the server for its nodes, percent of a core. With changes: less what the same changes take without a node.",
        &[
            "nodes",
            "change log, no changes",
            "change log, 100 changes/s",
            "NOTIFY, no changes",
            "NOTIFY, 100 changes/s",
        ],
    );
    let length = Duration::from_millis(bench.size(1500, 200) as u64);
    let cost = async |variant, nodes, writes| load::cost_of_nodes(ground, variant, nodes, writes, length).await;
    let alone = [cost(Variant::Log, 0, true).await?, cost(Variant::Notify, 0, true).await?];
    for nodes in [1, 8, 32] {
        let mut cells = vec![nodes.to_string()];
        for (variant, alone) in [Variant::Log, Variant::Notify].into_iter().zip(alone) {
            cells.push(number(cost(variant, nodes, false).await?));
            cells.push(number(cost(variant, nodes, true).await? - alone));
        }
        table.row(cells);
    }
    bench.table(table);
    Ok(())
}

async fn update_all(bench: &mut Bench, ground: &Ground, rows: usize) -> Result<()> {
    let variants = [Variant::None, Variant::Naive, Variant::Notify, Variant::NotifyAll, Variant::Log];
    let count = thousands(rows as i64);
    let mut table = Table::new(
        format!("One UPDATE of {count} rows. Messages: notifications that a listener had, or rows of the change log."),
        &["", "seconds", "of no trigger's", "MB of the server's process", "messages"],
    );
    // The table has grown to what it will be.
    bulk::measure(ground, Variant::None).await?;
    let mut outcomes: Vec<Vec<bulk::Outcome>> = variants.iter().map(|_| Vec::new()).collect();
    for round in 0..bench.rounds(if rows < 500_000 { 3 } else { 1 }) {
        for n in 0..variants.len() {
            let variant = (n + round) % variants.len();
            outcomes[variant].push(bulk::measure(ground, variants[variant]).await?);
        }
    }
    for (n, variant) in variants.iter().enumerate() {
        let of_none = Spread::of(outcomes[n].iter().zip(&outcomes[0]).map(|(it, none)| it.seconds / none.seconds));
        let messages = outcomes[n].iter().map(|it| it.messages).max().unwrap_or_default();
        table.row([
            variant.text().to_owned(),
            Spread::of(outcomes[n].iter().map(|it| it.seconds)).to_string(),
            if n == 0 { String::new() } else { of_none.to_string() },
            number(Spread::of(outcomes[n].iter().map(|it| it.memory)).median / 1e6),
            thousands(messages as i64),
        ]);
        if n > 0 {
            bench.ratio(Ratio::cost(
                format!("an UPDATE of {count} rows: {}", variant.text()),
                variants[0].text(),
                of_none,
            ));
        }
    }
    bench.table(table);
    Ok(())
}
