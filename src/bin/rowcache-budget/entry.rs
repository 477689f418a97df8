//! The price of an entry, in bytes, beside a bare `quick_cache` with the same rows in the same process. The caller brings the count of
//! what is allocated. `bench/` compiles this file as well, for its suite `memory`.

use std::sync::Arc;

use anyhow::{Result, ensure};
use quick_cache::sync::Cache;
use rowcache::{Node, Table, TableOptions};

/// What an entry may take, as a multiple of the bare cache's.
pub const BUDGET: f64 = 1.25;

pub const ROWS: usize = 1_000_000;

/// A small row, so that it is the entry that counts.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Point {
    #[expect(dead_code, reason = "only its weight counts")]
    id: i64,
    #[expect(dead_code, reason = "as above")]
    at: i64,
}

/// The table that is held in whole. `id` is its key.
pub const TABLE: &str = "create table points as select n as id, n as at from generate_series(1::bigint, 1000000) n;
    alter table points add primary key (id); select rowcache.track('points')";

/// Bytes for each row, in a bare cache and in a table.
pub async fn bytes(url: &str, allocated: impl Fn() -> usize) -> Result<(f64, f64)> {
    let keys: Vec<i64> = (1_i64..).take(ROWS).collect();
    let before = allocated();
    let bare = Cache::new(ROWS * 2);
    for &id in &keys {
        bare.insert(id, Arc::new(Point { id, at: id }));
    }
    let of_bare = allocated() - before;
    drop(bare);
    let node = Node::connect(url).await?;
    let before = allocated();
    let points = held(&node, &keys).await?;
    let of_ours = allocated().saturating_sub(before);
    drop(points);
    node.shutdown().await;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let each = |bytes: usize| bytes as f64 / ROWS as f64;
    Ok((each(of_bare), each(of_ours)))
}

/// A table with room for twice the rows, as the bare cache has, that holds all of them.
pub async fn held(node: &Node, keys: &[i64]) -> Result<Table<i64, Point>> {
    let points: Table<i64, Point> = node.table_with("points", TableOptions::default().capacity(ROWS * 2)).await?;
    for keys in keys.chunks(5000) {
        let found = points.get_many(keys).await?.iter().flatten().count();
        ensure!(found == keys.len(), "{found} of {} rows are there", keys.len());
    }
    Ok(points)
}
