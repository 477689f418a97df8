//! The smallest program: reads one user in a loop, and prints the user whenever it has changed.
//!
//! It needs a database with our schema and one tracked table. With `docker compose up -d --wait postgres`:
//!
//! ```text
//! export DATABASE_URL=postgres://postgres:postgres@localhost:5432/postgres
//! cargo run --features cli -- migrate up
//! psql "$DATABASE_URL" -c "create table members (id bigint primary key, name text not null)"
//! psql "$DATABASE_URL" -c "insert into members values (1, 'Ada')"
//! cargo run --features cli -- track public.members
//! cargo run --example smallest
//! ```
//!
//! Then, in another terminal:
//!
//! ```text
//! psql "$DATABASE_URL" -c "update members set name = 'Grace' where id = 1"
//! ```

use std::time::Duration;

use rowcache::{Node, Result, Table};

#[derive(Debug, PartialEq, sqlx::FromRow)]
struct Member {
    id: i64,
    name: String,
}

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("DATABASE_URL").expect("DATABASE_URL is set");
    let node = Node::connect(&url).await?;
    let members: Table<i64, Member> = node.table("public.members").await?;

    let mut shown = None;
    loop {
        // From memory, unless the row has changed since.
        let member = members.get(&1).await?;
        if Some(&member) != shown.as_ref() {
            match &member {
                Some(member) => println!("member {} is {}", member.id, member.name),
                None => println!("there is no member 1"),
            }
            shown = Some(member);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
