//! What else a service may use works as it does with Postgres.

use std::num::NonZeroU32;

use rowcache::{Fallback, Freshness, OnChange, WarmUp};

use super::*;

#[tokio::test(start_paused = true)]
async fn nodes_tell_each_other() {
    let (db, _) = ada();
    let (node, other) = (db.node().await, db.node().await);
    let (here, there) = (cached(&node).await, cached(&other).await);
    for forget in [0, 1] {
        read(&there).await;
        assert!(held(&there).is_some());
        let told = if forget == 0 { here.invalidate(&42).await } else { here.clear().await };
        told.expect("is sent");
        other.barrier().await.expect("a fence comes back");
        assert_eq!(held(&there), None);
    }
    db.stop();
    assert!(here.invalidate(&42).await.is_err_and(|error| error.is_unavailable()));
}

#[tokio::test(start_paused = true)]
async fn any_message_can_be_sent() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    let mut events = node.subscribe();
    let messages: [&dyn Fn(); 5] = [
        &|| db.tell(&testing::change(USERS, Rows::All)).expect("is sent"),
        &|| db.tell(&testing::change(USERS, Rows::Keys(vec![testing::row_key(&42_i64)]))).expect("is sent"),
        &|| db.tell_text(r#"{"v":1,"all":true}"#).expect("is sent"),
        &|| db.tell_text("nonsense").expect("is sent"),
        &|| {
            users.truncate();
        },
    ];
    for send in messages {
        read(&table).await;
        assert!(held(&table).is_some());
        send();
        node.barrier().await.expect("a fence comes back");
        assert_eq!(held(&table), None);
    }
    assert_eq!(read(&table).await, "nobody");
    db.tell(&testing::change("public.others", Rows::All)).expect("is sent");
    node.barrier().await.expect("a fence comes back");
    assert!(held(&table).is_some(), "it is of another table");
    let seen = so_far(&mut events).await;
    assert_eq!(seen.iter().filter(|event| matches!(event, Event::Unreadable { .. })).count(), 1, "{seen:?}");
    assert_eq!((seen.len(), node.stats().unreadable), (6, 1));
}

#[tokio::test(start_paused = true)]
async fn many_rows_in_one_commit_clear_the_table() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    let mut events = node.subscribe();
    users.put_all([(43, user("Joan")), (44, user("Jean"))]);
    read(&table).await;
    node.barrier().await.expect("a fence comes back");
    assert!(held(&table).is_some(), "its row is not among them");
    users.put_all((100..9000).map(|id| (id, user("many"))));
    node.barrier().await.expect("a fence comes back");
    assert_eq!(held(&table), None);
    let seen = so_far(&mut events).await;
    let all = |event: &Event| matches!(event, Event::Change(change) if change.rows == Rows::All);
    assert_eq!(seen.iter().map(all).collect::<Vec<_>>(), [false, true]);
}

#[tokio::test(start_paused = true)]
async fn fresher_reads_and_snapshots() {
    let (db, users) = ada();
    users.put(43, user("Alan"));
    let node = db.node().await;
    let table = cached(&node).await;
    read(&table).await;
    db.chaos(Chaos::seeded(1).delay_messages(exactly(ms(20))));
    users.put_all([(42, user("Grace")), (43, user("Joan"))]);
    assert_eq!(read(&table).await, "Ada");
    let rows = table.snapshot(&[42, 43]).await.expect("can be read");
    let names: Vec<_> = rows.iter().map(|row| name(row.as_ref())).collect();
    assert!(names == ["Grace", "Joan"] || names == ["Ada", "Alan"], "of one moment: {names:?}");
    let fenced = table.get_with(&42, Freshness::Fenced).await.expect("can be read");
    assert_eq!(name(fenced.as_ref()), "Grace");
    users.put(42, user("Jean"));
    let within = table.get_with(&42, Freshness::Within(Duration::ZERO)).await.expect("can be read");
    assert_eq!(name(within.as_ref()), "Jean");
}

#[tokio::test(start_paused = true)]
async fn a_ticket_puts_what_no_change_has_overtaken() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    let ticket = table.ticket(&42);
    assert!(ticket.put(users.get(&42)));
    assert_eq!(held(&table).as_deref(), Some("Ada"));
    let (ticket, row) = (table.ticket(&42), users.get(&42));
    users.put(42, user("Grace"));
    node.barrier().await.expect("a fence comes back");
    assert!(!ticket.put(row), "a change came in between");
    assert_eq!(held(&table), None);
}

#[tokio::test(start_paused = true)]
async fn what_is_used_is_read_again() {
    let (db, users) = ada();
    let node = db.node().await;
    let options = TableOptions::default().on_change(OnChange::Refresh);
    let table: Table<i64, User> = node.table_with(USERS, options).await.expect("opens");
    read(&table).await;
    read(&table).await;
    users.put(42, user("Grace"));
    sleep(ms(100)).await;
    assert_eq!(held(&table).as_deref(), Some("Grace"), "though nobody has asked");
}

#[tokio::test(start_paused = true)]
async fn a_breaker_opens_and_closes() {
    let (db, _) = ada();
    let node = db.node().await;
    let options = TableOptions::default().breaker(NonZeroU32::new(3));
    let table: Table<i64, User> = node.table_with(USERS, options).await.expect("opens");
    db.chaos(Chaos::seeded(1).fail_loads(1.0).delay_loads(exactly(ms(100))));
    for _ in 0..3 {
        assert!(table.get(&42).await.is_err());
    }
    let began = Instant::now();
    assert!(table.get(&42).await.is_err_and(|error| error.is_unavailable()));
    assert!(began.elapsed() < ms(100), "it was not tried");
    db.calm();
    sleep(ms(1100)).await;
    assert_eq!(read(&table).await, "Ada");
}

#[tokio::test(start_paused = true)]
async fn fallbacks_count_in_a_gap() {
    let (db, _) = ada();
    let node = db.node().await;
    let with = |fallback| TableOptions::default().fallback(fallback);
    let stale = with(Fallback::ServeStale { max: Duration::from_secs(20) });
    let stale: Table<i64, User> = node.table_with(USERS, stale).await.expect("opens");
    let fails: Table<i64, User> = node.table_with(USERS, with(Fallback::Fail)).await.expect("opens");
    read(&stale).await;
    read(&fails).await;
    db.stop();
    assert!(node.status().to_string().contains("stopped"), "{}", node.status());
    assert_eq!(read(&stale).await, "Ada", "nobody is asked");
    assert!(fails.get(&42).await.is_err_and(|error| error.is_unavailable()));
    sleep(Duration::from_secs(21)).await;
    assert!(stale.get(&42).await.is_err_and(|error| error.is_unavailable()), "not for ever");
    db.start();
    node.until_coherent().await.expect("comes back");
    assert_eq!(read(&fails).await, "Ada");
}

#[tokio::test(start_paused = true)]
async fn an_audit_finds_what_no_message_told() {
    let (db, users) = ada();
    let node = db.node().await;
    let options = TableOptions::default().audit(1000);
    let table: Table<i64, User> = node.table_with(USERS, options).await.expect("opens");
    let mut events = node.subscribe();
    read(&table).await;
    for _ in 0..50 {
        sleep(ms(100)).await;
        read(&table).await;
    }
    assert!(so_far(&mut events).await.is_empty(), "nothing is wrong");
    users.put_untold(&42, user("Grace"));
    let mut seen = Vec::new();
    for _ in 0..50 {
        sleep(ms(100)).await;
        read(&table).await;
        seen.extend(so_far(&mut events).await);
    }
    assert!(matches!(&seen[..], [Event::Incoherent { table, .. }] if table == USERS), "{seen:?}");
    assert_eq!(read(&table).await, "Grace");
}

#[tokio::test(start_paused = true)]
async fn rows_are_warmed_up_and_counted() {
    let (db, users) = ada();
    users.put_all((0..10).map(|id| (id, user("some"))));
    let node = db.node().await;
    let options = TableOptions::default().bytes(1 << 20);
    let table: Table<i64, User> = node.table_with(USERS, options).await.expect("opens");
    let progress = table.warm_up(WarmUp::keys(0..10)).finished().await;
    assert_eq!((progress.loaded, progress.failed), (10, 0));
    assert!((0..10).all(|id| table.peek(&id).is_known()));
    let stats = table.stats();
    assert_eq!((stats.entries, stats.hits), (10, 0), "{stats:?}");
    let by_query = table.warm_up(WarmUp::query("select id from users")).finished().await;
    assert!(by_query.error.is_some_and(|error| error.contains("no database")), "there is no SQL");
}

#[tokio::test(start_paused = true)]
async fn caching_can_be_switched_off() {
    let (db, _) = ada();
    let mut config = testing::config();
    config.caching = false;
    let node = db.node_with(config).await.expect("starts");
    let table = cached(&node).await;
    assert_eq!((read(&table).await.as_str(), held(&table)), ("Ada", None));
    assert_eq!(why(&node), Some(Reason::SwitchedOff));
    node.set_caching(true);
    assert_eq!(read(&table).await, "Ada");
    assert!(held(&table).is_some());
    node.set_caching(false);
    assert_eq!(held(&table), None);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_shut_down_is_closed() {
    let (db, _) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    read(&table).await;
    let began = Instant::now();
    node.shutdown().await;
    assert!(began.elapsed() < ms(100));
    assert_eq!(why(&node), Some(Reason::ShutDown));
    assert_eq!(held(&table), None);
    assert!(node.barrier().await.is_err_and(|error| error.is_closed()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_time_and_threads_will_do_as_well() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    for n in 0..20 {
        read(&table).await;
        users.put(42, user(&n.to_string()));
        node.barrier().await.expect("a fence comes back");
        assert_eq!(read(&table).await, n.to_string());
    }
    // From a thread that knows no runtime.
    let from_outside = std::thread::spawn({
        let (table, users) = (table.clone(), users.clone());
        move || {
            users.put(42, user("outside"));
            table.stats().hits
        }
    });
    from_outside.join().expect("ends");
    node.barrier().await.expect("a fence comes back");
    assert_eq!(read(&table).await, "outside");
    node.shutdown().await;
}
