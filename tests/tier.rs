//! A shared tier between the memory of nodes and Postgres: a real Redis, and all that can go wrong with it.
//!
//! They have a server of Postgres that no other test uses, and one after the other: a transaction that somebody leaves open would keep what
//! is read meanwhile from being taken.

use std::{collections::HashMap, io::Write as _, time::Duration};

use redis::AsyncCommands as _;
use rowcache::{
    Config, Freshness, Node, Table, TableOptions, Tier, TierStats, cli::temp_server::TempServer,
    verify::redis::RedisServer,
};
use tokio::sync::{Mutex, MutexGuard, OnceCell};

use crate::{
    fixture::{self, KILL_LISTENERS, gap_and_recovery, hasty, users_db_on},
    support::{
        PATIENCE, TestDb, Version, eventually,
        proxy::{Direction, Flow, Proxy},
        server,
    },
};

#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow, serde::Serialize, serde::Deserialize)]
struct User {
    id: i64,
    name: String,
}

type Users = Table<i64, User>;

/// `None`, said on stderr, where Redis is not installed.
async fn redis() -> Option<RedisServer> {
    if !RedisServer::is_installed() {
        assert!(std::env::var_os("ROWCACHE_TEST_REQUIRE_ALL").is_none(), "redis-server is not installed");
        writeln!(std::io::stderr(), "SKIPPED: redis-server is not installed").expect("stderr is open");
        return None;
    }
    Some(RedisServer::start().await.expect("redis-server starts"))
}

/// A database of users, and the right to use its server.
async fn alone(version: Version) -> (MutexGuard<'static, ()>, TestDb) {
    static SERVERS: [OnceCell<TempServer>; 2] = [const { OnceCell::const_new() }; 2];
    static TURNS: [Mutex<()>; 2] = [const { Mutex::const_new(()) }; 2];
    let turn = TURNS[version as usize].lock().await;
    let server = SERVERS[version as usize].get_or_init(|| server(version, &[])).await;
    (turn, users_db_on(server, version).await)
}

/// That has time, however busy the machine is.
fn tier(url: &str) -> Tier {
    Tier::redis(url).expect("an address").timeout(Duration::from_secs(10))
}

async fn open(node: &Node, tier: &Tier) -> Users {
    node.table_with("public.users", TableOptions::default().tier::<User>(tier)).await.expect("opens")
}

/// Until what the tier has may be taken: the second fence that counts.
async fn settled(node: &Node) {
    for _ in 0..2 {
        node.barrier().await.expect("a fence");
    }
}

/// A node of its own connections, as another process would be.
async fn user_node(db: &TestDb, tier: &Tier) -> (Node, Users) {
    let node = fixture::node(db).await;
    let users = open(&node, tier).await;
    settled(&node).await;
    (node, users)
}

async fn user_nodes<const N: usize>(db: &TestDb, tier: &Tier) -> [(Node, Users); N] {
    let mut nodes = Vec::new();
    for _ in 0..N {
        nodes.push(user_node(db, tier).await);
    }
    nodes.try_into().unwrap_or_else(|_| unreachable!("as many"))
}

async fn name(users: &Users, id: i64) -> Option<String> {
    users.get(&id).await.expect("the load succeeds").map(|user| user.name.clone())
}

/// What was read is in the tier.
async fn written(users: &Users, rows: u64) {
    eventually("the tier has it", async || users.stats().tier.written == rows).await;
}

fn identity(users: &Users) -> TierStats {
    let it = users.stats().tier;
    assert_eq!(it.asked, it.hits + it.misses + it.refused + it.unreadable + it.failed + it.awaited_in_vain, "{it:?}");
    it
}

const USER_1: &str = "update public.users set name = 'changed' where id = 1";

pg_test! {
    async fn what_one_node_has_read_others_take(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        tier.ready().await.expect("it answers");
        let [(_one, reads), (_two, takes)] = user_nodes(&db, &tier).await;
        assert_eq!(name(&reads, 1).await.as_deref(), Some("user 1"));
        assert_eq!(name(&reads, 99).await, None);
        written(&reads, 2).await;
        assert_eq!(name(&takes, 1).await.as_deref(), Some("user 1"));
        assert_eq!(name(&takes, 99).await, None, "there is no such row");
        let (read, took) = (identity(&reads), identity(&takes));
        assert_eq!((read.misses, read.hits, took.misses, took.hits, took.written), (2, 0, 0, 2, 0));
        assert!(takes.try_get(&1).is_known() && takes.try_get(&99).is_known(), "held like any other");
    }

    async fn what_has_changed_is_not_taken(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        let [(_one, reads), (two, takes), (three, third)] = user_nodes(&db, &tier).await;
        name(&reads, 1).await;
        name(&reads, 2).await;
        written(&reads, 2).await;
        db.execute(USER_1).await;
        two.barrier().await.expect("a fence");
        assert_eq!(name(&takes, 1).await.as_deref(), Some("changed"));
        assert_eq!(name(&takes, 2).await.as_deref(), Some("user 2"), "which has not changed");
        let took = identity(&takes);
        assert_eq!((took.misses, took.hits), (1, 1));
        written(&takes, 1).await;
        three.barrier().await.expect("a fence");
        assert_eq!(name(&third, 1).await.as_deref(), Some("changed"));
        assert_eq!(identity(&third).hits, 1, "what was read after the change is taken");
    }

    /// X32: what a gap hides is in no slot.
    async fn x32_what_was_put_in_before_a_node_listened_is_not_taken(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        let (one, reads) = user_node(&db, &tier).await;
        name(&reads, 1).await;
        written(&reads, 1).await;
        // Changed while nobody else listens; and the tier is not told.
        one.shutdown().await;
        db.execute(USER_1).await;
        let (_two, takes) = user_node(&db, &tier).await;
        assert_eq!(name(&takes, 1).await.as_deref(), Some("changed"));
        assert_eq!(identity(&takes).hits, 0);
    }

    async fn x32_what_was_put_in_before_a_gap_is_not_taken(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users = open(&node, &tier).await;
        settled(&node).await;
        name(&users, 1).await;
        written(&users, 1).await;
        let mut events = node.subscribe();
        test.logs.allow("LISTEN connection was lost");
        db.execute(&format!("begin; {KILL_LISTENERS}; {USER_1}; commit")).await;
        gap_and_recovery(&mut events).await;
        settled(&node).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("changed"));
        assert_eq!(identity(&users).hits, 0);
    }

    /// X33: a row that was read and evicted, before any message told of it.
    async fn x33_nobody_goes_back_to_what_the_tier_has_of_before(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        db.execute("insert into public.users select n, 'user ' || n from generate_series(11, 2000) n").await;
        let tier = tier(&redis.url());
        let (_one, writes) = user_node(&db, &tier).await;
        name(&writes, 1).await;
        written(&writes, 1).await;
        let mut connection = redis.connect().await.expect("connects");
        let names: Vec<String> = connection.keys("rowcache:*").await.expect("names");
        let old: Vec<u8> = connection.get(&names[0]).await.expect("the old row");

        // A node that hears of nothing for as long as this takes, and does not mind.
        let proxy = Proxy::start(db.port).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.listener = Config::from_url(&proxy.url(&db.url)).expect("a good URL").listener;
        (config.beat_timeout, config.lease) = (4 * PATIENCE, 5 * PATIENCE);
        let node = Node::start(config).await.expect("starts");
        let options = TableOptions::default().capacity(1).tier::<User>(&tier);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        settled(&node).await;
        // Loaded after its floor.
        let _: () = connection.del(&names[0]).await.expect("deleted");
        name(&users, 1).await;
        written(&users, 1).await;
        let before: Vec<u8> = connection.get(&names[0]).await.expect("the row of before");
        assert_ne!(before, old);
        proxy.set(Direction::Down, Flow::Stall);
        db.execute(USER_1).await;
        // Out of its memory, by others.
        let push_out = async |from: i64| {
            let mut id = from;
            while users.peek(&1).is_known() {
                name(&users, id).await;
                id += 1;
            }
        };
        push_out(11).await;
        let _: () = connection.del(&names[0]).await.expect("deleted");
        assert_eq!(name(&users, 1).await.as_deref(), Some("changed"), "from Postgres, before any message");
        eventually("it is in the tier", async || connection.clone().get::<_, Option<Vec<u8>>>(&names[0]).await.expect("a row").is_some_and(|row| row[0] == b'v')).await;
        push_out(1000).await;
        let _: () = connection.set(&names[0], &before).await.expect("set");
        let asked = identity(&users).asked;
        assert_eq!(name(&users, 1).await.as_deref(), Some("changed"), "and not what the tier has of before");
        assert_eq!(identity(&users).asked, asked + 1, "which was asked");
        proxy.set(Direction::Down, Flow::Pass);
    }

    async fn what_is_restored_from_an_old_dump_is_not_taken(test: Test) {
        let Some(mut redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        let [(one, users), (two, others), (_three, third)] = user_nodes(&db, &tier).await;
        for id in 1..=10 {
            name(&users, id).await;
        }
        written(&users, 10).await;
        let dump = redis.save().await.expect("saved");
        db.execute("update public.users set name = name || ' anew' where id <= 5; delete from public.users where id = 5").await;
        for node in [&one, &two] {
            node.barrier().await.expect("a fence");
        }
        for id in 1..=5 {
            name(&users, id).await;
        }
        written(&users, 15).await;
        test.logs.allow("the tier does not answer");
        redis.restore(&dump).await.expect("restored");
        // The connections of before end with errors, which is a failure of the tier, and is over in a second.
        eventually("it is asked again", async || {
            others.invalidate(&10).await.expect("forgotten");
            settled(&two).await;
            name(&others, 10).await;
            others.stats().tier.hits + others.stats().tier.misses > 0
        }).await;
        for id in 1..=10 {
            let wanted = match id {
                1..=4 => Some(format!("user {id} anew")),
                5 => None,
                _ => Some(format!("user {id}")),
            };
            assert_eq!(name(&others, id).await, wanted);
            assert_eq!(name(&third, id).await, wanted);
        }
        identity(&others);
        identity(&third);
    }

    async fn a_tier_that_lies_is_not_believed(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        let [(_one, users), (_two, others), (_three, third)] = user_nodes(&db, &tier).await;
        for id in 1..=6 {
            name(&users, id).await;
        }
        written(&users, 6).await;
        let mut connection = redis.connect().await.expect("connects");
        let mut names: Vec<String> = connection.keys("rowcache:*").await.expect("names");
        names.sort();
        assert!(names[0].contains(":public.users:") && names[0].ends_with(":1"), "{names:?}");
        let mut rows: Vec<Vec<u8>> = connection.mget(&names).await.expect("rows");
        // Each other's; damaged; cut; made up, from a time to come; of another type.
        rows.swap(0, 1);
        *rows[2].last_mut().expect("bytes") ^= 1;
        let short = rows[3].len() - 1;
        rows[3].truncate(short);
        rows[4] = [b"v".as_slice(), &[b'f'; 48], &[7; 29], br#"{"id":5,"name":"forged"}"#].concat();
        for (name, row) in names.iter().zip(&rows).take(5) {
            let _: () = connection.set(name, row).await.expect("set");
        }
        for id in 1..=5 {
            assert_eq!(name(&others, id).await, Some(format!("user {id}")));
        }
        assert_eq!(identity(&others).unreadable, 5);
        let _: () = connection.del(&names[5]).await.expect("deleted");
        let _: () = connection.rpush(&names[5], "no row").await.expect("pushed");
        assert_eq!(name(&third, 6).await.as_deref(), Some("user 6"));
        assert_eq!(identity(&third).failed, 1);
        test.logs.allow("the tier does not answer");
    }

    async fn a_tier_that_is_down_costs_little_and_comes_back(test: Test) {
        let Some(mut redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        redis.kill().await.expect("killed");
        assert!(tier.ready().await.expect_err("it is down").is_unavailable());
        let (node, users) = user_node(&db, &tier).await;
        for id in 1..=10 {
            assert_eq!(name(&users, id).await, Some(format!("user {id}")));
        }
        let it = identity(&users);
        assert!(it.failed >= 1 && it.skipped >= 1 && it.failed + it.skipped == 10, "one finds out for all: {it:?}");
        test.logs.allow("the tier does not answer");
        redis.run().await.expect("started");
        eventually("it is asked again", async || {
            users.invalidate(&1).await.expect("forgotten");
            settled(&node).await;
            name(&users, 1).await;
            users.stats().tier.misses > 0
        }).await;
        eventually("and written to", async || users.stats().tier.written > 0).await;
    }

    async fn a_tier_that_is_slow_is_down(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let proxy = Proxy::start(redis.port()).await;
        let tier = Tier::redis(&proxy.url(&redis.url())).expect("an address");
        tier.ready().await.expect("it answers");
        let (_node, users) = user_node(&db, &tier).await;
        proxy.set_both(Flow::Stall);
        for id in 1..=10 {
            assert_eq!(name(&users, id).await, Some(format!("user {id}")));
        }
        assert!(identity(&users).failed >= 1);
        test.logs.allow("the tier does not answer");
    }

    async fn a_flushed_tier_is_filled_again(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        let [(_one, users), (_two, others), (_three, third)] = user_nodes(&db, &tier).await;
        name(&users, 1).await;
        written(&users, 1).await;
        redis.ask::<String>(&["FLUSHALL"]).await.expect("flushed");
        assert_eq!(name(&others, 1).await.as_deref(), Some("user 1"));
        written(&others, 1).await;
        assert_eq!(name(&third, 1).await.as_deref(), Some("user 1"));
        assert_eq!((identity(&others).misses, identity(&third).hits), (1, 1));
    }

    async fn on_a_cold_tier_one_node_reads_for_all(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url()).patience(Duration::from_secs(10));
        let nodes: [(Node, Users); 8] = user_nodes(&db, &tier).await;
        let callers: Vec<_> = (0..1000)
            .map(|n: usize| {
                let users = nodes[n % 8].1.clone();
                tokio::spawn(async move { name(&users, 1).await })
            })
            .collect();
        for caller in callers {
            assert_eq!(caller.await.expect("ends").as_deref(), Some("user 1"));
        }
        let sum = |of: fn(TierStats) -> u64| nodes.iter().map(|(_, users)| of(identity(users))).sum::<u64>();
        assert_eq!((sum(|it| it.asked), sum(|it| it.misses), sum(|it| it.hits)), (8, 1, 7));
    }

    async fn who_waits_for_another_node_in_vain_reads_by_himself(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        let [(_one, users), (_two, others)] = user_nodes(&db, &tier).await;
        name(&users, 1).await;
        written(&users, 1).await;
        let mut connection = redis.connect().await.expect("connects");
        let names: Vec<String> = connection.keys("rowcache:*").await.expect("names");
        let _: () = connection.set(&names[0], "l").await.expect("set, for ever");
        assert_eq!(name(&others, 1).await.as_deref(), Some("user 1"));
        let it = identity(&others);
        assert_eq!((it.awaited, it.awaited_in_vain, it.written), (1, 1, it.written));
    }

    async fn many_keys_are_asked_for_at_once(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        db.execute("insert into public.users select n, 'user ' || n from generate_series(11, 500) n").await;
        let tier = tier(&redis.url());
        let [(_one, users), (_two, others), (_three, third)] = user_nodes(&db, &tier).await;
        // So that the servers know the script.
        name(&third, 1).await;
        let keys: Vec<i64> = (1..=500).collect();
        users.get_many(&keys).await.expect("loads");
        eventually("the tier has them", async || users.stats().tier.written >= 499).await;
        let asked = async || {
            let stats: String = redis.ask(&["INFO", "commandstats"]).await.expect("statistics");
            let calls = |line: &str| line.strip_prefix("cmdstat_evalsha:calls=")?.split(',').next()?.parse::<u64>().ok();
            stats.lines().find_map(calls).unwrap_or(0)
        };
        let before = asked().await;
        let rows = others.get_many(&keys).await.expect("loads");
        assert!(rows.iter().zip(&keys).all(|(row, key)| row.as_ref().is_some_and(|user| user.id == *key)));
        let runs = others.stats().queries;
        assert_eq!((asked().await - before, identity(&others).hits), (runs, 500), "one round trip for each batch");
    }

    async fn rows_by_other_columns_and_lists_have_a_tier_too(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        db.execute("select rowcache.track('public.users', columns => '{name}')").await;
        let tier = tier(&redis.url());
        let [one, two] = [fixture::node(&db).await, fixture::node(&db).await];
        let by = async |node: &Node| {
            let options = TableOptions::default().tier::<User>(&tier);
            let by: Table<String, User> = node.table_by("public.users", ["name"], options).await.expect("opens");
            let options = TableOptions::default().tier::<Vec<User>>(&tier);
            let list: Table<String, Vec<User>> = node.list_by("public.users", ["name"], options).await.expect("opens");
            settled(node).await;
            (by, list)
        };
        let ((by, list), (other_by, other_list)) = (by(&one).await, by(&two).await);
        let key = "user 1".to_owned();
        let found = async |by: &Table<String, User>, list: &Table<String, Vec<User>>| {
            let user = by.get(&key).await.expect("loads").map(|user| user.id);
            (user, list.get(&key).await.expect("loads").map_or(0, |users| users.len()))
        };
        assert_eq!(found(&by, &list).await, (Some(1), 1));
        eventually("the tier has them", async || (by.stats().tier.written, list.stats().tier.written) == (1, 1)).await;
        assert_eq!(found(&other_by, &other_list).await, (Some(1), 1));
        assert_eq!((other_by.stats().tier.hits, other_list.stats().tier.hits), (1, 1));
        db.execute(USER_1).await;
        two.barrier().await.expect("a fence");
        assert_eq!(found(&other_by, &other_list).await, (None, 0));
    }

    /// A cluster of three: each key has its own server.
    async fn a_cluster_is_a_tier(test: Test) {
        if redis().await.is_none() {
            return;
        }
        let mut servers = Vec::new();
        for _ in 0..3 {
            servers.push(RedisServer::start_with(&["--cluster-enabled", "yes"]).await.expect("starts"));
        }
        let mut create = tokio::process::Command::new("redis-cli");
        create.args(["--cluster", "create"]).args(servers.iter().map(|it| format!("127.0.0.1:{}", it.port())));
        let created = create.args(["--cluster-replicas", "0", "--cluster-yes"]).output().await.expect("redis-cli");
        assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stdout));
        let (_alone, db) = alone(test.version).await;
        let urls: Vec<String> = servers.iter().map(RedisServer::url).collect();
        let tier = Tier::redis_cluster(urls.iter().map(String::as_str)).expect("addresses").timeout(Duration::from_secs(10));
        tier.ready().await.expect("it answers");
        let [(_one, users), (_two, others)] = user_nodes(&db, &tier).await;
        let keys: Vec<i64> = (1..=10).collect();
        users.get_many(&keys).await.expect("loads");
        written(&users, 10).await;
        others.get_many(&keys).await.expect("loads");
        assert_eq!(identity(&others).hits, 10);
        let mut on = HashMap::new();
        for server in &servers {
            on.insert(server.port(), server.ask::<u64>(&["DBSIZE"]).await.expect("a number"));
        }
        assert!(on.values().filter(|rows| **rows > 0).count() > 1, "{on:?}");
    }

    async fn a_tier_is_refused_where_it_would_be_wrong(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        db.execute(fixture::SESSIONS).await;
        let tier = tier(&redis.url());
        let node = fixture::node(&db).await;
        let options = || TableOptions::default().tier::<User>(&tier);
        let secret = node.table_with::<String, User>("public.sessions", options()).await.expect_err("secret keys");
        assert!(secret.is_config() && secret.to_string().contains("public.sessions"), "{secret}");
        let other = node.table_with::<i64, (i64, String)>("public.users", options()).await.expect_err("another type");
        assert!(other.to_string().contains("User"), "{other}");
        let _plain: Users = node.table("public.users").await.expect("opens");
        let late = node.table_with::<i64, User>("public.users", options()).await.expect_err("opened without");
        assert!(late.is_config() && late.to_string().contains("opened before, without a `tier`"), "{late}");
        let memo = node.memo("squares", options(), async |n: i64| Ok::<_, std::io::Error>(User { id: n, name: String::new() })).err();
        assert!(memo.is_some_and(|error| error.is_config()));
    }

    async fn reads_that_want_more_than_coherence_get_it_with_a_tier(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        let [(_one, users), (two, others)] = user_nodes(&db, &tier).await;
        for round in 0..20 {
            users.get_with(&1, Freshness::Fenced).await.expect("loads");
            let mut write = two.begin().await.expect("begins");
            sqlx::query("update public.users set name = $1 where id = 1")
                .bind(format!("round {round}"))
                .execute(&mut *write)
                .await
                .expect("updates");
            let token = write.commit().await.expect("commits");
            for users in [&users, &others] {
                let user = users.get_with(&1, Freshness::AtLeast(token)).await.expect("loads").expect("a row");
                assert_eq!(user.name, format!("round {round}"));
            }
        }
        identity(&users);
    }

    async fn audits_find_nothing_wrong_with_what_came_from_a_tier(test: Test) {
        let Some(redis) = redis().await else { return };
        let (_alone, db) = alone(test.version).await;
        let tier = tier(&redis.url());
        let options = || TableOptions::default().audit(1000).tier::<User>(&tier);
        let mut tables = Vec::new();
        for _ in 0..2 {
            let node = fixture::node(&db).await;
            let users: Users = node.table_with("public.users", options()).await.expect("opens");
            settled(&node).await;
            tables.push(users);
        }
        name(&tables[0], 1).await;
        written(&tables[0], 1).await;
        name(&tables[1], 1).await;
        assert_eq!(identity(&tables[1]).hits, 1);
        eventually("hits are audited", async || {
            for _ in 0..1000 {
                name(&tables[1], 1).await;
            }
            tables[1].stats().audits.equal > 0
        }).await;
        assert_eq!(tables[1].stats().audits.incoherent, 0);
    }
}
