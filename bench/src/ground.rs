//! Throw-away servers, and tables on them.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use rowcache::{
    Config, Key, Node, Table, TableOptions,
    cli::temp_server::{Options, TempServer},
    install, migrate,
    verify::redis::RedisServer,
};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use tokio_postgres::{Client, NoTls};

use crate::suite::Bench;

/// A row of some 200 bytes in memory, as services have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::FromRow)]
pub struct User {
    pub id: i64,
    pub email: String,
    pub name: String,
    pub role: String,
}

impl User {
    /// What the table has.
    pub fn nth(id: i64) -> Self {
        let (email, name) = (format!("user{id}@example.org"), format!("First{} Last{}", id % 1000, id % 7919));
        Self { id, email, name, role: "member".to_owned() }
    }
}

const USERS: &str = "(id bigint primary key, email text not null, name text not null, role text not null)";
const PEOPLE: &str = "(id bigint not null, email text primary key, name text not null, role text not null)";
const ROWS: &str = "select n, 'user' || n || '@example.org', 'First' || n % 1000 || ' Last' || n % 7919, 'member' \
    from generate_series(1::bigint, ";

/// A Postgres of our own.
#[derive(Debug)]
pub struct Ground {
    pub server: TempServer,
}

impl Ground {
    /// A durable server that keeps all of a suite's data in memory, and has the triggers' functions.
    pub async fn start(bench: &mut Bench) -> Result<Self> {
        Self::start_with(bench, &[]).await
    }

    /// As [`start`](Self::start), with further settings.
    pub async fn start_with(bench: &mut Bench, further: &[(&str, &str)]) -> Result<Self> {
        let settings = [
            ("fsync", "on"),
            ("synchronous_commit", "on"),
            ("full_page_writes", "on"),
            ("shared_buffers", "1GB"),
            ("max_wal_size", "16GB"),
            ("checkpoint_timeout", "1h"),
            ("autovacuum", "off"),
            ("max_connections", "300"),
        ];
        let options =
            settings.iter().chain(further).fold(TempServer::options(), |it, (name, value)| it.setting(name, value));
        let server = bench.options.bin.iter().fold(options, |it: Options, bin| it.bin_dir(bin)).start().await?;
        bench.server(format!("PostgreSQL {}", server.version()));
        let ground = Self { server };
        let pool = ground.pool(1).await?;
        migrate::up(&pool).await?;
        pool.close().await;
        Ok(ground)
    }

    pub fn url(&self) -> String {
        self.server.admin_url()
    }

    /// A pool of this many connections, all of them open.
    pub async fn pool(&self, connections: u32) -> Result<PgPool> {
        let options = sqlx::postgres::PgPoolOptions::new().max_connections(connections).min_connections(connections);
        Ok(options.connect(&self.url()).await?)
    }

    pub async fn client(&self) -> Result<Client> {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// The process that is parent of all others of the server.
    pub fn postmaster(&self) -> Result<u32> {
        let text = fs::read_to_string(self.server.data_dir().join("postmaster.pid"))?;
        text.lines().next().and_then(|line| line.trim().parse().ok()).context("postmaster.pid has no number")
    }

    /// The tracked table `public.users`, anew, with this many rows.
    pub async fn users(&self, rows: usize) -> Result<()> {
        self.table("public.users", USERS, rows).await
    }

    /// The same rows as `public.people`, by their `email`.
    pub async fn people(&self, rows: usize) -> Result<()> {
        self.table("public.people", PEOPLE, rows).await
    }

    async fn table(&self, name: &str, columns: &str, rows: usize) -> Result<()> {
        let client = self.client().await?;
        let make = format!("drop table if exists {name}; create table {name} {columns} with (fillfactor = 80)");
        client.batch_execute(&make).await?;
        client.batch_execute(&format!("insert into {name} (id, email, name, role) {ROWS}{rows}) n")).await?;
        client.batch_execute(&format!("vacuum analyze {name}")).await?;
        let pool = self.pool(1).await?;
        install::track(&pool, name, &install::TrackOptions::default()).await?;
        pool.close().await;
        Ok(())
    }

    /// Ends the connections on which nodes listen.
    pub async fn kill_listeners(&self) -> Result<()> {
        let kill = "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and application_name like '%(listener)'";
        Ok(self.client().await?.batch_execute(kill).await?)
    }

    /// The settings that a service has by default, but for a pool of this many connections.
    pub fn config(&self, connections: u32) -> Result<Config> {
        let mut config = Config::from_url(&self.url())?;
        config.pool = config.pool.max_connections(connections);
        Ok(config)
    }

    /// A node with [these settings](Self::config).
    pub async fn node(&self, connections: u32) -> Result<Node> {
        Ok(Node::start(self.config(connections)?).await?)
    }
}

/// Opens a table, and has the node read and hold these rows.
pub async fn holding<K: Key>(node: &Node, table: &str, options: TableOptions, keys: &[K]) -> Result<Table<K, User>> {
    let users: Table<K, User> = node.table_with(table, options.capacity(keys.len() * 2)).await?;
    for keys in keys.chunks(5000) {
        let found = users.get_many(keys).await?.iter().flatten().count();
        anyhow::ensure!(found == keys.len(), "{found} of {} rows are there", keys.len());
    }
    Ok(users)
}

/// A Redis of our own.
pub async fn redis(bench: &mut Bench) -> Result<RedisServer> {
    let redis = RedisServer::start().await?;
    let info: String = redis.ask(&["INFO", "server"]).await?;
    let version = info.lines().find_map(|line| line.strip_prefix("redis_version:")).context("a version")?;
    bench.server(format!("Redis {version}"));
    Ok(redis)
}

/// The program that Debian's package of the same name has.
pub fn program(name: &str) -> Result<PathBuf> {
    which::which(name).with_context(|| format!("there is no program `{name}`; Debian's package is {name}"))
}
