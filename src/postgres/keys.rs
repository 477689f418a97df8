//! Keys that a query of the user's names, and key columns of rows.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Row as _, postgres::PgRow};
use tokio::time::timeout;

use crate::{
    error::{Error, Kind, Result},
    key::{Key, KeyType, Parts},
    postgres::{
        access::Access,
        columns::{self, KeyColumn},
        database_error,
        lent::Lent,
        server::fetch,
    },
};

/// What key columns of these types have in a row, from column `first` on; `None` if one of them is null.
pub(super) fn parts(row: &PgRow, first: usize, types: &[KeyType]) -> sqlx::Result<Option<Parts>> {
    let mut parts = Parts::new();
    for (column, of) in (first..).zip(types) {
        match columns::read(row, column, *of)? {
            Some(part) => parts.push(part),
            None => return Ok(None),
        }
    }
    Ok(Some(parts))
}

/// The keys that a query returns, at most so many, in its order. Rows with a null are left out.
pub(super) async fn read<K: Key>(
    access: &Access,
    cache: &str,
    types: &[KeyType],
    query: &str,
    max: usize,
    limit: Duration,
) -> Result<Vec<K>> {
    let query = query.trim().trim_end_matches(';');
    // The columns as they are read, and then all that there are, which shows whether there are more.
    let names: Vec<String> = (0..types.len()).map(|n| format!("k{n}")).collect();
    let column = |(of, name): (&KeyType, &String)| KeyColumn { of: *of, table: "", name }.value();
    let values: Vec<String> = types.iter().zip(&names).map(column).collect();
    let sql = format!("select {}, t.* from ({query}\n) as t({}) limit {max}", values.join(", "), names.join(", "));
    let of = format!("the keys of {cache}");
    // An unnamed statement would not survive that the driver looks up a type between its preparation and its execution.
    let asking = async {
        let mut connection = Lent::acquire(&access.pool).await?;
        let rows =
            fetch(&mut connection, sqlx::query(AssertSqlSafe(sql)).persistent(!access.pooler), access.pooler).await?;
        connection.give_back();
        Ok::<Vec<PgRow>, sqlx::Error>(rows)
    };
    let rows = match timeout(limit, asking).await {
        Ok(rows) => rows.map_err(|error| database_error(&format!("reading {of}"), error))?,
        Err(_) => return Err(Error::new(Kind::Timeout, format!("reading {of} took longer than {limit:?}"))),
    };
    let broken = |what: &str| {
        let columns: Vec<_> = types.iter().map(|of| of.postgres()).collect();
        Error::new(
            Kind::Table,
            format!("{of}: {what}; the query must return ({}), and nothing else", columns.join(", ")),
        )
    };
    let mut keys = Vec::with_capacity(rows.len());
    for row in &rows {
        let found = row.len() - types.len();
        if found != types.len() {
            return Err(broken(&format!("the query returns {found} columns")));
        }
        let Some(parts) = parts(row, 0, types).map_err(|error| broken(&error.to_string()))? else { continue };
        keys.push(K::from_parts(&parts).ok_or_else(|| broken("what it returns is no key"))?);
    }
    Ok(keys)
}
