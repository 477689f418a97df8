//! Writes that must be told, must not be harmed by that, and cannot be told without their triggers.

use std::cell::RefCell;

use rowcache::{Event, Reason, Rows, Status, Table};

use crate::{
    fixture::{User, Users, event, migrated, name, node, users, users_db},
    program::run,
    support::eventually,
};

type Texts = Table<String, (String, String)>;

pg_test! {
    /// A message too large for NOTIFY made the write fail: cocalc #1718, meteor #56, channels_postgres #84, lovego.
    async fn trap_11_the_payload_that_aborts_the_writer(test: Test) {
        let db = migrated(test.version).await;
        db.execute("create table texts (k text primary key, v text); select rowcache.track('texts')").await;
        let node = node(&db).await;
        let texts: Texts = node.table("texts").await.expect("opens");
        let client = db.client().await;
        // Bytes: what just fits into a message, what just does not, and what no index would take if it could not be packed.
        for key in ["x".to_owned(), "ß".repeat(4000), "x".repeat(10_000)] {
            assert!(texts.get(&key).await.expect("loads").is_none());
            client.execute("insert into texts values ($1, 'long')", &[&key]).await.expect("the writer is not harmed");
            node.barrier().await.expect("coherent");
            assert_eq!(texts.get(&key).await.expect("loads").expect("exists").1, "long");
            client.execute("update texts set v = 'changed' where k = $1", &[&key]).await.expect("the writer is not harmed");
            node.barrier().await.expect("coherent");
            assert_eq!(texts.get(&key).await.expect("loads").expect("exists").1, "changed");
            texts.invalidate(&key).await.expect("sent, as a change of the whole table");
            assert!(!texts.peek(&key).is_known());
        }
        // Very many rows: one message, and not a hundred thousand.
        db.execute(
            "create table many (id bigint primary key, name text not null); select rowcache.track('many');
             insert into many select n, 'old' from generate_series(1, 100000) n",
        )
        .await;
        let many: Table<i64, User> = node.table("many").await.expect("opens");
        assert_eq!(name(&many, 99_999).await.as_deref(), Some("old"));
        let mut events = node.subscribe();
        db.execute("update many set name = 'new'").await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&many, 99_999).await.as_deref(), Some("new"));
        let Event::Change(change) = event(&mut events, "the change", |event| matches!(event, Event::Change(_))).await else {
            unreachable!()
        };
        assert_eq!(change.rows, Rows::All);
    }

    /// An UPDATE of the key told the new key or the old one, and the other stayed: EctoWatch.
    async fn trap_12_the_primary_key_that_changes(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        // By statement, and by row.
        for level in ["statement", "row"] {
            db.execute(&format!("select rowcache.track('public.users', level => '{level}')")).await;
            node.barrier().await.expect("coherent: it has looked");
            let held = async |ids: &[i64]| {
                for id in ids {
                    name(&users, *id).await;
                    assert!(users.peek(id).is_known(), "{level}: {id}");
                }
            };
            held(&[1, 2, 100]).await;
            db.execute("update public.users set id = 100 where id = 1").await;
            node.barrier().await.expect("coherent");
            assert!(!users.peek(&1).is_known() && !users.peek(&100).is_known(), "{level}: both keys");
            assert!(users.peek(&2).is_known(), "{level}: and no other");
            assert_eq!(name(&users, 1).await, None);
            assert_eq!(name(&users, 100).await.as_deref(), Some("user 1"));
            // Two rows change places, by way of a third key; then all move.
            held(&[2, 3, -2]).await;
            db.execute(
                "begin; update public.users set id = -2 where id = 2; update public.users set id = 2 where id = 3;
                 update public.users set id = 3 where id = -2; commit",
            )
            .await;
            node.barrier().await.expect("coherent");
            assert_eq!([name(&users, 2).await, name(&users, 3).await], [Some("user 3".into()), Some("user 2".into())]);
            assert_eq!(name(&users, -2).await, None);
            held(&[4, 1004]).await;
            db.execute("update public.users set id = id + 1000").await;
            node.barrier().await.expect("coherent");
            assert_eq!([name(&users, 4).await, name(&users, 1004).await], [None, Some("user 4".into())]);
            db.execute("update public.users set id = substr(name, 6)::int").await;
            node.barrier().await.expect("coherent");
        }
    }

    /// TRUNCATE fires no row trigger: lovego, EctoWatch.
    async fn trap_13_the_truncate_that_nobody_tells(test: Test) {
        let db = users_db(test.version).await;
        // The children go with the parent: another table, and partitions of one.
        db.execute(
            "create table children (id bigint primary key references public.users, name text not null);
             create table parted (id bigint primary key references public.users, name text not null) partition by range (id);
             create table low partition of parted for values from (0) to (5);
             create table high partition of parted for values from (5) to (100);
             select rowcache.track('children'); select rowcache.track('parted')",
        )
        .await;
        let node = node(&db).await;
        let parent = users(&node).await;
        let children: Users = node.table("children").await.expect("opens");
        let parted: Users = node.table("parted").await.expect("opens");
        for (truncate, empties_parent) in [("truncate low, high", false), ("truncate public.users cascade", true)] {
            db.execute(
                "insert into children select id, name from public.users on conflict do nothing;
                 insert into parted select id, name from public.users on conflict do nothing",
            )
            .await;
            node.barrier().await.expect("coherent");
            for rows in [&parent, &children, &parted] {
                for id in [1, 7] {
                    assert_eq!(name(rows, id).await, Some(format!("user {id}")), "{truncate}");
                    assert!(rows.peek(&id).is_known());
                }
            }
            let mut events = node.subscribe();
            db.execute(truncate).await;
            let told = if empties_parent { &["public.users", "public.children", "public.parted"][..] } else { &["public.parted"] };
            let missing = RefCell::new(told.to_vec());
            // Not left to the fence, which would see that the table has another file.
            event(&mut events, "all of them are told", |event| {
                if let Event::Change(change) = event
                    && change.rows == Rows::All
                {
                    missing.borrow_mut().retain(|table| change.table.as_deref() != Some(table));
                }
                missing.borrow().is_empty()
            })
            .await;
            node.barrier().await.expect("coherent");
            for id in [1, 7] {
                assert_eq!(name(&parted, id).await, None, "{truncate}");
                for rows in [&parent, &children] {
                    assert_eq!(name(rows, id).await.is_none(), empties_parent, "{truncate}");
                }
            }
        }
    }

    /// A table whose trigger was missing, or was not what it should be, was served as ever: mission-control #3455,
    /// Logflare #2132, lovego.
    async fn trap_14_the_trigger_that_is_gone_or_drifted(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed");
        let db = migrated(test.version).await;
        let tables = ["gone", "off", "drifted", "untracked", "well"];
        for table in tables {
            db.execute(&format!(
                "create table {table} (id bigint primary key, name text not null); select rowcache.track('{table}');
                 insert into {table} values (1, 'old')"
            ))
            .await;
        }
        let running = node(&db).await;
        let mut opened: Vec<(&str, Table<i64, User>)> = Vec::new();
        for table in tables {
            let rows = running.table(table).await.expect("opens");
            assert_eq!(name(&rows, 1).await.as_deref(), Some("old"));
            opened.push((table, rows));
        }
        db.execute(
            "drop trigger zz_rowcache_update on gone; alter table off disable trigger zz_rowcache_update;
             select rowcache.untrack('untracked');
             do $$ begin execute format('create or replace function rowcache.%I() returns trigger language plpgsql as
                 ''begin return null; end''', 'changed_' || 'drifted'::regclass::oid); end $$",
        )
        .await;
        for (table, _) in &opened {
            db.execute(&format!("update {table} set name = 'new'")).await;
        }
        // The node that runs: at the next look, which a barrier waits for, it knows.
        running.barrier().await.expect("the other tables are well");
        for (table, rows) in &opened {
            assert_eq!(name(rows, 1).await.as_deref(), Some("new"), "{table}");
            let trusted = *table == "well";
            assert_eq!(rows.peek(&1).is_known(), trusted, "{table}");
            match rows.status() {
                Status::Bypassed { why: Reason::Triggers(why), .. } => assert!(!trusted && !why.is_empty(), "{table}: {why}"),
                status => assert!(trusted, "{table}: {status:?}"),
            }
        }
        // A node that starts: it does not open them.
        let started = node(&db).await;
        for (table, _) in &opened {
            let opened = started.table::<i64, User>(table).await;
            assert_eq!(opened.err().map(|error| error.is_not_tracked()), (*table != "well").then_some(true), "{table}");
        }
        // The doctor, and the cure.
        let ended = run(&db.url, &["doctor", "--json", "--seconds", "1"]).await;
        assert_eq!(ended.code, Some(2), "{ended:#?}");
        for fault in ["trigger.missing", "trigger.disabled", "function.drifted"] {
            assert!(ended.out.contains(fault), "{fault}: {}", ended.out);
        }
        db.execute("select rowcache.track(t::regclass) from unnest('{gone,off,drifted,untracked}'::text[]) t").await;
        let ended = run(&db.url, &["doctor", "--json", "--seconds", "1"]).await;
        assert!(ended.code != Some(2) && ended.out.contains("tables.whole"), "{ended:#?}");
        for (table, rows) in &opened {
            eventually("it is trusted again", async || matches!(rows.status(), Status::Coherent { .. })).await;
            db.execute(&format!("update {table} set name = 'newer'")).await;
            running.barrier().await.expect("coherent");
            assert_eq!(name(rows, 1).await.as_deref(), Some("newer"), "{table}");
            assert!(rows.peek(&1).is_known(), "{table}");
        }
    }
}
