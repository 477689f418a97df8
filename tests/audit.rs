//! The audit of rows that were served: it finds what nobody told, and is silent whatever else happens.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use rowcache::{Event, Node, Table, TableOptions};

use crate::{
    fixture::{self, event, hasty, migrated, node, users_db},
    support::eventually,
};

/// What happens to the users while they are read and audited, and half of them written; each leaves the table as good as before.
const CHAOS: [&str; 8] = [
    "begin; delete from public.users; insert into public.users select n, 'again ' || n from generate_series(1, 10) n; commit",
    "begin; truncate public.users; insert into public.users select n, 'new ' || n from generate_series(1, 10) n; commit",
    "select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and application_name like '%(listener)'",
    "alter table public.users add column extra int default 7",
    "alter table public.users drop column extra",
    "alter table public.users alter column name type varchar",
    "alter table public.users alter column name type text",
    "vacuum full public.users",
];

type Users = Table<i64, fixture::User>;

/// Everything that a test does beside its chaos ends with this.
struct Busy(Arc<AtomicBool>);

impl Busy {
    fn goes_on(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }
}

pg_test! {
    async fn nothing_that_was_told_is_an_alarm(test: Test) {
        for expected in ["LISTEN connection", "the triggers or the definition", "cannot verify the triggers"] {
            test.logs.allow(expected);
        }
        let db = users_db(test.version).await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users: Users = node.table_with("public.users", TableOptions::default().audit(1000)).await.expect("opens");
        let over = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        for writer in 0..4 {
            let (busy, client) = (Busy(Arc::clone(&over)), db.client().await);
            tasks.push(tokio::spawn(async move {
                let mut n = writer;
                while busy.goes_on() {
                    n += 7;
                    let update = format!("update public.users set name = 'w{n}' where id = {}", n % 5 + 1);
                    // It may meet a table that is being altered.
                    let _ = client.batch_execute(&update).await;
                }
            }));
        }
        for reader in 0..4 {
            let (busy, users) = (Busy(Arc::clone(&over)), users.clone());
            tasks.push(tokio::spawn(async move {
                let mut id = reader;
                while busy.goes_on() {
                    // Half of them read only what nobody writes, and so hit all the time.
                    id = if reader % 2 == 0 { id % 5 + 6 } else { id % 10 + 1 };
                    // It may meet a gap, or a killed connection.
                    let _ = users.get(&id).await;
                    tokio::task::yield_now().await;
                }
            }));
        }
        for n in 1..=2 {
            for chaos in CHAOS {
                db.execute(chaos).await;
                let seen = users.stats().audits;
                let decided = async || {
                    let audits = users.stats().audits;
                    audits.changed + audits.incoherent > seen.changed && audits.equal > seen.equal
                };
                eventually(&format!("audits after chaos {n}: {chaos}"), decided).await;
            }
        }
        over.store(true, Ordering::Relaxed);
        for task in tasks {
            task.await.expect("no panic");
        }
        let audits = users.stats().audits;
        assert_eq!(audits.incoherent, 0, "a false alarm: {audits:?}");
        assert_eq!(audits.audited, audits.equal + audits.changed + audits.skipped);
    }

    // A row that changes between two hits takes two seats of one round: its key is then in the statement twice.
    async fn the_old_and_the_new_entry_of_a_row_are_audited_together(test: Test) {
        let db = users_db(test.version).await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users: Users = node.table_with("public.users", TableOptions::default().audit(1000)).await.expect("opens");
        for n in 1.. {
            let before = users.stats().audits;
            if before.changed >= 10 {
                break;
            }
            for _ in 0..100 {
                users.get(&1).await.expect("loads");
            }
            db.execute(&format!("update public.users set name = 'version {n}' where id = 1")).await;
            node.barrier().await.expect("coherent");
            while users.stats().audits.equal == before.equal {
                users.get(&1).await.expect("loads");
                let audits = users.stats().audits;
                assert_eq!(audits.incoherent, 0, "a false alarm: {audits:?}");
                tokio::task::yield_now().await;
            }
        }
    }

    // Who may see a row depends on another table, which no trigger watches: against what is assumed of a table (A3).
    async fn what_nobody_told_is_found_and_healed(test: Test) {
        test.logs.allow("a row was served that is not what Postgres has");
        let db = migrated(test.version).await;
        let role = format!("member_of_{}", db.name);
        db.execute(&format!(
            "create table public.allowed (id bigint primary key);
             create table public.secrets (id bigint primary key, name text not null);
             insert into public.allowed select generate_series(1, 3);
             insert into public.secrets select n, 'secret ' || n from generate_series(1, 3) n;
             alter table public.secrets enable row level security;
             create policy members on public.secrets using (id in (select id from public.allowed));
             create role \"{role}\" login;
             grant select on public.secrets, public.allowed to \"{role}\";
             select rowcache.track('public.secrets')",
        )).await;
        let url = db.url.replace("postgres://postgres@", &format!("postgres://{role}@"));
        let node = Node::start(hasty(&url)).await.expect("starts");
        let secrets: Users = node.table_with("public.secrets", TableOptions::default().audit(100)).await.expect("opens");
        let mut events = node.subscribe();
        let is_shown = async |secrets: &Users| secrets.get(&1).await.expect("loads").is_some();
        assert!(is_shown(&secrets).await);
        db.execute("delete from public.allowed where id = 1").await;
        node.barrier().await.expect("coherent");
        assert!(is_shown(&secrets).await, "nobody told");
        let reading = secrets.clone();
        let reader = tokio::spawn(async move {
            while is_shown(&reading).await {
                tokio::task::yield_now().await;
            }
        });
        let found = event(&mut events, "an alarm", |event| matches!(event, Event::Incoherent { .. })).await;
        let Event::Incoherent { table, key: Some(key), .. } = found else { panic!("{found:?}") };
        assert_eq!((table.as_str(), key.to_string().as_str()), ("public.secrets", "1"));
        reader.await.expect("the row is read again");
        let equal = secrets.stats().audits.equal;
        eventually("the row is right now", async || {
            assert!(!is_shown(&secrets).await);
            secrets.stats().audits.equal > equal
        }).await;
        let audits = secrets.stats().audits;
        assert_eq!(audits.incoherent, 1, "{audits:?}");
        assert_eq!(audits.within_second + audits.within_minute + audits.within_hour + audits.older, 1);
    }

    async fn it_is_off_unless_asked_for_and_has_a_limit(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let refused = node.table_with::<i64, fixture::User>("public.users", TableOptions::default().audit(1001)).await;
        let error = refused.expect_err("too many");
        assert!(error.is_config() && error.to_string().contains("audit"), "{error}");
        let users: Users = fixture::users(&node).await;
        users.get(&1).await.expect("loads");
        for _ in 0..1000 {
            assert!(users.try_get(&1).is_known());
        }
        let queries = users.stats().queries;
        for _ in 0..3 {
            node.barrier().await.expect("coherent");
        }
        assert_eq!((users.stats().audits.audited, users.stats().queries), (0, queries));
    }
}
