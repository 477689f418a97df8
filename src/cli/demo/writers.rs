//! Writers: programs that know nothing of the cache. Each is a `psql` that runs one statement at a time, read from its
//! input; where there is no `psql`, a plain connection.
//!
//! They leave the first [`YOURS`] rows to who joins in, and put back rows that are gone.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rand::{Rng as _, SeedableRng as _, distr::Distribution as _, rngs::StdRng};
use rand_distr::Zipf;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use url::Url;

use super::{
    board::Board,
    world::{EXPONENT, TABLE, YOURS, key},
};
use crate::Config;

pub(super) const WRITERS: u64 = 2;

/// Rows that a bulk UPDATE changes.
const BULK: i64 = 100;

/// Whoever holds a lock for longer than this (a transaction left open in somebody's psql) does not stop the writers.
const SETTINGS: &str = "set lock_timeout = '1s'";

/// Between two attempts to connect again.
const PAUSE: Duration = Duration::from_millis(500);

/// How a writer reaches the database.
#[derive(Clone)]
pub(super) struct Means {
    pub(super) url: String,
    pub(super) psql: Option<PathBuf>,
}

/// What one writer has changed and means to change back.
struct Writer {
    rng: StdRng,
    popularity: Zipf<f64>,
    rows: i64,
    deleted: Vec<i64>,
    /// Original ids of rows that now have them plus `rows`.
    moved: Vec<i64>,
}

/// Writes until `stop` says so. Reconnects by itself.
pub(super) async fn write(
    means: Means,
    rows: u64,
    every: Duration,
    board: Arc<Board>,
    mut stop: watch::Receiver<bool>,
) {
    let mut writer = Writer::new(rows);
    while !*stop.borrow() {
        tokio::select! {
            ended = writer.run(&means, every, &board, stop.clone()) => match ended {
                Ok(()) => return,
                Err(error) => board.add_trouble(&error.context("a writer tries again")),
            },
            // A statement that waits for a lock is not waited for: its connection is closed.
            () = stopped_for(&mut stop, PAUSE) => return,
        }
        let _ = timeout(PAUSE, stop.wait_for(|stop| *stop)).await;
    }
}

/// Returns `grace` after `stop` was set.
async fn stopped_for(stop: &mut watch::Receiver<bool>, grace: Duration) {
    let _ = stop.wait_for(|stop| *stop).await;
    tokio::time::sleep(grace).await;
}

impl Writer {
    fn new(rows: u64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a number of rows far below 2^52")]
        let popularity = Zipf::new((rows - YOURS) as f64, EXPONENT).expect("there are more rows than yours");
        let rows = i64::try_from(rows).expect("the option has a limit");
        Self { rng: StdRng::from_os_rng(), popularity, rows, deleted: Vec::new(), moved: Vec::new() }
    }

    async fn run(
        &mut self,
        means: &Means,
        every: Duration,
        board: &Board,
        mut stop: watch::Receiver<bool>,
    ) -> Result<()> {
        let mut session = Session::open(means).await?;
        session.execute(SETTINGS).await?;
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
            let (sql, key) = self.statement();
            match session.execute(&sql).await? {
                // Somebody has deleted it, or emptied the table: it is put back next.
                Some(0) => self.deleted.extend(key),
                Some(_) => board.add_commit(),
                // Refused: a lock, or a row that another writer was faster with.
                None => {
                    board.refused.fetch_add(1, Relaxed);
                }
            }
        }
        session.close().await
    }

    /// The next statement, and the id that it expects to find.
    fn statement(&mut self) -> (String, Option<i64>) {
        let yours = i64::try_from(YOURS).expect("a small number");
        let popular = yours + key(self.popularity.sample(&mut self.rng));
        let any = self.rng.random_range(yours + 1..=self.rows);
        if self.deleted.len() > 3 || (!self.deleted.is_empty() && self.rng.random_ratio(1, 10)) {
            let id = self.deleted.swap_remove(self.rng.random_range(..self.deleted.len()));
            let sql = format!("insert into {TABLE} (id, name) values ({id}, 'user {id}') on conflict do nothing");
            return (sql, None);
        }
        if self.moved.len() > 3 {
            let id = self.moved.swap_remove(0);
            return (move_row(id + self.rows, id), None);
        }
        match self.rng.random_range(0..100) {
            0..5 => {
                let last = any.max(yours + BULK);
                let first = last - BULK + 1;
                (format!("update {TABLE} set plan = 'pro' where id between {first} and {last}"), None)
            }
            5..12 => {
                self.deleted.push(any);
                (format!("delete from {TABLE} where id = {any}"), None)
            }
            12..16 => {
                self.moved.push(any);
                (move_row(any, any + self.rows), Some(any))
            }
            n => {
                let id = if n < 60 { popular } else { any };
                (format!("update {TABLE} set logins = logins + 1 where id = {id}"), Some(id))
            }
        }
    }
}

fn move_row(from: i64, to: i64) -> String {
    format!("update {TABLE} set id = {to} where id = {from} and not exists (select from {TABLE} where id = {to})")
}

/// One connection, however it is made.
enum Session {
    Psql(Box<Psql>),
    BuiltIn(PgConnection),
}

impl Session {
    async fn open(means: &Means) -> Result<Self> {
        Ok(match &means.psql {
            Some(psql) => Self::Psql(Box::new(Psql::start(psql, &means.url)?)),
            None => Self::BuiltIn(PgConnection::connect_with(&Config::from_url(&means.url)?.pool_connect).await?),
        })
    }

    /// Runs one statement; when this returns, it is committed. Returns how many rows it changed; `None`: it failed. An
    /// error means that the connection is lost.
    async fn execute(&mut self, sql: &str) -> Result<Option<u64>> {
        match self {
            Self::Psql(psql) => psql.execute(sql).await,
            Self::BuiltIn(connection) => match sqlx::query(AssertSqlSafe(sql)).execute(connection).await {
                Ok(done) => Ok(Some(done.rows_affected())),
                Err(sqlx::Error::Database(error)) if !error.code().is_some_and(|code| code.starts_with("57P")) => {
                    Ok(None)
                }
                Err(error) => Err(error.into()),
            },
        }
    }

    async fn close(self) -> Result<()> {
        match self {
            Self::Psql(psql) => psql.close().await,
            Self::BuiltIn(connection) => Ok(connection.close().await?),
        }
    }
}

/// A `psql` that reads statements from us. It ends when its input does, so also when we are killed.
struct Psql {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

/// What psql prints after each statement, whether it succeeded or not.
const DONE: &str = "-- done";

/// A `psql` that does not end by itself within this time is killed.
const END_WITHIN: Duration = Duration::from_secs(2);

impl Psql {
    fn start(psql: &Path, url: &str) -> Result<Self> {
        let (url, password) = without_password(url)?;
        let mut command = Command::new(psql);
        // No variable of ours (PGOPTIONS, PGSERVICE, …) may lead it elsewhere; HOME is where it looks for certificates.
        command.env_clear().env("LC_ALL", "C").env("PGAPPNAME", "rowcache demo writer").env("PGCONNECT_TIMEOUT", "5");
        command.envs(["PATH", "HOME"].iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        // Not as an argument, which everybody on the machine can read.
        command.envs(password.map(|password| ("PGPASSWORD", password)));
        command.args(["--no-psqlrc", "--no-password", "--tuples-only", "--no-align", "--dbname"]).arg(url);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // Ctrl-C is for us; we end it. It would end anyway when we are gone.
        command.process_group(0).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("cannot run {}", psql.display()))?;
        let input = child.stdin.take().expect("it was asked for");
        let output = BufReader::new(child.stdout.take().expect("it was asked for")).lines();
        Ok(Self { child, input, output })
    }

    async fn execute(&mut self, sql: &str) -> Result<Option<u64>> {
        self.input.write_all(format!("{sql};\n\\echo {DONE}\n").as_bytes()).await.context("psql has ended")?;
        self.input.flush().await.context("psql has ended")?;
        let mut changed = None;
        loop {
            match self.output.next_line().await.context("psql has ended")? {
                Some(line) if line == DONE => return Ok(changed),
                // `UPDATE 1`, `INSERT 0 1`, `SET`
                Some(line) => changed = line.rsplit(' ').next().and_then(|count| count.parse().ok()),
                None => bail!("psql has ended ({})", self.child.wait().await?),
            }
        }
    }

    async fn close(mut self) -> Result<()> {
        drop(self.input);
        if timeout(END_WITHIN, self.child.wait()).await.is_err() {
            self.child.kill().await?;
        }
        Ok(())
    }
}

/// A URL to show, and to use where others can see it; and the password that was in it.
pub(super) fn without_password(url: &str) -> Result<(String, Option<String>)> {
    let password = Config::from_url(url)?.listener.get_password().map(|it| String::from_utf8_lossy(it).into_owned());
    if password.is_none() {
        return Ok((url.to_owned(), None));
    }
    let mut shown = Url::parse(url).context("the database URL cannot be read")?;
    let _ = shown.set_password(None); // fails for URLs that cannot have one
    let rest: Vec<_> = shown
        .query_pairs()
        .filter(|(name, _)| name != "password")
        .map(|(n, v)| (n.into_owned(), v.into_owned()))
        .collect();
    if rest.is_empty() {
        shown.set_query(None);
    } else {
        // Percent-encoding throughout: libpq takes `+` for a plus sign.
        shown.query_pairs_mut().clear().extend_pairs(rest);
        let query = shown.query().map(|query| query.replace('+', "%20"));
        shown.set_query(query.as_deref());
    }
    Ok((shown.into(), password))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_password_is_shown() {
        let (url, password) = without_password("postgres://app:s3%20cret@db:5433/app?application_name=a%20b").unwrap();
        assert_eq!(url, "postgres://app@db:5433/app?application_name=a%20b");
        assert_eq!(password.as_deref(), Some("s3 cret"));
        let (url, password) = without_password("postgres://app@db/app").unwrap();
        assert_eq!((url.as_str(), password), ("postgres://app@db/app", None));
    }

    #[test]
    fn your_rows_are_left_alone() {
        let mut writer = Writer::new(1000);
        for _ in 0..5000 {
            let (sql, _) = writer.statement();
            let numbers = sql.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse::<u64>().ok());
            let ids: Vec<_> = numbers.filter(|&number| number > 1).collect();
            assert!(ids.iter().all(|&id| id > YOURS && id <= 2000), "{sql}");
        }
    }
}
