//! The price of an entry, in bytes, beside a bare `quick_cache` with the same rows in the same process. The caller brings the count of
//! what is allocated. `bench/` compiles this file as well, for its suite `memory`.

use std::sync::Arc;

use anyhow::{Result, ensure};
use quick_cache::sync::Cache;
use rowcache::{FromRow, Node, Table, TableOptions};

/// What an entry of a row as services have them may take, as a multiple of the bare cache's.
pub const BUDGET: f64 = 1.25;

pub const ROWS: usize = 1_000_000;

/// A row that is as small as rows can be, so that it is the entry that counts.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Point {
    #[expect(dead_code, reason = "only its weight counts")]
    id: i64,
    #[expect(dead_code, reason = "as above")]
    at: i64,
}

impl Point {
    pub const TABLE: &str = "create table points as select n as id, n as at from generate_series(1::bigint, 1000000) n;
        alter table points add primary key (id); select rowcache.track('points')";

    pub fn nth(id: i64) -> Self {
        Self { id, at: id }
    }
}

/// A row as services have them.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Person {
    #[expect(dead_code, reason = "only its weight counts")]
    id: i64,
    #[expect(dead_code, reason = "as above")]
    email: String,
    #[expect(dead_code, reason = "as above")]
    name: String,
    #[expect(dead_code, reason = "as above")]
    role: String,
}

impl Person {
    pub const TABLE: &str = "create table persons as select n as id, 'user' || n || '@example.org' as email,
        'First' || n % 1000 || ' Last' || n % 7919 as name, 'member' as role from generate_series(1::bigint, 1000000) n;
        alter table persons add primary key (id); select rowcache.track('persons')";

    pub fn nth(id: i64) -> Self {
        let (email, name) = (format!("user{id}@example.org"), format!("First{} Last{}", id % 1000, id % 7919));
        Self { id, email, name, role: "member".to_owned() }
    }
}

/// Bytes for each row of this table, in a bare cache and in a node. Both have room for twice the rows.
pub async fn bytes<V: FromRow>(
    node: &Node,
    table: &str,
    nth: fn(i64) -> V,
    allocated: fn() -> usize,
) -> Result<(f64, f64)> {
    let keys: Vec<i64> = (1..).take(ROWS).collect();
    let before = allocated();
    let bare = Cache::new(ROWS * 2);
    for &id in &keys {
        bare.insert(id, Arc::new(nth(id)));
    }
    let of_bare = allocated().saturating_sub(before);
    drop(bare);
    let before = allocated();
    let rows: Table<i64, V> = node.table_with(table, TableOptions::default().capacity(ROWS * 2)).await?;
    for keys in keys.chunks(5000) {
        let found = rows.get_many(keys).await?.iter().flatten().count();
        ensure!(found == keys.len(), "{found} of {} rows are there", keys.len());
    }
    let of_ours = allocated().saturating_sub(before);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let each = |bytes: usize| bytes as f64 / ROWS as f64;
    Ok((each(of_bare), each(of_ours)))
}
