//! Values that are no rows: shared by all nodes, and computed once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use rowcache::{Codec, Node, Raw, Share, SharedValues, cli::temp_server::Stop};
use tokio::{
    runtime::Builder,
    sync::{Notify, Semaphore},
};

use crate::{
    fixture::{event, migrate, migrated, node},
    support::{TestDb, database_on, eventually, server},
};

type Permissions = SharedValues<i64, Vec<String>>;

const SECOND: Duration = Duration::from_secs(1);

fn share(node: &Node) -> Share<'_, i64, Vec<String>> {
    node.shared("permissions")
}

async fn open(node: &Node) -> Permissions {
    share(node).open().await.expect("opens")
}

async fn nodes(db: &TestDb, count: usize) -> Vec<Node> {
    let mut nodes = Vec::new();
    for _ in 0..count {
        nodes.push(node(db).await);
    }
    nodes
}

/// A producer that counts its calls, and waits for a turn.
#[derive(Clone)]
struct Producer {
    calls: Arc<AtomicU32>,
    turns: Arc<Semaphore>,
    begun: Arc<Notify>,
}

impl Producer {
    fn new() -> Self {
        Self { calls: Arc::default(), turns: Arc::new(Semaphore::new(0)), begun: Arc::default() }
    }

    fn calls(&self) -> u32 {
        self.calls.load(Ordering::SeqCst)
    }

    async fn produce(self) -> Vec<String> {
        let n = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        self.begun.notify_one();
        self.turns.acquire().await.expect("open").forget();
        vec![format!("of call {n}")]
    }

    fn ask(
        &self,
        permissions: &Permissions,
        user: i64,
    ) -> tokio::task::JoinHandle<Result<Vec<String>, rowcache::Error>> {
        let (permissions, producer) = (permissions.clone(), self.clone());
        tokio::spawn(async move {
            let value = permissions.get_or_store(&user, || producer.produce()).await?;
            Ok((*value).clone())
        })
    }
}

/// A codec that panics.
struct Bad;

impl Codec<u8> for Bad {
    fn encode(value: &u8) -> Result<Vec<u8>, rowcache::BoxError> {
        assert_ne!(*value, 9, "not this one");
        Ok(vec![1])
    }

    fn decode(_: &[u8]) -> Result<u8, rowcache::BoxError> {
        panic!("no")
    }
}

fn of_call(n: u32) -> Vec<String> {
    vec![format!("of call {n}")]
}

async fn held(permissions: &Permissions, user: i64) -> Option<Vec<String>> {
    permissions.get(&user).await.expect("loads").map(|value| (*value).clone())
}

pg_test! {
    async fn one_node_computes_for_all_who_ask(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 8).await;
        let producer = Producer::new();
        let mut asked = Vec::new();
        for node in &nodes {
            let permissions = open(node).await;
            asked.extend((0..125).map(|_| producer.ask(&permissions, 42)));
        }
        producer.begun.notified().await;
        producer.turns.add_permits(1);
        for answer in asked {
            assert_eq!(answer.await.expect("no panic").expect("computed"), of_call(1));
        }
        assert_eq!(producer.calls(), 1);
        // A node that joins later finds it.
        let later = open(&node(&db).await).await;
        assert_eq!(held(&later, 42).await, Some(of_call(1)));
        assert!(later.exists(&42).await.expect("loads") && !later.exists(&43).await.expect("loads"));
        let rows: i64 = db.client().await.query_one("select count(*) from rowcache.shared_permissions where lease is not null", &[]).await.expect("counts").get(0);
        assert_eq!(rows, 0, "the lease was given back");
    }

    async fn writes_and_deletes_reach_every_node(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 2).await;
        let [here, there] = [open(&nodes[0]).await, open(&nodes[1]).await];
        assert_eq!((held(&here, 1).await, held(&there, 1).await), (None, None));
        let token = here.put(&1, &of_call(7)).await.expect("stores");
        assert_eq!(held(&here, 1).await, Some(of_call(7)), "at once");
        nodes[0].barrier().await.expect("coherent");
        assert_eq!(held(&here, 1).await, Some(of_call(7)), "and its own message undoes nothing");
        let with = rowcache::Freshness::AtLeast(token);
        assert_eq!(there.get_with(&1, with).await.expect("loads").as_deref(), Some(&of_call(7)));
        assert!(there.delete(&1).await.expect("deletes") && !there.delete(&1).await.expect("deletes"));
        assert_eq!(held(&there, 1).await, None, "at once");
        nodes[0].barrier().await.expect("coherent");
        assert_eq!(held(&here, 1).await, None);

        // By anybody, in SQL.
        db.execute("insert into rowcache.shared_permissions (key, value) values (2, '[\"root\"]')").await;
        nodes[0].barrier().await.expect("coherent");
        assert_eq!(held(&here, 2).await, Some(vec!["root".into()]));
        for user in 3..=5 {
            here.put(&user, &vec![]).await.expect("stores");
        }
        assert_eq!(held(&there, 3).await, Some(vec![]));
        assert_eq!(there.clear().await.expect("clears"), 4);
        assert_eq!(held(&there, 3).await, None);
        nodes[0].barrier().await.expect("coherent");
        assert_eq!((held(&here, 2).await, held(&here, 3).await), (None, None));
    }

    async fn a_delete_while_the_producer_runs_wins(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 2).await;
        let [here, there] = [open(&nodes[0]).await, open(&nodes[1]).await];
        for (n, delete) in ["delete from rowcache.shared_permissions where key = 1", "truncate rowcache.shared_permissions"].into_iter().enumerate() {
            let producer = Producer::new();
            let first = producer.ask(&here, 1);
            producer.begun.notified().await;
            db.execute(delete).await;
            nodes[0].barrier().await.expect("coherent");
            // These ask after the delete.
            let joined = producer.ask(&here, 1);
            let elsewhere = producer.ask(&there, 1);
            producer.begun.notified().await;
            producer.turns.add_permits(2);
            assert_eq!(first.await.expect("no panic").expect("computed"), of_call(1), "he had asked before");
            assert_eq!(joined.await.expect("no panic").expect("computed"), of_call(2));
            assert_eq!(elsewhere.await.expect("no panic").expect("computed"), of_call(2));
            assert_eq!((held(&here, 1).await, held(&there, 1).await), (Some(of_call(2)), Some(of_call(2))));
            assert_eq!(here.stats().unkept, u64::try_from(n).expect("few") + 1);
            here.delete(&1).await.expect("deletes");
        }
    }

    async fn a_value_that_is_written_while_the_producer_runs_stays(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 2).await;
        let [here, there] = [open(&nodes[0]).await, open(&nodes[1]).await];
        let producer = Producer::new();
        let first = producer.ask(&here, 1);
        producer.begun.notified().await;
        let joined = producer.ask(&there, 1);
        there.put(&1, &of_call(99)).await.expect("stores");
        assert_eq!(joined.await.expect("no panic").expect("loads"), of_call(99), "who waits is told");
        producer.turns.add_permits(1);
        assert_eq!(first.await.expect("no panic").expect("computed"), of_call(1));
        nodes[0].barrier().await.expect("coherent");
        assert_eq!((held(&here, 1).await, held(&there, 1).await), (Some(of_call(99)), Some(of_call(99))));
        assert_eq!(producer.calls(), 1);

        // By somebody who knows nothing of leases.
        let first = producer.ask(&here, 2);
        producer.begun.notified().await;
        db.execute("insert into rowcache.shared_permissions (key, value) values (2, '[\"root\"]') on conflict (key) do update set value = excluded.value").await;
        producer.turns.add_permits(1);
        assert_eq!(first.await.expect("no panic").expect("computed"), of_call(2));
        nodes[0].barrier().await.expect("coherent");
        assert_eq!((held(&here, 2).await, held(&there, 2).await), (Some(vec!["root".into()]), Some(vec!["root".into()])));
    }

    async fn errors_go_to_those_who_waited_and_are_not_kept(test: Test) {
        let db = migrated(test.version).await;
        let node = node(&db).await;
        let permissions = open(&node).await;
        let producer = Producer::new();
        let fail = |permissions: &Permissions| {
            let (permissions, producer) = (permissions.clone(), producer.clone());
            tokio::spawn(async move {
                let answer = permissions.fetch_or_store(&1, || async move {
                    producer.produce().await;
                    Err::<Vec<String>, _>("the backend is down")
                });
                answer.await.map(|value| (*value).clone())
            })
        };
        let asked = [fail(&permissions), fail(&permissions), fail(&permissions)];
        producer.begun.notified().await;
        // Each looks twice, and then waits.
        eventually("all have looked", async || permissions.cache_stats().gets >= 6).await;
        producer.turns.add_permits(3);
        for answer in asked {
            let error = answer.await.expect("no panic").expect_err("it failed");
            assert!(error.is_loader() && error.to_string().contains("shared:permissions 1"), "{error}");
        }
        assert_eq!(held(&permissions, 1).await, None);
        let panics = permissions.get_or_store(&1, || async { panic!("ouch") }).await.expect_err("it panicked");
        assert!(panics.is_loader() && panics.to_string().contains("ouch"), "{panics}");
        let hasty = share(&node).produce_timeout(SECOND).open().await.expect("opens");
        let hangs = hasty.get_or_store(&1, std::future::pending).await.expect_err("it hangs");
        assert!(hangs.is_timeout() && hangs.to_string().contains("`produce_timeout`"), "{hangs}");
        // The lease was given back each time.
        let leases: i64 = db.client().await.query_one("select count(*) from rowcache.shared_permissions", &[]).await.expect("counts").get(0);
        assert_eq!(leases, 0);
        let value = permissions.get_or_store(&1, || async { of_call(5) }).await.expect("computed");
        assert_eq!((*value).clone(), of_call(5));
        let stats = permissions.stats();
        assert_eq!(stats.produced, 1);
        assert!(stats.failed >= 3, "{stats:?}");
    }

    async fn who_waits_for_one_who_fails_takes_over(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 2).await;
        let [here, there] = [open(&nodes[0]).await, open(&nodes[1]).await];
        let fails = Producer::new();
        let first = tokio::spawn({
            let (here, fails) = (here.clone(), fails.clone());
            async move {
                let failing = async move || {
                    fails.produce().await;
                    Err::<Vec<String>, _>("no")
                };
                here.fetch_or_store(&1, failing).await.map(drop)
            }
        });
        fails.begun.notified().await;
        let works = Producer::new();
        let second = works.ask(&there, 1);
        works.turns.add_permits(1);
        eventually("he waits", async || there.explain(&1).to_string().contains("absent")).await;
        assert_eq!(works.calls(), 0);
        fails.turns.add_permits(1);
        first.await.expect("no panic").expect_err("it failed");
        assert_eq!(second.await.expect("no panic").expect("computed"), of_call(1));
    }

    async fn a_lease_is_renewed_for_as_long_as_its_node_lives(test: Test) {
        let db = migrated(test.version).await;
        let living = node(&db).await;
        let there = share(&living).lease(3 * SECOND).open().await.expect("opens");
        let producer = Producer::new();
        // A node with a runtime of its own, which ends with all that runs on it.
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("starts");
        let (url, slow) = (db.url.clone(), producer.clone());
        runtime.spawn(async move {
            let node = Node::connect(&url).await.expect("starts");
            let here = share(&node).lease(3 * SECOND).open().await.expect("opens");
            here.get_or_store(&1, || slow.produce()).await.expect("computed");
        });
        producer.begun.notified().await;
        let waits = Producer::new();
        let second = waits.ask(&there, 1);
        waits.turns.add_permits(1);
        let client = db.client().await;
        let until = async || -> String {
            client.query_one("select lease_until::text from rowcache.shared_permissions", &[]).await.expect("a lease").get(0)
        };
        for _ in 0..4 {
            let before = until().await;
            eventually("it is renewed", async || until().await != before).await;
        }
        assert_eq!(waits.calls(), 0, "nobody else computes while it is");
        runtime.shutdown_background();
        assert_eq!(second.await.expect("no panic").expect("computed"), of_call(1));
        assert_eq!((waits.calls(), producer.calls()), (1, 1));
    }

    async fn values_of_any_size(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 2).await;
        let blobs = async |node: &Node| {
            let share = node.shared::<String, Vec<u8>>("blobs").codec::<Raw>().value_bytes_max(5 << 20);
            share.open().await.expect("opens")
        };
        let [here, there] = [blobs(&nodes[0]).await, blobs(&nodes[1]).await];
        for length in [0, 1, 8 << 10, 5 << 20] {
            let name = format!("of {length}");
            let blob = vec![7; length];
            let stored = here.get_or_store(&name, { let blob = blob.clone(); || async { blob } }).await.expect("stores");
            assert_eq!(*stored, blob);
            assert_eq!(there.get(&name).await.expect("loads").as_deref(), Some(&blob));
        }
        let too_large = vec![7; (5 << 20) + 1];
        let error = here.put(&"large".into(), &too_large).await.expect_err("too large");
        assert!(error.is_value() && error.to_string().contains("`value_bytes_max`"), "{error}");
        let error = here.get_or_store(&"large".into(), || async { too_large }).await.expect_err("too large");
        assert!(error.is_value(), "{error}");
        assert!(!there.exists(&"large".into()).await.expect("loads"));
    }

    async fn what_cannot_be_decoded_is_missing(test: Test) {
        let db = migrated(test.version).await;
        let node = node(&db).await;
        let permissions = open(&node).await;
        for garbage in ["'{'", "'\\xff'", "'\"another type\"'"] {
            db.execute(&format!("insert into rowcache.shared_permissions (key, value) values (1, {garbage}) on conflict (key) do update set value = excluded.value, written_at = clock_timestamp()")).await;
            node.barrier().await.expect("coherent");
            assert_eq!(held(&permissions, 1).await, None);
            let value = permissions.get_or_store(&1, || async { of_call(1) }).await.expect("computed");
            assert_eq!(*value, of_call(1));
            assert_eq!(held(&permissions, 1).await, Some(of_call(1)));
        }
        assert!(permissions.stats().unreadable >= 3);
        // A codec that panics is one that cannot.
        let bad = node.shared::<i64, u8>("bad").codec::<Bad>().open().await.expect("opens");
        assert_eq!(*bad.get_or_store(&1, || async { 5 }).await.expect("computed"), 5);
        assert!(bad.get(&1).await.expect("loads").is_none());
        assert_eq!(*bad.get_or_store(&1, || async { 6 }).await.expect("computed"), 6);
        for error in [bad.get_or_store(&2, || async { 9 }).await.expect_err("no bytes"), bad.put(&2, &9).await.expect_err("no bytes")] {
            assert!(error.is_value() && error.to_string().contains("not this one"), "{error}");
        }
        let leases: i64 = db.client().await.query_one("select count(*) from rowcache.shared_bad where lease is not null", &[]).await.expect("counts").get(0);
        assert_eq!(leases, 0, "given back");
    }

    async fn values_expire_and_are_swept(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 2).await;
        let [here, there] = [share(&nodes[0]).ttl(3 * SECOND).open().await.expect("opens"), open(&nodes[1]).await];
        here.put(&1, &of_call(1)).await.expect("stores");
        here.living(None, None).put(&2, &of_call(2)).await.expect("stores");
        assert_eq!((held(&there, 1).await, held(&there, 2).await), (Some(of_call(1)), Some(of_call(2))));
        for node in [&here, &there] {
            eventually("it has expired", async || held(node, 1).await.is_none()).await;
            assert_eq!(held(node, 2).await, Some(of_call(2)));
        }
        let producer = Producer::new();
        producer.turns.add_permits(1);
        assert_eq!(producer.ask(&there, 1).await.expect("no panic").expect("computed"), of_call(1));
        assert_eq!(there.sweep().await.expect("sweeps"), 0, "that one lives again");
        for user in 10..20 {
            here.put(&user, &vec![]).await.expect("stores");
        }
        eventually("they are swept", async || {
            there.sweep().await.expect("sweeps");
            there.stats().swept == 10
        }).await;
    }

    async fn what_any_node_uses_is_kept(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 2).await;
        let [here, there] = [share(&nodes[0]).idle(5 * SECOND).open().await.expect("opens"), open(&nodes[1]).await];
        for user in [1, 2] {
            here.put(&user, &of_call(1)).await.expect("stores");
        }
        assert_eq!(held(&there, 2).await, Some(of_call(1)));
        let began = Instant::now();
        eventually("what nobody uses is gone", async || {
            assert_eq!(held(&here, 1).await, Some(of_call(1)), "this one is used");
            let rows: i64 = db.client().await.query_one("select count(*) from rowcache.shared_permissions where key = 2 and dies_at > clock_timestamp()", &[]).await.expect("counts").get(0);
            rows == 0
        }).await;
        assert_eq!(held(&there, 1).await, Some(of_call(1)), "elsewhere, too");
        eventually("more than two lives", async || {
            assert_eq!(held(&here, 1).await, Some(of_call(1)), "this one is used");
            began.elapsed() > 12 * SECOND
        }).await;
        assert_eq!(held(&there, 1).await, Some(of_call(1)), "elsewhere, too");
        assert_eq!((held(&here, 2).await, held(&there, 2).await), (None, None));
    }

    async fn a_function_is_called_on_one_node_for_all(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 3).await;
        let calls = Arc::new(AtomicU32::new(0));
        let mut asked = Vec::new();
        for node in &nodes {
            let doubles = node.shared::<i64, i64>("doubles").open().await.expect("opens");
            let calls = Arc::clone(&calls);
            let doubles = doubles.memo(move |n| {
                calls.fetch_add(1, Ordering::SeqCst);
                async move { i64::checked_mul(n, 2).ok_or("too large") }
            });
            asked.extend((0..10).map(|_| tokio::spawn({
                let doubles = doubles.clone();
                async move { doubles.get(&21).await.map(|double| *double) }
            })));
            let error = doubles.get(&i64::MAX).await.expect_err("too large");
            assert!(error.is_loader(), "{error}");
            assert!(doubles.values().get(&i64::MAX).await.expect("loads").is_none());
        }
        for answer in asked {
            assert_eq!(answer.await.expect("no panic").expect("computed"), 42);
        }
        assert_eq!(calls.load(Ordering::SeqCst), 1 + 3, "once, and each time that it failed");
    }

    async fn numbers_are_added_to_by_all_nodes(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 4).await;
        let mut adding = Vec::new();
        for node in &nodes {
            let visits: SharedValues<(String, i32), i64> = node.shared("visits").open().await.expect("opens");
            adding.push(tokio::spawn(async move {
                for _ in 0..25 {
                    visits.increment(&("home".into(), 1), 2).await.expect("adds");
                }
                visits
            }));
        }
        let mut all = Vec::new();
        for visits in adding {
            all.push(visits.await.expect("no panic"));
        }
        for (node, visits) in nodes.iter().zip(&all) {
            node.barrier().await.expect("coherent");
            assert_eq!(visits.get(&("home".into(), 1)).await.expect("loads").as_deref(), Some(&200));
            assert!(visits.get(&("home".into(), 2)).await.expect("loads").is_none());
        }
        assert_eq!(all[0].increment(&("home".into(), 2), -5).await.expect("adds"), -5);
        let over = all[0].increment(&("home".into(), 2), i64::MIN).await.expect_err("no bigint");
        assert!(over.is_refused(), "{over}");
        let short = all[0].living(Some(SECOND), None);
        short.increment(&("short".into(), 1), 1).await.expect("adds");
        eventually("it has expired", async || short.get(&("short".into(), 1)).await.expect("loads").is_none()).await;
        assert_eq!(short.increment(&("short".into(), 1), 1).await.expect("adds"), 1, "begins anew");
    }

    async fn eager_nodes_read_again_what_they_use(test: Test) {
        let db = migrated(test.version).await;
        let nodes = nodes(&db, 2).await;
        let [here, there] = [open(&nodes[0]).await, share(&nodes[1]).eager().open().await.expect("opens")];
        here.put(&1, &of_call(1)).await.expect("stores");
        // What was told of this is not to come later.
        nodes[1].barrier().await.expect("coherent");
        for _ in 0..2 {
            assert_eq!(held(&there, 1).await, Some(of_call(1)));
        }
        here.put(&1, &of_call(2)).await.expect("stores");
        eventually("it is read again", async || there.try_get(&1).is_some_and(|value| *value == of_call(2))).await;
    }

    async fn values_that_are_not_logged_are_gone_after_a_crash(test: Test) {
        test.logs.allow("LISTEN connection was lost");
        test.logs.allow("cannot open the LISTEN connection");
        let mut server = server(test.version, &[]).await;
        let db = database_on(&server, test.version).await;
        migrate(&db).await;
        let node = node(&db).await;
        let fleeting = open(&node).await;
        let lasting: Permissions = node.shared("lasting").logged().open().await.expect("opens");
        for permissions in [&fleeting, &lasting] {
            permissions.put(&1, &of_call(1)).await.expect("stores");
            assert_eq!(held(permissions, 1).await, Some(of_call(1)));
        }
        let mut events = node.subscribe();
        server.stop(Stop::Immediate).await.expect("stops");
        event(&mut events, "a gap", |event| matches!(event, rowcache::Event::Gap(_))).await;
        server.start().await.expect("starts");
        event(&mut events, "coherent", |event| matches!(event, rowcache::Event::Coherent)).await;
        assert_eq!((held(&fleeting, 1).await, held(&lasting, 1).await), (None, Some(of_call(1))));
        let value = fleeting.get_or_store(&1, || async { of_call(2) }).await.expect("computed");
        assert_eq!(*value, of_call(2));
    }

    async fn what_is_in_the_way_is_said_with_the_cure(test: Test) {
        let db = migrated(test.version).await;
        let first = node(&db).await;
        open(&first).await;
        let error = first.shared::<String, u8>("permissions").open().await.expect_err("another key");
        assert!(error.is_table() && error.to_string().contains("bigint") && error.to_string().contains("unshare"), "{error}");
        let error = share(&first).logged().open().await.expect_err("it is not");
        assert!(error.is_table() && error.to_string().contains("set logged"), "{error}");
        for name in ["", "Permissions", "a-b", "1st", &"x".repeat(41)] {
            let error = first.shared::<i64, u8>(name).open().await.expect_err("no name");
            assert!(error.is_config(), "{error}");
        }
        let error = share(&first).ttl(Duration::from_millis(10)).open().await.expect_err("too short");
        assert!(error.is_config() && error.to_string().contains("`ttl`"), "{error}");

        // A role that may not make it.
        let role = format!("service_{}", db.name);
        db.execute(&format!("create role {role} login; grant usage on schema rowcache to {role}")).await;
        let url = db.url.replacen("postgres@", &format!("{role}@"), 1);
        assert_ne!(url, db.url, "{url}");
        let service = Node::connect(&url).await.expect("starts");
        let error = service.shared::<(i32, String), u8>("visits").open().await.expect_err("may not");
        let text = error.to_string();
        assert!(error.is_refused() && text.contains("select rowcache.share('visits', '{integer,text}')"), "{text}");
        db.execute(&format!("select rowcache.share('visits', '{{integer,text}}');
             grant select, insert, update, delete on rowcache.shared_visits to {role}")).await;
        let visits = service.shared::<(i32, String), u8>("visits").open().await.expect("opens");
        assert_eq!(*visits.get_or_store(&(1, "a".into()), || async { 3 }).await.expect("computed"), 3);
        service.shutdown().await;
        db.execute(&format!("select rowcache.unshare('visits'); select rowcache.unshare('permissions'); drop owned by {role}; drop role {role}")).await;
    }
}
