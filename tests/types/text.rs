//! The text of a key is the trigger's, for very many values, and whatever the session of the writer has set.

use chrono::{DateTime, NaiveDate, NaiveDateTime, TimeDelta, Utc};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use rowcache::{EnumLabel, Key, KeyPart};
use rust_decimal::Decimal;

use crate::{
    ODD, TYPES, date, datetime,
    fixture::migrated,
    support::{Test, TestClient},
};

/// How many values of a type are tried.
const VALUES: usize = 2000;

struct Ground(TestClient);

impl Ground {
    async fn new(test: &Test) -> Self {
        let db = migrated(test.version).await;
        db.execute(TYPES).await;
        Self(db.client().await)
    }

    /// What a trigger writes for the values of a column of this type that are given as SQL makes them of a text each.
    async fn told(&self, of: &str, from_text: &str, texts: &[String]) -> Vec<String> {
        self.0
            .batch_execute(&format!("drop table if exists public.t; create table public.t (k {of})"))
            .await
            .expect("creates");
        let sql = self.0.query_one("select rowcache.key_text('public.t', 'k', 'u.k')", &[]).await.expect("asks");
        let sql: String = sql.get(0);
        let ask = format!(
            "select {sql} from (select ({from_text})::{of}, n from unnest($1::text[]) with ordinality as v(t, n)) u(k, n) order by n"
        );
        let mut told: Vec<Vec<String>> = Vec::new();
        for session in ["reset all", ODD] {
            self.0.batch_execute(session).await.expect("sets");
            let rows = self.0.query(&ask, &[&texts]).await.unwrap_or_else(|error| panic!("{error:?}\nin: {ask}"));
            told.push(rows.iter().map(|row| row.get(0)).collect());
        }
        self.0.batch_execute("reset all").await.expect("resets");
        assert_eq!(told[0], told[1], "{of}");
        told.swap_remove(0)
    }

    /// Keys, and what Postgres makes the same values of.
    async fn check<K: Key>(&self, of: &str, from_text: &str, keys: &[(K, String)]) {
        let texts: Vec<String> = keys.iter().map(|(_, text)| text.clone()).collect();
        let told = self.told(of, from_text, &texts).await;
        assert_eq!(told.len(), keys.len());
        for ((key, text), told) in keys.iter().zip(told) {
            assert_eq!(
                serde_json::to_string(&key.to_parts()[0]).expect("writes"),
                told,
                "{of} {text}: what a node makes"
            );
            let part: KeyPart<'static> = serde_json::from_str(&told).expect("reads");
            assert_eq!(K::from_parts(&[part]).as_ref(), Some(key), "{of} {text}: what a node reads");
        }
    }
}

/// Values of a strategy, the same in each run.
fn values<T>(strategy: impl Strategy<Value = T>) -> Vec<T> {
    let mut runner = TestRunner::deterministic();
    (0..VALUES).map(|_| strategy.new_tree(&mut runner).expect("a value").current()).collect()
}

/// As Postgres reads a day: it has no year 0.
fn day_text(day: NaiveDate) -> String {
    use chrono::Datelike;
    let (year, era) = if day.year() > 0 { (day.year(), "") } else { (1 - day.year(), " BC") };
    format!("{year:04}-{:02}-{:02}{era}", day.month(), day.day())
}

fn moment_text(moment: NaiveDateTime, zone: &str) -> String {
    let day = day_text(moment.date());
    let (day, era) = day.split_once(' ').map_or((day.as_str(), ""), |(day, _)| (day, " BC"));
    format!("{day} {}{zone}{era}", moment.format("%H:%M:%S%.6f"))
}

fn moments() -> Vec<NaiveDateTime> {
    let [first, last] = [datetime("-4713-11-24T00:00:00"), datetime("+262142-12-31T23:59:59.999999")];
    let mut moments = vec![
        first,
        last,
        datetime("2000-01-01T00:00:00"),
        datetime("1999-12-31T23:59:59.999999"),
        datetime("0000-12-31T23:59:59"),
    ];
    let span = (last - first).num_seconds();
    moments.extend(
        values((0..span, 0_i64..1_000_000))
            .into_iter()
            .map(|(seconds, micros)| first + TimeDelta::seconds(seconds) + TimeDelta::microseconds(micros)),
    );
    // Most are nearer than that.
    moments.extend(values((-5_000_000_000_i64..5_000_000_000, 0_i64..1_000_000)).into_iter().map(
        |(seconds, micros)| {
            datetime("2000-01-01T00:00:00") + TimeDelta::seconds(seconds) + TimeDelta::microseconds(micros)
        },
    ));
    moments
}

/// The same moment of crate `time`, if it is in its range.
fn of_time(moment: DateTime<Utc>) -> Option<time::OffsetDateTime> {
    let at = time::OffsetDateTime::from_unix_timestamp(moment.timestamp()).ok()?;
    at.replace_nanosecond(moment.timestamp_subsec_nanos()).ok()
}

pg_test! {
    async fn of_days(test: Test) {
        let ground = Ground::new(&test).await;
        let days: Vec<NaiveDate> = moments().iter().map(NaiveDateTime::date).collect();
        let keys: Vec<_> = days.iter().map(|day| (*day, day_text(*day))).collect();
        ground.check("date", "t::date", &keys).await;
        let days = days.iter().filter_map(|day| Some((of_time(day.and_hms_opt(0, 0, 0)?.and_utc())?.date(), day_text(*day))));
        let keys: Vec<_> = days.collect();
        assert!(keys.len() > VALUES);
        ground.check("date", "t::date", &keys).await;
        let told = ground.told("date", "t::date", &["infinity".into(), "-infinity".into(), "5874897-12-31".into()]).await;
        assert_eq!(told, ["\"infinity\"", "\"-infinity\"", "\"2145031948\""]);
        assert_eq!(date("2000-01-01").to_parts(), [KeyPart::Text("0".into())]);
    }

    async fn of_moments(test: Test) {
        let ground = Ground::new(&test).await;
        let moments = moments();
        let keys: Vec<_> = moments.iter().map(|moment| (*moment, moment_text(*moment, ""))).collect();
        ground.check("timestamp", "t::timestamp", &keys).await;
        let keys: Vec<_> = moments.iter().map(|moment| (moment.and_utc(), moment_text(*moment, "+00"))).collect();
        ground.check("timestamptz", "t::timestamptz", &keys).await;
        let keys: Vec<_> = moments.iter().filter_map(|moment| Some((of_time(moment.and_utc())?, moment_text(*moment, "+00")))).collect();
        assert!(keys.len() > VALUES);
        ground.check("timestamptz", "t::timestamptz", &keys).await;
        let keys: Vec<_> = keys.iter().map(|(moment, text)| (time::PrimitiveDateTime::new(moment.date(), moment.time()), text.replace("+00", ""))).collect();
        ground.check("timestamp", "t::timestamp", &keys).await;
    }

    async fn of_numbers(test: Test) {
        let ground = Ground::new(&test).await;
        let digits = prop_oneof![-(1_i128 << 96) + 1..1_i128 << 96, -1_000_000_i128..1_000_000, Just((1_i128 << 96) - 1), Just(0)];
        let keys: Vec<_> = values((digits, 0_u32..=28)).into_iter().map(|(digits, scale)| {
            // With its zeros, which are not part of the key.
            let number = Decimal::from_i128_with_scale(digits, scale);
            (number, number.to_string())
        }).collect();
        ground.check("numeric", "t::numeric", &keys).await;
        // What Rust cannot hold is what it does not read: more digits, a number that is none.
        let beyond = values("-?[1-9][0-9]{0,40}\\.[0-9]{0,40}[1-9]");
        let told = ground.told("numeric", "t::numeric", &beyond).await;
        let mut held = 0;
        for (text, told) in beyond.iter().zip(told) {
            let part: KeyPart<'static> = serde_json::from_str(&told).expect("reads");
            if let Some(key) = <Decimal as Key>::from_parts(std::slice::from_ref(&part)) {
                assert_eq!(key.to_parts(), [part], "{text}");
                held += 1;
            } else {
                assert!(text.len() > 28, "{text} could be held");
            }
        }
        assert!(held > VALUES / 20 && held < VALUES, "{held}");
    }

    async fn of_bytes_bools_and_labels(test: Test) {
        let ground = Ground::new(&test).await;
        let bytes = values(proptest::collection::vec(any::<u8>(), 0..100));
        let hex = |bytes: &Vec<u8>| bytes.iter().map(|byte| format!("{byte:02X}")).collect::<String>();
        let keys: Vec<_> = bytes.iter().map(|bytes| (bytes.clone(), hex(bytes))).collect();
        ground.check("bytea", "decode(t, 'hex')", &keys).await;
        ground.check("boolean", "t::boolean", &[(true, "yes".to_owned()), (false, "off".to_owned()), (true, "TRUE".to_owned())]).await;
        let labels = ["sad", "it's \"fine\"", "glad", "Ünï"].map(|label| (EnumLabel::from(label), label.to_owned()));
        ground.check("public.\"Mood\"", "t::public.\"Mood\"", &labels).await;
        ground.check("public.temper", "t::public.\"Mood\"", &labels).await;
    }
}
