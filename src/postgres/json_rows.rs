//! Rows as JSON, made by Postgres, for who does not know their columns.

use bytes::Bytes;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row, postgres::PgRow};

use super::{
    catalog,
    columns::{KeyColumn, bind},
    database_error,
    rows::quote,
    schema_hint,
};
use crate::{
    error::{Error, Kind, Result},
    key::{AnyKey, Key as _, KeyType},
};

/// A row as a JSON object, ready to be sent.
pub(crate) struct JsonRow {
    pub(crate) json: Bytes,
    /// Names these bytes: `W/"…"`. Weak, as the body may be sent compressed.
    pub(crate) etag: Bytes,
}

impl<'r> sqlx::FromRow<'r, PgRow> for JsonRow {
    fn from_row(row: &'r PgRow) -> sqlx::Result<Self> {
        Ok(Self::new(row.try_get(COLUMN)?))
    }
}

impl JsonRow {
    pub(crate) fn new(json: String) -> Self {
        let hash: String = Sha256::digest(&json).iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        Self { json: json.into(), etag: format!("W/\"{hash}\"").into() }
    }
}

const COLUMN: &str = "rowcache.json";

/// Which columns of a table are sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sent {
    #[default]
    All,
    Only(Vec<String>),
    AllBut(Vec<String>),
}

/// What is read in place of the table: its key, and the row.
pub(crate) fn query(table: &str, key: &[String], sent: &Sent) -> String {
    let columns =
        |names: &[String]| names.iter().map(|name| format!("x.{}", quote(name))).collect::<Vec<_>>().join(", ");
    let json = match sent {
        Sent::All => "pg_catalog.to_jsonb(x)".to_owned(),
        Sent::Only(names) => format!("(select pg_catalog.to_jsonb(r) from (select {}) r)", columns(names)),
        Sent::AllBut(names) => {
            let names: Vec<_> = names.iter().map(|name| format!("'{}'", name.replace('\'', "''"))).collect();
            format!("(pg_catalog.to_jsonb(x) - array[{}]::text[])", names.join(", "))
        }
    };
    format!("(select {}, {json}::text as \"{COLUMN}\" from {table} x)", columns(key))
}

/// A table that is to be served.
pub(crate) struct Looked {
    /// Its name, as messages have it.
    pub(crate) relation: String,
    columns: Vec<String>,
    types: Vec<String>,
    enums: Vec<bool>,
}

impl Looked {
    /// The columns of its key, or those by which rows are asked for. `None`: one is of a type that no key has.
    pub(crate) fn key(&self) -> Option<Vec<(String, KeyType)>> {
        let of = |(name, is_enum): (&String, &bool)| catalog::key_type(name, *is_enum);
        let types = self.types.iter().zip(&self.enums).map(of);
        self.columns.iter().zip(types).map(|(name, of)| Some((name.clone(), of?))).collect()
    }
}

/// Looks up a table, and whether it has the columns that are to be sent.
pub(crate) async fn look(pool: &PgPool, name: &str, by: &[String], sent: &Sent) -> Result<Looked> {
    let failed = |error| database_error(&format!("looking up {name}"), error);
    let (relation, key): (Option<String>, Vec<String>) =
        sqlx::query_as("select relation, coalesce(key_columns, '{}') from rowcache.describe($1)")
            .bind(name)
            .fetch_one(pool)
            .await
            .map_err(|error| schema_hint(&error).unwrap_or_else(|| failed(error)))?;
    let Some(relation) = relation else {
        return Err(Error::new(
            Kind::Table,
            format!("there is no table {name} in this database; write it as schema.table"),
        ));
    };
    let named: &[String] = match sent {
        Sent::All => &[],
        Sent::Only(names) | Sent::AllBut(names) => names,
    };
    let columns = if by.is_empty() { key } else { by.to_vec() };
    let asked: Vec<String> = columns.iter().chain(named).cloned().collect();
    let found: Vec<(String, Option<String>, bool)> =
        sqlx::query_as(catalog::TYPES).bind(&relation).bind(&asked).fetch_all(pool).await.map_err(failed)?;
    if let Some((column, ..)) = found.iter().find(|(_, of, _)| of.is_none()) {
        return Err(Error::new(Kind::Table, format!("table {relation} has no column {column}")));
    }
    let (types, enums) = found.into_iter().take(columns.len()).map(|(_, of, is)| (of.unwrap_or_default(), is)).unzip();
    Ok(Looked { relation, columns, types, enums })
}

/// Sets columns of a row to values of a JSON object. Returns whether there is such a row.
pub(crate) async fn update(
    connection: &mut PgConnection,
    relation: &str,
    by: &[(String, KeyType)],
    key: &AnyKey,
    columns: &Map<String, Value>,
) -> Result<bool> {
    let set: Vec<_> = columns.keys().map(|name| format!("{0} = r.{0}", quote(name))).collect();
    let names: Vec<_> = by.iter().map(|(name, of)| (quote(name), *of)).collect();
    let equal: Vec<_> =
        names.iter().zip(1..).map(|((name, of), n)| KeyColumn { of: *of, table: relation, name }.is(n)).collect();
    let sql = format!(
        "update {relation} t set {} from pg_catalog.jsonb_populate_record(null::{relation}, ${}::text::jsonb) r where {}",
        set.join(", "),
        by.len() + 1,
        equal.join(" and ")
    );
    let query = sqlx::query(AssertSqlSafe(sql)).persistent(false);
    let parts = key.to_parts().into_iter().zip(by);
    let query = parts.fold(query, |query, (part, (_, of))| bind(query, *of, part));
    let done = query.bind(Value::Object(columns.clone()).to_string()).execute(connection).await;
    let failed = |error| database_error(&format!("changing a row of {relation}"), error);
    Ok(done.map_err(failed)?.rows_affected() > 0)
}
