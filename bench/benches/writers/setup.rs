//! The table that is written, and the ways in which changes of it are told.

use anyhow::Result;
use rowcache_bench::ground::Ground;

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
pub enum Variant {
    None,
    Naive,
    Notify,
    /// Each key, of however many rows.
    NotifyAll,
    Log,
}

impl Variant {
    pub fn text(self) -> &'static str {
        match self {
            Self::None => "no trigger",
            Self::Naive => "whole rows by NOTIFY",
            Self::Notify => "rowcache, NOTIFY",
            Self::NotifyAll => "rowcache, NOTIFY, `--max-keys 1000000`",
            Self::Log => "rowcache, change log",
        }
    }
}

/// The table anew, with so many rows.
pub async fn fill(ground: &Ground, rows: usize) -> Result<()> {
    let client = ground.client().await?;
    client.batch_execute("drop table if exists public.item").await?;
    client.batch_execute(&format!("{TABLE}; {ROWS}{rows}) n")).await?;
    client.batch_execute("vacuum analyze public.item").await?;
    Ok(())
}

/// Has changes told in this way, and cleans up after the last one.
pub async fn tell(ground: &Ground, variant: Variant) -> Result<()> {
    let client = ground.client().await?;
    client.batch_execute("drop trigger if exists naive on public.item; select rowcache.untrack('public.item')").await?;
    client
        .batch_execute(match variant {
            Variant::None => "",
            Variant::Naive => NAIVE,
            Variant::Notify => "select rowcache.track('public.item')",
            Variant::NotifyAll => "select rowcache.track('public.item', max_keys => 1000000)",
            Variant::Log => "select rowcache.track('public.item', via => 'log')",
        })
        .await?;
    client.batch_execute("vacuum public.item").await?;
    Ok(())
}
