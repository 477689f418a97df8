//! Tables whose keys are secrets, read through the cache: messages have hashes, and a node knows whose they are.

use std::fmt::Debug;

use rowcache::{Event, Key, KeyHash, Lookup, Node, Reason, Rows, Status, Table, TableOptions};
use sqlx::FromRow;
use uuid::Uuid;

use crate::{
    fixture::{event, migrated, node},
    support::{TestDb, Version},
};

#[derive(Debug, FromRow)]
struct Session {
    v: i32,
}

type Sessions = Table<String, Session>;

/// A database with hashed sessions `tok1` to `tok10`.
async fn sessions_db(version: Version) -> TestDb {
    let db = migrated(version).await;
    db.execute(
        "create table public.sessions (token text primary key, v int not null);
         insert into public.sessions select 'tok' || n, n from generate_series(1, 10) n;
         select rowcache.track('public.sessions', hash_keys => true)",
    )
    .await;
    db
}

async fn sessions(node: &Node) -> Sessions {
    node.table("public.sessions").await.expect("opens")
}

async fn read<K: Key>(table: &Table<K, Session>, key: &K) -> Option<i32> {
    table.get(key).await.expect("loads").map(|session| session.v)
}

fn tok(n: usize) -> String {
    format!("tok{n}")
}

async fn check<K: Key + Debug>(node: &Node, db: &TestDb, name: &str, present: K, absent: K) {
    let table: Table<K, Session> = node.table(name).await.expect("opens");
    for (v, expected) in [(1, Some(0)), (2, Some(1))] {
        assert_eq!((read(&table, &present).await, read(&table, &absent).await), (expected, None), "{name}");
        db.execute(&format!("update {name} set v = {v}")).await;
        node.barrier().await.expect("coherent");
        assert!(!table.peek(&present).is_known(), "{name}: the hash of the message is the hash of the node");
        assert!(table.peek(&absent).is_known(), "{name}: and nothing else is forgotten");
    }
}

pg_test! {
    async fn a_change_by_anybody_is_seen_on_every_node(test: Test) {
        let db = sessions_db(test.version).await;
        let (a, b) = (node(&db).await, node(&db).await);
        let tables = [sessions(&a).await, sessions(&b).await];
        for (sql, token, expected) in [
            ("update public.sessions set v = 100 where token = 'tok1'", "tok1", Some(100)),
            ("delete from public.sessions where token = 'tok2'", "tok2", None),
            ("insert into public.sessions values ('tok2', 20)", "tok2", Some(20)),
            ("update public.sessions set token = 'tok3b' where token = 'tok3'", "tok3", None),
            ("update public.sessions set token = 'tok3' where token = 'tok3b'", "tok3b", None),
            ("update public.sessions set v = 0", "tok5", Some(0)),
            ("truncate public.sessions", "tok6", None),
        ] {
            for sessions in &tables {
                read(sessions, &token.to_owned()).await;
                read(sessions, &tok(77)).await;
                assert!(sessions.peek(&token.to_owned()).is_known(), "held before: {sql}");
            }
            db.execute(sql).await;
            for (node, sessions) in [&a, &b].into_iter().zip(&tables) {
                node.barrier().await.expect("coherent");
                assert!(!sessions.peek(&token.to_owned()).is_known(), "forgotten after: {sql}");
                assert_eq!(sessions.peek(&tok(77)).is_known(), !sql.contains("truncate"), "and nothing else: {sql}");
                assert_eq!(read(sessions, &token.to_owned()).await, expected, "{sql}");
            }
        }
    }

    async fn an_absent_row_is_cached_and_an_insert_undoes_it(test: Test) {
        let db = sessions_db(test.version).await;
        let node = node(&db).await;
        let sessions = sessions(&node).await;
        assert_eq!(read(&sessions, &tok(77)).await, None);
        assert!(matches!(sessions.try_get(&tok(77)), Lookup::Absent));
        db.execute("insert into public.sessions values ('tok77', 77)").await;
        node.barrier().await.expect("coherent");
        assert_eq!(read(&sessions, &tok(77)).await, Some(77));
    }

    async fn keys_of_every_type_and_of_several_columns(test: Test) {
        let db = migrated(test.version).await;
        let controls: String = (1_u8..=0x7f).map(char::from).collect::<String>() + "Ünï \u{2028}\u{1f600}";
        let client = db.client().await;
        client.batch_execute(
            "create table small (k smallint primary key, v int);
             create table medium (k integer primary key, v int);
             create table large (k bigint primary key, v int);
             create table texts (k text primary key, v int);
             create domain code as varchar(300);
             create table codes (k code primary key, v int);
             create table uuids (k uuid primary key, v int);
             create table several (tenant integer, code text, id uuid, n bigint, v int, primary key (tenant, code, id, n));
             select rowcache.track(t::regclass, hash_keys => true)
             from unnest('{small,medium,large,texts,codes,uuids,several}'::text[]) t;
             insert into small values (-3, 0); insert into medium values (70000, 0);
             insert into large values (-9223372036854775808, 0); insert into uuids values ('00000000-0000-0000-0000-00000000002A', 0)",
        ).await.expect("prepare");
        for sql in ["insert into texts values ($1, 0)", "insert into codes values ($1, 0)",
                    "insert into several values (7, $1, '00000000-0000-0000-0000-00000000002A', -1, 0)"] {
            let statement = client.prepare_typed(sql, &[tokio_postgres::types::Type::TEXT]).await.expect(sql);
            client.execute(&statement, &[&controls]).await.expect(sql);
        }
        let node = node(&db).await;
        check(&node, &db, "small", -3_i16, 4).await;
        check(&node, &db, "medium", 70_000_i32, 4).await;
        check(&node, &db, "large", i64::MIN, 4).await;
        check(&node, &db, "texts", controls.clone(), String::new()).await;
        check(&node, &db, "codes", controls.clone(), String::new()).await;
        check(&node, &db, "uuids", Uuid::from_u128(42), Uuid::nil()).await;
        let several = (7_i32, controls, Uuid::from_u128(42), -1_i64);
        check(&node, &db, "several", several.clone(), (8, several.1.clone(), several.2, -1)).await;
    }

    async fn many_keys_in_little_room_stay_right_while_the_index_is_swept(test: Test) {
        let db = sessions_db(test.version).await;
        db.execute("insert into public.sessions select 'tok' || n, n from generate_series(11, 6000) n").await;
        let node = node(&db).await;
        let mut options = TableOptions::default();
        options.capacity = 50;
        let sessions: Sessions = node.table_with("public.sessions", options).await.expect("opens");
        // Far more keys than the index takes before it is swept, over and over.
        for round in 0..4 {
            for from in (1..6000).step_by(500) {
                let keys: Vec<_> = (from..from + 500).map(tok).collect();
                let rows = sessions.get_many(&keys).await.expect("loads");
                for (n, row) in (from..).zip(rows) {
                    assert_eq!(row.map(|row| row.v), i32::try_from(n + round).ok(), "round {round}");
                }
            }
            db.execute("update public.sessions set v = v + 1").await;
            node.barrier().await.expect("coherent");
        }
        // What is held now is told by a message with nothing but its hash.
        for n in [1, 2, 3] {
            let before = read(&sessions, &tok(n)).await;
            db.execute(&format!("update public.sessions set v = -1 where token = 'tok{n}'")).await;
            node.barrier().await.expect("coherent");
            assert_eq!((before, read(&sessions, &tok(n)).await), (i32::try_from(n + 4).ok(), Some(-1)));
        }
    }

    async fn an_invalidation_by_hand_reaches_every_node_without_the_key(test: Test) {
        let db = sessions_db(test.version).await;
        let (a, b) = (node(&db).await, node(&db).await);
        let (here, there) = (sessions(&a).await, sessions(&b).await);
        for n in [1, 2] {
            read(&here, &tok(n)).await;
            read(&there, &tok(n)).await;
        }
        // The listener's marker.
        test.logs.allow("a message on channel rowcache could not be read");
        let mut listener = db.listen("rowcache").await;
        let mut events = b.subscribe();
        here.invalidate(&tok(1)).await.expect("sent");
        assert!(!here.peek(&tok(1)).is_known() && here.peek(&tok(2)).is_known());
        b.barrier().await.expect("coherent");
        assert!(!there.peek(&tok(1)).is_known() && there.peek(&tok(2)).is_known());
        let said = listener.all_so_far().await;
        assert!(said.len() == 1 && said[0].contains("\"h\":[") && !said[0].contains("tok"), "{said:?}");
        let Event::Change(change) = event(&mut events, "the change", |event| matches!(event, Event::Change(_))).await else {
            unreachable!()
        };
        let Rows::Hashed { hashes, .. } = &change.rows else { panic!("{change:?}") };
        assert!(matches!(&hashes[..], [hash] if said[0].contains(&KeyHash::to_string(hash))), "{change:?}");
    }

    async fn errors_do_not_show_the_key(test: Test) {
        let db = sessions_db(test.version).await;
        let node = node(&db).await;
        let sessions: Table<String, (Uuid,)> = node.table("public.sessions").await.expect("opens");
        let error = sessions.get(&tok(1)).await.expect_err("a token is no uuid");
        assert!(error.is_decode() && error.to_string() == "a row of public.sessions could not be decoded", "{error}");
        let sessions = self::sessions(&node).await;
        test.logs.allow("the triggers or the definition of this table changed; its reads go to Postgres");
        db.execute("drop table public.sessions").await;
        let error = sessions.get(&tok(2)).await.expect_err("it is gone");
        assert!(!format!("{error:?}").contains("tok2"), "{error:?}");
    }

    async fn hashes_by_another_secret_are_the_whole_table(test: Test) {
        let db = sessions_db(test.version).await;
        let node = node(&db).await;
        let sessions = sessions(&node).await;
        let mut events = node.subscribe();
        let hash = "0123456789abcdef0123456789abcdef";
        let id: String = db.client().await.query_one("select id from rowcache.secret", &[]).await.expect("the id").get(0);
        for (secret, forgotten) in [(id.as_str(), false), ("0000000000000000", true)] {
            assert_eq!(read(&sessions, &tok(1)).await, Some(1));
            let message = format!(r#"{{"v":1,"t":"public.sessions","x":1,"i":"{secret}","h":["{hash}"]}}"#);
            db.execute(&format!("notify rowcache, '{message}'")).await;
            event(&mut events, "the message", |event| matches!(event, Event::Change(_))).await;
            assert_eq!(sessions.peek(&tok(1)).is_known(), !forgotten, "{message}");
        }
    }

    async fn the_secret_must_be_granted_to_the_role_of_the_service(test: Test) {
        let db = sessions_db(test.version).await;
        let role = format!("App-{}", db.name);
        let role = &role[..role.len().min(63)];
        db.execute(&format!("create role \"{role}\" login; grant select on public.sessions to \"{role}\"")).await;
        let node = Node::connect(&db.url.replacen("postgres@", &format!("{role}@"), 1)).await.expect("the node starts");
        let error = node.table::<String, Session>("public.sessions").await.expect_err("no right");
        let cure = format!("grant execute on function rowcache.key_secret() to \"{role}\"");
        assert!(error.is_refused() && error.to_string().ends_with(&format!("run: {cure}")), "{error}");
        db.execute(&cure).await;
        let sessions = sessions(&node).await;
        assert_eq!(read(&sessions, &tok(1)).await, Some(1));
        db.execute("update public.sessions set v = 100 where token = 'tok1'").await;
        node.barrier().await.expect("coherent");
        assert_eq!(read(&sessions, &tok(1)).await, Some(100));
        node.shutdown().await;
        db.execute(&format!("drop owned by \"{role}\"; drop role \"{role}\"")).await;
    }

    async fn a_table_whose_option_or_secret_changes_is_in_doubt_until_a_restart(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed; its reads go to Postgres");
        let db = sessions_db(test.version).await;
        for change in [
            "select rowcache.track('public.sessions')",
            "select rowcache.track('public.sessions', hash_keys => true)",
            "update rowcache.secret set secret = default; select rowcache.track('public.sessions', hash_keys => true)",
        ] {
            let node = node(&db).await;
            let sessions = sessions(&node).await;
            assert_eq!(read(&sessions, &tok(1)).await, Some(1), "before {change}");
            db.execute(change).await;
            db.execute("update public.sessions set v = 100 where token = 'tok1'").await;
            node.barrier().await.expect("coherent");
            assert_eq!(read(&sessions, &tok(1)).await, Some(100), "{change}");
            let status = sessions.status();
            let Status::Bypassed { why: Reason::Triggers(why), .. } = &status else { panic!("{status:?} after {change}") };
            assert!(why.contains("sent as hashes") && why.ends_with("restart the service"), "{why}");
            db.execute("update public.sessions set v = 1 where token = 'tok1'").await;
            assert_eq!(read(&sessions, &tok(1)).await, Some(1), "{change}");
        }
    }
}
