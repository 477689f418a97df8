//! What we rely on, and others promise or merely do: Postgres, the drivers, and `quick_cache`. A new version that changes an answer
//! fails here, and not in production.

#[path = "upstream/quick_cache.rs"]
mod quick;

use std::{future::poll_fn, time::Duration};

use rowcache::cli::temp_server::Stop;
use sqlx::postgres::PgListener;
use tokio::time::timeout;
use tokio_postgres::{AsyncMessage, NoTls};

use crate::{
    fixture::{migrate, migrated},
    support::{self, PATIENCE, connect, database, database_on, server},
};

pg_test! {
    // T1 (coherence): a load that starts after a message was delivered sees the change.
    async fn what_was_notified_is_visible_to_every_session(test: Test) {
        let db = database(test.version).await;
        db.execute("create table t (v int); insert into t values (0)").await;
        let mut notifications = db.listen("t").await;
        let (writer, reader) = (db.client().await, db.client().await);
        for n in 1..=300 {
            let write = writer.batch_execute("update t set v = v + 1; select pg_notify('t', '')");
            let read = async {
                notifications.next().await;
                reader.query_one("select v from t", &[]).await.expect("reads").get::<_, i32>(0)
            };
            let (written, seen) = tokio::join!(write, read);
            written.expect("writes");
            assert_eq!(seen, n);
        }
    }

    // T2, T3: one queue for all channels, in the order of commits; a fence on a channel of its own comes after
    // every message that was committed before it was sent.
    async fn messages_of_all_channels_arrive_in_the_order_of_commits(test: Test) {
        let db = database(test.version).await;
        let (client, mut connection) = tokio_postgres::connect(&db.url, NoTls).await.expect("connects");
        let (send, mut received) = tokio::sync::mpsc::unbounded_channel();
        let driver = tokio::spawn(async move {
            while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                if let AsyncMessage::Notification(notification) = message {
                    send.send(notification.payload().to_owned()).expect("the test waits");
                }
            }
        });
        client.batch_execute("listen a; listen b").await.expect("listens");
        let (one, other) = (db.client().await, db.client().await);
        for n in 0..100 {
            let channel = if n % 3 == 0 { "b" } else { "a" };
            let writer = if n % 2 == 0 { &one } else { &other };
            writer.execute("select pg_notify($1, $2)", &[&channel, &n.to_string()]).await.expect("notifies");
        }
        for n in 0..100 {
            let payload = timeout(PATIENCE, received.recv()).await.expect("arrives").expect("connected");
            assert_eq!(payload, n.to_string());
        }
        driver.abort();
    }

    // I5: the incarnation. A crash empties the canary, a clean restart does not; both change the start time, or not.
    async fn the_canary_dies_in_a_crash_and_survives_a_restart(test: Test) {
        let mut server = server(test.version, &[]).await;
        let db = database_on(&server, test.version).await;
        migrate(&db).await;
        let look = async || {
            let row = db.client().await.query_one("select canary::text, started from rowcache.stamp", &[]).await;
            let row = row.expect("the stamp is there");
            (row.get::<_, Option<String>>(0), row.get::<_, i64>(1))
        };
        assert_eq!(look().await.0, None, "no canary before anybody asked for one");
        db.execute("select rowcache.incarnation()").await;
        let (first, started) = look().await;
        assert!(first.is_some());
        server.restart(Stop::Fast).await.expect("restarts");
        let (survivor, restarted) = look().await;
        assert_eq!(survivor, first);
        assert!(restarted > started, "but it is another run of the server");
        server.restart(Stop::Immediate).await.expect("recovers");
        assert_eq!(look().await.0, None, "a crash empties unlogged tables");
        db.execute("select rowcache.incarnation()").await;
        assert_ne!(look().await.0, first);
        // A killed backend is a crash of the whole server, without a new start time.
        let victim = connect(&db.url).await;
        let (before, started) = look().await;
        assert!(before.is_some());
        server.kill_backend(victim.backend_pid().await).expect("killed");
        support::eventually("the server has recovered without its canary", async || {
            let Ok((client, connection)) = tokio_postgres::connect(&db.url, NoTls).await else { return false };
            let driver = tokio::spawn(connection);
            let row = client.query_one("select canary is null from rowcache.stamp", &[]).await;
            driver.abort();
            row.is_ok_and(|row| row.get(0))
        })
        .await;
        assert_eq!(look().await, (None, started));
    }

    async fn a_payload_has_less_than_8000_bytes(test: Test) {
        let db = database(test.version).await;
        let client = db.client().await;
        let notify = async |bytes: usize| client.execute("select pg_notify('c', repeat('x', $1))", &[&i32::try_from(bytes).unwrap()]).await;
        notify(7999).await.expect("fits");
        assert!(notify(8000).await.is_err());
    }

    // Why the listener is tokio-postgres: sqlx's one reconnects by itself, and does not say that messages were lost.
    async fn sqlx_listeners_hide_gaps(test: Test) {
        test.logs.allow("");
        let db = migrated(test.version).await;
        let mut listener = PgListener::connect(&db.url).await.expect("connects");
        listener.listen("c").await.expect("listens");
        let admin = db.client().await;
        let listeners = "select pid from pg_stat_activity where query like 'LISTEN%' and datname = current_database()";
        let pid: i32 = admin.query_one(listeners, &[]).await.expect("one").get(0);
        admin.execute("select pg_terminate_backend($1)", &[&pid]).await.expect("killed");
        admin.batch_execute("select pg_notify('c', 'lost')").await.expect("notifies");
        let next = timeout(PATIENCE, async {
            // Its reconnect takes an unknown time: send until it hears something.
            let mut retry = tokio::time::interval(Duration::from_millis(50));
            loop {
                tokio::select! {
                    message = listener.recv() => return message.expect("no error, no sign"),
                    _ = retry.tick() => admin.batch_execute("select pg_notify('c', 'after')").await.expect("notifies"),
                }
            }
        });
        assert_eq!(next.await.expect("hears").payload(), "after", "as if nothing had happened");
    }

    async fn tokio_postgres_reports_the_end_of_a_connection(test: Test) {
        let db = database(test.version).await;
        let (client, mut connection) = tokio_postgres::connect(&db.url, NoTls).await.expect("connects");
        let ended = tokio::spawn(async move {
            loop {
                match poll_fn(|context| connection.poll_message(context)).await {
                    Some(Ok(_)) => {}
                    end => return end.is_none_or(|message| message.is_err()),
                }
            }
        });
        let pid: i32 = client.query_one("select pg_backend_pid()", &[]).await.expect("asks").get(0);
        db.client().await.execute("select pg_terminate_backend($1)", &[&pid]).await.expect("killed");
        assert!(timeout(PATIENCE, ended).await.expect("is told").expect("ends"));
    }
}
