//! Puts the triggers on a table and takes them off again: the SQL functions `rowcache.track` and `rowcache.untrack` and
//! the view `rowcache.tracked`, nothing more. What they do is in `migrations/0002_tracking.up.sql`.
//!
//! Whoever calls [`track`] must own the table and be allowed to create functions in schema `rowcache`.

use sqlx::{PgExecutor, Row as _, postgres::PgRow};

use crate::{error::Result, postgres::refusal};

/// How a table is to be tracked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TrackOptions {
    /// The columns that name a row in messages; `None`: its primary key.
    pub key: Option<Vec<String>>,
    /// Further columns whose old and new values are sent, for views that depend on them.
    pub columns: Vec<String>,
    /// An UPDATE that changes nothing but these sends nothing.
    pub ignore: Vec<String>,
    /// Above so many changed rows a statement is told as a change of the whole table. 10,000 keys are some 25 messages;
    /// much more costs the writer, and every node, more than loading again what is in use.
    pub max_keys: u32,
    /// Which triggers.
    pub level: Level,
    /// Messages carry keyed hashes in place of keys: for tables whose keys are secrets, such as session tokens, as anybody
    /// who may connect can read messages. Not together with [`columns`](Self::columns). The owner of the table must be able
    /// to read `rowcache.secret`, and the roles of services to execute `rowcache.key_secret()`.
    pub hash_keys: bool,
    /// What carries messages.
    pub via: Transport,
}

impl Default for TrackOptions {
    fn default() -> Self {
        Self {
            key: None,
            columns: Vec::new(),
            ignore: Vec::new(),
            max_keys: 10_000,
            level: Level::Auto,
            hash_keys: false,
            via: Transport::Notify,
        }
    }
}

/// Which triggers a table gets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Level {
    /// Statement triggers, where they see every write; else row triggers.
    #[default]
    Auto,
    /// Statement triggers: cheaper for statements that change many rows. Refused where they would miss writes.
    Statement,
    /// Row triggers: a little cheaper for statements that change one row.
    Row,
}

/// What carries the messages of a table to the nodes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Transport {
    /// NOTIFY: the soonest, and nothing is stored. Each commit that notifies holds a lock of the whole server until it is flushed, so
    /// that such commits come one after the other. Right for tables that are written now and then.
    #[default]
    Notify,
    /// Rows of the change log, which nodes poll: a few milliseconds later, and commits go on side by side. Right for tables that are
    /// written by many at once. Works through poolers in transaction mode, and on standbys.
    Log,
}

impl Transport {
    fn as_str(self) -> &'static str {
        match self {
            Self::Notify => "notify",
            Self::Log => "log",
        }
    }
}

impl Level {
    fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Statement => "statement",
            Self::Row => "row",
        }
    }
}

/// A tracked table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tracked {
    /// Its name in messages, such as `public.users`.
    pub relation: String,
    /// The columns that name a row.
    pub key: Vec<String>,
    /// Further columns that are sent.
    pub columns: Vec<String>,
    /// Columns whose changes are not sent.
    pub ignore: Vec<String>,
    /// Rows above which a change is told as one of the whole table.
    pub max_keys: i32,
    /// `statement` or `row`.
    pub level: String,
    /// Whether its keys are sent as hashes.
    pub hash_keys: bool,
    /// What carries its messages: `notify` or `log`.
    pub via: String,
    /// Why writes might go unseen, and the cure; empty if all is well.
    pub problems: Vec<String>,
}

/// Puts triggers on a table, and on its partitions or inheritance children, or brings them up to date. Returns its name
/// in messages. A name without a schema is looked up as in any query.
///
/// Writers of the table wait until the transaction of `executor` ends, readers do not. Nothing is locked if all is in
/// place.
///
/// # Errors
///
/// If the table cannot be tracked like this; the message names the table and column, the hint the cure.
///
/// # Cancel safety
///
/// It happens as a whole or not at all.
pub async fn track(executor: impl PgExecutor<'_>, table: &str, options: &TrackOptions) -> Result<String> {
    sqlx::query_scalar(
        "select rowcache.track($1::text::regclass, $2::text[]::name[], $3::text[]::name[], $4::text[]::name[], $5, $6, $7, $8)",
    )
    .bind(table)
    .bind(&options.key)
    .bind(&options.columns)
    .bind(&options.ignore)
    .bind(i32::try_from(options.max_keys).unwrap_or(i32::MAX))
    .bind(options.level.as_str())
    .bind(options.hash_keys)
    .bind(options.via.as_str())
    .fetch_one(executor)
    .await
    .map_err(|error| refusal(&format!("tracking {table}"), error))
}

/// Takes off a table whatever [`track`] has put on it, also if half of it is gone. `false`: there was nothing.
///
/// Readers and writers of the table wait until the transaction of `executor` ends.
///
/// # Errors
///
/// If there is no such table, or the caller does not own it.
///
/// # Cancel safety
///
/// It happens as a whole or not at all.
pub async fn untrack(executor: impl PgExecutor<'_>, table: &str) -> Result<bool> {
    let untrack = sqlx::query_scalar("select rowcache.untrack($1::text::regclass)").bind(table);
    untrack.fetch_one(executor).await.map_err(|error| refusal(&format!("untracking {table}"), error))
}

/// All tracked tables, by name, with what is wrong with each.
///
/// # Errors
///
/// If the database cannot be asked.
///
/// # Cancel safety
///
/// Cancel safe.
pub async fn tracked(executor: impl PgExecutor<'_>) -> Result<Vec<Tracked>> {
    let rows = sqlx::query(
        "select relation, key_columns, columns, ignored, max_keys, level, hash_keys, via, problems from rowcache.tracked order by 1",
    );
    let tracked = |row: PgRow| {
        Ok(Tracked {
            relation: row.try_get(0)?,
            key: row.try_get(1)?,
            columns: row.try_get(2)?,
            ignore: row.try_get(3)?,
            max_keys: row.try_get(4)?,
            level: row.try_get(5)?,
            hash_keys: row.try_get(6)?,
            via: row.try_get(7)?,
            problems: row.try_get(8)?,
        })
    };
    let failed = |error| refusal("listing the tracked tables", error);
    let rows = rows.fetch_all(executor).await.map_err(failed)?;
    rows.into_iter().map(tracked).collect::<sqlx::Result<_>>().map_err(failed)
}
