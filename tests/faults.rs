//! Faults that are produced for real: of the network, the server, a failover, the notification queue, the catalogue.
//!
//! Every test shows the same three things. While the fault lasts, the node says so: since when, and why. No read returns
//! what it must not: once the gap is noticed rows come from Postgres, and nothing from before it is served after it. When
//! the fault is over the node is back by itself: coherent, holding rows, hearing changes. `gap.rs` has the faults that were
//! there first.

#[macro_use]
mod support;
mod fixture;

#[path = "faults/catalogue.rs"]
mod catalogue;
#[path = "faults/crowd.rs"]
mod crowd;
#[path = "faults/failover.rs"]
mod failover;
#[path = "faults/network.rs"]
mod network;
#[path = "faults/queue.rs"]
mod queue;
#[path = "faults/server.rs"]
mod server;
#[path = "faults/settings.rs"]
mod settings;

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use fixture::{Users, event, name};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rowcache::{Config, Event, Events, Node, Reason, Status};
use support::{Logs, TestDb, eventually};

/// What a node logs while its line comes and goes, and on a slow machine at any time.
fn allow_gaps(logs: &Logs) {
    for line in [
        "LISTEN connection was lost",
        "cannot open the LISTEN connection",
        "a fence waited too long",
        "cannot verify the triggers",
    ] {
        logs.allow(line);
    }
}

/// A node with the table of users, and a way to Postgres around it.
struct Subject {
    /// Reaches Postgres whatever happens to the node's connections.
    db: TestDb,
    node: Node,
    users: Users,
    events: Events,
    writes: AtomicU32,
}

impl Subject {
    /// A node that holds the rows 1 and 2.
    async fn new(db: &TestDb, config: Config) -> Self {
        let node = Node::start(config).await.expect("the node starts");
        let users = fixture::users(&node).await;
        let subject = Self { db: db.clone(), events: node.subscribe(), node, users, writes: AtomicU32::new(0) };
        subject.warm().await;
        subject
    }

    /// Returns when the rows 1 and 2 are held.
    async fn warm(&self) {
        for id in [1, 2] {
            eventually("the row is held", async || self.users.get(&id).await.is_ok() && self.held(id)).await;
        }
    }

    fn held(&self, id: i64) -> bool {
        self.users.peek(&id).is_known()
    }

    /// Gives a user a new name, which is returned.
    async fn write(&self, id: i64) -> String {
        let name = format!("name {}", self.writes.fetch_add(1, Ordering::Relaxed));
        self.db.execute(&format!("update public.users set name = '{name}' where id = {id}")).await;
        name
    }

    async fn in_postgres(&self, id: i64) -> Option<String> {
        let row = self.db.client().await.query_opt("select name from public.users where id = $1", &[&id]).await;
        row.expect("reads").map(|row| row.get(0))
    }

    /// Waits for the gap that a fault makes, and returns why there is one.
    async fn gap(&mut self) -> Reason {
        match event(&mut self.events, "a gap", |event| matches!(event, Event::Gap(_))).await {
            Event::Gap(why) => why,
            _ => unreachable!(),
        }
    }

    /// What holds while a fault lasts that began after `before` and has been noticed. Returns what the node says.
    async fn is_bypassed(&self, before: Instant) -> Reason {
        let Status::Bypassed { since, why } = self.node.status() else { panic!("{:?}", self.node.status()) };
        assert!(before <= since && since <= Instant::now(), "bypassed since {since:?}, which is not after {before:?}");
        assert!(
            matches!(self.users.status(), Status::Bypassed { since: it, .. } if it.duration_since(before) < support::PATIENCE)
        );
        assert!(!self.held(1) && !self.held(2), "nothing is served from memory");
        assert!(self.node.barrier().await.is_err_and(|error| error.is_unavailable()), "no barrier without a line");
        why
    }

    /// What holds as well if the pool still reaches Postgres.
    async fn reads_postgres(&self) {
        for _ in 0..2 {
            let written = self.write(1).await;
            assert_eq!(name(&self.users, 1).await, Some(written), "reads go to Postgres");
            assert!(!self.held(1), "and nothing is kept");
        }
    }

    /// Waits until the node is coherent after a fault, and shows that it is as good as new.
    async fn is_back(&mut self) {
        event(&mut self.events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        self.is_well().await;
    }

    /// Nothing old is served, rows are held, changes arrive, and the status says so.
    async fn is_well(&self) {
        for id in [1, 2, 3] {
            assert_eq!(name(&self.users, id).await, self.in_postgres(id).await, "row {id}");
        }
        self.warm().await;
        self.hears_changes().await;
        // A slow machine may have had another gap, which ends too.
        eventually("the status is good", async || {
            [self.node.status(), self.users.status()].iter().all(|it| matches!(it, Status::Coherent { .. }))
        })
        .await;
    }

    /// A change reaches the node as a message.
    async fn hears_changes(&self) {
        eventually("a change arrives", async || {
            let heard = self.users.stats().invalidations;
            let written = self.write(1).await;
            if self.node.barrier().await.is_err() {
                return false;
            }
            assert_eq!(name(&self.users, 1).await, Some(written), "the barrier covers the change");
            self.users.stats().invalidations > heard
        })
        .await;
    }

    /// Fills the pool with as many idle connections as loads may have, of which none has been idle for long.
    async fn fill_pool(&self) {
        self.fill_pool_and(|| ()).await;
    }

    /// The same, and does something while all of them wait for their answers.
    async fn fill_pool_and(&self, meanwhile: impl FnOnce()) {
        const LOADS: i64 = 4;
        self.users.clear().await.expect("forgets them");
        eventually("it has heard itself", async || self.node.barrier().await.is_ok()).await;
        let client = self.db.client().await;
        client.batch_execute("begin; lock table public.users in access exclusive mode").await.expect("locks");
        let mut loads = Vec::new();
        for n in 1..=LOADS {
            let users = self.users.clone();
            loads.push(tokio::spawn(async move { users.get(&(1_000_000 + n)).await.map(drop) }));
            // One by one, or some would be one statement.
            eventually("the load waits for the lock", async || {
                let waiting = "select count(*) from pg_locks where not granted and relation = 'public.users'::regclass";
                client.query_one(waiting, &[]).await.expect("counts").get::<_, i64>(0) == n
            })
            .await;
        }
        meanwhile();
        client.batch_execute("rollback").await.expect("unlocks");
        for load in loads {
            load.await.expect("ends").expect("there is no such row");
        }
    }
}

/// The server processes behind the node's connections whose application name contains `part`.
async fn backends(db: &TestDb, part: &str) -> Vec<i32> {
    let sql = "select pid from pg_stat_activity where datname = current_database() and application_name like $1";
    let rows = db.client().await.query(sql, &[&format!("%{part}%")]).await.expect("lists the backends");
    rows.iter().map(|row| row.get(0)).collect()
}

/// Server processes that were stopped; they go on when this is dropped.
struct Stopped(Vec<Pid>);

impl Stopped {
    fn new(pids: Vec<i32>) -> Self {
        assert!(!pids.is_empty(), "there is something to stop");
        let mut stopped = Self(Vec::new());
        for pid in pids.into_iter().map(Pid::from_raw) {
            kill(pid, Signal::SIGSTOP).expect("stops");
            stopped.0.push(pid);
        }
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill(*pid, Signal::SIGCONT); // it may have ended
        }
    }
}
