//! How much a table's cache holds: rows by number or by memory, keys that do not exist apart, and what strangers can do.

use std::num::NonZeroU32;

use rowcache::{Lookup, Table, TableOptions};

use crate::{
    fixture::{User, Users, name, node, users, users_db, users_server},
    support::eventually,
};

/// A table of documents, each with a body of so many bytes.
const DOCUMENTS: &str = "create table public.documents (id bigint primary key, title text not null, body bytea not null);
     insert into public.documents select n, 'document ' || n, decode(repeat('ab', 10000), 'hex') from generate_series(1, 1000) n;
     select rowcache.track('public.documents')";
const BODY: u64 = 10_000;

#[derive(Debug, sqlx::FromRow)]
struct Document {
    #[allow(dead_code)] // it is there, as in any table
    id: i64,
    title: String,
    body: Vec<u8>,
}

pg_test! {
    async fn what_happened_in_a_time_is_the_difference_of_two_looks(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users: Users = node.table_with("public.users", TableOptions::default().capacity(1000)).await.expect("opens");
        name(&users, 1).await;
        let earlier = users.stats();
        assert_eq!((earlier.hit_ratio(), earlier.load_times.count(), earlier.used), (Some(0.0), 1, 1));
        assert!(earlier.utilisation() > 0.0 && earlier.utilisation() < 0.01, "{earlier:?}");
        assert!(earlier.load_times.quantile(0.5).is_some());
        for _ in 0..9 {
            name(&users, 1).await;
        }
        let since = users.stats().since(&earlier);
        assert_eq!((since.gets, since.hit_ratio(), since.load_times.count(), since.used), (9, Some(1.0), 0, 1));
    }

    // Somebody asks for one key after another that he made up.
    async fn who_enumerates_keys_evicts_no_row_and_fills_no_memory(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().capacity(1000).absent_bytes(200_000);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        for id in 1..=10 {
            name(&users, id).await;
        }
        for chunk in (1000..50_000_i64).collect::<Vec<_>>().chunks(5000) {
            let found = users.get_many(chunk).await.expect("loads");
            assert!(found.iter().all(Option::is_none));
        }
        for id in 1..=10 {
            assert!(users.peek(&id).row().is_some(), "row {id} is held");
        }
        let stats = users.stats();
        assert!(stats.absent > 500 && stats.bytes <= 200_000, "{stats:?}");
        assert_eq!((stats.entries, stats.not_found), (10 + stats.absent, 49_000));
        // What is held of them is true as ever.
        let held = (1000..50_000).find(|id| matches!(users.peek(id), Lookup::Absent)).expect("one is held");
        db.execute(&format!("insert into public.users values ({held}, 'new')")).await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, held).await.as_deref(), Some("new"));
    }

    async fn loads_that_find_nothing_are_bounded(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().not_found_max(NonZeroU32::new(2).expect("not zero"));
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        let made_up: Vec<i64> = (100..400).collect();
        assert!(users.get_many(&made_up).await.expect("nobody knows that yet").iter().all(Option::is_none));
        let before = users.stats();
        for error in [
            users.get(&2).await.expect_err("refused"),
            users.get(&1000).await.expect_err("refused"),
            users.get_many(&[1, 2]).await.expect_err("refused"),
            users.snapshot(&[2, 3]).await.expect_err("refused"),
        ] {
            assert!(error.is_throttled());
            let text = error.to_string();
            assert!(text.contains("public.users") && text.contains("not_found_max"), "{text}");
        }
        // What is known is served, also that there is no such row.
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        assert!(users.get(&100).await.expect("held").is_none());
        assert_eq!(users.stats().loads, before.loads);
        let stats = users.stats();
        assert_eq!((stats.gets, stats.misses), (stats.hits + stats.misses, stats.led + stats.joined + stats.declined));
    }

    async fn rows_are_bounded_by_the_memory_that_they_take(test: Test) {
        let db = users_db(test.version).await;
        db.execute(DOCUMENTS).await;
        let node = node(&db).await;
        let bytes = 100 * BODY;
        let options = TableOptions::default().bytes(usize::try_from(bytes).expect("small"));
        let documents: Table<i64, Document> = node.table_with("public.documents", options).await.expect("opens");
        for id in 1..=1000 {
            let document = documents.get(&id).await.expect("loads").expect("exists");
            assert_eq!((document.title.as_str(), document.body.len() as u64), (&*format!("document {id}"), BODY));
        }
        let stats = documents.stats();
        assert!((80..=100).contains(&stats.entries), "{stats:?}");
        assert!((80 * BODY..=bytes).contains(&stats.bytes), "{stats:?}");
        assert_eq!((stats.published, stats.evicted, stats.oversized), (1000, 1000 - stats.entries, 0));
        // One that is larger than all of it is read each time, and no harm is done.
        db.execute("update public.documents set body = decode(repeat('ab', 2000000), 'hex') where id = 1").await;
        node.barrier().await.expect("coherent");
        for _ in 0..2 {
            assert_eq!(documents.get(&1).await.expect("loads").expect("exists").body.len(), 2_000_000);
        }
        assert_eq!(documents.stats().oversized, 2);
    }

    async fn rows_are_weighed_by_whoever_knows_better(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().bytes(1 << 20).weigher(|user: &User| user.name.len() * 100_000);
        let users: Users = node.table_with("public.users", options.clone()).await.expect("opens");
        name(&users, 1).await;
        assert!((600_000..610_000).contains(&users.stats().bytes), "{:?}", users.stats());
        let error = node.table_with::<i64, Document>("public.users", options).await.expect_err("of another type");
        assert!(error.is_config(), "{error}");
    }

    // The options of whoever opened the table first count, whoever loads.
    async fn who_opens_a_table_again_loads_for_those_who_opened_it_first(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().bytes(1 << 20).audit(1000);
        let first: Users = node.table_with("public.users", options).await.expect("opens");
        db.execute("update public.users set name = repeat('x', 10000) where id = 1").await;
        let second = users(&node).await;
        node.barrier().await.expect("coherent");
        name(&second, 1).await;
        assert!((10_000..11_000).contains(&first.stats().bytes), "{:?}", first.stats());
        eventually("hits are audited", async || {
            for _ in 0..100 {
                name(&first, 1).await;
            }
            first.stats().audits.audited > 0
        })
        .await;
        let audits = first.stats().audits;
        assert_eq!((audits.equal, audits.incoherent), (audits.audited, 0));
    }

    async fn what_is_pinned_is_not_evicted(test: Test) {
        let (_server, db) = users_server(test.version, &[]).await;
        db.execute("insert into public.users select n, 'user ' || n from generate_series(11, 3000) n").await;
        let node = node(&db).await;
        let options = TableOptions::default().capacity(100);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        let read = async |from: i64| users.get_many(&(from..from + 1000).collect::<Vec<_>>()).await.expect("loads");
        read(1000).await;
        assert!(users.pin(&1));
        name(&users, 1).await;
        name(&users, 2).await;
        read(2000).await;
        assert!(users.peek(&1).is_known() && !users.peek(&2).is_known());
        // It is invalidated like any other.
        db.execute("update public.users set name = 'ada' where id = 1").await;
        node.barrier().await.expect("coherent");
        assert!(!users.peek(&1).is_known());
        assert_eq!(name(&users, 1).await.as_deref(), Some("ada"));
        read(1000).await;
        assert_eq!(users.peek(&1).row().expect("pinned").name, "ada");
        assert!(users.unpin(&1) && !users.unpin(&1));
    }

    async fn a_table_is_opened_with_its_defaults(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        assert!(users.get(&99).await.expect("loads").is_none());
        let stats = users.stats();
        assert_eq!((stats.entries, stats.absent, stats.not_found, stats.evicted), (2, 1, 1, 0));
        assert!((100..400).contains(&stats.bytes), "{stats:?}");
    }
}
