//! A service, and its own tests, which need no Postgres: in memory, without a sleep, with races and failures that happen
//! when the test says so.
//!
//! ```text
//! cargo test --features test-kit --example tested_service
//! ```
//!
//! What it does is in `Door`: it lets people in whose account is active. The program asks for one number; it needs a database with our schema
//! and the table `accounts` of `examples/authenticated_service.rs`.

use std::time::Duration;

use rowcache::{Node, Result, Table, TableOptions};

#[derive(Clone, Debug, sqlx::FromRow)]
struct Account {
    active: bool,
}

/// Lets people in. All that it knows of the database is a table.
struct Door {
    accounts: Table<i64, Account>,
}

impl Door {
    async fn new(node: &Node) -> Result<Self> {
        // If the database is away, who was let in lately is let in for another minute.
        let options = TableOptions::default().ttl(Duration::from_mins(10)).stale_if_error(Duration::from_mins(1));
        Ok(Self { accounts: node.table_with("public.accounts", options).await? })
    }

    async fn lets_in(&self, account: i64) -> Result<bool> {
        Ok(self.accounts.get(&account).await?.is_some_and(|account| account.active))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("DATABASE_URL").expect("DATABASE_URL is set");
    let account = std::env::args().nth(1).and_then(|account| account.parse().ok()).expect("the number of an account");
    let node = Node::connect(&url).await?;
    let opens = Door::new(&node).await?.lets_in(account).await?;
    println!("the door {} for account {account}", if opens { "opens" } else { "stays shut" });
    node.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rowcache::testing::{Database, TestTable};
    use tokio::time::sleep;

    use super::*;

    /// A database, its table as others write to it, a node, and what is to be tested.
    async fn door() -> (Database, TestTable<i64, Account>, Node, Door) {
        let db = Database::new();
        let accounts = db.table("public.accounts");
        accounts.put(42, Account { active: true });
        let node = db.node().await;
        let door = Door::new(&node).await.expect("the table is there");
        (db, accounts, node, door)
    }

    #[tokio::test]
    async fn an_account_that_was_disabled_is_not_let_in() {
        let (_db, accounts, node, door) = door().await;
        assert!(door.lets_in(42).await.expect("answers"));
        accounts.put(42, Account { active: false });
        // In place of a sleep: the commit's message has been applied when this returns.
        node.barrier().await.expect("nothing is in the way");
        assert!(!door.lets_in(42).await.expect("answers"));
        assert!(!door.lets_in(43).await.expect("answers"), "there is no such account");
    }

    #[tokio::test]
    async fn nor_is_one_that_is_disabled_while_it_is_being_read() {
        let (db, accounts, node, door) = door().await;
        let held = db.hold_loads();
        let first = async { door.lets_in(42).await };
        let meanwhile = async {
            held.reached(1).await; // It has read the row.
            accounts.put(42, Account { active: false });
            node.barrier().await.expect("nothing is in the way");
            held.release();
        };
        let (first, ()) = tokio::join!(first, meanwhile);
        assert!(first.expect("answers"), "who came before the change");
        assert!(!door.lets_in(42).await.expect("answers"), "who came after");
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_let_in_lately_is_while_the_database_is_away() {
        let (db, _accounts, node, door) = door().await;
        assert!(door.lets_in(42).await.expect("answers"));
        db.stop();
        assert!(door.lets_in(42).await.expect("from memory"));
        assert!(door.lets_in(43).await.is_err(), "nobody knows");
        sleep(Duration::from_secs(70)).await; // No time passes: it is paused, and leaps.
        assert!(door.lets_in(42).await.is_err(), "it has been too long");
        db.start();
        node.until_coherent().await.expect("connects by itself");
        assert!(door.lets_in(42).await.expect("answers"));
    }
}
