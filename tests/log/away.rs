//! A node that was away: what happened meanwhile is read afterwards, and what is still right is still held. Unless it was away for
//! too long, which it knows.

use rowcache::{Event, Table, cli::temp_server::Stop};

use super::*;
use crate::{
    fixture::{event, gap_and_recovery},
    support::eventually,
    support::proxy::{Close, Proxy},
};

pub const LOST: &str = "LISTEN connection was lost";
pub const AGAIN: &str = "cannot open the LISTEN connection";
pub const TRIMMED: &str = "the change log was trimmed while this node could not read it";

/// A node that reaches its database by way of a proxy.
pub async fn by_proxy(db: &TestDb, config: impl FnOnce(&str) -> Config) -> (Proxy, Node, Users) {
    let proxy = Proxy::start(db.port).await;
    let node = Node::start(config(&proxy.url(&db.url))).await.expect("starts");
    let users = users(&node).await;
    (proxy, node, users)
}

/// Uses up so many transaction ids.
async fn burn(db: &TestDb, ids: u32) {
    let burn = format!(
        "create temporary table if not exists burnt (id int);
         do $$ begin for i in 1..{ids} loop begin insert into burnt values (1); raise exception 'x'; exception when raise_exception \
         then null; end; end loop; end $$"
    );
    db.execute(&burn).await;
}

/// So many share a bin of the log.
const RANGE: u32 = 1 << 19;

pg_test! {
    async fn a_line_that_is_lost_costs_only_what_was_changed(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = log_db(&test).await;
        for config in [hasty, deaf] {
            let (mut proxy, node, users) = by_proxy(&db, config).await;
            for id in 1..=3 {
                name(&users, id).await;
            }
            let mut events = node.subscribe();
            // Nobody gets in until the lease has long run out.
            proxy.refuse().await;
            proxy.close_all(Close::Rst).await;
            event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
            assert!(!is_held(&users, 1));
            db.execute("update public.users set name = 'meanwhile ' || random() where id = 2").await;
            proxy.accept().await;
            event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
            assert_eq!(held_name(&users, 1).as_deref(), Some("user 1"));
            assert!(!is_held(&users, 2));
            assert_eq!(held_name(&users, 3).as_deref(), Some("user 3"));
            assert!(name(&users, 2).await.expect("there").starts_with("meanwhile"));
            db.execute("update public.users set name = name where id = 1").await;
            node.barrier().await.expect("coherent");
            assert!(!is_held(&users, 1));
        }
    }

    // A table that is told with NOTIFY has no messages of the time.
    async fn of_two_tables_one_is_resumed_and_one_is_not(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = log_db(&test).await;
        db.execute("create table public.others (id bigint primary key, name text not null);
            insert into public.others values (1, 'other 1'); select rowcache.track('public.others')").await;
        let (proxy, node, users) = by_proxy(&db, hasty).await;
        let others: Users = node.table("public.others").await.expect("opens");
        let mut events = node.subscribe();
        name(&users, 1).await;
        name(&others, 1).await;
        proxy.close_all(Close::Rst).await;
        gap_and_recovery(&mut events).await;
        assert!(is_held(&users, 1) && !is_held(&others, 1));
    }

    // Nor has a view that depends on such a table, whatever else it depends on.
    async fn a_view_is_resumed_if_the_log_tells_all_that_it_is_made_of(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = log_db(&test).await;
        db.execute("create table public.others (id bigint primary key); select rowcache.track('public.others')").await;
        let (mut proxy, node, users) = by_proxy(&db, hasty).await;
        let view = async |name: &str, others: bool| -> Table<i64, i64> {
            let view = node.view(name).on("public.users", ["id"]);
            let view = if others { view.on("public.others", ["id"]) } else { view };
            view.open(|ids, _| Box::pin(async move { Ok(ids.iter().map(|id| (*id, *id)).collect()) })).await.expect("opens")
        };
        let (alone, both) = (view("alone", false).await, view("both", true).await);
        for id in 1..=2 {
            name(&users, id).await;
            alone.get(&id).await.expect("loads");
            both.get(&id).await.expect("loads");
        }
        let mut events = node.subscribe();
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        db.execute("update public.users set name = 'meanwhile' where id = 2").await;
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert_eq!([1, 2].map(|id| is_held(&users, id)), [true, false]);
        assert_eq!([1, 2].map(|id| alone.peek(&id).is_known()), [true, false]);
        assert_eq!([1, 2].map(|id| both.peek(&id).is_known()), [false, false]);
    }

    async fn what_was_cleared_during_the_gap_stays_away(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = log_db(&test).await;
        let (mut proxy, node, users) = by_proxy(&db, deaf).await;
        name(&users, 1).await;
        let mut events = node.subscribe();
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        users.clear().await.expect_err("nobody can be told");
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert!(!is_held(&users, 1));
        node.barrier().await.expect("coherent");
    }

    async fn who_was_away_for_too_long_forgets_everything(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        test.logs.allow(TRIMMED);
        let (_server, db) = fixture::users_server(test.version, &[]).await;
        db.execute(VIA_LOG).await;
        let (mut proxy, node, users) = by_proxy(&db, deaf).await;
        let present = Node::start(deaf(&db.url)).await.expect("starts");
        let theirs = fixture::users(&present).await;
        let mut events = node.subscribe();
        for id in 1..=2 {
            name(&users, id).await;
            name(&theirs, id).await;
        }
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        db.execute("update public.users set name = 'long ago' where id = 1").await;
        present.barrier().await.expect("coherent");
        let kept = async || {
            let count = "select count(*) from rowcache.change_log where message like '%[1]%'";
            db.client().await.query_one(count, &[]).await.expect("counts").get::<_, i64>(0)
        };
        assert_eq!(kept().await, 1);
        // Until the bin with that message is the one that is written to next: the node that is there trims it.
        let mut burnt = 0;
        while kept().await == 1 {
            assert!(burnt < 4, "nobody trims the log");
            burn(&db, RANGE).await;
            burnt += 1;
            for _ in 0..3 {
                present.barrier().await.expect("coherent");
            }
        }
        assert!(burnt >= 2, "what was written lately is kept");
        assert!(is_held(&theirs, 2), "who was there has missed nothing");
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert!(!is_held(&users, 1) && !is_held(&users, 2));
        assert_eq!(name(&users, 1).await.as_deref(), Some("long ago"));
    }

    // So many messages that they cannot be read within the time that a poll has: it would be tried for ever.
    async fn who_cannot_read_it_all_in_time_forgets_everything(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        test.logs.allow("the change log had more to read than could be read in time");
        let (_server, db) = fixture::users_server(test.version, &[]).await;
        db.execute(VIA_LOG).await;
        let (mut proxy, node, users) = by_proxy(&db, deaf).await;
        let mut events = node.subscribe();
        name(&users, 1).await;
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        db.execute("select rowcache.log_change(format('{\"v\":1,\"t\":\"of.others\",\"k\":[%s]}', n)) from generate_series(1, 400000) n").await;
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        name(&users, 2).await;
        db.execute("update public.users set name = 'x' where id = 2").await;
        node.barrier().await.expect("coherent");
        assert!(!is_held(&users, 2));
    }

    // The server makes the answer up before it sends any of it: nothing comes in time, however often it is asked.
    async fn who_gets_no_answer_in_time_forgets_everything(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        test.logs.allow("the change log had more to read than could be read in time");
        test.logs.allow("cannot verify the triggers of the cached tables");
        let (_server, db) = fixture::users_server(test.version, &[]).await;
        db.execute(VIA_LOG).await;
        let (mut proxy, node, users) = by_proxy(&db, deaf).await;
        let mut events = node.subscribe();
        name(&users, 1).await;
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        db.execute("update public.users set name = 'meanwhile' where id = 1;
            alter function rowcache.poll(xid8, xid8[], xid8[]) rename to poll_at_once;
            create function rowcache.poll(since xid8, pending xid8[], skip xid8[])
              returns table (canary uuid, started bigint, standby boolean, snapshot text, lsn bigint, horizon bigint, xid bigint,
                message text)
              language plpgsql as $$ begin
                if since is not null then perform pg_sleep(2); end if;
                return query select * from rowcache.poll_at_once(since, pending, skip);
              end $$").await;
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert!(!is_held(&users, 1));
        db.execute("drop function rowcache.poll(xid8, xid8[], xid8[]);
            alter function rowcache.poll_at_once(xid8, xid8[], xid8[]) rename to poll").await;
        eventually("it is well again", async || node.barrier().await.is_ok()).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("meanwhile"));
    }

    // A transaction that is older than the log itself.
    async fn a_transaction_that_runs_for_ages_is_read_when_it_commits(test: Test) {
        let (_server, db) = fixture::users_server(test.version, &[]).await;
        db.execute(VIA_LOG).await;
        let (early, late) = (db.client().await, db.client().await);
        // One has written before, one writes only at the end.
        early.batch_execute("begin; update public.users set name = 'early' where id = 1").await.expect("writes");
        late.batch_execute("begin; select pg_current_xact_id()").await.expect("has a number");
        let nodes = both(&db).await;
        for (_, users) in &nodes {
            for id in 1..=3 {
                name(users, id).await;
            }
        }
        for _ in 0..4 {
            burn(&db, RANGE).await;
            // The log is trimmed. (Who finds it trimmed and a transaction ended in one poll cannot know whether it missed that one.)
            for (node, users) in nodes.iter().cycle().take(6) {
                node.barrier().await.expect("coherent");
                assert!((1..=3).all(|id| is_held(users, id)));
            }
        }
        late.batch_execute("update public.users set name = 'late' where id = 2; commit").await.expect("commits");
        early.batch_execute("commit").await.expect("commits");
        for (node, users) in &nodes {
            node.barrier().await.expect("coherent");
            assert!(!is_held(users, 1) && !is_held(users, 2));
            assert_eq!(name(users, 1).await.as_deref(), Some("early"));
            assert_eq!(name(users, 2).await.as_deref(), Some("late"));
        }
    }

    // X5: commits that were seen are lost, and their numbers come again.
    async fn x5_a_crash_that_loses_commits_clears_everything(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let settings = [("fsync", "on"), ("synchronous_commit", "off"), ("wal_writer_delay", "10s")];
        let (mut server, db) = fixture::users_server(test.version, &settings).await;
        db.execute(VIA_LOG).await;
        db.execute("checkpoint").await;
        let node = Node::start(deaf(&db.url)).await.expect("starts");
        let users = users(&node).await;
        db.execute("update public.users set name = 'perhaps lost' where id = 1").await;
        node.barrier().await.expect("coherent");
        name(&users, 1).await;
        name(&users, 2).await;
        let mut events = node.subscribe();
        server.stop(Stop::Immediate).await.expect("crashes");
        server.start().await.expect("recovers");
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert!(!is_held(&users, 1) && !is_held(&users, 2));
        let now = sqlx::query_scalar::<_, String>("select name from public.users where id = 1");
        let now = now.fetch_one(&db.pool().await).await.expect("reads");
        assert_eq!(name(&users, 1).await, Some(now));
    }

    async fn isolation_that_would_hide_commits_is_refused_with_the_cure(test: Test) {
        let db = log_db(&test).await;
        db.execute(&format!("alter database {} set default_transaction_isolation = 'repeatable read'", db.name)).await;
        let mut pooled = deaf(&db.url);
        pooled.pooler = true;
        let error = Node::start(pooled).await.expect_err("its polls would see the past");
        assert!(format!("{error:?}").contains("default_transaction_isolation"), "{error:?}");
        // Whoever has sessions of his own sets them up.
        for config in [hasty(&db.url), deaf(&db.url)] {
            Node::start(config).await.expect("starts").barrier().await.expect("coherent");
        }
    }
}
