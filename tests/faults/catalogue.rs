//! What happens to a table and its triggers while its rows are held.

use rowcache::{Reason, Status};

use crate::{
    Subject, allow_gaps,
    fixture::{hasty, migrated, name, users_db},
    support::{Test, eventually},
};

const TRACK: &str = "select rowcache.track('public.users')";

async fn subject(test: &Test) -> Subject {
    allow(test);
    let db = users_db(test.version).await;
    Subject::new(&db, hasty(&db.url)).await
}

fn allow(test: &Test) {
    allow_gaps(&test.logs);
    test.logs.allow("the triggers or the definition of this table changed");
}

impl Subject {
    /// Does something that puts the table in doubt; returns when it says so, for a reason that contains `why`.
    async fn in_doubt(&self, damage: &str, why: &str) {
        self.warm().await;
        self.db.execute(damage).await;
        eventually("what was held is forgotten", async || !self.held(1) && !self.held(2)).await;
        eventually(&format!("the status says: {why}"), async || match self.users.status() {
            Status::Bypassed { why: Reason::Triggers(text), .. } => text.contains(why),
            _ => false,
        })
        .await;
    }

    /// Undoes it; returns when the table is as good as new.
    async fn trusted_after(&self, repair: &str) {
        self.db.execute(repair).await;
        eventually("the table is trusted again", async || matches!(self.users.status(), Status::Coherent { .. })).await;
        self.is_well().await;
    }
}

pg_test! {
    async fn a_trigger_function_is_replaced(test: Test) {
        let subject = subject(&test).await;
        subject
            .in_doubt(
                "do $$ begin execute format(
                     'create or replace function rowcache.%I() returns trigger language plpgsql as ''begin return null; end''',
                     (select function from rowcache.tracked_table where name = 'public.users'));
                 end $$",
                "is not what track() makes",
            )
            .await;
        subject.reads_postgres().await;
        subject.trusted_after(TRACK).await;
    }

    async fn single_triggers_are_dropped_or_replaced(test: Test) {
        let subject = subject(&test).await;
        for (damage, why) in [
            ("drop trigger zz_rowcache_truncate on public.users", "is missing"),
            ("alter table public.users enable trigger zz_rowcache_update", "is not enabled ALWAYS"),
            (
                "create function public.nothing() returns trigger language plpgsql as 'begin return null; end';
                 create or replace trigger zz_rowcache_update after update on public.users
                 for each statement execute function public.nothing()",
                "calls another function",
            ),
        ] {
            subject.in_doubt(damage, why).await;
            subject.reads_postgres().await;
            subject.trusted_after(TRACK).await;
        }
    }

    // Logical replication and restores write like this, and ordinary triggers do not fire.
    async fn a_writer_in_replica_mode_is_heard(test: Test) {
        let subject = subject(&test).await;
        let writer = subject.db.client().await;
        writer.batch_execute("set session_replication_role = replica").await.expect("set");
        eventually("the change arrives as a message", async || {
            subject.warm().await;
            let heard = subject.users.stats().invalidations;
            writer.batch_execute("update public.users set name = name || '!' where id = 1").await.expect("writes");
            subject.node.barrier().await.is_ok() && subject.users.stats().invalidations > heard
        })
        .await;
        subject.is_well().await;
    }

    async fn a_table_is_dropped_and_made_again(test: Test) {
        let subject = subject(&test).await;
        subject.in_doubt("drop table public.users", "gone").await;
        let error = subject.users.get(&1).await.expect_err("there is no table");
        assert!(error.is_table(), "{error:?}");
        let made = "create table public.users (id bigint primary key, name text not null);
             insert into public.users select n, 'again ' || n from generate_series(1, 3) n";
        subject.db.execute(made).await;
        eventually("the status says that it is not tracked", async || match subject.users.status() {
            Status::Bypassed { why, .. } => why.to_string().contains("not tracked"),
            Status::Coherent { .. } => panic!("nobody would tell of a change"),
            _ => false,
        })
        .await;
        assert_eq!(name(&subject.users, 2).await.as_deref(), Some("again 2"));
        assert!(subject.users.get(&9).await.expect("loads").is_none());
        subject.reads_postgres().await;
        subject.trusted_after(TRACK).await;
    }

    // All at once, between two looks: the name stands for another table.
    async fn a_table_is_replaced_in_one_transaction(test: Test) {
        let subject = subject(&test).await;
        let swap = "begin; create table public.users_new (id bigint primary key, name text not null);
             insert into public.users_new select n, 'new ' || n from generate_series(1, 3) n;
             alter table public.users rename to users_old; alter table public.users_new rename to users;";
        subject.in_doubt(&format!("{swap} commit"), "not tracked").await;
        assert_eq!(name(&subject.users, 2).await.as_deref(), Some("new 2"));
        subject.reads_postgres().await;
        subject.trusted_after(TRACK).await;
        // The same with a table that is tracked before anybody looks.
        subject.db.execute("drop table public.users_old").await;
        subject.warm().await;
        subject.db.execute(&format!("{swap} update public.users set name = 'newer'; {TRACK}; commit")).await;
        eventually("the rows are those of the new table", async || {
            let (one, two) = (name(&subject.users, 1).await, name(&subject.users, 2).await);
            [one, two].iter().all(|name| name.as_deref() == Some("newer"))
        })
        .await;
        subject.is_well().await;
    }

    async fn a_table_is_renamed_and_gets_its_name_back(test: Test) {
        let subject = subject(&test).await;
        subject.in_doubt("alter table public.users rename to people", "gone").await;
        let error = subject.users.get(&1).await.expect_err("there is no table of that name");
        assert!(error.is_table(), "{error:?}");
        subject.db.execute("update public.people set name = 'while away' where id = 2").await;
        subject.trusted_after("alter table public.people rename to users").await;
        assert_eq!(name(&subject.users, 2).await.as_deref(), Some("while away"));
    }

    async fn columns_come_and_go(test: Test) {
        let subject = subject(&test).await;
        for change in [
            "alter table public.users add column extra int not null default 7",
            "alter table public.users alter column extra type text",
            "alter table public.users alter column name type varchar(99)",
            "alter table public.users drop column extra",
        ] {
            subject.warm().await;
            subject.db.execute(change).await;
            eventually("what was held is forgotten", async || !subject.held(1) && !subject.held(2)).await;
            subject.is_well().await;
        }
        subject.db.execute("alter table public.users drop column name").await;
        eventually("the row cannot be read", async || subject.users.get(&1).await.is_err_and(|error| error.is_decode())).await;
        subject.db.execute("alter table public.users add column name text not null default 'anew'").await;
        eventually("it can be read", async || subject.users.get(&2).await.is_ok()).await;
        assert_eq!(name(&subject.users, 2).await.as_deref(), Some("anew"));
        subject.is_well().await;
    }

    // X22.
    async fn partitions_come_and_go(test: Test) {
        allow(&test);
        let db = migrated(test.version).await;
        db.execute(
            "create table public.users (id bigint primary key, name text not null) partition by range (id);
             create table public.low partition of public.users for values from (0) to (100);
             create table public.high (id bigint primary key, name text not null);
             insert into public.users values (1, 'low 1'), (2, 'low 2');
             insert into public.high values (101, 'high 101'), (102, 'high 102');
             select rowcache.track('public.users')",
        )
        .await;
        let subject = Subject::new(&db, hasty(&db.url)).await;
        let reads = async |what: &str, id: i64, expected: Option<&str>| {
            eventually(what, async || {
                name(&subject.users, id).await.as_deref() == expected && subject.users.peek(&id).is_known()
            })
            .await;
        };
        reads("there is no such row yet", 101, None).await;
        // Row triggers come along, the one for TRUNCATE does not.
        subject.in_doubt("alter table public.users attach partition public.high for values from (100) to (200)", "is missing").await;
        assert_eq!(name(&subject.users, 101).await.as_deref(), Some("high 101"));
        subject.reads_postgres().await;
        subject.trusted_after(TRACK).await;
        reads("the row has come", 101, Some("high 101")).await;
        for (removal, restore) in [
            ("alter table public.users detach partition public.high", Some("alter table public.users attach partition public.high for values from (100) to (200)")),
            ("truncate public.high", Some("insert into public.high values (101, 'high 101')")),
            ("drop table public.high", None),
        ] {
            reads(&format!("held before: {removal}"), 101, Some("high 101")).await;
            db.execute(removal).await;
            reads(removal, 101, None).await;
            subject.is_well().await;
            if let Some(restore) = restore {
                db.execute(restore).await;
                db.execute(TRACK).await;
            }
        }
        subject.is_well().await;
    }
}
