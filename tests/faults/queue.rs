//! The notification queue of the server: full, because somebody does not read; and our own reader, which must not be that
//! somebody.

use std::{
    collections::HashMap,
    future::poll_fn,
    sync::{
        Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    time::Instant,
};

use rowcache::{Event, Node, Reason, Status, Table, cli::temp_server::TempServer};
use tokio_postgres::{NoTls, error::SqlState};

use crate::{
    Subject, allow_gaps,
    fixture::{self, event, hasty, users_server},
    support::{Test, TestClient, TestDb, Version, eventually},
};

/// A server whose queue has 64 pages of 8 kB; `None` where that cannot be had, before Postgres 17.
async fn small_queue(test: &Test) -> Option<(TempServer, TestDb)> {
    if test.version == Version::V15 {
        return None; // 8 GB would have to be filled
    }
    Some(users_server(test.version, &[("max_notify_queue_pages", "64")]).await)
}

/// One notification of nearly a page, on a channel of nobody's. `false`: the queue is full.
async fn notify(client: &TestClient) -> bool {
    match client.batch_execute("select pg_notify('of_others', repeat('x', 7900))").await {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.code(), Some(&SqlState::PROGRAM_LIMIT_EXCEEDED), "{error:?}");
            false
        }
    }
}

/// Listens to something, and stays in a transaction, so that nothing is taken from the queue.
async fn block(client: &TestClient) {
    client.batch_execute("listen something").await.expect("listens");
    client.batch_execute("begin; select 1").await.expect("begins");
}

/// Fills the queue, until looking at it makes no room either: a reader that is merely slow is not what keeps it full.
async fn fill(client: &TestClient) {
    // What is in the queue, and what fits into the buffers of sockets.
    for _ in 0..20_000 {
        if !notify(client).await {
            client.batch_execute("select pg_notification_queue_usage()").await.expect("looks");
            if !notify(client).await {
                return;
            }
        }
    }
    panic!("the queue is not full");
}

/// What holds while the queue is full.
async fn is_truthful(subject: &mut Subject, before: Instant) {
    let why = subject.gap().await;
    assert!(matches!(why, Reason::ConnectionLost(_) | Reason::BeatLate | Reason::LeaseExpired), "{why}");
    subject.is_bypassed(before).await;
    eventually("the node says what is wrong", async || match subject.node.status() {
        Status::Bypassed { why, .. } => why.to_string().contains("too many notifications in the NOTIFY queue"),
        _ => false,
    })
    .await;
    // A write of a tracked table fails with its notification; nobody has anything to invalidate.
    let refused =
        subject.db.client().await.batch_execute("update public.users set name = 'refused' where id = 1").await;
    assert_eq!(refused.expect_err("refused").code(), Some(&SqlState::PROGRAM_LIMIT_EXCEEDED));
    assert_eq!(fixture::name(&subject.users, 1).await, subject.in_postgres(1).await);
    assert!(!subject.held(1));
}

/// A row whose `Drop` waits, if there is a brake for its name.
#[derive(sqlx::FromRow)]
struct Slow {
    name: String,
}

/// Where a value says that it is being dropped, and what it then waits for.
type Brake = (Sender<()>, Receiver<()>);

static BRAKES: Mutex<Option<HashMap<String, Brake>>> = Mutex::new(None);

impl Slow {
    /// The first value of this name waits when it is dropped. What is returned says so, and lets it go on when dropped.
    fn brake(name: &str) -> (Receiver<()>, Sender<()>) {
        let ((dropping, dropped), (free, wait)) = (channel(), channel());
        BRAKES.lock().expect("no panic").get_or_insert_default().insert(name.to_owned(), (dropping, wait));
        (dropped, free)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let brake = BRAKES.lock().expect("no panic").get_or_insert_default().remove(&self.name);
        if let Some((dropping, wait)) = brake {
            dropping.send(()).expect("the test waits");
            let _ = wait.recv(); // until the other end is gone
        }
    }
}

pg_test! {
    // Why nodes look at the queue: nobody else makes room.
    async fn a_full_queue_stays_full_until_somebody_looks_at_it(test: Test) {
        let Some((_server, db)) = small_queue(&test).await else { return };
        let writer = db.client().await;
        {
            let blocker = db.client().await;
            block(&blocker).await;
            fill(&writer).await;
            blocker.batch_execute("rollback").await.expect("moves on");
            blocker.batch_execute("unlisten *").await.expect("leaves");
        }
        for _ in 0..20 {
            assert!(!notify(&writer).await, "nobody is in the way any more, and yet");
        }
        let other = db.client().await;
        other.batch_execute("listen something").await.expect("listens");
        assert!(!notify(&writer).await, "a new listener does not help");
        other.batch_execute("select pg_notification_queue_usage()").await.expect("looks");
        assert!(notify(&writer).await);
    }

    // metaflow-service #213, tls-observatory #109.
    async fn a_queue_that_is_full_comes_free_again_by_the_node(test: Test) {
        allow_gaps(&test.logs);
        let Some((_server, db)) = small_queue(&test).await else { return };
        let mut subject = Subject::new(&db, hasty(&db.url)).await;
        let writer = db.client().await;
        let blocker = db.client().await;
        block(&blocker).await;
        let before = Instant::now();
        fill(&writer).await;
        is_truthful(&mut subject, before).await;
        blocker.batch_execute("rollback").await.expect("moves on");
        eventually("writers get through", async || notify(&writer).await).await;
        subject.is_back().await;
    }

    async fn another_client_does_not_read_its_socket(test: Test) {
        allow_gaps(&test.logs);
        let Some((_server, db)) = small_queue(&test).await else { return };
        let mut subject = Subject::new(&db, hasty(&db.url)).await;
        let writer = db.client().await;
        let (client, mut connection) = tokio_postgres::connect(&db.url, NoTls).await.expect("connects");
        {
            let listen = client.batch_execute("listen of_others");
            let read = poll_fn(|context| connection.poll_message(context));
            tokio::select! {
                listening = listen => listening.expect("listens"),
                message = read => panic!("{message:?}"),
            }
        }
        // From here on nobody reads from it.
        let before = Instant::now();
        fill(&writer).await;
        is_truthful(&mut subject, before).await;
        drop((client, connection));
        eventually("writers get through", async || notify(&writer).await).await;
        subject.is_back().await;
    }

    // The task that reads the socket waits for nothing: an applier that stands still is the node's own trouble.
    async fn an_applier_that_stands_still_does_not_hold_up_the_server(test: Test) {
        allow_gaps(&test.logs);
        let (_server, db) = users_server(test.version, &[]).await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users: Table<i64, Slow> = node.table("public.users").await.expect("opens");
        // Tests run side by side, and each has a brake of its own.
        let brake = format!("slow on {}", db.port);
        db.execute(&format!("update public.users set name = '{brake}' where id = 1")).await;
        node.barrier().await.expect("coherent");
        eventually("the row is held", async || users.get(&1).await.is_ok() && users.peek(&1).is_known()).await;
        let (dropping, free) = Slow::brake(&brake);
        let mut events = node.subscribe();
        db.execute("update public.users set name = 'new' where id = 1").await;
        tokio::task::spawn_blocking(move || dropping.recv().expect("the applier drops the old value")).await.expect("ends");
        // More than sockets hold.
        db.execute("do $$ begin for n in 1..4000 loop perform pg_notify('rowcache', repeat('x', 7900) || n); end loop; end $$")
            .await;
        test.logs.allow("could not be read");
        eventually("the server has got rid of it all", async || {
            let row = db.client().await.query_one("select pg_notification_queue_usage() = 0", &[]).await;
            row.expect("looks").get(0)
        })
        .await;
        let why = event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        assert!(matches!(why, Event::Gap(Reason::BeatLate | Reason::LeaseExpired)), "{why:?}");
        assert!(!users.peek(&1).is_known());
        drop(free);
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        eventually("the new row is held", async || {
            users.get(&1).await.expect("loads").is_some_and(|user| user.name == "new") && users.peek(&1).is_known()
        })
        .await;
    }
}
