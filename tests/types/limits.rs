//! Where types end: rows whose keys Rust cannot hold, keys that no row can have, and columns that make no key.

use std::sync::atomic::{AtomicU32, Ordering};

use rowcache::{EnumLabel, Error, Key, KeyPart, KeyType};
use rust_decimal::Decimal;

use crate::{
    Row, Rows, TYPES, date, datetime,
    fixture::{migrated, node},
    offset, read, utc,
};

/// A type of the user's own, which knows of infinity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Until {
    Day(chrono::NaiveDate),
    Ever,
}

impl Key for Until {
    fn types() -> Vec<KeyType> {
        vec![KeyType::Date]
    }

    fn from_parts(parts: &[KeyPart<'_>]) -> Option<Self> {
        match parts {
            [KeyPart::Text(text)] if text == "infinity" => Some(Self::Ever),
            parts => chrono::NaiveDate::from_parts(parts).map(Self::Day),
        }
    }

    fn to_parts(&self) -> Vec<KeyPart<'_>> {
        match self {
            Self::Day(day) => day.to_parts(),
            Self::Ever => vec![KeyPart::Text("infinity".into())],
        }
    }
}

pg_test! {
    // Some rows have keys that the Rust type cannot hold. What is said of them is taken for "anything", unless it is hashed.
    async fn rows_beyond_the_type_are_never_taken_for_others(test: Test) {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        async fn check<K: Key>(db: &crate::support::TestDb, node: &rowcache::Node, of: &str, beyond: &[&str], within: [(K, &str); 2]) {
            for hashed in [false, true] {
                let table = format!("public.t{}", NEXT.fetch_add(1, Ordering::Relaxed));
                let values: Vec<_> = beyond.iter().map(|sql| format!("({sql}::{of}, 0)")).collect();
                db.execute(&format!(
                    "create table {table} (k {of} primary key, v int); select rowcache.track('{table}', hash_keys => {hashed});
                     insert into {table} values {}, ({}::{of}, 1), ({}::{of}, 1)",
                    values.join(", "), within[0].1, within[1].1
                )).await;
                let rows: Rows<K> = node.table(&table).await.expect("opens");
                for sql in beyond {
                    for (key, _) in &within {
                        assert_eq!(read(&rows, key).await, Some(1), "{of}");
                    }
                    db.execute(&format!("update {table} set v = v + 1 where k = {sql}::{of}")).await;
                    node.barrier().await.expect("coherent");
                    for (key, _) in &within {
                        assert_eq!(rows.peek(key).is_known(), hashed, "{of} {sql}: what is not understood is all");
                    }
                }
                assert_eq!(rows.get_many(&within.clone().map(|(key, _)| key)).await.expect("loads").iter().flatten().count(), 2);
                assert_eq!(rows.stats().failed, 0);
            }
        }
        let db = migrated(test.version).await;
        let node = node(&db).await;
        let infinite = ["'infinity'", "'-infinity'"];
        let days = [(date("2024-01-01"), "'2024-01-01'"), (date("2024-01-02"), "'2024-01-02'")];
        check(&db, &node, "date", &["'infinity'", "'-infinity'", "'5874897-12-31'", "'300000-01-01'"], days).await;
        let days = days.map(|(day, sql)| (offset(&format!("{day}T00:00:00Z")).date(), sql));
        check(&db, &node, "date", &["'infinity'", "'10000-01-01'", "'5874897-12-31'"], days).await;
        let moments = [(datetime("2024-01-01T00:00:00"), "'2024-01-01'"), (datetime("2024-01-02T00:00:00"), "'2024-01-02'")];
        check(&db, &node, "timestamp", &["'infinity'", "'-infinity'", "'294276-12-31 23:59:59.999999'"], moments).await;
        let moments = moments.map(|(moment, sql)| (moment.and_utc(), sql));
        check(&db, &node, "timestamptz", &infinite, moments).await;
        let moments = moments.map(|(moment, sql)| (offset(&moment.to_rfc3339()), sql));
        check(&db, &node, "timestamptz", &infinite, moments).await;
        let near: Decimal = "1.2345678901234567890123456789".parse().expect("a decimal");
        let numbers = [(Decimal::ONE, "1"), (near, "1.2345678901234567890123456789")];
        let beyond = ["'NaN'", "'Infinity'", "'-Infinity'", "1e30", "1.23456789012345678901234567890000000001", "1e-29"];
        check(&db, &node, "numeric", &beyond, numbers).await;
    }

    async fn a_type_of_the_users_own_holds_what_ours_does_not(test: Test) {
        let db = migrated(test.version).await;
        let node = node(&db).await;
        db.execute(
            "create table public.t (k date primary key, v int); select rowcache.track('public.t');
             insert into public.t values ('infinity', 1), ('2024-01-01', 2)",
        ).await;
        let rows: Rows<Until> = node.table("public.t").await.expect("opens");
        let day = Until::Day(date("2024-01-01"));
        assert_eq!((read(&rows, &Until::Ever).await, read(&rows, &day).await), (Some(1), Some(2)));
        db.execute("update public.t set v = 3 where k = 'infinity'").await;
        node.barrier().await.expect("coherent");
        assert!(!rows.peek(&Until::Ever).is_known() && rows.peek(&day).is_known());
        let both = rows.get_many(&[day, Until::Ever]).await.expect("loads");
        assert_eq!(both.map_v(), [Some(2), Some(3)]);
    }

    // Somebody asked for a key that is next to a row's, and it was rounded to that row's. "There is no such row" then stood for the one,
    // and with hashed keys the message about the other was taken for it: the row's own entry stayed as it was.
    async fn keys_between_two_that_a_column_holds_are_no_row(test: Test) {
        let db = migrated(test.version).await;
        let node = node(&db).await;
        for (hashed, t) in [(false, "public.t"), (true, "public.hashed_t")] {
            let pairs = format!("{t}_pairs");
            db.execute(&format!(
                "create table {t} (k timestamptz primary key, v int); select rowcache.track('{t}', hash_keys => {hashed});
                 create table {pairs} (a int, k timestamptz, v int, primary key (a, k));
                 select rowcache.track('{pairs}', hash_keys => {hashed});
                 insert into {t} values ('2024-01-01 00:00:00.000001+00', 1); insert into {pairs} select 7, k, v from {t}"
            )).await;
            let (row, between) = (utc("2024-01-01T00:00:00.000001Z"), utc("2024-01-01T00:00:00.000001001Z"));
            let before_postgres = utc("-5000-01-01T00:00:00Z");
            let rows: Rows<chrono::DateTime<chrono::Utc>> = node.table(t).await.expect("opens");
            for key in [between, before_postgres] {
                assert_eq!(read(&rows, &key).await, None, "{key:?}");
                let seen = rows.modify(&key, |row, _| Box::pin(async move { Ok::<_, Error>(row.map(|row| row.v)) }));
                assert_eq!(seen.await.expect("commits").0, None, "nor is it locked");
            }
            assert_eq!(read(&rows, &row).await, Some(1));
            assert_eq!(rows.get_many(&[between, row, before_postgres]).await.expect("hits").map_v(), [None, Some(1), None]);
            rows.clear().await.expect("sent");
            assert_eq!(rows.get_many(&[between, row, before_postgres]).await.expect("loads").map_v(), [None, Some(1), None]);
            let rows_of_pairs: Rows<(i32, time::OffsetDateTime)> = node.table(&pairs).await.expect("opens");
            let [between, row] = [between, row].map(|moment| (7, offset(&moment.to_rfc3339())));
            assert_eq!(rows_of_pairs.get_many(&[between, row]).await.expect("loads").map_v(), [None, Some(1)]);
            db.execute(&format!("update {t} set v = 2; update {pairs} set v = 2")).await;
            node.barrier().await.expect("coherent");
            assert_eq!(read(&rows, &utc("2024-01-01T00:00:00.000001Z")).await, Some(2));
            assert_eq!(rows_of_pairs.get_many(&[between, row]).await.expect("loads").map_v(), [None, Some(2)]);
            rows.invalidate(&utc("2024-01-01T00:00:00.000001001Z")).await.expect("sent");
            assert!(rows.peek(&utc("2024-01-01T00:00:00.000001Z")).is_known(), "it is about another key");
        }
    }

    // Also one that it gets later: what is held of it is then a message's to evict.
    async fn labels_that_an_enum_does_not_have_are_no_row(test: Test) {
        let db = migrated(test.version).await;
        db.execute(TYPES).await;
        db.execute(
            "create table public.t (k public.\"Mood\" primary key, v int); select rowcache.track('public.t');
             create table public.pairs (a int, k public.\"Mood\", v int, primary key (a, k)); select rowcache.track('public.pairs');
             insert into public.t values ('sad', 1); insert into public.pairs values (7, 'sad', 1)",
        ).await;
        test.logs.allow("the triggers or the definition of this table changed");
        let node = node(&db).await;
        let rows: Rows<EnumLabel> = node.table("public.t").await.expect("opens");
        let pairs: Rows<(i32, EnumLabel)> = node.table("public.pairs").await.expect("opens");
        let [sad, new, never] = ["sad", "new", "\0"].map(EnumLabel::from);
        assert_eq!(rows.get_many(&[new.clone(), sad.clone(), never.clone()]).await.expect("loads").map_v(), [None, Some(1), None]);
        let two = [new.clone(), sad.clone()].map(|label| (7, label));
        assert_eq!(pairs.get_many(&two).await.expect("loads").map_v(), [None, Some(1)]);
        assert_eq!((read(&pairs, &two[0]).await, read(&rows, &new).await, read(&rows, &never).await), (None, None, None));
        db.execute("alter type public.\"Mood\" add value 'new'").await;
        db.execute("insert into public.t values ('new', 2); insert into public.pairs values (7, 'new', 2)").await;
        node.barrier().await.expect("coherent");
        assert_eq!((read(&pairs, &two[0]).await, read(&rows, &new).await), (Some(2), Some(2)));
        // No row changes, and one key is another one.
        db.execute("alter type public.\"Mood\" rename value 'sad' to 'blue'").await;
        crate::support::eventually("the new name is noticed", async || {
            node.barrier().await.expect("coherent");
            (read(&rows, &sad).await, read(&rows, &EnumLabel::from("blue")).await) == (None, Some(1))
        }).await;
    }

    async fn columns_that_make_no_key_are_refused_with_a_reason(test: Test) {
        let db = migrated(test.version).await;
        let client = db.client().await;
        db.execute("create extension citext").await;
        for of in ["char(5)", "citext", "real", "double precision", "interval", "jsonb", "inet", "int[]", "time", "money"] {
            let sql = format!("create table public.t (k {of}); select rowcache.track('public.t', key => '{{k}}')");
            let error = client.batch_execute(&sql).await.expect_err(of);
            let error = error.as_db_error().expect("from the server");
            assert!(error.message().contains("of which rowcache knows no canonical text"), "{of}: {error:?}");
            assert!(error.hint().is_some_and(|hint| hint.contains("Usable types: smallint")), "{of}: {error:?}");
        }
        // Postgres itself cannot compare two of them.
        db.execute(TYPES).await;
        let sql = "create table public.t (k public.temper primary key); select rowcache.track('public.t')";
        let error = client.batch_execute(sql).await.expect_err("a domain over an enum");
        assert!(error.to_string().contains("db error") && error.as_db_error().expect("from the server").message().contains("does not exist: public.temper"));
    }

    async fn another_type_than_the_columns_is_refused_with_the_right_one(test: Test) {
        let db = migrated(test.version).await;
        db.execute(TYPES).await;
        let node = node(&db).await;
        for (n, (of, named, cure)) in [
            ("date", "date", "chrono::NaiveDate or time::Date"),
            ("timestamp(3)", "timestamp without time zone", "chrono::NaiveDateTime or time::PrimitiveDateTime"),
            ("timestamptz", "timestamp with time zone", "chrono::DateTime<Utc> or time::OffsetDateTime"),
            ("numeric(5, 2)", "numeric", "rust_decimal::Decimal"),
            ("boolean", "boolean", "bool"),
            ("bytea", "bytea", "Vec<u8>"),
            ("public.\"Mood\"", "public.\"Mood\"", "EnumLabel"),
        ].into_iter().enumerate() {
            let t = &format!("public.t{n}");
            db.execute(&format!("create table {t} (k {of} primary key); select rowcache.track('{t}')")).await;
            for error in [
                node.table::<i64, Row>(t).await.expect_err("it fits not"),
                node.table::<String, Row>(t).await.expect_err("it fits not"),
                node.table_by::<i64, Row>(t, ["k"], rowcache::TableOptions::default()).await.expect_err("it fits not"),
            ] {
                let text = error.to_string();
                assert!(text.contains(&format!("(k {named}), which does not")) || text.contains(&format!("(k {}) of {t}", named.trim_start_matches("public."))), "{text}");
                assert!(text.ends_with(&format!("; use Table<{cure}, _>")), "{text}");
            }
        }
        db.execute("create table public.other (k date primary key, c char(5), d public.temper); select rowcache.track('public.other')").await;
        let wrong = node.table::<chrono::NaiveDateTime, Row>("public.other").await.expect_err("a day is no moment").to_string();
        assert!(wrong.contains("does not fit a key of type chrono::NaiveDateTime or"), "{wrong}");
        // Padded; and a domain over an enum.
        for column in ["c", "d"] {
            let options = rowcache::TableOptions::default();
            let error = node.table_by::<String, Row>("public.other", [column], options).await.expect_err(column).to_string();
            assert!(error.contains("no key type of this library holds that"), "{error}");
        }
    }
}

trait Values {
    fn map_v(self) -> Vec<Option<i32>>;
}

impl Values for Vec<Option<rowcache::Cached<Row>>> {
    fn map_v(self) -> Vec<Option<i32>> {
        self.into_iter().map(|row| row.map(|row| row.v)).collect()
    }
}
