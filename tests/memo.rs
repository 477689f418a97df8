//! Functions whose values are kept, whatever becomes of the database.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use rowcache::{Cause, Event, Memo, Node, OnChange, TableEvent, TableOptions};
use tokio::sync::Semaphore;

use crate::{
    fixture::{KILL_LISTENERS, event, hasty, migrated, node},
    support::eventually,
};

const SECOND: Duration = Duration::from_secs(1);
/// A function that counts its calls, waits for a turn if there is a door, and fails if it is told to.
#[derive(Clone, Default)]
struct Function {
    calls: Arc<AtomicUsize>,
    fails: Arc<AtomicBool>,
    door: Option<Arc<Semaphore>>,
}

impl Function {
    fn with_door() -> Self {
        Self { door: Some(Arc::new(Semaphore::new(0))), ..Self::default() }
    }

    fn calls(&self) -> usize {
        self.calls.load(SeqCst)
    }

    fn open(&self) {
        self.door.as_ref().expect("it has one").add_permits(1);
    }

    fn memo(&self, node: &Node, options: TableOptions) -> Memo<i64, usize> {
        let this = self.clone();
        let memo = node.memo("calls", options, move |_: i64| {
            let this = this.clone();
            async move {
                let call = this.calls.fetch_add(1, SeqCst) + 1;
                if let Some(door) = &this.door {
                    door.acquire().await.expect("it stays").forget();
                }
                if this.fails.load(SeqCst) { Err(io::Error::other("the bank is closed")) } else { Ok(call) }
            }
        });
        memo.expect("fine")
    }
}

fn options() -> TableOptions {
    TableOptions::default()
}

pg_test! {
    async fn a_function_is_called_once_for_all_who_ask(test: Test) {
        let node = node(&migrated(test.version).await).await;
        let function = Function::with_door();
        let memo = function.memo(&node, options());
        let ask = || tokio::spawn({
            let memo = memo.clone();
            async move { *memo.get(&1).await.expect("it returns") }
        });
        let all = [ask(), ask(), ask()];
        eventually("all wait", async || memo.stats().gets == 3).await;
        function.open();
        for one in all {
            assert_eq!(one.await.expect("no panic"), 1);
        }
        assert_eq!(memo.try_get(&1).as_deref(), Some(&1));
        function.open();
        let two = memo.get_many(&[1, 2]).await.expect("they return");
        assert_eq!((*two[0], *two[1], function.calls()), (1, 2, 2));
        assert_eq!(*function.memo(&node, options()).get(&1).await.expect("held"), 1, "a name stands for one cache");
        assert!(memo.explain(&1).to_string().starts_with("memo:calls 1 is held: put in"), "{}", memo.explain(&1));
    }

    async fn a_value_that_was_declared_wrong_while_it_was_made_is_not_kept(test: Test) {
        let node = node(&migrated(test.version).await).await;
        let function = Function::with_door();
        let memo = function.memo(&node, options());
        let mut events = memo.subscribe();
        let before = tokio::spawn({
            let memo = memo.clone();
            async move { *memo.get(&1).await.expect("it returns") }
        });
        eventually("it is called", async || function.calls() == 1).await;
        memo.invalidate(&1);
        let after = tokio::spawn({
            let memo = memo.clone();
            async move { *memo.get(&1).await.expect("it returns") }
        });
        eventually("both wait", async || memo.stats().gets == 2).await;
        function.open();
        function.open();
        assert_eq!((before.await.expect("no panic"), after.await.expect("no panic")), (1, 2));
        assert!(matches!(events.recv().await, Some(TableEvent::Voided { key: 1 })));
        memo.invalidate(&1);
        assert!(memo.try_get(&1).is_none());
        assert!(matches!(events.recv().await, Some(TableEvent::Loaded { key: 1, .. })));
        assert!(matches!(events.recv().await, Some(TableEvent::Invalidated { key: 1, by: Cause::Node })));
    }

    async fn errors_and_panics_go_to_who_waits_and_are_not_kept(test: Test) {
        let node = node(&migrated(test.version).await).await;
        let function = Function::default();
        function.fails.store(true, SeqCst);
        let memo = function.memo(&node, options());
        for _ in 0..7 {
            let error = memo.get(&7).await.expect_err("it fails");
            assert!(error.is_loader() && format!("{error:?}").contains("the bank is closed"), "{error:?}");
            assert!(error.to_string().contains("memo:calls 7"), "{error}");
        }
        assert_eq!(function.calls(), 7, "an answer is an answer");
        let panics = node.memo("panics", options(), |_: i64| async { panic!("of the user") as io::Result<()> });
        let error = panics.expect("fine").get(&1).await.expect_err("it panics");
        assert!(error.is_loader() && error.to_string().contains("panicked: of the user"), "{error}");
        let slow = options().load_timeout(Duration::from_millis(20));
        let slow = node.memo("slow", slow, |_: i64| std::future::pending::<io::Result<()>>()).expect("fine");
        for _ in 0..5 {
            let error = slow.get(&1).await.expect_err("it never ends");
            assert!(error.is_timeout() && error.to_string().contains("memo:slow 1"), "{error}");
        }
        let error = slow.get(&1).await.expect_err("it is not tried");
        assert!(error.is_unavailable() && error.to_string().contains("`breaker`"), "{error}");
        assert!(node.memo("wrong", options().audit(1), |_: i64| async { io::Result::Ok(1) }).expect_err("no rows").is_config());
    }

    async fn values_expire_are_made_ahead_and_serve_when_it_fails(test: Test) {
        let node = node(&migrated(test.version).await).await;
        let function = Function::default();
        let hour = Duration::from_hours(1);
        let memo = function.memo(&node, options().ttl(SECOND).jitter(0.0).stale_if_error(hour).breaker(None));
        assert_eq!(*memo.get(&1).await.expect("it returns"), 1);
        function.fails.store(true, SeqCst);
        eventually("it has expired", async || memo.try_get(&1).is_none()).await;
        assert_eq!(*memo.get(&1).await.expect("what there was"), 1);
        assert_eq!((memo.stats().rescued, function.calls()), (1, 2));
        function.fails.store(false, SeqCst);
        assert_eq!(*memo.get(&1).await.expect("it returns"), 3);

        let fresh = Function::default();
        let this = fresh.clone();
        let memo = node
            .memo("refreshed", options().on_change(OnChange::Refresh), move |_: i64| {
                let this = this.clone();
                async move { io::Result::Ok(this.calls.fetch_add(1, SeqCst) + 1) }
            })
            .expect("fine");
        memo.get(&1).await.expect("it returns");
        memo.get(&1).await.expect("held: it is used");
        memo.invalidate(&1);
        eventually("it is made again", async || memo.try_get(&1).as_deref() == Some(&2)).await;
    }

    async fn a_memo_is_served_whatever_becomes_of_the_line(test: Test) {
        test.logs.allow("LISTEN connection was lost");
        let db = migrated(test.version).await;
        let node = node(&db).await;
        let function = Function::default();
        let memo = function.memo(&node, options());
        memo.get(&1).await.expect("it returns");
        let mut events = node.subscribe();
        db.execute("select pg_notify('rowcache', '{\"v\":1,\"all\":true}')").await;
        db.execute(KILL_LISTENERS).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        for _ in 0..2 {
            assert_eq!((*memo.get(&1).await.expect("held"), *memo.get(&2).await.expect("it returns")), (1, 2));
            node.until_coherent().await.expect("it comes back");
        }
        assert_eq!(function.calls(), 2, "nothing was forgotten");
        memo.clear();
        assert!(memo.try_get(&1).is_none());
        assert_eq!(*memo.get(&1).await.expect("it returns"), 3);

        node.set_caching(false);
        assert_eq!((*memo.get(&1).await.expect("returns"), *memo.get(&1).await.expect("returns")), (4, 5));
        node.set_caching(true);
        assert_eq!((*memo.get(&1).await.expect("returns"), *memo.get(&1).await.expect("held")), (6, 6));
        node.shutdown().await;
        assert!(memo.try_get(&1).is_none(), "nothing is served any more");
    }

    async fn a_memo_needs_no_database(test: Test) {
        test.logs.allow("cannot open the LISTEN connection");
        let db = migrated(test.version).await;
        let node = Node::launch(hasty(&db.url.replace(&format!(":{}/", db.port), ":1/"))).expect("needs none");
        let function = Function::default();
        let memo = function.memo(&node, options());
        assert_eq!((*memo.get(&1).await.expect("it returns"), *memo.get(&1).await.expect("held")), (1, 1));
    }

    async fn so_many_calls_at_a_time_and_no_more(test: Test) {
        let node = node(&migrated(test.version).await).await;
        let function = Function::with_door();
        let memo = function.memo(&node, options());
        let asked: Vec<i64> = (0..100).collect();
        let all = tokio::spawn({
            let memo = memo.clone();
            async move { memo.get_many(&asked).await.expect("they return").len() }
        });
        eventually("as many as may be are called", async || function.calls() == 64).await;
        for called in 65..=100 {
            function.open();
            eventually("one more is called", async || function.calls() == called).await;
        }
        (0..64).for_each(|_| function.open());
        assert_eq!(all.await.expect("no panic"), 100);
    }
}
