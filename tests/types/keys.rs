//! Keys of every type, alone and with others, sent as they are, as hashes and by the change log: a write evicts exactly the entries that it
//! is about.

use std::sync::atomic::{AtomicU32, Ordering};

use rowcache::{EnumLabel, Error, Key, KeyPart, KeyType, Node, TableOptions};
use rust_decimal::Decimal;
use uuid::Uuid;

use super::{ODD, Row, Rows, TYPES, date, datetime, offset, read, utc};
use crate::{
    fixture::{migrated, node},
    support::{Test, TestClient},
};

/// Four keys of a table, as Rust and as SQL have them. The first two have rows at first.
type Keys<'a, K> = [(K, &'a str); 4];

struct Ground {
    writer: TestClient,
    nodes: [Node; 2],
}

impl Ground {
    async fn new(test: &Test) -> Self {
        let db = migrated(test.version).await;
        db.execute(TYPES).await;
        // Those of the nodes as well.
        for setting in [
            "timezone = 'Asia/Kathmandu'",
            "datestyle = 'SQL, DMY'",
            "bytea_output = escape",
            "extra_float_digits = -3",
        ] {
            db.execute(&format!("alter database {} set {setting}", db.name)).await;
        }
        let writer = db.client().await;
        writer.batch_execute(ODD).await.expect("sets");
        Self { writer, nodes: [node(&db).await, node(&db).await] }
    }

    async fn write(&self, sql: &str) {
        self.writer.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?}\nin: {sql}"));
    }

    /// Alone, as they are and as hashes; and as a part of a longer key, by the change log.
    async fn check<K>(&self, of: &str, keys: Keys<'_, K>)
    where
        K: Key,
        (i32, K): Key,
    {
        for options in ["", ", hash_keys => true"] {
            self.play(&format!("k {of}"), "k", options, keys.clone()).await;
        }
        let sql = keys.each_ref().map(|(_, sql)| format!("(7, {sql})"));
        let pairs = [0, 1, 2, 3].map(|n| ((7, keys[n].0.clone()), sql[n].as_str()));
        let options = ", via => 'log', level => 'row'";
        self.play(&format!("tenant integer, k {of}"), "(tenant, k)", options, pairs).await;
    }

    async fn play<K: Key>(&self, columns: &str, key: &str, options: &str, keys: Keys<'_, K>) {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let table = format!("public.t{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let [(a, a_sql), (b, b_sql), (c, c_sql), (d, d_sql)] = keys;
        // `(a, b)` with one more value is `(a, b, v)`.
        let row = |sql: &str| sql.strip_prefix('(').and_then(|it| it.strip_suffix(')')).unwrap_or(sql).to_owned();
        let insert = |sql: &str, v: i32| {
            let parts = if key == "k" { sql.to_owned() } else { row(sql) };
            format!("insert into {table} values ({parts}, {v})")
        };
        let names = key.trim_matches(['(', ')']);
        self.write(&format!(
            "create table {table} ({columns}, v int not null, primary key ({names})); select rowcache.track('{table}'{options});
             {}; {}",
            insert(a_sql, 1),
            insert(b_sql, 1)
        ))
        .await;
        let mut tables: Vec<Rows<K>> = Vec::new();
        for node in &self.nodes {
            tables.push(node.table(&table).await.unwrap_or_else(|error| panic!("{columns}: {error}")));
            // What was told of the first rows is not to come later.
            node.barrier().await.expect("coherent");
        }
        let all = [a.clone(), b.clone(), c.clone(), d.clone()];
        let load = async || {
            for rows in &tables {
                for key in &all {
                    read(rows, key).await;
                    assert!(rows.peek(key).is_known(), "{columns}{options}: {key:?} is held");
                }
            }
        };
        let expect = async |doing: &str, evicted: [bool; 4], now: [Option<i32>; 4]| {
            for (node, rows) in self.nodes.iter().zip(&tables) {
                node.barrier().await.expect("coherent");
                let gone = all.each_ref().map(|key| !rows.peek(key).is_known());
                assert_eq!(gone, evicted, "{columns}{options}: {doing} evicts what it is about");
                let many = rows.get_many(&all).await.expect("loads");
                assert_eq!(
                    many.iter().map(|row| row.as_ref().map(|row| row.v)).collect::<Vec<_>>(),
                    now,
                    "{columns}{options}: {doing}"
                );
            }
            load().await;
        };

        // One by one, and then, when all is forgotten, together.
        load().await;
        let held: Vec<_> =
            tables[0].get_many(&all).await.expect("hits").into_iter().map(|row| row.map(|row| row.v)).collect();
        assert_eq!(held, [Some(1), Some(1), None, None], "{columns}{options}");
        tables[0].clear().await.expect("sent");
        expect("a clear", [true; 4], [Some(1), Some(1), None, None]).await;

        self.write(&format!("update {table} set v = 2 where {key} = {a_sql}")).await;
        expect("an UPDATE", [true, false, false, false], [Some(2), Some(1), None, None]).await;
        self.write(&format!("update {table} set {key} = {d_sql} where {key} = {a_sql}")).await;
        expect("an UPDATE of the key", [true, false, false, true], [None, Some(1), None, Some(2)]).await;
        self.write(&insert(c_sql, 3)).await;
        expect("an INSERT", [false, false, true, false], [None, Some(1), Some(3), Some(2)]).await;
        self.write(&format!("delete from {table} where {key} = {b_sql}")).await;
        expect("a DELETE", [false, true, false, false], [None, None, Some(3), Some(2)]).await;
        tables[1].invalidate(&c).await.expect("sent");
        expect("an invalidation by hand", [false, false, true, false], [None, None, Some(3), Some(2)]).await;
        let (of, by) = (table.clone(), format!("{key} = {c_sql}"));
        let modified = tables[0].modify(&c, |row, transaction| {
            Box::pin(async move {
                assert_eq!(row.map(|row| row.v), Some(3), "the row that was locked");
                let sql = sqlx::AssertSqlSafe(format!("update {of} set v = 4 where {by}"));
                sqlx::query(sql).execute(&mut **transaction).await.expect("writes");
                Ok::<_, Error>(())
            })
        });
        modified.await.expect("commits");
        for (node, rows) in self.nodes.iter().zip(&tables) {
            node.barrier().await.expect("coherent");
            assert_eq!(read(rows, &c).await, Some(4), "{columns}{options}");
            assert!(rows.peek(&d).is_known(), "{columns}{options}");
        }
    }
}

/// A type of the user's own, over one of ours.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Invoice(Decimal);

impl Key for Invoice {
    fn types() -> Vec<KeyType> {
        Decimal::types()
    }

    fn from_parts(parts: &[KeyPart<'_>]) -> Option<Self> {
        <Decimal as Key>::from_parts(parts).map(Self)
    }

    fn to_parts(&self) -> Vec<KeyPart<'_>> {
        self.0.to_parts()
    }
}

fn decimal(text: &str) -> Decimal {
    text.parse().expect("a decimal")
}

pg_test! {
    async fn bytes(test: Test) {
        let ground = Ground::new(&test).await;
        let keys = [
            (vec![0, 255, 0x5c], "decode('00ff5c', 'hex')"),
            (vec![], "decode('', 'hex')"),
            (b"\\x00".to_vec(), "decode('5c783030', 'hex')"),
            ((0..=255).collect(), "(select string_agg(set_byte(decode('00', 'hex'), 0, n), '' order by n) from generate_series(0, 255) n)"),
        ];
        ground.check::<Vec<u8>>("bytea", keys).await;
    }

    async fn labels_of_enums(test: Test) {
        let ground = Ground::new(&test).await;
        let label = |text: &str| EnumLabel::from(text);
        let sql = ["sad", "it''s \"fine\"", "glad", "Ünï"].map(|label| format!("'{label}'"));
        let keys = [
            (label("sad"), sql[0].as_str()),
            (label("it's \"fine\""), &sql[1]),
            (label("glad"), &sql[2]),
            (label("Ünï"), &sql[3]),
        ];
        ground.check("public.\"Mood\"", keys).await;
    }

    async fn dates(test: Test) {
        let ground = Ground::new(&test).await;
        for of in ["date", "public.day"] {
            let keys = [
                (date("2024-02-29"), "date '2024-02-29'"),
                (date("1999-12-31"), "date '1999-12-31'"),
                (date("2000-01-01"), "date '2000-01-01'"),
                (date("9999-12-31"), "date '9999-12-31'"),
            ];
            ground.check(of, keys).await;
            ground.check(of, keys.map(|(key, sql)| (offset(&format!("{key}T00:00:00Z")).date(), sql))).await;
        }
        let far = [
            (date("-4713-11-24"), "date '4714-11-24 BC'"),
            (date("0000-02-29"), "date '0001-02-29 BC'"),
            (date("+12345-06-07"), "date '12345-06-07'"),
            (date("+262142-12-31"), "date '262142-12-31'"),
        ];
        ground.check("date", far).await;
    }

    async fn moments(test: Test) {
        let ground = Ground::new(&test).await;
        let texts = ["2000-01-01T00:00:00", "1999-12-31T23:59:59.999999", "2024-10-27T01:30:00.000001", "9999-12-31T23:59:59.999999"];
        let sql = texts.map(|text| format!("timestamp '{text}'"));
        ground.check("timestamp", [0, 1, 2, 3].map(|n| (datetime(texts[n]), sql[n].as_str()))).await;
        let primitive = |text: &str| {
            let moment = offset(&format!("{text}Z"));
            time::PrimitiveDateTime::new(moment.date(), moment.time())
        };
        ground.check("timestamp", [0, 1, 2, 3].map(|n| (primitive(texts[n]), sql[n].as_str()))).await;
        let far = [
            (datetime("-4713-11-24T00:00:00"), "timestamp '4714-11-24 00:00:00 BC'"),
            (datetime("-0043-03-15T12:00:00"), "timestamp '0044-03-15 12:00:00 BC'"),
            (datetime("+12345-06-07T08:09:10.5"), "timestamp '12345-06-07 08:09:10.5'"),
            (datetime("+262142-12-31T23:59:59.999999"), "timestamp '262142-12-31 23:59:59.999999'"),
        ];
        ground.check("timestamp", far).await;
    }

    async fn moments_with_a_zone(test: Test) {
        let ground = Ground::new(&test).await;
        let texts = [
            ("2000-01-01T00:00:00Z", "timestamptz '1999-12-31 19:00:00-05'"),
            ("1999-12-31T23:59:59.999999Z", "timestamptz '1999-12-31 23:59:59.999999+00'"),
            // Twice in one night, to whoever has a summer.
            ("2024-10-27T00:30:00Z", "timestamptz '2024-10-27 02:30:00+02'"),
            ("2024-10-27T01:30:00Z", "timestamptz '2024-10-27 02:30:00+01'"),
        ];
        ground.check("timestamptz(6)", texts.map(|(text, sql)| (utc(text), sql))).await;
        let zone = time::UtcOffset::from_hms(5, 45, 0).expect("an offset");
        ground.check("timestamptz", texts.map(|(text, sql)| (offset(text).to_offset(zone), sql))).await;
    }

    async fn numbers(test: Test) {
        let ground = Ground::new(&test).await;
        let keys = [
            (decimal("1.50"), "1.5"),
            (decimal("100"), "100.000"),
            (decimal("-0.00"), "0.0"),
            (decimal("-0.007"), "-0.0070"),
        ];
        ground.check("numeric", keys).await;
        ground.check("numeric(12, 6)", keys).await;
        ground.check("public.amount", keys).await;
        let long = [
            (decimal("79228162514264337593543950335"), "79228162514264337593543950335"),
            (decimal("-7.9228162514264337593543950335"), "-7.9228162514264337593543950335"),
            (decimal("0.0000000000000000000000000001"), "1e-28"),
            (decimal("10000000000000000000000000000"), "1e28"),
        ];
        ground.check("numeric", long).await;
        // A type of the user's own; and one more way to write 1.5.
        ground.play("k numeric", "k", "", keys.map(|(key, sql)| (Invoice(key), sql))).await;
        let rows: Rows<Decimal> = {
            ground.write("create table public.prices (k numeric primary key, v int); select rowcache.track('public.prices');
                 insert into public.prices values (1.5, 1)").await;
            ground.nodes[0].table("public.prices").await.expect("opens")
        };
        // What was told of the first row is not to come later.
        ground.nodes[0].barrier().await.expect("coherent");
        assert_eq!(read(&rows, &decimal("1.500")).await, Some(1));
        assert!(rows.peek(&decimal("1.5")).is_known(), "one key");
        ground.write("update public.prices set k = 1.50, v = 2").await;
        ground.nodes[0].barrier().await.expect("coherent");
        assert!(!rows.peek(&decimal("1.500")).is_known());
    }

    async fn two_values_of_a_bool(test: Test) {
        let ground = Ground::new(&test).await;
        // Four keys, of which a bool is a part.
        let keys = |sql: [&'static str; 4]| [(true, 1_i64), (false, 1), (true, 2), (false, 2)].into_iter().zip(sql).collect::<Vec<_>>();
        for (table, options) in [("public.flags", ""), ("public.hashed", ", hash_keys => true")] {
            let keys = keys(["(true, 1)", "(false, 1)", "(true, 2)", "(false, 2)"]);
            ground.play("flag boolean, k bigint", "(flag, k)", options, keys.try_into().expect("four")).await;
            ground.write(&format!(
                "create table {table} (k boolean primary key, v int); select rowcache.track('{table}'{options});
                 insert into {table} values (true, 1)"
            )).await;
            for node in &ground.nodes {
                let flags: Rows<bool> = node.table(table).await.expect("opens");
                node.barrier().await.expect("coherent");
                assert_eq!((read(&flags, &true).await, read(&flags, &false).await), (Some(1), None));
                let many = flags.get_many(&[false, true]).await.expect("hits");
                assert!(many[0].is_none() && many[1].is_some());
                ground.write(&format!("update {table} set v = 1")).await;
                node.barrier().await.expect("coherent");
                assert!(!flags.peek(&true).is_known() && flags.peek(&false).is_known());
                let both = flags.get_many(&[false, true]).await.expect("loads");
                assert!(both[0].is_none() && both[1].is_some());
            }
        }
    }

    async fn keys_of_four_columns_and_four_types(test: Test) {
        let ground = Ground::new(&test).await;
        let key = |day: &str, mood: &str, n: &str, at: &str| (date(day), EnumLabel::from(mood), decimal(n), utc(at));
        let at = "2024-01-01T00:00:00Z";
        let sql = |day: &str, mood: &str, n: &str| format!("(date '{day}', '{mood}'::public.\"Mood\", {n}, timestamptz '2024-01-01 02:00:00+02')");
        let sql = [sql("2024-01-01", "sad", "1"), sql("2024-01-02", "sad", "1"), sql("2024-01-01", "glad", "1"), sql("2024-01-01", "sad", "1.1")];
        let keys = [
            (key("2024-01-01", "sad", "1.0", at), sql[0].as_str()),
            (key("2024-01-02", "sad", "1", at), &sql[1]),
            (key("2024-01-01", "glad", "1", at), &sql[2]),
            (key("2024-01-01", "sad", "1.10", at), &sql[3]),
        ];
        ground.play("a date, b public.\"Mood\", c numeric, d timestamptz", "(a, b, c, d)", "", keys.clone()).await;
        ground.play("a public.day, b public.\"Mood\", c public.amount, d timestamptz", "(a, b, c, d)", ", hash_keys => true", keys).await;
        ground.play(
            "a boolean, b bytea, c uuid, d timestamp",
            "(a, b, c, d)",
            "",
            [
                ((true, vec![1_u8], Uuid::nil(), datetime("2024-01-01T00:00:00")), "(true, decode('01', 'hex'), '00000000-0000-0000-0000-000000000000'::uuid, timestamp '2024-01-01')"),
                ((true, vec![2], Uuid::nil(), datetime("2024-01-01T00:00:00")), "(true, decode('02', 'hex'), '00000000-0000-0000-0000-000000000000'::uuid, timestamp '2024-01-01')"),
                ((false, vec![1], Uuid::nil(), datetime("2024-01-01T00:00:00")), "(false, decode('01', 'hex'), '00000000-0000-0000-0000-000000000000'::uuid, timestamp '2024-01-01')"),
                ((true, vec![1], Uuid::nil(), datetime("2024-01-02T00:00:00")), "(true, decode('01', 'hex'), '00000000-0000-0000-0000-000000000000'::uuid, timestamp '2024-01-02')"),
            ],
        ).await;
    }

    // By columns that are not the key of the table: rows, lists of rows, and what a loader makes of them.
    async fn other_columns_than_the_key(test: Test) {
        let ground = Ground::new(&test).await;
        ground.write(
            "create table public.visits (v int primary key, day date, mood public.\"Mood\", amount numeric, at timestamptz unique, flag boolean);
             select rowcache.track('public.visits', columns => '{day,mood,amount,at,flag}');
             insert into public.visits values (1, date '2024-02-29', 'sad', 1.50, timestamptz '2024-01-01 00:00:00+00', true),
                 (2, date '2024-02-29', 'glad', 1.5, timestamptz '2024-01-02 00:00:00+00', true),
                 (3, date '2024-03-01', null, null, timestamptz '2024-01-03 00:00:00+00', false)"
        ).await;
        let node = &ground.nodes[0];
        let options = TableOptions::default;
        let days = node.list_by::<_, Row>("public.visits", ["day"], options()).await.expect("opens");
        let moods = node.list_by::<_, Row>("public.visits", ["mood"], options()).await.expect("opens");
        let amounts = node.list_by::<_, Row>("public.visits", ["amount", "flag"], options()).await.expect("opens");
        let moments = node.table_by::<_, Row>("public.visits", ["at"], options()).await.expect("opens");
        node.barrier().await.expect("coherent");
        let (leap, march) = (date("2024-02-29"), date("2024-03-01"));
        let (sad, glad) = (EnumLabel::from("sad"), EnumLabel::from("glad"));
        let (half, three) = ((decimal("1.500"), true), (decimal("3"), false));
        let (first, third) = (utc("2024-01-01T00:00:00Z"), utc("2024-01-03T00:00:00Z"));
        let list = |list: Option<rowcache::Cached<Vec<Row>>>| list.map(|rows| rows.iter().map(|row| row.v).collect::<Vec<_>>()).unwrap_or_default();
        let look = async || (
            (list(days.get(&leap).await.expect("loads")), list(days.get(&march).await.expect("loads"))),
            (list(moods.get(&sad).await.expect("loads")), list(moods.get(&glad).await.expect("loads"))),
            (list(amounts.get(&half).await.expect("loads")), list(amounts.get(&three).await.expect("loads"))),
            (read(&moments, &first).await, read(&moments, &third).await),
        );
        let before = ((vec![1, 2], vec![3]), (vec![1], vec![2]), (vec![1, 2], vec![]), (Some(1), Some(3)));
        assert_eq!(look().await, before);
        for (sql, gone, after) in [
            (
                "update public.visits set day = date '2024-03-02', mood = 'Ünï', amount = 2, at = timestamptz '2024-01-04 00:00:00+00' where v = 1",
                [true, false, true, false, true, false, true, false],
                ((vec![2], vec![3]), (vec![], vec![2]), (vec![2], vec![]), (None, Some(3))),
            ),
            (
                "update public.visits set mood = 'glad', amount = 3.0 where v = 3",
                // Its day and its moment are sent along.
                [false, true, false, true, false, true, false, true],
                ((vec![2], vec![3]), (vec![], vec![2, 3]), (vec![2], vec![3]), (None, Some(3))),
            ),
        ] {
            ground.write(sql).await;
            node.barrier().await.expect("coherent");
            let known = [
                days.peek(&leap).is_known(), days.peek(&march).is_known(), moods.peek(&sad).is_known(), moods.peek(&glad).is_known(),
                amounts.peek(&half).is_known(), amounts.peek(&three).is_known(), moments.peek(&first).is_known(), moments.peek(&third).is_known(),
            ];
            assert_eq!(known.map(|known| !known), gone, "{sql}");
            assert_eq!(look().await, after, "{sql}");
        }
    }
}
