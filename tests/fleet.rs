//! Who is there: nodes that ask each other, those that do not answer, and what anybody may send on their channel.

use std::{
    sync::{Condvar, Mutex},
    time::Duration,
};

use rowcache::{Config, Event, Fleet, FleetNode, Node, NodeReport, Table, testing};
use uuid::Uuid;

use crate::{
    fixture::{Users, event, migrated, name, users, users_db, users_server},
    support::{
        PATIENCE, TestDb, Version, connect, eventually,
        proxy::{Direction, Flow, Proxy},
    },
};

/// As long as is waited for somebody who does not answer, on purpose.
const SHORT: Duration = Duration::from_millis(300);

fn named(db: &TestDb, name: &str) -> Config {
    let mut config = Config::from_url(&db.url).expect("a good URL");
    config.name = Some(name.into());
    config
}

/// The same, and nothing is late for as long as a test lasts.
fn patient(db: &TestDb, name: &str) -> Config {
    let mut config = named(db, name);
    (config.beat_timeout, config.lease) = (PATIENCE, 2 * PATIENCE);
    config
}

async fn start(config: Config) -> (Node, Users) {
    let node = Node::start(config).await.expect("starts");
    let users = users(&node).await;
    (node, users)
}

/// Who answered, by name; and who did not.
fn called(fleet: &Fleet) -> (Vec<&str>, Vec<&str>) {
    fn names<'a>(nodes: impl Iterator<Item = &'a FleetNode>) -> Vec<&'a str> {
        nodes.map(|node| node.name.as_str()).collect()
    }
    (names(fleet.nodes.iter().filter(|node| node.report.is_some())), names(fleet.silent()))
}

/// Asks, and does not wait long for those who do not answer; again, until these have.
async fn soon(asking: &Node, answer: &[&str]) -> Fleet {
    let fleet = Mutex::new(None);
    eventually("they answer", async || {
        let last = asking.fleet(SHORT).await.expect("asks");
        let all = answer.iter().all(|name| called(&last).0.contains(name));
        *fleet.lock().unwrap() = Some(last);
        all
    })
    .await;
    fleet.into_inner().unwrap().expect("asked")
}

fn report<'a>(fleet: &'a Fleet, name: &str) -> &'a NodeReport {
    let node = fleet.nodes.iter().find(|node| node.name == name).unwrap_or_else(|| panic!("no {name} in {fleet:#?}"));
    node.report.as_ref().unwrap_or_else(|| panic!("{name} is silent: {fleet:#?}"))
}

fn question(nonce: Uuid) -> String {
    format!(r#"{{"v":1,"ask":"{nonce}"}}"#)
}

fn answer_channel(nonce: Uuid) -> String {
    format!("rowcache_fleet_{}", nonce.simple())
}

async fn send(db: &TestDb, channel: &str, payload: &str) {
    db.client().await.execute("select pg_notify($1, $2)", &[&channel, &payload]).await.expect("is sent");
}

/// The URL for another role, which may log in and nothing else.
async fn as_a_role(db: &TestDb) -> String {
    let role = format!("{}_app", &db.name[..db.name.len().min(50)]);
    db.execute(&format!("create role {role} login; grant select on all tables in schema public to {role}")).await;
    let mut url = url::Url::parse(&db.url).expect("a URL");
    url.set_username(&role).expect("has a host");
    url.into()
}

/// Whether rows that are forgotten cannot be dropped, so that an applier stands still: by id of the row.
static STUCK: [(Mutex<bool>, Condvar); 3] = [const { (Mutex::new(false), Condvar::new()) }; 3];

/// A row whose end takes as long as somebody wants.
#[derive(sqlx::FromRow)]
struct Slow {
    id: i64,
}

impl Drop for Slow {
    fn drop(&mut self) {
        if let Some((stuck, freed)) = usize::try_from(self.id).ok().and_then(|id| STUCK.get(id)) {
            tokio::task::block_in_place(|| drop(freed.wait_while(stuck.lock().unwrap(), |stuck| *stuck)));
        }
    }
}

/// Until this is dropped, the row with this id is stuck.
struct Stuck(usize);

impl Stuck {
    fn new(id: i64) -> Self {
        let id = usize::try_from(id).expect("small");
        *STUCK[id].0.lock().unwrap() = true;
        Self(id)
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        let (stuck, freed) = &STUCK[self.0];
        *stuck.lock().unwrap() = false;
        freed.notify_all();
    }
}

pg_test! {
    async fn nodes_see_each_other(test: Test) {
        let db = users_db(test.version).await;
        db.execute("create table public.empty (id bigint primary key); select rowcache.track('public.empty')").await;
        let mut config = named(&db, "one");
        config.address = Some("http://one:8080".into());
        let (one, ones) = start(config).await;
        let (two, twos) = start(named(&db, "two")).await;
        // Its name is so long that its role would not fit.
        let long = "a name that is much longer than what a session can have, and has an ü in it";
        let (three, _) = start(named(&db, long)).await;
        let _empty: Table<i64, (i64,)> = one.table("public.empty").await.expect("opens");
        for id in [1, 1, 1, 2, 99] {
            name(&ones, id).await;
        }
        name(&twos, 7).await;

        let fleet = one.fleet(PATIENCE).await.expect("asks");
        assert_eq!(called(&fleet), (vec![long, "one", "two"], vec![]), "{fleet:#?}");
        let told = report(&fleet, "one");
        assert_eq!((told.process, told.address.as_deref()), (std::process::id(), Some("http://one:8080")));
        assert!(told.is_coherent && told.reason.is_none() && told.gaps == 0 && !told.host.is_empty(), "{told:?}");
        assert!(told.as_of.is_some() && told.uptime < 4 * PATIENCE && told.version == env!("CARGO_PKG_VERSION"), "{told:?}");
        assert_eq!(told.staleness_bound, named(&db, "").staleness_bound());
        let tables: Vec<_> = told.tables.iter().map(|it| (&*it.name, it.is_coherent, it.entries, it.gets, it.hits)).collect();
        assert_eq!(tables, [("public.users", true, 3, 5, 2), ("public.empty", true, 0, 0, 0)]);
        let (users, stats) = (&told.tables[0], ones.stats());
        assert_eq!((users.used, users.capacity, told.tables_left_out), (stats.used, stats.capacity, 0));
        assert_eq!(report(&fleet, "two").tables[0].gets, 1);
        let ids: std::collections::HashSet<_> = fleet.nodes.iter().map(|node| node.report.as_ref().unwrap().id).collect();
        assert_eq!(ids.len(), 3);
        assert_eq!(fleet.nodes.iter().map(|node| node.is_this).collect::<Vec<_>>(), [false, true, false]);
        assert!(fleet.nodes.iter().all(|node| node.connected.is_some() && node.client.as_deref() == Some("127.0.0.1")), "{fleet:#?}");

        // Their sessions are the ones that the server knows, and who asks is none.
        let sessions = "select array_agg(pid order by pid), bool_or(application_name like '%(asking)') from pg_stat_activity
            where datname = current_database() and application_name ~ '\\((listener|asking)\\)$'";
        let client = db.client().await;
        let mut pids: Vec<_> = fleet.nodes.iter().map(|node| node.listener_pid).collect();
        pids.sort_unstable();
        eventually("who asked has gone", async || {
            let row = client.query_one(sessions, &[]).await.expect("reads");
            row.get::<_, Vec<i32>>(0) == pids && !row.get::<_, bool>(1)
        })
        .await;

        let mut others = [two.fleet(PATIENCE).await.expect("asks"), Fleet::ask(&named(&db, "x"), PATIENCE).await.expect("asks")];
        let this = |fleet: &Fleet| fleet.nodes.iter().map(|node| node.is_this).collect::<Vec<_>>();
        assert_eq!(others.each_ref().map(this), [vec![false, false, true], vec![false; 3]]);
        for fleet in &mut others {
            assert_eq!(called(fleet).0.len(), 3);
        }
        three.shutdown().await;
        eventually("its session has gone", async || called(&two.fleet(SHORT).await.expect("asks")).0 == ["one", "two"]).await;
        two.shutdown().await;
        assert!(two.fleet(PATIENCE).await.expect_err("it was shut down").is_closed());
    }

    async fn who_stands_still_is_silent(test: Test) {
        let db = users_db(test.version).await;
        let proxy = Proxy::start(db.port).await;
        let mut config = patient(&db, "cut off");
        config.listener = Config::from_url(&proxy.url(&db.url)).expect("a good URL").listener;
        let (_cut_off, _) = start(config).await;
        let (asking, _) = start(patient(&db, "asking")).await;
        let mut config = patient(&db, "discreet");
        config.answers = false;
        let (discreet, _) = start(config).await;
        let fleet = soon(&asking, &["asking", "cut off"]).await;
        assert_eq!((called(&fleet).1, fleet.deadline), (vec!["discreet"], SHORT));
        assert_eq!(called(&soon(&discreet, &["asking", "cut off"]).await).1, ["discreet"], "it may ask, and does not answer");
        proxy.set(Direction::Down, Flow::Swallow);
        assert_eq!(called(&soon(&asking, &["asking"]).await).1, ["cut off", "discreet"]);
        assert_eq!(asking.fleet(Duration::ZERO).await.expect("asks").nodes.len(), 3, "the list does not need an answer");
    }

    async fn nobody_is_there_or_can_be_heard(test: Test) {
        let db = migrated(test.version).await;
        let fleet = Fleet::ask(&named(&db, "x"), PATIENCE).await.expect("asks");
        assert_eq!(fleet.nodes, []);
        let mut pooled = named(&db, "x");
        (pooled.listen, pooled.pooler) = (false, true);
        assert!(Fleet::ask(&pooled, PATIENCE).await.expect_err("cannot").is_pooler());
    }

    // The argument is an order: `clear` has sent its message when it returns, the question is sent after it, and an answer
    // only when the question has been applied, in its turn.
    async fn who_answers_has_forgotten(test: Test) {
        let db = users_db(test.version).await;
        let mut nodes = Vec::new();
        for n in 0..3 {
            nodes.push(start(patient(&db, &format!("node {n}"))).await);
        }
        for round in 0..30 {
            for (_, users) in &nodes {
                for id in 1..=5 {
                    name(users, id).await;
                }
            }
            let (asking, users) = &nodes[round % 3];
            users.clear().await.expect("all are told");
            let fleet = asking.fleet(PATIENCE).await.expect("asks");
            assert_eq!(called(&fleet).0.len(), 3, "{fleet:#?}");
            for (n, (_, users)) in nodes.iter().enumerate() {
                assert!((1..=5).all(|id| !users.peek(&id).is_known()), "node {n} in round {round}");
            }
        }
    }

    async fn who_has_not_applied_all_does_not_answer(test: Test) {
        let db = users_db(test.version).await;
        let (asking, users) = start(patient(&db, "asking")).await;
        let slow = Node::start(patient(&db, "slow")).await.expect("starts");
        let rows: Table<i64, Slow> = slow.table("public.users").await.expect("opens");
        let id = match test.version { Version::V15 => 1, Version::V18 => 2 };
        for id in [id, 9] {
            assert!(rows.get(&id).await.expect("loads").is_some());
        }
        let stuck = Stuck::new(id);
        db.execute(&format!("update public.users set name = 'new' where id = {id}")).await;
        users.invalidate(&9).await.expect("all are told");
        assert_eq!(called(&soon(&asking, &["asking"]).await).1, ["slow"], "its applier stands still");
        assert!(rows.peek(&9).is_known());
        drop(stuck);
        let fleet = asking.fleet(PATIENCE).await.expect("asks");
        assert_eq!(called(&fleet).0, ["asking", "slow"]);
        assert!(!rows.peek(&id).is_known() && !rows.peek(&9).is_known());
    }

    // Between two polls a question, which comes by NOTIFY, is faster than what the log tells.
    async fn who_answers_has_read_the_log(test: Test) {
        let db = users_db(test.version).await;
        db.execute("select rowcache.track('public.users', via => 'log')").await;
        let lazy = |name| {
            let mut config = patient(&db, name);
            (config.beat, config.poll_min, config.poll_max) = (PATIENCE / 2, PATIENCE, PATIENCE);
            config
        };
        let (asking, users) = start(lazy("asking")).await;
        let (_other, others) = start(lazy("other")).await;
        for _ in 0..3 {
            name(&others, 1).await;
            users.clear().await.expect("all are told");
            let fleet = asking.fleet(PATIENCE).await.expect("asks");
            assert_eq!(called(&fleet).0, ["asking", "other"]);
            assert!(!others.peek(&1).is_known());
        }
    }

    async fn garbage_harms_nothing(test: Test) {
        let db = users_db(test.version).await;
        let (node, users) = start(patient(&db, "node")).await;
        name(&users, 1).await;
        let before = users.stats();
        let client = db.client().await;
        for payload in [
            "", "garbage", "{", "[]", r#"{"v":1}"#, r#"{"v":1,"all":true}"#, r#"{"v":1,"t":"public.users","all":true}"#,
            r#"{"v":1,"t":"public.users","k":[1]}"#, r#"{"v":1,"ask":"no uuid"}"#, r#"{"v":2,"ask":"00000000-0000-0000-0000-000000000001"}"#,
            &"x".repeat(7999),
        ] {
            client.execute("select pg_notify('rowcache_fleet', $1)", &[&payload]).await.expect("is sent");
        }
        // Many questions in one transaction, which nobody waits for.
        let many = r#"select pg_notify('rowcache_fleet', '{"v":1,"ask":"' || gen_random_uuid() || '"}') from generate_series(1, 5000)"#;
        client.execute(many, &[]).await.expect("are sent");
        node.barrier().await.expect("coherent");
        assert!(users.peek(&1).is_known());
        assert_eq!((users.stats().clears, users.stats().invalidations), (before.clears, before.invalidations));
        assert_eq!((node.stats().unreadable, node.stats().overflows, node.stats().gaps), (0, 0, 0));
        // It is busy with what the flood has left it to answer, which is little.
        let second = Duration::from_secs(1);
        eventually("it answers again", async || called(&node.fleet(second).await.expect("asks")).0 == ["node"]).await;
    }

    async fn made_up_answers_are_no_more_than_that(test: Test) {
        let db = users_db(test.version).await;
        let (node, _) = start(patient(&db, "node")).await;
        // It is on the list, so that its answer is waited for, and all that it sends before.
        let stranger = connect(&format!("{}?application_name=stranger+%28listener%29", db.url).replace('+', "%20")).await;
        let pid = stranger.backend_pid().await;
        let mut questions = db.listen("rowcache_fleet").await;
        let asked = tokio::spawn({
            let node = node.clone();
            async move { node.fleet(PATIENCE).await.expect("asks") }
        });
        let heard = questions.next().await;
        let nonce = heard.payload().split('"').nth(5).expect("it has one").parse().expect("a uuid");
        let answer = |pid: i32, name: &str| {
            format!(
                r#"{{"v":1,"id":"{nonce}","name":"{name}","pid":{pid},"spare":null,"version":"9","host":"h","process":1,"address":null,
                    "up":1,"coherent":true,"as_of":0,"bound":1,"why":null,"gaps":0,"tables":[],"left_out":0}}"#
            )
        };
        for payload in ["", "garbage", "{}", &answer(-7, r"a\u001b[2Jb"), &answer(pid, "first"), &answer(pid, "second")] {
            stranger.execute("select pg_notify($1, $2)", &[&answer_channel(nonce), &payload]).await.expect("is sent");
        }
        let fleet = asked.await.expect("no panic");
        assert_eq!(called(&fleet), (vec!["a\u{fffd}[2Jb", "first", "node"], vec![]), "{fleet:#?}");
        assert_eq!((fleet.nodes[0].listener_pid, fleet.nodes[0].connected), (-7, None));
    }

    async fn a_question_that_comes_twice_is_answered_once(test: Test) {
        let db = users_db(test.version).await;
        let mut config = patient(&db, "node");
        // No fence, after the one that made it covered: the spare keeps what it hears until there is one.
        (config.redundant_listener, config.beat) = (true, PATIENCE / 2);
        let (node, users) = start(config).await;
        eventually("the spare covers", async || node.is_covered()).await;
        let fleet = node.fleet(PATIENCE).await.expect("asks");
        assert_eq!((called(&fleet).0, fleet.nodes.len()), (vec!["node"], 1), "the spare is no node: {fleet:#?}");
        let first = fleet.nodes[0].listener_pid;

        let [by_both_lines, by_a_stranger, marker] = [(); 3].map(|()| Uuid::new_v4());
        let (mut once, mut again) = (db.listen(&answer_channel(by_both_lines)).await, db.listen(&answer_channel(by_a_stranger)).await);
        let mut markers = db.listen(&answer_channel(marker)).await;
        let mut events = node.subscribe();
        for nonce in [by_both_lines, by_a_stranger, by_a_stranger] {
            send(&db, "rowcache_fleet", &question(nonce)).await;
        }
        once.next().await;
        again.next().await;
        db.execute(&format!("select pg_terminate_backend({first})")).await;
        event(&mut events, "a handoff", |event| matches!(event, Event::Handoff(_))).await;
        send(&db, "rowcache_fleet", &question(marker)).await;
        markers.next().await;
        assert_eq!((once.all_so_far().await, again.all_so_far().await), (Vec::new(), Vec::new()));

        let fleet = node.fleet(PATIENCE).await.expect("asks");
        assert_eq!(called(&fleet).0, ["node"]);
        assert!(fleet.nodes[0].listener_pid != first && fleet.nodes[0].is_this, "{fleet:#?}");
        assert_eq!((users.stats().clears, node.stats().gaps), (0, 0));
    }

    async fn a_role_that_may_see_nothing_sees_who_is_there(test: Test) {
        let db = users_db(test.version).await;
        let (_node, _) = start(named(&db, "node")).await;
        let mut config = Config::from_url(&as_a_role(&db).await).expect("a good URL");
        config.name = Some("of another role".into());
        let fleet = Fleet::ask(&config, PATIENCE).await.expect("asks");
        let node = &fleet.nodes[0];
        assert_eq!((called(&fleet).0, &node.client, node.connected), (vec!["node"], &None, None));
        assert!(report(&fleet, "node").is_coherent && node.listener_pid > 0);
        // A node of this role answers with what its pool may do.
        let (other, _) = start(config).await;
        assert_eq!(called(&other.fleet(PATIENCE).await.expect("asks")).0, ["node", "of another role"]);
    }

    async fn what_is_wrong_with_a_node_is_told(test: Test) {
        let db = users_db(test.version).await;
        let (asking, _) = start(named(&db, "asking")).await;
        let (off, users) = start(named(&db, "off")).await;
        off.set_caching(false);
        let fleet = asking.fleet(PATIENCE).await.expect("asks");
        let told = report(&fleet, "off");
        assert!(!told.is_coherent && told.reason.as_deref().is_some_and(|why| why.contains("caching")), "{told:?}");
        assert!(!told.tables[0].is_coherent);
        off.set_caching(true);
        test.logs.allow("the triggers or the definition of this table changed");
        db.execute("alter table public.users disable trigger user").await;
        eventually("the table is in doubt", async || !matches!(users.status(), rowcache::Status::Coherent { .. })).await;
        let fleet = asking.fleet(PATIENCE).await.expect("asks");
        let told = report(&fleet, "off");
        assert!(told.is_coherent && !told.tables[0].is_coherent, "{told:?}");
    }

    async fn a_standby_cannot_be_asked(test: Test) {
        let (mut primary, db) = users_server(test.version, &[]).await;
        let standby = primary.standby().await.expect("makes a standby");
        let config = Config::from_url(&standby.url(&db.name)).expect("a good URL");
        let error = Fleet::ask(&config, PATIENCE).await.expect_err("there is no LISTEN");
        assert!(error.is_standby() && error.to_string().contains("connect to the primary"), "{error}");
    }

    async fn one_node_forgets_alone(test: Test) {
        let db = users_db(test.version).await;
        let (node, here) = start(named(&db, "here")).await;
        let (other, there) = start(named(&db, "there")).await;
        for users in [&here, &there] {
            name(users, 1).await;
            name(users, 2).await;
        }
        here.forget(&1);
        assert!(!here.peek(&1).is_known() && here.peek(&2).is_known());
        assert!(here.explain(&1).to_string().contains("forgotten"), "{}", here.explain(&1));
        name(&here, 1).await;
        here.forget_all();
        assert!(!here.peek(&1).is_known() && !here.peek(&2).is_known());
        node.barrier().await.expect("coherent");
        other.barrier().await.expect("coherent");
        assert!(there.peek(&1).is_known() && there.peek(&2).is_known());
        assert_eq!((there.stats().invalidations, there.stats().clears), (0, 0));
    }
}

#[tokio::test]
async fn a_node_of_the_test_kit_is_alone() {
    let node = testing::Database::new().node().await;
    let fleet = node.fleet(PATIENCE).await.expect("asks nobody");
    assert_eq!((called(&fleet).0.len(), fleet.nodes[0].is_this), (1, true));
}
