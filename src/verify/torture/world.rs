//! The servers of a run, and what they hold.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_postgres::Client;

use super::{
    super::{
        history::{Key, Time},
        redis::RedisServer,
    },
    plan,
    table::PLACES,
    timeline::Timeline,
    wire::{PATIENCE, machine_time, now},
    writer::{Phase, connect},
};
use crate::{
    Token,
    cli::temp_server::{Stop, TempServer},
    migrate,
};

const SCHEMA: &str = include_str!("world.sql");

/// A server that loses commits in a crash: nobody waits for the log, and nobody writes it unasked.
const SETTINGS: [(&str, &str); 6] = [
    ("fsync", "off"),
    ("synchronous_commit", "off"),
    ("wal_writer_delay", "10s"),
    ("wal_writer_flush_after", "1GB"),
    ("bgwriter_lru_maxpages", "0"),
    ("restart_after_crash", "on"),
];

pub(super) struct World {
    pub(super) server: TempServer,
    /// A former primary that runs on.
    pub(super) former: Option<TempServer>,
    pub(super) origin: Time,
    pub(super) timeline: Timeline,
    pub(super) phase: watch::Sender<Phase>,
    /// All tables are told by way of the change log, and not the last one alone.
    pub(super) log_only: bool,
    run: u32,
    /// What the tier is, if it is installed; and what was in it once, and when.
    pub(super) redis: Option<RedisServer>,
    pub(super) dump: Option<(Time, Vec<u8>)>,
}

impl World {
    pub(super) async fn new(bin: Option<PathBuf>, log_only: bool) -> Result<Self> {
        let mut options = TempServer::options();
        if let Some(bin) = bin {
            options = options.bin_dir(bin);
        }
        let options = SETTINGS.iter().fold(options, |options, (name, value)| options.setting(name, value));
        let server = options.start().await?;
        let pool = sqlx::PgPool::connect(&server.admin_url()).await?;
        migrate::up(&pool).await?;
        pool.close().await;
        let client = connect(&server.admin_url(), "torture admin").await?;
        client.batch_execute(SCHEMA).await?;
        for place in &PLACES {
            let name = place.name;
            client.batch_execute(&place.track(log_only)).await?;
            client
                .batch_execute(&format!(
                    "with w as (insert into {name} (key, number) select key, 1 from unnest({}) key returning key)
                     insert into torture.history select key, 1, false, pg_current_xact_id()::text::bigint from w",
                    plan::array(&place.all().filter(|key| key % 3 > 0).collect::<Vec<_>>())
                ))
                .await?;
        }
        let timeline = Timeline::new(server.port());
        let phase = watch::Sender::new(Phase::Stop);
        let redis = if RedisServer::is_installed() { Some(RedisServer::start().await?) } else { None };
        let (former, dump) = Default::default();
        Ok(Self { server, former, origin: machine_time(), timeline, phase, log_only, run: 0, redis, dump })
    }

    pub(super) fn now(&self) -> Time {
        now(self.origin)
    }

    pub(super) async fn client(&self) -> Result<Client> {
        connect(&self.server.admin_url(), "torture admin").await
    }

    /// Lets writers connect to the server.
    pub(super) fn open(&mut self) {
        self.run += 1;
        self.phase.send_replace(Phase::Open { url: self.server.admin_url(), run: self.run });
    }

    /// Before a crash: nobody may connect and take the server for what it was.
    pub(super) fn close(&self) {
        self.phase.send_replace(Phase::Closed);
    }

    pub(super) fn stop_writers(&self) {
        self.phase.send_replace(Phase::Stop);
    }

    /// After a crash, and before anybody can have written again.
    pub(super) fn begin_era(&mut self) {
        self.timeline.begin_era(self.server.port(), self.now());
    }

    /// Waits until the server accepts connections.
    pub(super) async fn until_ready(&self) -> Result<Client> {
        let ready = async {
            loop {
                if let Ok(client) = self.client().await {
                    return client;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, ready).await.context("the server does not come back")
    }

    /// Notes which run of the server this is, once a node has put its canary in place.
    pub(super) async fn learn_incarnation(&mut self, client: &Client) -> Result<()> {
        let row = client.query_one("select rowcache.token()", &[]).await?;
        let token: Option<String> = row.get(0);
        if let Some(token) = token.and_then(|token| token.parse::<Token>().ok()) {
            self.timeline.is_now(token.incarnation);
        }
        Ok(())
    }

    /// All that has survived, once nothing is under way: changed rows with their numbers, and what the tables hold.
    pub(super) async fn survivors(&self, client: &Client) -> Result<Survivors> {
        let keys: Vec<Key> = PLACES.iter().flat_map(super::table::Place::all).collect();
        // What is carried over to the next episode must not be lost in a crash there.
        client.batch_execute("begin; set local synchronous_commit = on").await?;
        timeout(PATIENCE, client.simple_query(&plan::lock(&keys))).await.context("a transaction does not end")??;
        // Read committed: each of these statements sees what was committed before the locks came free.
        let mut survivors = Survivors::default();
        for row in client.query("select key, number, deletes, xid from torture.history", &[]).await? {
            let (number, xid): (i64, i64) = (row.get(1), row.get(3));
            survivors.history.push((row.get(0), number.cast_unsigned(), row.get(2), xid.cast_unsigned()));
        }
        for place in &PLACES {
            for row in client.query(&format!("select key, number from {}", place.name), &[]).await? {
                survivors.rows.insert(row.get(0), row.get::<_, i64>(1).cast_unsigned());
            }
        }
        client.batch_execute("delete from torture.history; commit").await?;
        Ok(survivors)
    }

    /// Ends the server and begins it anew.
    pub(super) async fn crash(&mut self) -> Result<()> {
        self.server.stop(Stop::Immediate).await?;
        self.begin_era();
        self.server.start().await
    }
}

/// What was found in the database.
#[derive(Default)]
pub(super) struct Survivors {
    /// Key, number, whether the row is gone, transaction.
    pub(super) history: Vec<(Key, u64, bool, u64)>,
    pub(super) rows: HashMap<Key, u64>,
}
