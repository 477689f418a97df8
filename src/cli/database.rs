//! The commands that prepare a database: `migrate`, `track`, `untrack`, `tracked`.

use std::io::{Write as _, stdout};

use anyhow::{Result, bail};
use sqlx::PgPool;

use super::{connect::connect, text};
use crate::{
    install::{self, TrackOptions, Tracked},
    migrate,
};

pub(crate) async fn up(url: &str) -> Result<()> {
    let pool = connect(url).await?;
    let applied = migrate::up(&pool).await?;
    let mut out = stdout().lock();
    for name in names(&applied) {
        writeln!(out, "applied {name}")?;
    }
    if applied.is_empty() {
        writeln!(out, "nothing to do: all migrations have been run")?;
    } else {
        writeln!(out, "next: rowcache track TABLE")?;
    }
    Ok(())
}

pub(crate) async fn down(url: &str, steps: usize) -> Result<()> {
    let pool = connect(url).await?;
    let taken_back = migrate::down(&pool, steps).await?;
    let mut out = stdout().lock();
    for name in names(&taken_back) {
        writeln!(out, "took back {name}")?;
    }
    if taken_back.is_empty() {
        writeln!(out, "nothing to do: no migration has been run")?;
    }
    Ok(())
}

/// `1` as `0001_incarnation`.
fn names(versions: &[i64]) -> Vec<String> {
    let files = migrate::print();
    let name = |version: &i64| {
        let number = format!("{version:04}_");
        let file = files.iter().map(|file| file.name.as_str()).find(|name| name.starts_with(&number));
        file.and_then(|name| name.split('.').next()).unwrap_or(&number).to_owned()
    };
    versions.iter().map(name).collect()
}

pub(crate) async fn status(url: &str) -> Result<()> {
    let pool = connect(url).await?;
    let mut rows = vec![vec!["version".to_owned(), "name".to_owned(), "applied".to_owned()]];
    for migration in migrate::status(&pool).await? {
        let altered = if migration.altered { ", from a file with other contents" } else { "" };
        let applied = migration.applied.unwrap_or_else(|| "no".to_owned());
        rows.push(vec![migration.version.to_string(), migration.name, format!("{applied}{altered}")]);
    }
    write!(stdout(), "{}", text::table(&rows))?;
    Ok(())
}

pub(crate) fn print(version: Option<i64>, down: bool) -> Result<()> {
    let mut files = migrate::print();
    files.retain(|file| {
        let number = file.name.split('_').next().and_then(|number| number.parse().ok());
        file.name.ends_with(".down.sql") == down && (version.is_none() || version == number)
    });
    if files.is_empty() {
        bail!("there is no such migration; `rowcache migrate print` prints all of them");
    }
    if down {
        files.reverse();
    }
    let mut out = stdout().lock();
    for (n, file) in files.iter().enumerate() {
        let gap = if n == 0 { "" } else { "\n" };
        writeln!(out, "{gap}-- {}\n{}", file.name, file.sql.trim_end())?;
    }
    Ok(())
}

pub(crate) async fn track(url: &str, tables: &[String], options: &TrackOptions) -> Result<()> {
    let pool = connect(url).await?;
    for table in tables {
        look_up(&pool, table).await?;
        let name = install::track(&pool, table, options).await?;
        let tracked = install::tracked(&pool).await?;
        let how = tracked.iter().find(|tracked| tracked.relation == name);
        let how = how.map_or_else(String::new, |it| {
            let hashed = if it.hash_keys { ", keys sent as hashes" } else { "" };
            let via = if it.via == "log" { ", told by way of the change log" } else { "" };
            format!(" by ({}), {} triggers{hashed}{via}", it.key.join(", "), it.level)
        });
        writeln!(stdout(), "tracking {name}{how}")?;
    }
    Ok(())
}

pub(crate) async fn untrack(url: &str, tables: &[String]) -> Result<()> {
    let pool = connect(url).await?;
    for table in tables {
        look_up(&pool, table).await?;
        let was = install::untrack(&pool, table).await?;
        writeln!(stdout(), "{table} {}", if was { "is no longer tracked" } else { "was not tracked" })?;
    }
    Ok(())
}

pub(crate) async fn tracked(url: &str, json: bool) -> Result<()> {
    let pool = connect(url).await?;
    let tables = install::tracked(&pool).await?;
    let mut out = stdout().lock();
    if json {
        let tables: Vec<_> = tables.iter().map(as_json).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&tables)?)?;
        return Ok(());
    }
    if tables.is_empty() {
        writeln!(out, "no table is tracked; `rowcache track TABLE` puts the triggers on one")?;
        return Ok(());
    }
    let head = ["relation", "key", "columns", "ignored", "max keys", "level", "via", "problems"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let list = |columns: &[String]| if columns.is_empty() { "-".to_owned() } else { columns.join(", ") };
    for table in &tables {
        let problems = match table.problems.len() {
            0 => "none".to_owned(),
            n => format!("{n}, see below"),
        };
        rows.push(vec![
            table.relation.clone(),
            list(&table.key) + if table.hash_keys { " (hashed)" } else { "" },
            list(&table.columns),
            list(&table.ignore),
            table.max_keys.to_string(),
            table.level.clone(),
            table.via.clone(),
            problems,
        ]);
    }
    write!(out, "{}", text::table(&rows))?;
    for table in &tables {
        for problem in &table.problems {
            writeln!(out, "\n{}: {problem}", table.relation)?;
        }
    }
    Ok(())
}

/// A table that exists.
pub(crate) struct Found {
    /// As messages name it.
    pub(crate) name: String,
    pub(crate) tracked: bool,
    pub(crate) problems: Vec<String>,
}

/// Looks up a table by the name that a person gave it.
pub(crate) async fn look_up(pool: &PgPool, table: &str) -> Result<Found> {
    let ask = sqlx::query_as("select relation, tracked, problems from rowcache.describe($1)").bind(table);
    let (relation, tracked, problems): (Option<String>, bool, Vec<String>) = ask.fetch_one(pool).await?;
    let Some(name) = relation else {
        bail!(
            "there is no table {table} in this database; write it as schema.table, in the case in which it was created \
             (without a schema it is looked up in the search_path)"
        );
    };
    Ok(Found { name, tracked, problems })
}

fn as_json(table: &Tracked) -> serde_json::Value {
    serde_json::json!({
        "relation": table.relation,
        "key": table.key,
        "columns": table.columns,
        "ignored": table.ignore,
        "max_keys": table.max_keys,
        "level": table.level,
        "hash_keys": table.hash_keys,
        "via": table.via,
        "problems": table.problems,
    })
}
