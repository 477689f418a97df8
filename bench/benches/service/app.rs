//! The service that authenticates every request, and its database.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, Result};
use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use rowcache::{Config, Node, Table, TableOptions, Tag, Tagged, install};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgPool, postgres::PgPoolOptions};
use tokio::net::TcpListener;

use super::load::Service;

const SCHEMA: &str = "
    create table public.organisations (id bigint primary key, plan text not null, permissions text[] not null);
    create table public.accounts (id bigint primary key, api_key text not null unique, name text not null,
        organisation_id bigint not null references public.organisations, changes bigint not null default 0) with (fillfactor = 80);
    create table public.orders (id bigint primary key, account_id bigint not null, total bigint not null);
    insert into public.organisations select n, 'plan ' || n % 5, '{read,write}' from generate_series(1, 1000) n;
    insert into public.orders select n, n / 5, n % 1000 from generate_series(5, 500004) n;
    create index on public.orders (account_id, id)";

const ACCOUNT: &str = "select id, name, organisation_id from public.accounts where api_key = $1";
const ORGANISATION: &str = "select plan, permissions from public.organisations where id = $1";
const JOINED: &str = "select a.id, a.name, o.plan, o.permissions from public.accounts a
    join public.organisations o on o.id = a.organisation_id where a.api_key = $1";
const ORDERS: &str = "select total from public.orders where account_id = $1 order by id desc limit 5";

/// What is called so in `pg_stat_activity`.
const NAME: &str = "service";

/// The tables, with this many accounts.
pub async fn prepare(pool: &PgPool, accounts: usize) -> Result<()> {
    let rows = format!(
        "insert into public.accounts select n, 'key-' || n, 'Account ' || n, n % 1000 + 1 from generate_series(1, {accounts}) n"
    );
    for sql in [SCHEMA, rows.as_str(), "vacuum analyze"] {
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(pool).await?;
    }
    let by_key = install::TrackOptions { columns: vec!["api_key".to_owned()], ..Default::default() };
    install::track(pool, "public.accounts", &by_key).await?;
    install::track(pool, "public.organisations", &install::TrackOptions::default()).await?;
    Ok(())
}

/// The header of a request by this account.
pub fn authorization(account: usize) -> String {
    format!("authorization: Bearer key-{account}\r\n")
}

/// Has wrk choose accounts in the manner of Zipf: their ranks are distributed evenly by their logarithms.
pub fn script(accounts: usize) -> String {
    format!(
        r#"
local requests, n = {{}}, 0
init = function()
  math.randomseed(7)
  for i = 1, 50000 do
    local rank = math.floor({accounts} ^ math.random())
    requests[i] = wrk.format("GET", nil, {{ ["Authorization"] = "Bearer key-" .. (rank * 7919 % {accounts} + 1) }})
  end
end
request = function()
  n = n % 50000 + 1
  return requests[n]
end
"#
    )
}

/// Transactions of this database that have committed. Backends of the services are ended: others tell only after a while.
pub async fn commits(pool: &PgPool) -> Result<i64> {
    let end = "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity where application_name = $1";
    sqlx::query(end).bind(NAME).execute(pool).await?;
    let commits = "select xact_commit from pg_stat_database where datname = current_database()";
    Ok(sqlx::query_scalar(commits).fetch_one(pool).await?)
}

/// What the cache has been asked for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Reads {
    pub gets: u64,
    pub misses: u64,
}

impl Reads {
    pub async fn of(service: &Service) -> Result<Self> {
        let answer = service.get("/reads", "").await?;
        let (_, body) = answer.split_once("\r\n\r\n").context("a head and a body")?;
        Ok(serde_json::from_str(body)?)
    }

    pub fn since(&self, before: &Self) -> Self {
        Self { gets: self.gets - before.gets, misses: self.misses - before.misses }
    }
}

#[derive(Debug, FromRow)]
struct Account {
    id: i64,
    name: String,
    organisation_id: i64,
}

#[derive(Debug, FromRow)]
struct Organisation {
    plan: String,
    permissions: Vec<String>,
}

/// Both together.
#[derive(Debug, FromRow)]
struct Caller {
    id: i64,
    name: String,
    plan: String,
    permissions: Vec<String>,
}

/// What the view reads.
#[derive(Debug, FromRow)]
struct Row {
    api_key: String,
    organisation_id: i64,
    #[sqlx(flatten)]
    caller: Caller,
}

#[derive(Clone)]
struct Cache {
    accounts: Table<String, Account>,
    organisations: Table<i64, Organisation>,
    callers: Table<String, Caller>,
}

/// What answers are made of.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    caller: &'a str,
    plan: &'a str,
    orders: Vec<i64>,
}

enum Refusal {
    Unauthorized,
    Forbidden,
    Broken(String),
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED.into_response(),
            Self::Forbidden => StatusCode::FORBIDDEN.into_response(),
            Self::Broken(error) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
        }
    }
}

impl From<rowcache::Error> for Refusal {
    fn from(error: rowcache::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<sqlx::Error> for Refusal {
    fn from(error: sqlx::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

fn api_key(headers: &HeaderMap) -> Result<&str, Refusal> {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    value.and_then(|value| value.strip_prefix("Bearer ")).ok_or(Refusal::Unauthorized)
}

fn answer(name: &str, plan: &str, permissions: &[String], orders: Vec<i64>) -> Result<Response, Refusal> {
    if !permissions.iter().any(|permission| permission == "read") {
        return Err(Refusal::Forbidden);
    }
    Ok(Json(Answer { caller: name, plan, orders }).into_response())
}

/// The work that a handler may have besides.
async fn orders(pool: Option<&PgPool>, account: i64) -> Result<Vec<i64>, Refusal> {
    let Some(pool) = pool else { return Ok(Vec::new()) };
    Ok(sqlx::query_scalar(ORDERS).bind(account).fetch_all(pool).await?)
}

async fn by_tables(cache: &Cache, headers: &HeaderMap, pool: Option<&PgPool>) -> Result<Response, Refusal> {
    let key = api_key(headers)?.to_owned();
    let account = cache.accounts.get(&key).await?.ok_or(Refusal::Unauthorized)?;
    let organisation = cache.organisations.get(&account.organisation_id).await?.ok_or(Refusal::Unauthorized)?;
    let orders = orders(pool, account.id).await?;
    answer(&account.name, &organisation.plan, &organisation.permissions, orders)
}

async fn by_view(State((cache, _)): State<(Cache, PgPool)>, headers: HeaderMap) -> Result<Response, Refusal> {
    let key = api_key(&headers)?.to_owned();
    let caller = cache.callers.get(&key).await?.ok_or(Refusal::Unauthorized)?;
    answer(&caller.name, &caller.plan, &caller.permissions, Vec::new())
}

async fn by_join(pool: &PgPool, headers: &HeaderMap, and: Option<&PgPool>) -> Result<Response, Refusal> {
    let caller: Option<Caller> = sqlx::query_as(JOINED).bind(api_key(headers)?).fetch_optional(pool).await?;
    let caller = caller.ok_or(Refusal::Unauthorized)?;
    let orders = orders(and, caller.id).await?;
    answer(&caller.name, &caller.plan, &caller.permissions, orders)
}

async fn by_selects(State(pool): State<PgPool>, headers: HeaderMap) -> Result<Response, Refusal> {
    let account: Option<Account> = sqlx::query_as(ACCOUNT).bind(api_key(&headers)?).fetch_optional(&pool).await?;
    let account = account.ok_or(Refusal::Unauthorized)?;
    let found = sqlx::query_as(ORGANISATION).bind(account.organisation_id).fetch_optional(&pool).await?;
    let organisation: Organisation = found.ok_or(Refusal::Unauthorized)?;
    answer(&account.name, &organisation.plan, &organisation.permissions, Vec::new())
}

/// Everything that the service reads, held.
async fn cache(node: &Node, accounts: usize) -> Result<Cache> {
    let options = TableOptions::default().capacity(accounts * 2);
    let callers = node.view("callers").on("public.accounts", ["api_key"]).on_tagged("public.organisations");
    let callers = callers.options(options.clone()).open_tagged(|keys: &[String], db| {
        Box::pin(async move {
            let rows = "select a.api_key, a.organisation_id, a.id, a.name, o.plan, o.permissions from public.accounts a
                join public.organisations o on o.id = a.organisation_id where a.api_key = any($1)";
            let rows: Vec<Row> = sqlx::query_as(rows).bind(keys).fetch_all(db).await?;
            let tagged = |Row { api_key, organisation_id, caller }| {
                (api_key, Tagged::new(caller).tag(Tag::row("public.organisations", &organisation_id)))
            };
            Ok(rows.into_iter().map(tagged).collect::<HashMap<_, _>>())
        })
    });
    let cache = Cache {
        accounts: node.table_by("public.accounts", ["api_key"], options).await?,
        organisations: node.table("public.organisations").await?,
        callers: callers.await?,
    };
    let keys: Vec<String> = (1..=accounts).map(|n| format!("key-{n}")).collect();
    for keys in keys.chunks(5000) {
        cache.accounts.get_many(keys).await?;
        cache.callers.get_many(keys).await?;
    }
    cache.organisations.get_many(&(1..=1000).collect::<Vec<_>>()).await?;
    Ok(cache)
}

/// The service, with the cache or without.
pub async fn serve(is_cached: bool, url: &str, accounts: usize) -> Result<()> {
    let connect = url.parse::<sqlx::postgres::PgConnectOptions>()?.application_name(NAME);
    let pool =
        PgPoolOptions::new().max_connections(10).acquire_timeout(Duration::from_secs(10)).connect_lazy_with(connect);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on http://{}", listener.local_addr()?);
    let node = if is_cached { Some(Node::start(Config::from_url(url)?).await?) } else { None };
    let routes = if let Some(node) = &node {
        let cache = cache(node, accounts).await?;
        let nobody = || async { answer("Nobody", "plan 0", &["read".to_owned()], Vec::new()) };
        let reads = |State((cache, _)): State<(Cache, PgPool)>| async move {
            let all = [cache.accounts.stats(), cache.organisations.stats(), cache.callers.stats()];
            Json(Reads { gets: all.iter().map(|it| it.gets).sum(), misses: all.iter().map(|it| it.misses).sum() })
        };
        let tables = |State((cache, _)): State<(Cache, PgPool)>, headers: HeaderMap| async move {
            by_tables(&cache, &headers, None).await
        };
        let and_orders = |State((cache, pool)): State<(Cache, PgPool)>, headers: HeaderMap| async move {
            by_tables(&cache, &headers, Some(&pool)).await
        };
        Router::new()
            .route("/nobody", get(nobody))
            .route("/tables", get(tables))
            .route("/view", get(by_view))
            .route("/tables/orders", get(and_orders))
            .route("/reads", get(reads))
            .with_state((cache, pool))
    } else {
        let joined =
            |State(pool): State<PgPool>, headers: HeaderMap| async move { by_join(&pool, &headers, None).await };
        let and_orders =
            |State(pool): State<PgPool>, headers: HeaderMap| async move { by_join(&pool, &headers, Some(&pool)).await };
        Router::new()
            .route("/joined", get(joined))
            .route("/selects", get(by_selects))
            .route("/joined/orders", get(and_orders))
            .with_state(pool)
    };
    println!("serving");
    Ok(axum::serve(listener, routes).await?)
}
