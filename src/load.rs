//! Runs the loads of one table: greedy batches, without a timer.
//!
//! A runner waits for its turn among the node's loads, and then takes whatever has queued up meanwhile as one
//! statement. So a lone miss goes out at once as `= $1`, and under load the statements grow by themselves.

use std::{iter, sync::Arc};

use crate::{
    digest::Tenths,
    error::Error,
    fill::Join,
    key::Key,
    shared::{Shared, Whose},
    source::{Received, Source},
    store::{Asked, Origin, Runner, Store},
};

/// Loads until nothing waits. Runs in a task of its own, so that a caller who is cancelled harms nobody.
pub(crate) async fn run<K: Key, V: Send + Sync + 'static>(
    mut runner: Runner<K, V>,
    source: Arc<dyn Source<K, V>>,
    shared: Arc<Shared>,
) {
    let is_local = source.is_local();
    loop {
        // Never closed, so never an error; the permit is held until the rows are published.
        // Who would be refused does not wait for one; should he not be after all, that is one load in a second.
        let _turn =
            if is_local || runner.is_refused(shared.host.now()) { None } else { shared.loads.acquire().await.ok() };
        if runner.refuse(shared.host.now()) {
            if runner.has_retired() {
                return;
            }
            continue;
        }
        let began = shared.load_begins();
        let started = shared.host.now();
        let at = Tenths::at(started);
        let Some(keys) = runner.take() else { return };
        let loaded = source.load(keys).await;
        runner.asked(loaded.as_ref().map(|_| ()), started, shared.host.now());
        match loaded {
            Ok(loaded) => {
                let stamp = loaded.stamp;
                let whose = if is_local { Whose::Ours } else { shared.whose(stamp.incarnation, began) };
                if whose == Whose::Foreign {
                    runner.fail(&Shared::foreign());
                } else {
                    let ours = whose == Whose::Ours && !stamp.dirty;
                    let received = loaded.received.into_iter().chain(iter::repeat(Received::default()));
                    runner.finish_received(
                        loaded.rows.into_iter().zip(received),
                        Origin { stamp, ours, at, ended: shared.host.now() },
                    );
                }
            }
            Err(error) => runner.fail(&error),
        }
        if let Some(sweep) = runner.sweep() {
            shared.host.spawn_blocking(Box::new(sweep));
        }
    }
}

/// Starts what a miss of each of these keys has to start.
pub(crate) fn start<K: Key, V: Send + Sync + 'static>(
    store: &Arc<Store<K, V>>,
    source: &Arc<dyn Source<K, V>>,
    shared: &Arc<Shared>,
    wanted: Vec<K>,
) {
    for runner in store.enqueue(wanted) {
        shared.host.spawn(Box::pin(run(runner, Arc::clone(source), Arc::clone(shared))));
    }
}

/// What became of keys that nobody had asked for.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// They were held already.
    pub(crate) held: usize,
    pub(crate) loaded: usize,
    /// How many, and the first one's error.
    pub(crate) failed: Option<(usize, Error)>,
}

/// Loads these keys, as far as they are not held: for callers to come.
pub(crate) async fn ahead<K: Key, V: Send + Sync + 'static>(
    store: &Arc<Store<K, V>>,
    source: &Arc<dyn Source<K, V>>,
    shared: &Arc<Shared>,
    keys: &[K],
) -> Ahead {
    let mut wanted = Vec::with_capacity(keys.len());
    let asked: Vec<_> = keys.iter().map(|key| store.ask_again(key, Join::Running, &mut wanted)).collect();
    start(store, source, shared, wanted);
    let mut ahead = Ahead::default();
    // From the last one, which is answered last: this task is woken once then, and not by each answer.
    for asked in asked.into_iter().rev() {
        let Asked::Wait(answer) = asked else {
            ahead.held += 1;
            continue;
        };
        match answer.await {
            Ok(Ok(_)) => ahead.loaded += 1,
            Ok(Err(error)) => ahead.failed = Some((ahead.failed.map_or(0, |(count, _)| count) + 1, error)),
            // The node is going away.
            Err(_) => {}
        }
    }
    ahead
}
