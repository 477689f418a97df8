//! The test kit: a service's cache without Postgres. Time is paused: nothing here sleeps.

mod chaos;
mod features;
mod opening;

use std::{ops::RangeInclusive, time::Duration};

use rowcache::{
    Cached, Config, Event, Events, Lookup, Node, Reason, Rows, Status, Table, TableOptions, Token,
    testing::{self, Chaos, Database, TestTable},
};
use tokio::time::{Instant, advance, sleep};

#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
struct User {
    name: String,
}

fn user(name: &str) -> User {
    User { name: name.into() }
}

const USERS: &str = "public.users";

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn exactly(time: Duration) -> RangeInclusive<Duration> {
    time..=time
}

/// A database in which 42 is Ada.
fn ada() -> (Database, TestTable<i64, User>) {
    let db = Database::new();
    let users = db.table::<i64, User>(USERS);
    users.put(42, user("Ada"));
    (db, users)
}

async fn cached(node: &Node) -> Table<i64, User> {
    node.table(USERS).await.expect("is registered")
}

fn name(found: Option<&Cached<User>>) -> &str {
    found.map_or("nobody", |user| user.name.as_str())
}

/// Whom a read finds.
async fn read(table: &Table<i64, User>) -> String {
    name(table.get(&42).await.expect("can be read").as_ref()).to_owned()
}

/// Who is held.
fn held(table: &Table<i64, User>) -> Option<String> {
    match table.peek(&42) {
        Lookup::Row(user) => Some(user.name.clone()),
        Lookup::Absent => Some("nobody".into()),
        Lookup::Unknown => None,
    }
}

fn why(node: &Node) -> Option<Reason> {
    match node.status() {
        Status::Bypassed { why, .. } => Some(why),
        _ => None,
    }
}

/// What has happened so far.
async fn so_far(events: &mut Events) -> Vec<Event> {
    let mut all = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout(ms(1), events.recv()).await {
        all.push(event);
    }
    all
}

/// With this lease, and fences that are late only after it.
fn leased(lease: Duration) -> Config {
    let mut config = testing::config();
    config.beat = ms(500);
    config.lease = lease;
    config.beat_timeout = Duration::from_mins(1);
    config
}

#[tokio::test(start_paused = true)]
async fn a_change_is_seen_after_a_barrier() {
    let (db, users) = ada();
    let (node, other) = (db.node().await, db.node().await);
    let (here, there) = (cached(&node).await, cached(&other).await);
    assert_eq!((read(&here).await.as_str(), read(&there).await.as_str()), ("Ada", "Ada"));
    assert_eq!(held(&here).as_deref(), Some("Ada"));

    users.put(42, user("Grace"));
    assert_eq!(held(&here).as_deref(), Some("Ada"), "the message is under way");
    node.barrier().await.expect("a fence comes back");
    assert_eq!(held(&here), None);
    other.barrier().await.expect("a fence comes back");
    assert_eq!((read(&here).await.as_str(), read(&there).await.as_str()), ("Grace", "Grace"));

    users.remove(&42);
    node.barrier().await.expect("a fence comes back");
    assert_eq!(read(&here).await, "nobody");
    assert_eq!(held(&here).as_deref(), Some("nobody"), "that there is none is held, too");
    assert_eq!(here.stats().hits, 0);
    assert_eq!(read(&here).await, "nobody");
    assert_eq!(here.stats().hits, 1);
}

#[tokio::test(start_paused = true)]
async fn an_entry_expires_when_time_is_advanced() {
    let (db, users) = ada();
    let node = db.node().await;
    let options = TableOptions::default().ttl(ms(2000)).jitter(0.0);
    let table: Table<i64, User> = node.table_with(USERS, options).await.expect("opens");
    assert_eq!(read(&table).await, "Ada");
    users.put_untold(&42, user("Grace"));

    advance(ms(1900)).await;
    node.barrier().await.expect("a fence comes back");
    assert_eq!(held(&table).as_deref(), Some("Ada"), "its time has not come");
    advance(ms(200)).await;
    node.barrier().await.expect("a fence comes back");
    assert_eq!(held(&table), None);
    assert_eq!(read(&table).await, "Grace");
    assert_eq!(node.stats().gaps, 0);
}

#[tokio::test(start_paused = true)]
async fn a_long_sleep_is_no_gap() {
    let (db, _) = ada();
    let node = db.node().await;
    let options = TableOptions::default().ttl(Duration::from_mins(5)).jitter(0.0);
    let table: Table<i64, User> = node.table_with(USERS, options).await.expect("opens");
    read(&table).await;
    sleep(Duration::from_secs(299)).await;
    assert_eq!(held(&table).as_deref(), Some("Ada"));
    assert_eq!((node.stats().gaps, why(&node)), (0, None));
    let Status::Coherent { as_of, .. } = node.status() else { panic!("{}", node.status()) };
    let age = Instant::now().into_std() - as_of;
    assert!(age <= ms(1010), "moments are of the same time as the test's: {age:?}");
    sleep(ms(1200)).await;
    assert_eq!(held(&table), None);
}

#[tokio::test(start_paused = true)]
async fn a_leap_over_the_lease_is_a_gap() {
    let (db, users) = ada();
    let node = db.node_with(leased(ms(2000))).await.expect("starts");
    let table = cached(&node).await;
    read(&table).await;
    users.put_untold(&42, user("Grace"));
    advance(ms(1900)).await;
    node.barrier().await.expect("the lease has not run out");
    assert_eq!(held(&table).as_deref(), Some("Ada"));

    let mut events = node.subscribe();
    advance(ms(2100)).await;
    assert!(matches!(events.recv().await, Some(Event::Gap(Reason::LeaseExpired))));
    node.until_coherent().await.expect("comes back");
    assert_eq!(held(&table), None, "nothing from before the gap is served");
    assert_eq!(read(&table).await, "Grace");
}

#[tokio::test(start_paused = true)]
async fn a_lease_runs_out_where_the_line_is_silent() {
    let (db, users) = ada();
    let config = leased(ms(2000));
    let bound = config.staleness_bound();
    let node = db.node_with(config).await.expect("starts");
    let table = cached(&node).await;
    read(&table).await;
    node.barrier().await.expect("a fence comes back");
    let fenced = Instant::now();
    db.silence();
    users.put(42, user("Grace"));

    sleep(ms(1900)).await;
    assert_eq!((read(&table).await.as_str(), why(&node)), ("Ada", None), "nobody knows");
    sleep((fenced + bound).duration_since(Instant::now())).await;
    assert_eq!(why(&node), Some(Reason::LeaseExpired));
    assert_eq!(read(&table).await, "Grace");
    node.until_coherent().await.expect("connects again");
    users.put(42, user("Joan"));
    node.barrier().await.expect("the new line carries messages");
    assert_eq!(read(&table).await, "Joan");
}

#[tokio::test(start_paused = true)]
async fn a_disconnection_is_a_gap() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    read(&table).await;
    let mut events = node.subscribe();

    users.put(42, user("Grace")); // Its message is lost with the line.
    db.disconnect();
    assert!(matches!(why(&node), Some(Reason::ConnectionLost(how)) if how.contains("by the test")));
    assert_eq!(held(&table), None);
    assert!(node.barrier().await.is_err_and(|error| error.is_unavailable()));
    assert_eq!(read(&table).await, "Grace");
    assert_eq!(held(&table), None, "nothing is kept in a gap");

    node.until_coherent().await.expect("connects by itself");
    assert_eq!(read(&table).await, "Grace");
    assert_eq!(held(&table).as_deref(), Some("Grace"));
    let seen = so_far(&mut events).await;
    assert!(matches!(seen[..], [Event::Gap(Reason::ConnectionLost(_)), Event::Coherent]), "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_line_that_is_lost_is_opened_again_at_once_and_one_that_is_lost_again_and_again_is_not() {
    let (db, _) = ada();
    let node = db.node().await;
    let mut events = node.subscribe();
    let mut pauses = Vec::new();
    for _ in 0..3 {
        let lost = Instant::now();
        db.disconnect();
        while !matches!(events.recv().await.expect("the node lives"), Event::Coherent) {}
        pauses.push(lost.elapsed());
    }
    // Paused time passes when something is waited for; timers go by whole milliseconds.
    assert!(pauses[0] <= ms(21), "{pauses:?}");
    assert!(pauses[1..].iter().all(|pause| *pause >= ms(20)), "{pauses:?}");
}

#[tokio::test(start_paused = true)]
async fn a_message_that_comes_twice_does_no_harm() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    read(&table).await;
    let mut events = node.subscribe();
    db.chaos(Chaos::seeded(1).duplicate_messages(1.0));
    let token = users.put(42, user("Grace"));
    node.barrier().await.expect("a fence comes back");
    let seen = so_far(&mut events).await;
    assert_eq!(seen.len(), 2, "{seen:?}");
    for event in seen {
        let Event::Change(change) = event else { panic!("{event:?}") };
        assert_eq!(change.xid, Some(token.xid()));
        assert_eq!(change.rows, Rows::Keys(vec![testing::row_key(&42_i64)]));
    }
    assert_eq!(read(&table).await, "Grace");
    assert_eq!(node.stats().gaps, 0);
}

#[tokio::test(start_paused = true)]
async fn a_barrier_waits_for_a_message_that_is_late() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    read(&table).await;
    db.chaos(Chaos::seeded(1).delay_messages(exactly(ms(700))));
    let put = Instant::now();
    users.put(42, user("Grace"));
    assert_eq!(read(&table).await, "Ada");
    sleep(ms(690)).await;
    assert_eq!(read(&table).await, "Ada", "it has not come yet");
    node.barrier().await.expect("a fence comes back");
    assert_eq!(read(&table).await, "Grace");
    let waited = put.elapsed();
    assert!((ms(700)..ms(3000)).contains(&waited), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn messages_that_are_held_arrive_when_they_are_let_go() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    read(&table).await;
    let messages = db.hold_messages();
    users.put(42, user("Grace"));
    let barrier = tokio::spawn({
        let node = node.clone();
        async move { node.barrier().await }
    });
    sleep(ms(500)).await;
    assert!(!barrier.is_finished());
    assert_eq!(read(&table).await, "Ada");
    messages.release();
    barrier.await.expect("runs").expect("the fence comes back");
    assert_eq!(read(&table).await, "Grace");

    // For longer than a fence may take: a gap.
    let _messages = db.hold_messages();
    sleep(ms(4100)).await;
    assert_eq!(why(&node), Some(Reason::BeatLate));
}

#[tokio::test(start_paused = true)]
async fn what_a_change_has_overtaken_is_not_kept() {
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    let loads = db.hold_loads();
    let reader = tokio::spawn({
        let table = table.clone();
        async move { read(&table).await }
    });
    loads.reached(1).await;
    users.put(42, user("Grace"));
    node.barrier().await.expect("a fence comes back");
    let later = tokio::spawn({
        let table = table.clone();
        async move { read(&table).await }
    });
    tokio::task::yield_now().await;
    assert!(!reader.is_finished());
    loads.release();
    assert_eq!(reader.await.expect("runs"), "Ada", "it began before");
    assert_eq!(later.await.expect("runs"), "Grace", "it began after the change was applied");
    assert_eq!(held(&table).as_deref(), Some("Grace"));
}

#[tokio::test(start_paused = true)]
async fn a_load_that_is_held_for_too_long_times_out() {
    let (db, _) = ada();
    let node = db.node().await;
    let options = TableOptions::default().load_timeout(ms(300));
    let table: Table<i64, User> = node.table_with(USERS, options).await.expect("opens");
    let _loads = db.hold_loads();
    let began = Instant::now();
    let error = table.get(&42).await.expect_err("nobody answers");
    assert!(error.is_timeout() && error.to_string().contains("public.users"), "{error}");
    assert_eq!(began.elapsed().as_millis(), 300);
}

#[tokio::test(start_paused = true)]
async fn what_is_held_answers_while_loads_fail() {
    let (db, users) = ada();
    let node = db.node().await;
    let options =
        TableOptions::default().ttl(ms(1000)).jitter(0.0).breaker(None).stale_if_error(Duration::from_secs(10));
    let table: Table<i64, User> = node.table_with(USERS, options).await.expect("opens");
    read(&table).await;
    db.chaos(Chaos::seeded(1).fail_loads(1.0));
    sleep(ms(1200)).await;
    assert_eq!(held(&table), None, "it has expired");
    assert_eq!(read(&table).await, "Ada");
    let loads = table.stats().loads;
    assert!(loads >= 2, "it was tried: {loads}");

    // A row that is known to have changed is not served.
    users.put(42, user("Grace"));
    node.barrier().await.expect("a fence comes back");
    assert!(table.get(&42).await.is_err_and(|error| error.is_unavailable()));
    db.calm();
    assert_eq!(read(&table).await, "Grace");
    db.chaos(Chaos::seeded(1).fail_loads(1.0));
    sleep(ms(11_500)).await;
    assert!(table.get(&42).await.is_err_and(|error| error.is_unavailable()), "not for ever");
}

#[tokio::test(start_paused = true)]
async fn slow_loads_take_their_time() {
    let (db, _) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    db.chaos(Chaos::seeded(1).delay_loads(exactly(ms(250))));
    let began = Instant::now();
    assert_eq!(read(&table).await, "Ada");
    let took = began.elapsed();
    assert!((ms(250)..=ms(252)).contains(&took), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_token_of_a_commit_can_be_waited_for() {
    use rowcache::Freshness::AtLeast;
    let (db, users) = ada();
    let node = db.node().await;
    let table = cached(&node).await;
    read(&table).await;
    db.chaos(Chaos::seeded(1).delay_messages(exactly(ms(50))));
    let token = users.put(42, user("Grace"));
    assert_eq!(read(&table).await, "Ada");
    let found = table.get_with(&42, AtLeast(token)).await.expect("can be read");
    assert_eq!(name(found.as_ref()), "Grace");
    let token: Token = users.put(42, user("Joan")).to_string().parse().expect("a token");
    node.wait_for(token, ms(1000)).await.expect("is applied");
    assert_eq!(read(&table).await, "Joan");

    db.calm();
    db.restart();
    node.until_coherent().await.expect("comes back");
    let error = table.get_with(&42, AtLeast(token)).await.expect_err("of another run of the server");
    assert!(error.is_other_incarnation(), "{error}");
    assert_eq!(read(&table).await, "Joan", "the rows are still there");
}
