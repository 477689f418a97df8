//! Values that take long to compute: computed by one node, read by all from memory.
//!
//! It needs a database with our schema. With `docker compose up -d --wait postgres`:
//!
//! ```text
//! export DATABASE_URL=postgres://postgres:postgres@localhost:5432/postgres
//! cargo run --features cli -- migrate up
//! cargo run --example permissions
//! ```
//!
//! Start it in several terminals: one of them computes, all print the same. Then, in another one:
//!
//! ```text
//! psql "$DATABASE_URL" -c "delete from rowcache.shared_permissions where key = 42"
//! ```

use std::{process, time::Duration};

use rowcache::{Node, Result};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Permissions {
    may: Vec<String>,
    computed_by: u32,
}

/// The backend that needs its time.
async fn compute(user: i64) -> Result<Permissions, std::io::Error> {
    tokio::time::sleep(Duration::from_millis(600)).await;
    println!("computed the permissions of {user}");
    Ok(Permissions { may: vec!["read".into(), "write".into()], computed_by: process::id() })
}

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("DATABASE_URL").expect("DATABASE_URL is set");
    let node = Node::connect(&url).await?;
    let permissions = node.shared::<i64, Permissions>("permissions").open().await?;

    let mut shown = None;
    loop {
        // From memory, unless there is none.
        let now = permissions.fetch_or_store(&42, || compute(42)).await?;
        if shown.as_ref() != Some(&*now) {
            println!("42 may {}, says {}", now.may.join(" and "), now.computed_by);
            shown = Some((*now).clone());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
