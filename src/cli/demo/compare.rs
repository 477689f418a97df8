//! The last question of a demo: is everything that the nodes hold what the table holds?

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use sqlx::PgPool;

use super::nodes::{DemoNode, barrier};
use crate::Lookup;

/// Somebody may be writing while we compare (a person, another demo): what differs is looked at again, this often.
const ROUNDS: usize = 5;

pub(super) struct Comparison {
    /// Entries that were held, absent ones included, all nodes together.
    pub(super) entries: u64,
    /// What still differs at the end.
    pub(super) differing: Vec<String>,
}

/// Holds every entry of every node against the table.
pub(super) async fn compare(nodes: &[Arc<DemoNode>], pool: &PgPool, rows: u64) -> Result<Comparison> {
    let mut keys: BTreeSet<i64> = (1..=i64::try_from(2 * rows)?).collect();
    let ids: sqlx::Result<Vec<i64>> = sqlx::query_scalar("select id from rowcache_demo.users").fetch_all(pool).await;
    keys.extend(ids.context("cannot read the table for the last comparison")?);
    let mut comparison = Comparison { entries: 0, differing: Vec::new() };
    for round in 0..ROUNDS {
        for node in nodes {
            barrier(node).await?;
        }
        let held: Vec<_> = nodes.iter().flat_map(|node| held(node, &keys)).collect();
        if round == 0 {
            comparison.entries = held.len() as u64;
        }
        let table = read(pool, &keys).await?;
        let differing: Vec<_> = held.into_iter().filter(|it| table.get(&it.key).copied() != it.version).collect();
        keys = differing.iter().map(|it| it.key).collect();
        comparison.differing = differing.iter().map(|it| it.describe(&table)).collect();
        if keys.is_empty() {
            break;
        }
    }
    Ok(comparison)
}

/// One entry of a node.
struct Held {
    node: usize,
    key: i64,
    /// `None`: the node holds that there is no such row.
    version: Option<i64>,
}

impl Held {
    fn describe(&self, table: &HashMap<i64, i64>) -> String {
        let version =
            |version: Option<i64>| version.map_or("no row".to_owned(), |version| format!("version {version}"));
        let (here, there) = (version(self.version), version(table.get(&self.key).copied()));
        format!("node {} holds {here} of id {}, and the table {there}", self.node + 1, self.key)
    }
}

fn held(node: &DemoNode, keys: &BTreeSet<i64>) -> Vec<Held> {
    let held = |&key: &i64| {
        let version = match node.users.peek(&key) {
            Lookup::Row(row) => Some(row.version),
            Lookup::Absent => None,
            Lookup::Unknown => return None,
        };
        Some(Held { node: node.index, key, version })
    };
    keys.iter().filter_map(held).collect()
}

async fn read(pool: &PgPool, keys: &BTreeSet<i64>) -> Result<HashMap<i64, i64>> {
    let ask = sqlx::query_as("select id, version from rowcache_demo.users where id = any($1)");
    let rows: Vec<(i64, i64)> =
        ask.bind(keys.iter().copied().collect::<Vec<_>>()).fetch_all(pool).await.context("cannot read the table")?;
    Ok(rows.into_iter().collect())
}
