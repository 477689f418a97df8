//! Types of columns, as keys and in values: what a trigger says of a row and what a node makes of its key is the same, whatever
//! the type, whatever the writer's session has set.

#![cfg(all(feature = "verify", feature = "chrono", feature = "rust_decimal", feature = "time"))]

#[macro_use]
mod support;
mod fixture;

#[path = "types/keys.rs"]
mod keys;
#[path = "types/limits.rs"]
mod limits;
#[path = "types/text.rs"]
mod text;
#[path = "types/values.rs"]
mod values;

use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};
use rowcache::{Key, Table};

/// What the session of a writer may have set, and ours must not see.
const ODD: &str = "set timezone = 'America/Caracas'; set datestyle = 'SQL, DMY'; set bytea_output = escape; set extra_float_digits = -3;
     set intervalstyle = iso_8601; set lc_numeric = 'C'; set lc_time = 'C'; set lc_monetary = 'C'; set quote_all_identifiers = on;
     set standard_conforming_strings = off; set escape_string_warning = off; set transform_null_equals = on";

/// What key columns are made of beside the types of Postgres itself.
const TYPES: &str = "create type public.\"Mood\" as enum ('sad', 'it''s \"fine\"', 'glad', 'Ünï'); create domain public.temper as public.\"Mood\";
     create domain public.day as date check (value > '1900-01-01'); create domain public.amount as numeric(9, 3)";

fn date(text: &str) -> NaiveDate {
    text.parse().expect("a date")
}

fn datetime(text: &str) -> NaiveDateTime {
    text.parse().expect("a moment")
}

fn utc(text: &str) -> DateTime<Utc> {
    text.parse().expect("a moment")
}

/// As a value of crate `time`, which has no parser here.
fn offset(text: &str) -> time::OffsetDateTime {
    let moment = utc(text);
    let from = time::OffsetDateTime::from_unix_timestamp(moment.timestamp()).expect("in its range");
    from.replace_nanosecond(moment.timestamp_subsec_nanos()).expect("less than a second")
}

/// A row whose key's type does not matter.
#[derive(Debug, sqlx::FromRow)]
struct Row {
    v: i32,
}

type Rows<K> = Table<K, Row>;

async fn read<K: Key>(rows: &Rows<K>, key: &K) -> Option<i32> {
    rows.get(key).await.unwrap_or_else(|error| panic!("{key:?}: {error:?}")).map(|row| row.v)
}
