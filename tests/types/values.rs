//! Values with columns of every kind: loaded, held, weighed, audited, evicted and read again.

use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};
use rowcache::{Node, Table, TableOptions};
use rust_decimal::Decimal;
use serde::Deserialize;
use sqlx::types::Json;
use uuid::Uuid;

use crate::{
    ODD, Row, date, datetime,
    fixture::{hasty, migrated, node},
    offset,
    support::{TestDb, eventually},
    utc,
};

#[derive(Clone, Debug, Deserialize, PartialEq)]
struct Settings {
    theme: String,
    sizes: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
struct All {
    day: NaiveDate,
    at: NaiveDateTime,
    zoned: DateTime<Utc>,
    amount: Decimal,
    other: Uuid,
    settings: Json<Settings>,
    anything: serde_json::Value,
    numbers: Vec<i64>,
    words: Vec<String>,
    moments: Vec<DateTime<Utc>>,
    raw: Vec<u8>,
    no_day: Option<NaiveDate>,
    no_amount: Option<Decimal>,
    no_settings: Option<Json<Settings>>,
    no_numbers: Option<Vec<i64>>,
    holes: Vec<Option<String>>,
}

/// The same, with the types of crate `time`.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
struct WithTime {
    day: time::Date,
    at: time::PrimitiveDateTime,
    zoned: time::OffsetDateTime,
    no_day: Option<time::Date>,
}

fn before() -> All {
    All {
        day: date("2024-02-29"),
        at: datetime("1969-07-20T20:17:40.000001"),
        zoned: utc("2024-10-27T00:30:00.5Z"),
        amount: "1234.5600".parse().expect("a decimal"),
        other: Uuid::from_u128(42),
        settings: Json(Settings { theme: "dark".into(), sizes: vec![1, 2] }),
        anything: serde_json::json!({"a": [1, null, "x"], "b": {"c": 1.5}}),
        numbers: vec![1, -2, i64::MAX],
        words: vec!["a".into(), "b \"c\" {d}".into(), String::new()],
        moments: vec![utc("2024-01-01T00:00:00Z")],
        raw: vec![0, 1, 255],
        no_day: None,
        no_amount: None,
        no_settings: None,
        no_numbers: None,
        holes: vec![Some("x".into()), None],
    }
}

fn after() -> All {
    All {
        day: date("1999-12-31"),
        amount: Decimal::NEGATIVE_ONE,
        settings: Json(Settings { theme: "light".into(), sizes: vec![] }),
        anything: serde_json::Value::Null,
        numbers: vec![],
        words: vec!["new".into()],
        no_day: Some(date("2000-01-01")),
        no_amount: Some(Decimal::ONE),
        no_settings: Some(Json(Settings { theme: String::new(), sizes: vec![7] })),
        no_numbers: Some(vec![7]),
        holes: vec![],
        ..before()
    }
}

const UPDATE: &str = r#"update public.things set day = '1999-12-31', amount = -1, settings = '{"theme":"light","sizes":[]}', anything = 'null',
     numbers = '{}', words = '{new}', no_day = '2000-01-01', no_amount = 1, no_settings = '{"theme":"","sizes":[7]}', no_numbers = '{7}',
     holes = '{}' where id = 1"#;

async fn things(test_version: crate::support::Version) -> TestDb {
    let db = migrated(test_version).await;
    db.execute(
        r#"create table public.things (
               id bigint primary key, day date not null, at timestamp not null, zoned timestamptz not null, amount numeric not null,
               other uuid not null, settings jsonb not null, anything jsonb not null, numbers bigint[] not null, words text[] not null,
               moments timestamptz[] not null, raw bytea not null, no_day date, no_amount numeric, no_settings jsonb, no_numbers bigint[],
               holes text[] not null);
           insert into public.things select n, '2024-02-29', '1969-07-20 20:17:40.000001', '2024-10-27 02:30:00.5+02', 1234.5600,
               '00000000-0000-0000-0000-00000000002a', '{"sizes": [1, 2], "theme": "dark"}', '{"b": {"c": 1.5}, "a": [1, null, "x"]}',
               array[1, -2, 9223372036854775807], array['a', 'b "c" {d}', ''], array['2024-01-01 00:00:00+00'::timestamptz],
               decode('0001ff', 'hex'), null, null, null, null, array['x', null]
           from generate_series(1, 20) n;
           select rowcache.track('public.things')"#,
    )
    .await;
    db
}

pg_test! {
    async fn of_every_type_are_held_and_evicted(test: Test) {
        let db = things(test.version).await;
        let (a, b) = (node(&db).await, node(&db).await);
        let mut tables: Vec<Table<i64, All>> = Vec::new();
        for node in [&a, &b] {
            tables.push(node.table("public.things").await.expect("opens"));
        }
        let with_time: Table<i64, WithTime> = a.table("public.things").await.expect("opens with another value type");
        for things in &tables {
            assert_eq!(*things.get(&1).await.expect("loads").expect("exists"), before());
            assert!(things.get_many(&[2, 3]).await.expect("loads").iter().all(|thing| thing.as_deref() == Some(&before())));
        }
        let primitive = |text: &str| {
            let at = offset(text);
            time::PrimitiveDateTime::new(at.date(), at.time())
        };
        let first = WithTime {
            day: offset("2024-02-29T00:00:00Z").date(),
            at: primitive("1969-07-20T20:17:40.000001Z"),
            zoned: offset("2024-10-27T00:30:00.5Z"),
            no_day: None,
        };
        assert_eq!(*with_time.get(&1).await.expect("loads").expect("exists"), first);
        let writer = db.client().await;
        writer.batch_execute(ODD).await.expect("sets");
        writer.batch_execute(UPDATE).await.expect("writes");
        for (node, things) in [&a, &b].into_iter().zip(&tables) {
            node.barrier().await.expect("coherent");
            assert!(!things.peek(&1).is_known() && things.peek(&2).is_known());
            assert_eq!(*things.get(&1).await.expect("loads").expect("exists"), after());
            assert_eq!(*things.get(&2).await.expect("hits").expect("exists"), before());
        }
        let thing = with_time.get(&1).await.expect("loads").expect("exists");
        assert_eq!(thing.no_day, Some(offset("2000-01-01T00:00:00Z").date()));
        assert_eq!(tables[0].stats().failed, 0);
    }

    // What is weighed are the bytes of the row.
    async fn of_every_type_are_weighed(test: Test) {
        let db = things(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().bytes(1 << 20);
        let things: Table<i64, All> = node.table_with("public.things", options).await.expect("opens");
        things.get(&1).await.expect("loads");
        let small = things.stats().bytes;
        db.execute(
            "update public.things set words = array(select 'word ' || n from generate_series(1, 2000) n),
                 anything = (select jsonb_agg(n) from generate_series(1, 2000) n) where id = 1",
        ).await;
        node.barrier().await.expect("coherent");
        assert_eq!(things.get(&1).await.expect("loads").expect("exists").words.len(), 2000);
        let large = things.stats().bytes;
        assert!(small > 200 && small < 2000 && large > small + 30_000 && large < small + 60_000, "{small} {large}");
    }

    // A digest is of what was received, which no setting of a session changes, and no conversion.
    async fn of_every_type_are_audited(test: Test) {
        let db = things(test.version).await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let options = TableOptions::default().audit(1000);
        let things: Table<i64, All> = node.table_with("public.things", options).await.expect("opens");
        let day = "create table public.days (day date, mood text, amount numeric, v int, primary key (day, mood, amount));
             select rowcache.track('public.days'); insert into public.days values ('2024-02-29', 'x', 1.50, 1)";
        db.execute(day).await;
        let options = TableOptions::default().audit(1000);
        let days: Table<(NaiveDate, String, Decimal), Row> = node.table_with("public.days", options).await.expect("opens");
        let key = (date("2024-02-29"), "x".to_owned(), "1.500".parse().expect("a decimal"));
        for _ in 0..2 {
            eventually("both are audited", async || {
                for id in 1..=20 {
                    things.get(&id).await.expect("reads");
                    assert_eq!(days.get(&key).await.expect("reads").expect("exists").v, 1);
                }
                let [things, days] = [things.stats().audits, days.stats().audits];
                assert_eq!((things.incoherent, days.incoherent), (0, 0), "{things:?} {days:?}");
                things.equal > 20 && days.equal > 2
            }).await;
            db.execute(UPDATE).await;
            node.barrier().await.expect("coherent");
        }
    }
}
