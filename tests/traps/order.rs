//! What is newer, and what tells.

use rowcache::{Freshness, Lookup, Token};

use super::sources;
use crate::{
    fixture::{name, node, users, users_db},
    support,
};

/// Ways to ask a wall clock, in Rust and in SQL.
const WALL_CLOCKS: [&str; 14] = [
    "SystemTime",
    "UNIX_EPOCH",
    "CLOCK_REALTIME",
    "Utc::",
    "Local::",
    "OffsetDateTime::now",
    "Timestamp::",
    "Zoned::",
    "gettimeofday",
    "now()",
    "clock_timestamp",
    "statement_timestamp",
    "transaction_timestamp",
    "current_timestamp",
];

/// Whether a line asks this clock. What ends in `now()` may ask another one: our own counts from the boot.
fn asks(line: &str, clock: &str) -> bool {
    let is_part = |before: char| before.is_alphanumeric() || before == '_';
    let (line, clock) = (line.to_lowercase(), clock.to_lowercase());
    line.match_indices(&clock).any(|(at, _)| {
        let before = &line[..at];
        let others = clock == "now()" && [".", ":", "fn ", "ago = "].iter().any(|it| before.ends_with(it));
        !before.ends_with(is_part) && !others
    })
}

pg_test! {
    /// Numbers that are dealt before the commit were taken for the order of commits, and a missing one for a lost message:
    /// epoch's spec 0012.
    async fn trap_15_the_sequence_taken_for_a_gap_test(test: Test) {
        let db = users_db(test.version).await;
        db.execute("create sequence public.versions; alter table public.users add version bigint not null default 0").await;
        let node = node(&db).await;
        let users = users(&node).await;
        for id in [1, 2, 3] {
            name(&users, id).await;
        }
        let clears = users.stats().clears;
        let change = |what: &str, id: i64| {
            format!("update public.users set version = nextval('public.versions'), name = '{what}' where id = {id}")
        };
        // The first one has the lower number of every kind, and commits last.
        let first = db.client().await;
        first.batch_execute(&format!("begin; {}", change("first", 1))).await.expect("writes");
        let token: String = first.query_one("select rowcache.token()", &[]).await.expect("a token").get(0);
        let token: Token = token.parse().expect("is one");
        // This number is never seen.
        db.execute(&format!("begin; {}; rollback", change("never", 3))).await;
        db.execute(&change("second", 2)).await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 2).await.as_deref(), Some("second"));
        assert!(users.peek(&1).is_known() && users.peek(&3).is_known(), "holes in the numbers mean nothing");
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        let error = node.wait_for(token, support::PATIENCE).await.expect_err("a higher number was applied, and that says nothing");
        assert!(error.is_token(), "{error:?}");
        first.batch_execute("commit").await.expect("commits");
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 1).await.as_deref(), Some("first"), "a lower number than was applied before");
        node.wait_for(token, support::PATIENCE).await.expect("was applied");
        assert_eq!(users.stats().clears, clears, "nothing was taken for a gap");
        assert_eq!(node.stats().gaps, 0);
    }

    /// Wall clocks of different machines decided which of two rows is newer: FusionCache #319 and #627, cachalot.
    async fn trap_17_the_clock_that_is_wrong(test: Test) {
        // Nothing that decides looks at one. What a person is shown may; the programs are not part of the library.
        const OTHERS: [&str; 6] = ["/src/cli/", "/src/serve/", "/src/verify/", "/src/bin/", "tests.rs", "store_shuttle.rs"];
        // When a shared value ends, and until when somebody computes it, is a matter of time: that of one clock, the database's, on all
        // nodes. It does not decide which of two values is newer, nor whether one that was computed may be stored.
        const TIMES: [&str; 2] = ["/src/postgres/values.rs", "/migrations/0005_shared_values.up.sql"];
        // For how long a session has been open is shown, by the database's clock, and decides nothing. Keys that are moments are read
        // and written as such.
        const SHOWN: [&str; 2] = ["/src/postgres/fleet.rs", "/src/key/any.rs"];
        let code = sources("src", ".rs").into_iter().chain(sources("migrations", ".up.sql"));
        let others = || OTHERS.iter().chain(&TIMES).chain(&SHOWN);
        let of_library = code.filter(|(path, _)| !others().any(|it| path.contains(it)));
        let mut read = 0;
        for (path, text) in of_library {
            read += 1;
            for (n, line) in text.lines().enumerate() {
                let line = line.split("//").next().expect("a part").split("-- ").next().expect("a part");
                let asked = WALL_CLOCKS.iter().find(|it| asks(line, it));
                assert!(asked.is_none(), "{path}:{}: {line}", n + 1);
            }
        }
        assert!(read > 40, "{read} files");
        // And rows are as new as their commit, whatever their writers' clocks have put into them.
        let db = users_db(test.version).await;
        db.execute("alter table public.users add changed_at timestamptz not null default 'epoch'").await;
        let (one, other) = (node(&db).await, node(&db).await);
        let tables = [users(&one).await, users(&other).await];
        for (n, clock) in ["+ interval '1 year'", "- interval '1 year'", "", "- interval '100 years'"].into_iter().enumerate() {
            db.execute(&format!("update public.users set name = 'n{n}', changed_at = now() {clock} where id = 1")).await;
            for (node, users) in [&one, &other].into_iter().zip(&tables) {
                node.barrier().await.expect("coherent");
                assert_eq!(name(users, 1).await, Some(format!("n{n}")));
            }
        }
    }

    /// The message of an own write undid that write in the own cache, or the own write stayed after a newer one of somebody
    /// else: Redisson #3966, FusionCache #36.
    async fn trap_18_the_own_echo(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        for n in 0..50 {
            name(&users, 1).await;
            let mine = format!("mine {n}");
            let mut transaction = node.begin().await.expect("begins");
            sqlx::query("update public.users set name = $1 where id = 1").bind(&mine).execute(&mut *transaction).await.expect("writes");
            transaction.invalidates(&users, &1);
            let token = transaction.commit().await.expect("commits");
            // The echo comes at some moment of this.
            for _ in 0..5 {
                assert_eq!(name(&users, 1).await.as_ref(), Some(&mine), "the own write is read back");
                tokio::task::yield_now().await;
            }
            node.wait_for(token, support::PATIENCE).await.expect("was applied");
            assert_eq!(name(&users, 1).await.as_ref(), Some(&mine), "after its echo as well");
            assert!(matches!(users.peek(&1), Lookup::Row(_)), "and it is held");
            if n % 5 == 0 {
                // Somebody else's comes after it, and stays.
                let theirs = format!("theirs {n}");
                db.execute(&format!("update public.users set name = '{theirs}' where id = 1")).await;
                let newest = users.get_with(&1, Freshness::Fenced).await.expect("loads").expect("exists");
                assert_eq!(newest.name, theirs);
                assert_eq!(name(&users, 1).await, Some(theirs));
            }
        }
        let stats = users.stats();
        assert!(stats.loads <= 2 * 50 + 2 * 10 + 1, "one for a write, and one for its echo: {stats:?}");
    }
}
