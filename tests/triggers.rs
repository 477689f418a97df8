//! The database side on real Postgres: which writes are told, in what form, and how a write that was not told is noticed.
//!
//! A test says what a statement tells as a list of words, sorted: `7` is key 7 of `public.t`, `*` all of it, `email="x"` a
//! further column, `#0f…` a hashed key; of another table the words start with its name and a colon; `_` stands for a space. Nothing more than the list may arrive: a
//! marker sent afterwards comes next (commits are delivered in order).

mod fingerprint;
mod fires;
mod hashed;
mod message;
mod migrate;
mod track;
mod tree;

use std::{collections::BTreeSet, fmt::Write as _};

use serde_json::Value;

use crate::support::{Notifications, Test, TestClient, TestDb, database};

/// A migrated database, a session that writes, and one that listens on channel `rowcache`.
struct Db {
    #[allow(clippy::struct_field_names)] // it is the database
    db: TestDb,
    client: TestClient,
    listener: Notifications,
}

/// What was told.
struct Told {
    words: BTreeSet<String>,
    messages: Vec<String>,
}

/// An error of the server.
struct Refusal {
    code: String,
    message: String,
    hint: String,
}

impl Db {
    async fn new(test: &Test) -> Self {
        Self::on(database(test.version).await).await
    }

    async fn on(db: TestDb) -> Self {
        let client = db.client().await;
        for file in rowcache::migrate::print() {
            if file.name.ends_with(".up.sql") {
                client.batch_execute(&file.sql).await.unwrap_or_else(|error| panic!("{}: {error:?}", file.name));
            }
        }
        let listener = db.listen("rowcache").await;
        Self { db, client, listener }
    }

    /// With a tracked table `t` that has the rows 1 to 5.
    async fn with_table(test: &Test, level: &str) -> Self {
        let db = Self::new(test).await;
        db.run("create table t (id int primary key, v int not null default 0, w int)").await;
        db.run("insert into t select i from generate_series(1, 5) i").await;
        db.run(&format!("select rowcache.track('t', level => '{level}')")).await;
        db
    }

    async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?}\nin: {sql}"));
    }

    async fn refuses(&self, sql: &str) -> Refusal {
        let error = self.client.batch_execute(sql).await.expect_err(sql);
        let error = error.as_db_error().unwrap_or_else(|| panic!("{error:?}\nin: {sql}"));
        Refusal {
            code: error.code().code().to_owned(),
            message: error.message().to_owned(),
            hint: error.hint().unwrap_or_default().to_owned(),
        }
    }

    /// The only column of the only row, as text.
    async fn text(&self, sql: &str) -> Option<String> {
        let row = self.client.query_one(&format!("select ({sql})::text"), &[]).await;
        row.unwrap_or_else(|error| panic!("{error:?}\nin: {sql}")).get(0)
    }

    async fn problems(&self, table: &str) -> Vec<String> {
        let rows = self.client.query("select rowcache.problems($1::text::regclass)", &[&table]).await;
        rows.expect("problems").iter().map(|row| row.get(0)).collect()
    }

    async fn fingerprint(&self, table: &str) -> Option<String> {
        let sql = "select fingerprint from rowcache.fingerprints(array[$1])";
        self.client.query_one(sql, &[&table]).await.expect("fingerprints").get(0)
    }

    /// Runs the SQL and returns what it told.
    async fn told(&mut self, sql: &str) -> Told {
        self.run(sql).await;
        self.told_so_far().await
    }

    async fn told_so_far(&mut self) -> Told {
        let messages = self.listener.all_so_far().await;
        let mut words = BTreeSet::new();
        for message in &messages {
            words.extend(words_of(message).into_iter().map(|word| word.replace(' ', "_")));
        }
        Told { words, messages }
    }

    /// Runs the SQL and checks what it told.
    async fn tells(&mut self, sql: &str, expected: &str) {
        let told = self.told(sql).await;
        assert_eq!(told.list(), sorted(expected), "told by: {sql}\nas: {:#?}", told.messages);
    }
}

impl Told {
    fn list(&self) -> String {
        self.words.iter().map(String::as_str).collect::<Vec<_>>().join(" ")
    }
}

fn sorted(words: &str) -> String {
    words.split_whitespace().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(" ")
}

/// Reads a message as strictly as its grammar is.
fn words_of(message: &str) -> Vec<String> {
    assert!(message.len() < 8000, "{} bytes", message.len());
    let value: Value = serde_json::from_str(message).unwrap_or_else(|error| panic!("{error}: {message}"));
    let fields: BTreeSet<&str> = value.as_object().expect(message).keys().map(String::as_str).collect();
    assert_eq!(value["v"], 1, "{message}");
    assert!(value["x"].is_u64(), "{message}");
    let prefix = match value["t"].as_str().expect(message) {
        "public.t" => String::new(),
        name => format!("{name}:"),
    };
    if fields.contains("all") {
        assert!(fields == BTreeSet::from(["v", "t", "x", "all"]) && value["all"] == true, "{message}");
        return vec![format!("{prefix}*")];
    }
    if fields.contains("h") {
        assert_eq!(fields, BTreeSet::from(["v", "t", "x", "i", "h"]), "{message}");
        assert_eq!(value["i"].as_str().map(str::len), Some(16), "{message}");
        let hashes = value["h"].as_array().expect(message);
        return hashes.iter().map(|hash| format!("{prefix}#{}", hash.as_str().expect(message))).collect();
    }
    let keys = value["k"].as_array().expect(message);
    let mut words: Vec<_> = keys.iter().map(|key| format!("{prefix}{key}")).collect();
    if fields.contains("c") {
        assert_eq!(fields, BTreeSet::from(["v", "t", "x", "k", "c"]), "{message}");
        for (column, values) in value["c"].as_object().expect(message) {
            words.extend(values.as_array().expect(message).iter().map(|value| format!("{prefix}{column}={value}")));
        }
    } else {
        assert_eq!(fields, BTreeSet::from(["v", "t", "x", "k"]), "{message}");
    }
    words
}

/// `a b c …` for a range of numbers.
fn numbers(range: std::ops::RangeInclusive<i64>) -> String {
    range.fold(String::new(), |mut list, number| {
        write!(list, "{number} ").expect("a string takes all");
        list
    })
}
