//! Failovers to a real standby, which lacks the last commits: the old primary is gone, or runs on, or hangs.

use std::time::{Duration, Instant};

use rowcache::{
    Config, Reason, Status,
    cli::temp_server::{Stop, TempServer},
};

use crate::{
    Subject, allow_gaps,
    fixture::{hasty, name, users_server},
    support::{
        Test, TestDb, connect, eventually,
        proxy::{Close, Proxy},
    },
};

/// A primary and a standby, with proxies that reach the primary at first.
struct Pair {
    old: TempServer,
    new: TempServer,
    db: TestDb,
    to_pool: Proxy,
    to_listener: Proxy,
}

impl Pair {
    async fn new(test: &Test) -> Self {
        allow_gaps(&test.logs);
        let (mut old, db) = users_server(test.version, &[]).await;
        let new = old.standby().await.expect("makes a standby");
        let (to_pool, to_listener) = (Proxy::start(old.port()).await, Proxy::start(old.port()).await);
        Self { old, new, db, to_pool, to_listener }
    }

    fn config(&self) -> Config {
        let mut config = hasty(&self.to_pool.url(&self.db.url));
        config.listener = hasty(&self.to_listener.url(&self.db.url)).listener;
        config.load_timeout = Duration::from_secs(1);
        config
    }

    /// The same database on the standby.
    fn promoted(&self) -> TestDb {
        TestDb { url: self.new.url(&self.db.name), port: self.new.port(), ..self.db.clone() }
    }

    /// From here on the standby gets nothing: what is committed now will be lost.
    async fn cut(&self) {
        let standby = connect(&self.new.admin_url()).await;
        let count = async |sql: &str| standby.query_one(sql, &[]).await.expect("counts").get::<_, i64>(0);
        eventually("the standby has what there is", async || {
            let client = connect(&self.new.url(&self.db.name)).await;
            client.query("select from public.users", &[]).await.is_ok_and(|rows| rows.len() == 10)
        })
        .await;
        standby.batch_execute("alter system set primary_conninfo = ''").await.expect("set");
        standby.batch_execute("select pg_reload_conf()").await.expect("reloaded");
        eventually("it follows nobody", async || count("select count(*) from pg_stat_wal_receiver").await == 0).await;
    }

    /// A commit that the node sees, and that the standby will never have.
    async fn lose_a_commit(&self, subject: &Subject) {
        let lost = subject.write(1).await;
        eventually("the node holds what will be lost", async || {
            subject.node.barrier().await.is_ok()
                && name(&subject.users, 1).await.as_ref() == Some(&lost)
                && subject.held(1)
        })
        .await;
    }

    fn retarget(&self, port: u16) {
        self.to_pool.retarget(port);
        self.to_listener.retarget(port);
    }
}

fn says(status: &Status, what: &str) -> bool {
    matches!(status, Status::Bypassed { why, .. } if why.to_string().contains(what))
}

pg_test! {
    async fn a_lagging_standby_is_promoted_and_the_old_primary_is_gone(test: Test) {
        let mut pair = Pair::new(&test).await;
        let mut subject = Subject::new(&pair.db, pair.config()).await;
        pair.cut().await;
        pair.lose_a_commit(&subject).await;
        let before = Instant::now();
        pair.old.stop(Stop::Immediate).await.expect("stops");
        assert!(matches!(subject.gap().await, Reason::ConnectionLost(_)));
        subject.is_bypassed(before).await;
        // The address moves before the promotion is through.
        pair.retarget(pair.new.port());
        eventually("the node says that it reached a standby", async || says(&subject.node.status(), "standby")).await;
        let error = subject.users.get(&1).await.expect_err("rows of a standby are not to be had");
        assert!(error.is_refused() || error.is_standby(), "{error:?}");
        pair.new.promote().await.expect("promotes");
        subject.db = pair.promoted();
        subject.is_back().await;
        assert_eq!(subject.in_postgres(2).await.as_deref(), Some("user 2"));
    }

    // Split brain, 1: the listener has moved, the pool has not.
    async fn the_old_primary_runs_on_and_the_listener_moves_first(test: Test) {
        let pair = Pair::new(&test).await;
        let mut subject = Subject::new(&pair.db, pair.config()).await;
        pair.cut().await;
        pair.lose_a_commit(&subject).await;
        pair.new.promote().await.expect("promotes");
        pair.promoted().execute("update public.users set name = 'of the new primary'").await;
        subject.fill_pool().await;
        let before = Instant::now();
        pair.to_listener.retarget(pair.new.port());
        pair.to_listener.close_all(Close::Rst).await;
        assert!(matches!(subject.gap().await, Reason::ConnectionLost(_)));
        eventually("the node says what is wrong", async || says(&subject.node.status(), "different servers")).await;
        subject.is_bypassed(before).await;
        // Whom to believe is not known: what the pool reaches is returned, and not kept.
        subject.reads_postgres().await;
        // The addresses agree again. Connections to the old primary are still open, and good.
        pair.to_pool.retarget(pair.new.port());
        subject.db = pair.promoted();
        subject.is_back().await;
        subject.reads_the_new_primary().await;
    }

    // Split brain, 2: the pool has moved, the listener has not; fences come back all the time (X6).
    async fn x6_the_old_primary_runs_on_and_the_pool_moves_first(test: Test) {
        test.logs.allow("another server than the LISTEN connection");
        let pair = Pair::new(&test).await;
        let mut subject = Subject::new(&pair.db, pair.config()).await;
        pair.cut().await;
        pair.lose_a_commit(&subject).await;
        pair.new.promote().await.expect("promotes");
        pair.promoted().execute("update public.users set name = 'of the new primary'").await;
        let before = Instant::now();
        pair.to_pool.retarget(pair.new.port());
        pair.to_pool.close_all(Close::Rst).await;
        // Until a load shows it, nobody can know: what is held is still what the old primary has.
        let error = subject.users.get(&7).await.expect_err("it may be older than what this node has seen");
        assert!(error.is_unavailable() && error.to_string().contains("another server"), "{error:?}");
        assert!(!subject.held(7), "it is not kept");
        let why = subject.gap().await;
        assert!(matches!(why, Reason::OtherServer), "{why}");
        eventually("the node says what is wrong", async || says(&subject.node.status(), "different servers")).await;
        subject.is_bypassed(before).await;
        subject.db = pair.promoted();
        subject.reads_postgres().await;
        pair.to_listener.retarget(pair.new.port());
        pair.to_listener.close_all(Close::Rst).await;
        subject.is_back().await;
        subject.reads_the_new_primary().await;
    }

    // `host=a,b target_session_attrs=read-write`: the usual way to follow a primary without a proxy.
    async fn a_list_of_hosts_leads_to_the_new_primary(test: Test) {
        let mut pair = Pair::new(&test).await;
        let mut subject = Subject::new(&pair.db, with_host_list(&pair)).await;
        pair.cut().await;
        pair.lose_a_commit(&subject).await;
        let before = Instant::now();
        pair.old.stop(Stop::Immediate).await.expect("stops");
        pair.to_pool.retarget(pair.new.port());
        assert!(matches!(subject.gap().await, Reason::ConnectionLost(_)));
        subject.is_bypassed(before).await;
        pair.new.promote().await.expect("promotes");
        subject.db = pair.promoted();
        subject.is_back().await;
    }

    // The first host accepts connections, and says nothing ever again.
    async fn a_list_of_hosts_of_which_the_first_hangs(test: Test) {
        let pair = Pair::new(&test).await;
        let mut subject = Subject::new(&pair.db, with_host_list(&pair)).await;
        pair.cut().await;
        pair.lose_a_commit(&subject).await;
        let frozen = pair.old.freeze().await.expect("freezes");
        pair.to_pool.retarget(pair.new.port());
        subject.gap().await;
        pair.new.promote().await.expect("promotes");
        subject.db = pair.promoted();
        subject.is_back().await;
        drop(frozen);
        subject.is_well().await;
    }
}

fn with_host_list(pair: &Pair) -> Config {
    let mut config = pair.config();
    let mut listener = tokio_postgres::Config::new();
    for server in [&pair.old, &pair.new] {
        listener.host("127.0.0.1").port(server.port());
    }
    listener.user("postgres").dbname(&pair.db.name);
    listener.target_session_attrs(tokio_postgres::config::TargetSessionAttrs::ReadWrite);
    config.listener = listener;
    config
}

impl Subject {
    async fn reads_the_new_primary(&self) {
        for id in 4..=9 {
            assert_eq!(name(&self.users, id).await.as_deref(), Some("of the new primary"), "row {id}");
        }
    }
}
