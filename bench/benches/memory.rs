//! What entries take in memory, and how much more while everything is forgotten and read again.

#[path = "../../src/bin/rowcache-budget/entry.rs"]
mod entry;

use std::{hash::Hash, process::ExitCode, sync::Arc};

use anyhow::{Result, ensure};
use entry::{Person, Point};
use peak_alloc::PeakAlloc;
use rowcache::{Event, Lookup, Node, Table, TableOptions};
use rowcache_bench::{
    ground::{Ground, User},
    measure::Spread,
    report::{self, Plot, Ratio, Shape},
    suite::{self, Bench},
};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

fn main() -> ExitCode {
    suite::main("memory", "Memory", run)
}

async fn run(mut bench: Bench) -> Result<Bench> {
    bench.about(
        "Bytes that are allocated, as the program asks for them, for each of a million rows: keys and values with all that belongs to
         them. Each store has room for twice the rows. The small row is two numbers; the large one a number and three strings of 45
         characters together. Values are `Arc`s, but in rowcache, which makes its own of them.",
    );
    let ground = Ground::start(&mut bench).await?;
    let pool = ground.pool(1).await?;
    for table in [Point::TABLE, Person::TABLE] {
        sqlx::raw_sql(table).execute(&pool).await?;
    }
    pool.close().await;
    ground.users(entry::ROWS).await?;
    ground.people(entry::ROWS).await?;

    let node = Node::connect(&ground.url()).await?;
    let allocated = || ALLOCATOR.current_usage();
    let (bare_small, ours_small) = entry::bytes(&node, "points", Point::nth, allocated).await?;
    let (bare_large, ours_large) = entry::bytes(&node, "persons", Person::nth, allocated).await?;
    let of = |what: &str, ours: f64, bare: f64| {
        Ratio::cost(format!("bytes for an entry, {what}"), "quick_cache", Spread::exact(ours / bare))
            .target(entry::BUDGET)
    };
    bench.ratio(of("large row, bigint key", ours_large, bare_large));
    bench.ratio(of("small row, bigint key", ours_small, bare_small));
    let mut table = report::Table::new(
        "Bytes for each row.",
        &["store", "small row, bigint key", "large row, bigint key", "large row, text key"],
    );
    let ids = || 1..=entry::ROWS as i64;
    let small = |id: i64| (id, Arc::new((id, id)));
    let large = |id: i64| (id, Arc::new(User::nth(id)));
    let text = |id: i64| (User::nth(id).email, Arc::new(User::nth(id)));
    let bare_text = each(fill_quick(ids().map(text)));
    row(&mut table, "quick_cache", [bare_small, bare_large, bare_text]);
    let emails: Vec<String> = ids().map(|id| User::nth(id).email).collect();
    let ours_text = of_table(&node, "public.people", &emails).await?;
    drop(emails);
    node.shutdown().await;
    row(&mut table, "rowcache", [ours_small, ours_large, ours_text]);
    bench.ratio(of("large row, text key", ours_text, bare_text));
    let cells =
        [each(fill_moka(ids().map(small))), each(fill_moka(ids().map(large))), each(fill_moka(ids().map(text)))];
    row(&mut table, "moka", cells);
    let cells =
        [each(fill_foyer(ids().map(small))), each(fill_foyer(ids().map(large))), each(fill_foyer(ids().map(text)))];
    row(&mut table, "foyer", cells);
    let cells = [each(fill_map(ids().map(small))), each(fill_map(ids().map(large))), each(fill_map(ids().map(text)))];
    row(&mut table, "dashmap (no eviction)", cells);
    let bars = table.rows.iter().map(|row| (row[0].clone(), row[1].replace(',', "").parse().unwrap_or(0.0)));
    let bars = bars.collect();
    bench.table(table);
    bench.plot(Plot {
        name: "bytes".to_owned(),
        title: "Bytes for an entry of two numbers, a million of them".to_owned(),
        unit: "bytes".to_owned(),
        log: false,
        shape: Shape::Bars(bars),
    });
    peaks(&mut bench, &ground).await?;
    Ok(bench)
}

fn row(table: &mut report::Table, name: &str, cells: [f64; 3]) {
    table.row([name.to_owned()].into_iter().chain(cells.map(|bytes| format!("{bytes:.0}"))));
}

/// What is allocated for each row of a store that is made.
fn each<S>(make: impl FnOnce() -> S) -> f64 {
    let before = ALLOCATOR.current_usage();
    let store = make();
    let bytes = ALLOCATOR.current_usage().saturating_sub(before) as f64 / entry::ROWS as f64;
    drop(store);
    bytes
}

fn fill_quick<K: Hash + Eq, V>(
    rows: impl Iterator<Item = (K, Arc<V>)>,
) -> impl FnOnce() -> quick_cache::sync::Cache<K, Arc<V>> {
    move || {
        let cache = quick_cache::sync::Cache::new(entry::ROWS * 2);
        rows.for_each(|(key, row)| cache.insert(key, row));
        cache
    }
}

fn fill_moka<K, V>(rows: impl Iterator<Item = (K, Arc<V>)>) -> impl FnOnce() -> moka::sync::Cache<K, Arc<V>>
where
    K: Hash + Eq + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    move || {
        let cache = moka::sync::Cache::new(entry::ROWS as u64 * 2);
        rows.for_each(|(key, row)| cache.insert(key, row));
        cache.run_pending_tasks();
        cache
    }
}

fn fill_foyer<K, V>(rows: impl Iterator<Item = (K, Arc<V>)>) -> impl FnOnce() -> foyer_memory::Cache<K, Arc<V>>
where
    K: Hash + Eq + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    move || {
        let cache: foyer_memory::Cache<K, Arc<V>> = foyer_memory::CacheBuilder::new(entry::ROWS * 2).build();
        for (key, row) in rows {
            cache.insert(key, row);
        }
        cache
    }
}

fn fill_map<K: Hash + Eq, V>(rows: impl Iterator<Item = (K, Arc<V>)>) -> impl FnOnce() -> dashmap::DashMap<K, Arc<V>> {
    move || rows.collect()
}

async fn of_table(node: &Node, name: &str, keys: &[String]) -> Result<f64> {
    let before = ALLOCATOR.current_usage();
    let table = rowcache_bench::ground::holding(node, name, TableOptions::default(), keys).await?;
    let bytes = ALLOCATOR.current_usage().saturating_sub(before) as f64 / keys.len() as f64;
    drop(table);
    Ok(bytes)
}

/// How much more is allocated, at its highest, than while a million rows are just held.
async fn peaks(bench: &mut Bench, ground: &Ground) -> Result<()> {
    let ids: Vec<i64> = (1..=entry::ROWS as i64).collect();
    let mut table = report::Table::new(
        "The highest that was allocated meanwhile, as a multiple of what a million large rows take that are just held.",
        &["", "highest", "afterwards"],
    );
    for what in [
        "all of it is forgotten (`clear`), and read again",
        "the listener's connection is killed, and all of it read again",
    ] {
        let node = ground.node(5).await?;
        let before = ALLOCATOR.current_usage();
        let users: Table<i64, User> =
            rowcache_bench::ground::holding(&node, "public.users", TableOptions::default(), &ids).await?;
        let steady = (ALLOCATOR.current_usage() - before) as f64;
        ALLOCATOR.reset_peak_usage();
        if what.contains("clear") {
            users.clear().await?;
        } else {
            let mut events = node.subscribe();
            ground.kill_listeners().await?;
            while !matches!(events.recv().await, Some(Event::Gap(_)) | None) {}
            node.until_coherent().await?;
        }
        for ids in ids.chunks(5000) {
            users.get_many(ids).await?;
        }
        ensure!(matches!(users.try_get(&1), Lookup::Row(_)), "it is held again");
        let of = |bytes: usize| Spread::exact(bytes.saturating_sub(before) as f64 / steady);
        let (peak, after) = (of(ALLOCATOR.peak_usage()), of(ALLOCATOR.current_usage()));
        table.row([what.to_owned(), peak.to_string(), after.to_string()]);
        bench.ratio(Ratio::cost(format!("peak while {what}"), "steady", peak));
        drop(users);
        node.shutdown().await;
    }
    bench.table(table);
    Ok(())
}
