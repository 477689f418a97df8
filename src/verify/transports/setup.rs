//! The server, its table, and the ways in which changes of it are told.

use std::{fs, path::PathBuf, time::Instant};

use anyhow::{Context as _, Result};
use tokio_postgres::{Client, NoTls};

use crate::{cli::temp_server::TempServer, migrate};

const TABLE: &str = "create table public.item (id bigint primary key, email text not null, name text not null, \
    prefs jsonb not null, updated_at timestamptz not null default now()) with (fillfactor = 80)";

/// Rows of some 350 bytes.
const ROWS: &str = "insert into public.item select n, 'user' || n || '@example.test', 'First' || n % 1000 || ' Last' || n % 7919, \
    jsonb_build_object('theme', 'dark', 'lang', 'en-GB', 'flags', jsonb_build_object('beta', n % 3 = 0), 'limits', \
    jsonb_build_object('q', n % 1000, 'r', n % 777), 'tags', jsonb_build_array('alpha', 'bravo', 't' || n % 50), 'avatar', \
    'https://cdn.example.test/u/' || n || '.png') from generate_series(1, ";

/// What articles on the subject show: the whole row, for each row.
const NAIVE: &str = "create or replace function public.naive() returns trigger language plpgsql as $$ begin perform \
    pg_notify('cache', json_build_object('table', tg_table_name, 'op', tg_op, 'row', row_to_json(new))::text); return null; end $$; \
    create trigger naive after update on public.item for each row execute function public.naive()";

/// How changes are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    None,
    Log,
    Notify,
    Naive,
}

impl Variant {
    pub(super) const ALL: [Self; 4] = [Self::None, Self::Log, Self::Notify, Self::Naive];

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::None => "no trigger, no node",
            Self::Log => "change log",
            Self::Notify => "NOTIFY",
            Self::Naive => "whole rows by NOTIFY",
        }
    }
}

/// How long a commit's flush takes.
#[derive(Clone, Copy)]
pub(super) enum Flush {
    /// What this disk takes.
    Fast,
    /// A millisecond more.
    Slow,
}

impl Flush {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Fast => "durable, on this disk",
            Self::Slow => "durable, a flush 1 ms longer (`commit_delay`)",
        }
    }
}

pub(super) struct Ground {
    pub(super) server: TempServer,
}

impl Ground {
    pub(super) async fn new(bin: Option<PathBuf>) -> Result<Self> {
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
        let mut options =
            settings.iter().fold(TempServer::options(), |options, (name, value)| options.setting(name, value));
        if let Some(bin) = bin {
            options = options.bin_dir(bin);
        }
        let server = options.start().await?;
        let pool = sqlx::PgPool::connect(&server.admin_url()).await?;
        migrate::up(&pool).await?;
        pool.close().await;
        Ok(Self { server })
    }

    pub(super) fn url(&self) -> String {
        self.server.admin_url()
    }

    pub(super) async fn client(&self) -> Result<Client> {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    pub(super) fn postmaster(&self) -> Result<u32> {
        let text = fs::read_to_string(self.server.data_dir().join("postmaster.pid"))?;
        text.lines().next().and_then(|line| line.trim().parse().ok()).context("postmaster.pid has no number")
    }

    pub(super) async fn version(&self) -> Result<String> {
        Ok(self.client().await?.query_one("show server_version", &[]).await?.get(0))
    }

    /// The table anew, with so many rows.
    pub(super) async fn fill(&mut self, rows: i64) -> Result<()> {
        let client = self.client().await?;
        client.batch_execute("drop table if exists public.item").await?;
        client.batch_execute(&format!("{TABLE}; {ROWS}{rows}) n")).await?;
        client.batch_execute("vacuum analyze public.item").await?;
        Ok(())
    }

    /// Has changes told in this way, and cleans up after the last one.
    pub(super) async fn tell(&self, variant: Variant) -> Result<()> {
        let client = self.client().await?;
        client
            .batch_execute("drop trigger if exists naive on public.item; select rowcache.untrack('public.item')")
            .await?;
        client
            .batch_execute(match variant {
                Variant::None => "",
                Variant::Log => "select rowcache.track('public.item', via => 'log')",
                Variant::Notify => "select rowcache.track('public.item')",
                Variant::Naive => NAIVE,
            })
            .await?;
        client.batch_execute("vacuum public.item").await?;
        client.batch_execute("checkpoint").await?;
        Ok(())
    }

    /// Changes every row, in one statement. Returns seconds.
    pub(super) async fn bulk(&self, variant: Variant) -> Result<f64> {
        self.tell(variant).await?;
        let client = self.client().await?;
        let began = Instant::now();
        client.batch_execute("update public.item set updated_at = now()").await?;
        Ok(began.elapsed().as_secs_f64())
    }
}
