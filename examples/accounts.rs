//! A view: users with their orders, and an account that is printed whenever anything in it has changed.
//!
//! It needs a database with our schema and two tracked tables. With `docker compose up -d --wait postgres`:
//!
//! ```text
//! export DATABASE_URL=postgres://postgres:postgres@localhost:5432/postgres
//! cargo run --features cli -- migrate up
//! psql "$DATABASE_URL" -c "create table members (id bigint primary key, name text not null)"
//! psql "$DATABASE_URL" -c "create table orders (id bigint primary key, member_id bigint not null, total bigint not null)"
//! psql "$DATABASE_URL" -c "create index on orders (member_id)"
//! psql "$DATABASE_URL" -c "insert into members values (1, 'Ada'), (2, 'Bob')"
//! cargo run --features cli -- track public.members
//! cargo run --features cli -- track public.orders --columns member_id
//! cargo run --example accounts
//! ```
//!
//! Then, in another terminal:
//!
//! ```text
//! psql "$DATABASE_URL" -c "insert into orders values (7, 1, 120)"
//! psql "$DATABASE_URL" -c "update orders set member_id = 2 where id = 7"
//! ```

use std::{collections::HashMap, time::Duration};

use rowcache::{BoxError, Node, Result, Table};
use sqlx::PgConnection;

#[derive(sqlx::FromRow)]
struct Order {
    member_id: i64,
    total: i64,
}

#[derive(Debug, PartialEq)]
struct Account {
    name: String,
    totals: Vec<i64>,
}

/// Many accounts, by two statements that see the same moment.
async fn load(ids: &[i64], db: &mut PgConnection) -> Result<HashMap<i64, Account>, BoxError> {
    let members: Vec<(i64, String)> =
        sqlx::query_as("select id, name from members where id = any($1)").bind(ids).fetch_all(&mut *db).await?;
    let orders: Vec<Order> =
        sqlx::query_as("select member_id, total from orders where member_id = any($1) order by id")
            .bind(ids)
            .fetch_all(db)
            .await?;
    let empty = |(id, name)| (id, Account { name, totals: Vec::new() });
    let mut accounts: HashMap<i64, Account> = members.into_iter().map(empty).collect();
    for order in orders {
        if let Some(account) = accounts.get_mut(&order.member_id) {
            account.totals.push(order.total);
        }
    }
    Ok(accounts)
}

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("DATABASE_URL").expect("DATABASE_URL is set");
    let node = Node::connect(&url).await?;
    let accounts: Table<i64, Account> = node
        .view("accounts")
        .on("public.members", ["id"])
        .on("public.orders", ["member_id"])
        .open(|ids, db| Box::pin(load(ids, db)))
        .await?;

    let mut shown = Vec::new();
    loop {
        // From memory, unless a row of theirs has changed since.
        let now = accounts.get_many(&[1, 2]).await?;
        if now != shown {
            for account in now.iter().flatten() {
                println!("{} ordered {:?}", account.name, account.totals);
            }
            shown = now;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
