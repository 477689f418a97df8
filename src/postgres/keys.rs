//! Keys that a query of the user's names, and key columns of rows.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Row as _, postgres::PgRow};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    error::{Error, Kind, Result},
    key::{Key, KeyPart, KeyType},
    postgres::{access::Access, database_error, lent::Lent, server::fetch},
};

/// What key columns of these types have in a row, from column `first` on; `None` if one of them is null.
pub(super) fn parts(row: &PgRow, first: usize, types: &[KeyType]) -> sqlx::Result<Option<Vec<KeyPart<'static>>>> {
    let mut parts = Vec::with_capacity(types.len());
    for (column, of) in (first..).zip(types) {
        let part = match of {
            KeyType::Int2 => row.try_get::<Option<i16>, _>(column)?.map(|it| KeyPart::Int(it.into())),
            KeyType::Int4 => row.try_get::<Option<i32>, _>(column)?.map(|it| KeyPart::Int(it.into())),
            KeyType::Int8 => row.try_get::<Option<i64>, _>(column)?.map(KeyPart::Int),
            KeyType::Text => row.try_get::<Option<String>, _>(column)?.map(|it| KeyPart::Text(it.into())),
            KeyType::Uuid => row.try_get::<Option<Uuid>, _>(column)?.map(KeyPart::Uuid),
        };
        match part {
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
    query: &str,
    max: usize,
    limit: Duration,
) -> Result<Vec<K>> {
    let query = query.trim().trim_end_matches(';');
    let sql = format!("select * from ({query}\n) as wanted limit {max}");
    let of = format!("the keys of {cache}");
    let asking = async {
        let mut connection = Lent::acquire(&access.pool).await?;
        let rows = fetch(&mut connection, sqlx::query(AssertSqlSafe(sql)).persistent(false), access.pooler).await?;
        connection.give_back();
        Ok::<Vec<PgRow>, sqlx::Error>(rows)
    };
    let rows = match timeout(limit, asking).await {
        Ok(rows) => rows.map_err(|error| database_error(&format!("reading {of}"), error))?,
        Err(_) => return Err(Error::new(Kind::Timeout, format!("reading {of} took longer than {limit:?}"))),
    };
    let types = K::types();
    let broken = |what: &str| {
        let columns: Vec<_> = types.iter().map(|of| of.postgres()).collect();
        Error::new(
            Kind::Table,
            format!("{of}: {what}; the query must return ({}), and nothing else", columns.join(", ")),
        )
    };
    let mut keys = Vec::with_capacity(rows.len());
    for row in &rows {
        if row.len() != types.len() {
            return Err(broken(&format!("the query returns {} columns", row.len())));
        }
        let Some(parts) = parts(row, 0, &types).map_err(|error| broken(&error.to_string()))? else { continue };
        keys.push(K::from_parts(&parts).ok_or_else(|| broken("what it returns is no key"))?);
    }
    Ok(keys)
}
