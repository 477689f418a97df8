//! A load that is held between its read and its publication, by a decoder that waits, while the world changes.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, mpsc},
};

use rowcache::{Node, Table, TableOptions};
use sqlx::{FromRow, Row, postgres::PgRow};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    fixture::{node, users_db},
    support::{self, Test, TestDb},
};

/// A user whose decoder stops at the name it was told to stop at.
#[derive(Debug)]
pub struct Slow {
    pub name: String,
}

pub type Slows = Table<i64, Slow>;

/// Told when a decoder has stopped; tells it to go on.
type Stop = (oneshot::Sender<()>, mpsc::Receiver<()>);

/// Where decoders stop: by a name that one database has and no other.
static STOPS: LazyLock<Mutex<HashMap<String, Stop>>> = LazyLock::new(Mutex::default);

impl<'r> FromRow<'r, PgRow> for Slow {
    fn from_row(row: &'r PgRow) -> sqlx::Result<Self> {
        let name: String = row.try_get("name")?;
        let stop = STOPS.lock().unwrap().remove(&name);
        if let Some((reached, go_on)) = stop {
            reached.send(()).expect("the test waits for this");
            // Without an answer the test has failed, and this thread must not stay for ever.
            // In place, so that the runtime gives this worker's other tasks to somebody else.
            let _ = tokio::task::block_in_place(|| go_on.recv_timeout(support::PATIENCE));
        }
        Ok(Self { name })
    }
}

/// A load that will be stopped after its read.
pub struct Stopped {
    reached: oneshot::Receiver<()>,
    go_on: mpsc::Sender<()>,
}

impl Stopped {
    /// Returns when a load has read the row.
    pub async fn reached(&mut self) {
        tokio::time::timeout(support::PATIENCE, &mut self.reached).await.expect("a load begins").expect("and stops");
    }

    pub fn go_on(self) {
        self.go_on.send(()).expect("the load waits");
    }
}

/// Stops the next load that reads this name.
pub fn stop_at(name: &str) -> Stopped {
    let (reached, told) = oneshot::channel();
    let (go_on, wait) = mpsc::channel();
    STOPS.lock().unwrap().insert(name.to_owned(), (reached, wait));
    Stopped { reached: told, go_on }
}

/// A table with one user of this database, whose name nobody else has.
pub async fn setup(test: &Test) -> (TestDb, Node, Slows, String) {
    let db = users_db(test.version).await;
    let node = node(&db).await;
    let users = node.table_with("public.users", TableOptions::default().refill(10)).await.expect("opens");
    let old = format!("old in {} {:?}", db.name, test.version);
    db.execute(&format!("update public.users set name = '{old}' where id = 1")).await;
    node.barrier().await.expect("coherent");
    (db, node, users, old)
}

pub fn spawn_get(users: &Slows, id: i64) -> JoinHandle<Option<String>> {
    let users = users.clone();
    tokio::spawn(async move { slow_name(&users, id).await })
}

pub async fn slow_name(users: &Slows, id: i64) -> Option<String> {
    users.get(&id).await.expect("loads").map(|user| user.name.clone())
}
