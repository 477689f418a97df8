//! Messages that do not arrive.

use rowcache::{Event, Lookup, Reason, Status, cli::temp_server::Stop};

use super::{AGAIN, LOST, behind_proxy};
use crate::{
    fixture::{KILL_LISTENERS, event, gap_and_recovery, name, node, users, users_db, users_server},
    support::{
        eventually,
        proxy::{Close, Direction, Flow},
    },
};

const KILL_SENDERS: &str = "select pg_terminate_backend(pid) from pg_stat_activity \
    where datname = current_database() and application_name like '%(control)'";
const KILL_ALL: &str = "select pg_terminate_backend(pid) from pg_stat_activity \
    where datname = current_database() and pid <> pg_backend_pid()";

pg_test! {
    /// What was sent while the listener was away was lost, and nobody noticed: sqlx's `recv`, eventstore #309, shamichan #1095.
    async fn trap_08_messages_lost_while_reconnecting(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let (node, mut proxy) = behind_proxy(&db).await;
        let users = users(&node).await;
        for id in [1, 2] {
            name(&users, id).await;
        }
        let mut events = node.subscribe();
        proxy.refuse().await;
        db.execute(KILL_LISTENERS).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        let Status::Bypassed { why: Reason::ConnectionLost(_), .. } = node.status() else { panic!("{:?}", node.status()) };
        assert!(matches!(users.status(), Status::Bypassed { why: Reason::ConnectionLost(_), .. }));
        assert!(node.barrier().await.is_err_and(|error| error.is_unavailable()), "no barrier without a line");
        db.execute("update public.users set name = 'in the gap'").await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("in the gap"), "reads go to Postgres");
        assert!(matches!(users.peek(&1), Lookup::Unknown), "and nothing is kept");
        db.execute("update public.users set name = 'later in the gap'").await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("later in the gap"));
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        for id in [1, 2] {
            assert_eq!(name(&users, id).await.as_deref(), Some("later in the gap"), "row {id}, held before the gap");
            assert!(users.peek(&id).is_known());
        }
    }

    /// The first attempt to reconnect failed, the next one came back without a word about what was missed: sqlx's path of
    /// errors.
    async fn trap_09_the_first_reconnect_that_fails(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let (mut server, db) = users_server(test.version, &[]).await;
        let (node, mut proxy) = behind_proxy(&db).await;
        let users = users(&node).await;
        for id in [1, 2] {
            name(&users, id).await;
        }
        let mut events = node.subscribe();
        server.stop(Stop::Fast).await.expect("stops");
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        let error = users.get(&1).await.expect_err("nobody can answer");
        assert!(error.is_unavailable() || error.is_timeout(), "{error:?}");
        eventually("an attempt has failed", async || !test.logs.containing(AGAIN).is_empty()).await;
        proxy.refuse().await;
        server.start().await.expect("starts again");
        db.execute("update public.users set name = 'after the restart'").await;
        let failed = test.logs.containing(AGAIN).len();
        eventually("another one has", async || test.logs.containing(AGAIN).len() > failed).await;
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        for id in [1, 2] {
            assert_eq!(name(&users, id).await.as_deref(), Some("after the restart"));
            assert!(users.peek(&id).is_known(), "and it is cached again");
        }
    }

    /// The connection was alive, and delivered nothing: PostgREST #3147 and #4670, Redisson #4653, switch #415 (16 minutes).
    async fn trap_10_the_link_that_is_alive_but_deaf(test: Test) {
        test.logs.allow(AGAIN);
        // The link that is cut at the end may belong to a line that was quick to come back.
        test.logs.allow(LOST);
        let db = users_db(test.version).await;
        for how in ["unlisten", "nothing comes", "nothing comes or goes"] {
            let (node, mut proxy) = behind_proxy(&db).await;
            let users = users(&node).await;
            name(&users, 1).await;
            let mut events = node.subscribe();
            proxy.refuse().await;
            let line = proxy.connections();
            match how {
                "unlisten" => {
                    for listener in line.iter().filter(|it| it.greeted_with("(listener")) {
                        listener.execute("unlisten *").await;
                    }
                }
                "nothing comes" => proxy.set(Direction::Down, Flow::Swallow),
                _ => proxy.set_both(Flow::Swallow),
            }
            // From here on no message reaches the node. The bound is checked by what is served, not by a stopwatch.
            let new = format!("unheard: {how}");
            db.execute(&format!("update public.users set name = '{new}' where id = 1")).await;
            let Event::Gap(why) = event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await else {
                unreachable!()
            };
            assert!(matches!(why, Reason::BeatLate | Reason::LeaseExpired), "{how}: {why}");
            assert_eq!(name(&users, 1).await.as_ref(), Some(&new));
            assert!(matches!(users.peek(&1), Lookup::Unknown), "{how}: nothing is kept");
            proxy.set_both(Flow::Pass);
            proxy.close_all(Close::Rst).await;
            proxy.accept().await;
            event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
            assert_eq!(name(&users, 1).await.as_ref(), Some(&new));
            node.shutdown().await;
        }
    }

    /// Fewer lost messages than a limit were thought to do no harm: Hazelcast #25304.
    async fn trap_19_the_tolerance_for_a_few_misses(test: Test) {
        test.logs.allow(LOST);
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        // However short the interruption, and whether anything was missed or not.
        for (n, kill) in [KILL_LISTENERS, KILL_SENDERS, KILL_ALL].into_iter().enumerate() {
            for change in ["", "update public.users set name = name || '!' where id = 1"] {
                let mut events = node.subscribe();
                for id in [1, 2] {
                    name(&users, id).await;
                    assert!(users.peek(&id).is_known());
                }
                db.execute(&format!("{kill}; {change}")).await;
                gap_and_recovery(&mut events).await;
                for id in [1, 2] {
                    assert!(matches!(users.peek(&id), Lookup::Unknown), "{kill}: row {id} is from before the gap");
                }
            }
            assert_eq!(name(&users, 1).await, Some(format!("user 1{}", "!".repeat(n + 1))));
        }
    }
}
