//! `rowcache doctor`: each fault is made, found, and gone after its cure.

mod server;
mod tables;
mod traffic;

use serde_json::Value;

use crate::{
    program::{psql, run},
    support::{TestDb, Version, database},
};

/// What was found, and how the program ended.
pub struct Found {
    pub code: Option<i32>,
    pub findings: Vec<Value>,
}

/// Runs it for a second.
pub async fn doctor(url: &str) -> Found {
    doctor_with(url, &[]).await
}

pub async fn doctor_with(url: &str, args: &[&str]) -> Found {
    let all: Vec<_> = ["doctor", "--json", "--seconds", "1"].iter().chain(args).copied().collect();
    let ended = run(url, &all).await;
    assert_eq!(ended.err, "", "{ended:#?}");
    let findings: Vec<Value> = serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:#?}"));
    let found = Found { code: ended.code, findings };
    let worst =
        ["error", "warning"].iter().position(|severity| found.findings.iter().any(|it| it["severity"] == *severity));
    let expected = worst.map_or(0, |n| 2 - i32::try_from(n).expect("0 or 1"));
    assert_eq!(found.code, Some(expected), "{found}");
    found
}

impl Found {
    /// The findings with this code.
    pub fn all(&self, code: &str) -> Vec<&Value> {
        self.findings.iter().filter(|finding| finding["code"] == code).collect()
    }

    /// The one finding with this code: `warning what; why; cure`.
    #[track_caller]
    pub fn one(&self, code: &str) -> String {
        let all = self.all(code);
        assert_eq!(all.len(), 1, "{code} in {self}");
        text(all[0])
    }

    /// Fails unless there is one finding with this code, of this severity, in which all of these occur.
    #[track_caller]
    pub fn has(&self, severity: &str, code: &str, parts: &[&str]) {
        let text = self.one(code);
        assert!(text.starts_with(severity), "{severity} {code}: {text}");
        for part in parts {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    }

    #[track_caller]
    pub fn has_not(&self, code: &str) {
        assert!(self.all(code).is_empty(), "{code} in {self}");
    }

    /// Codes of warnings and errors, but for what a busy machine brings about: slow fences.
    pub fn bad(&self) -> Vec<&str> {
        let bad = |finding: &&Value| finding["severity"] == "warning" || finding["severity"] == "error";
        let codes = self.findings.iter().filter(bad).map(|finding| finding["code"].as_str().expect("a code"));
        codes.filter(|code| !["fence.latency", "fence.late"].contains(code)).collect()
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "exit {:?}", self.code)?;
        self.findings.iter().try_for_each(|it| writeln!(f, "{} {}", it["code"], text(it)))
    }
}

fn text(finding: &Value) -> String {
    let part = |name: &str| finding[name].as_str().unwrap_or("").to_owned();
    format!("{} {}; {}; {}", part("severity"), part("what"), part("why"), part("cure"))
}

/// A migrated database.
pub async fn migrated(version: Version) -> TestDb {
    let db = database(version).await;
    run(&db.url, &["migrate", "up"]).await.ok();
    db
}

/// One with table `users`, tracked, and ten rows in it.
pub async fn prepared(version: Version) -> TestDb {
    let db = migrated(version).await;
    prepare(&db).await;
    db
}

pub async fn prepare(db: &TestDb) {
    psql(
        db,
        &[
            "create table users (id bigint primary key, name text)",
            "insert into users select n, 'x' from generate_series(1, 10) n",
        ],
    )
    .await;
    run(&db.url, &["track", "users"]).await.ok();
}
